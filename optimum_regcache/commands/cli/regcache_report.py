"""`optimum-cli regcache report`."""
# pyright: reportMissingImports=false

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import CommandInfo
from optimum.commands.register.regcache_base import Command


class ReportCommand(Command):
    COMMAND = CommandInfo(name="report", help="One HTML page, and Markdown beside it, over one or several results.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "results", nargs="+", metavar="RESULT",
            help="folder of quantize or analyze, folder of such folders, JSON file of evaluate or of a CPU benchmark",
        )  # fmt: skip
        parser.add_argument("--output", required=True, help="HTML file; the Markdown goes beside it")
        parser.add_argument(
            "--dataset", help="images to measure attention to the registers on (default: the embedded encoder's scenes)"
        )
        parser.add_argument("--num-images", type=int, default=32, help="images for that (default 32)")
        parser.add_argument("--overwrite", action="store_true", help="replace a page over other results in --output")
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(device="cpu")

    def job(self) -> None:
        from optimum_regcache.commands.page.write import report_job

        a = self.args
        options = {"dataset": a.dataset, "num_images": a.num_images, "overwrite": a.overwrite}
        print(report_job(a.results, a.output, **options))
