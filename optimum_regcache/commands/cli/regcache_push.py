"""`optimum-cli regcache push`."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import CommandInfo
from optimum.commands.register.regcache_base import Command  # pyright: ignore[reportMissingImports] (its installed place)


class PushCommand(Command):
    COMMAND = CommandInfo(name="push", help="Publish a quantized model with its card on the Hugging Face Hub.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("folder", help="what `quantize` wrote")
        parser.add_argument("repo_id", metavar="user/name", help="repository; made if it does not exist")
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--revision", metavar="BRANCH", help="branch; made from main if it does not exist")
        where.add_argument("--pr", action="store_true", help="open a pull request")
        seen = parser.add_mutually_exclusive_group()
        seen.add_argument(
            "--private",
            action="store_true",
            default=None,
            help="make the repository private (default: as its owner set it)",
        )
        seen.add_argument("--public", action="store_false", dest="private", help="make it public")
        parser.add_argument("--commit-message", metavar="TEXT", help="first line of the commit")
        parser.add_argument("--token", help="Hub token with the right to write (default: the one of `hf auth login`)")
        parser.add_argument(
            "--exist-ok", action="store_true", help="replace the model that the repository holds; its history is kept"
        )
        parser.add_argument(
            "--unfinished", action="store_true", help="publish the best so far of a search that was interrupted"
        )
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(device="cpu")

    def job(self) -> None:
        from optimum_regcache.commands.push import push_job

        a = self.args
        options = {name: getattr(a, name) for name in ("revision", "private", "commit_message", "token", "exist_ok")}
        print(push_job(a.folder, a.repo_id, {**options, "create_pr": a.pr, "unfinished": a.unfinished}))
