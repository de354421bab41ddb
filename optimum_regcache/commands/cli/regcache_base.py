"""What the subcommands of `optimum-cli regcache` share: options, the recipe they resolve to, and where errors end."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand

PRESETS = ("w8a8", "w6a6", "w4a4", "w8a8-dynamic")
TASKS = (
    "accuracy", "cosine", "patch_cosine", "projector", "retrieval", "knn", "linear_probe", "segmentation", "depth", "detection",
)  # fmt: skip
_OBJECTIVES = ("cosine", "patch_cosine", "similarity_kl", "logit_kl", "accuracy", "knn")


def add_hub(parser: ArgumentParser, writes: bool = True) -> None:
    """How models are opened, and what every command understands."""
    parser.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    parser.add_argument("--token", help="Hub token (default: the one of `hf auth login`)")
    parser.add_argument("--cache-dir", help="folder of downloads (default: that of huggingface_hub)")
    parser.add_argument(
        "--local-files-only", "--offline", action="store_true", help="ask no Hub: only what is on this machine"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the code of the model's repository, with your rights; off unless given, and said in the card",
    )  # fmt: skip
    parser.add_argument("--code-revision", help="commit of that code, where it is not in --revision")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if writes:
        parser.add_argument("--overwrite", action="store_true", help="replace the result of another job in --output")


def add_pictures(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--show-photos", action="store_true",
        help="draw outliers.png on the images of --dataset, which then lie in the folder (embedded scenes are always shown)",
    )  # fmt: skip


def hub_options(args: Namespace) -> dict[str, Any]:
    """Those of `load_model` and `load_processor` that were given."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "code_revision")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def add_common(
    parser: ArgumentParser, several: bool = False, recipe: str = "--recipe", templates: bool = False
) -> None:
    add_hub(parser)
    parser.add_argument("--model", help="Hub id, directory, or reference encoder (default: clip-scenes-induced)")
    parser.add_argument(
        "--dataset", help="Hub id, image folder, table of images (default: the embedded encoder's scenes)"
    )
    parser.add_argument(
        recipe,
        help="YAML file, name of a packaged recipe, preset, or Hub repository with a recipe.yaml (user/name or "
        "user/name@revision); the options below override it",
    )
    more = "; several make one model each, in OUTPUT/PRESET" if several else ""
    options: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {}
    parser.add_argument("--preset", choices=PRESETS, help=f"bit widths (default w8a8){more}", **options)
    parser.add_argument("--num-samples", type=int, help="reference images for search and calibration")
    parser.add_argument("--num-report", type=int, help="unseen images for the report")
    parser.add_argument("--batch-size", type=int, help="images per forward pass")
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        default=None,
        help="leave out images that are missing or cannot be decoded",
    )
    parser.add_argument(
        "--streaming", action="store_true", default=None, help="read only the images that are used, instead of all"
    )
    parser.add_argument(
        "--objective",
        choices=_OBJECTIVES,
        help="what the search maximises (default cosine); accuracy and knn read labels",
    )
    parser.add_argument(
        "--template", action="append" if templates else "store",
        help=f"zero-shot prompt template, for example 'a photo of a {{}}.'{'; several are averaged' if templates else ''}",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="seed of subsets and search (default 0)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
        help="override any recipe field, for example --set search.max_delete=4",
    )  # fmt: skip


def resolve_recipe(args: Namespace, preset: str | None) -> Any:
    """Recipe of the file or preset with the command line on top; ``preset`` is one of ``args.preset``."""
    from dataclasses import replace

    from optimum_regcache.commands.sources import ask_hub, with_known_images
    from optimum_regcache.config import DeletionConfig, RegCacheConfig, RegistersConfig
    from optimum_regcache.config.recipe import Recipe
    from optimum_regcache.config.recipe_files import on_hub

    if args.recipe and on_hub(args.recipe):
        ask_hub(args.recipe, {}, "the recipe of ")
    recipe = Recipe.load(args.recipe, args.token) if args.recipe else Recipe()
    if preset:
        bits = RegCacheConfig.from_preset(preset)
        recipe = recipe.with_quantization(
            recipe.quantization.replace(weights=bits.weights, activations=bits.activations)
        )
    flags = {
        "data.num_samples": args.num_samples,
        "data.num_report": args.num_report,
        "data.batch_size": args.batch_size,
        "data.skip_broken": args.skip_broken,
        "data.streaming": args.streaming,
        "search.objective": args.objective,
        "search.seed": args.seed,
    }
    assignments = [f"{field}={value}" for field, value in flags.items() if value is not None]
    if getattr(args, "no_registers", False):
        recipe = recipe.with_quantization(
            recipe.quantization.replace(registers=RegistersConfig(mode="none"), deletion=DeletionConfig())
        )
    if getattr(args, "method", None):
        from optimum_regcache.methods import without_methods

        names = tuple(dict.fromkeys(args.method))  # what the recipe's own methods set goes with them
        recipe = recipe.with_quantization(without_methods(recipe.quantization).replace(methods=names))
    if getattr(args, "quantize_attention", False):
        attention = {"quantize": True, "bits": recipe.quantization.activations.bits}
        recipe = recipe.with_quantization(recipe.quantization.replace(attention=attention))
    recipe = recipe.override([*assignments, *args.assignments])
    if getattr(args, "effort", None):  # what was asked for by name stays, defaults too
        recipe = recipe.with_effort(args.effort).override([*assignments, *args.assignments])
    if hasattr(args, "no_registers") and recipe.quantization.registers.mode != "search":
        unread = [a for a in (*assignments, *args.assignments) if a.startswith("search.") and "search.seed=" not in a]
        unread = [a for a in unread if not a.startswith("search.kv_mode=")]  # the old name of a field of the registers
        if unread:
            raise ValueError(
                f"{', '.join(unread)} has no effect: nothing is searched with registers.mode="
                f"{recipe.quantization.registers.mode!r}. Use registers.mode='search', or leave it out."
            )
    revision = args.revision or (recipe.revision if args.model is None else None)
    named = replace(recipe, model=args.model or recipe.model, dataset=args.dataset or recipe.dataset, revision=revision)
    return with_known_images(named)


class Command(BaseOptimumCLICommand):
    """The one place where exceptions end: a line on stderr, and an exit code (docs/reference/commands.md)."""

    args: Any

    def job(self) -> None:
        """Do it and print the summary."""
        raise NotImplementedError

    def open(self, recipe: Any) -> Any:
        """Model with its images."""
        from optimum_regcache.commands.sources import open_source

        args = self.args
        return open_source(None, None, recipe, template=args.template, device=args.device, hub=hub_options(args))

    def output(self, path: Any, kind: str, recipe: Any, *more: Any) -> Any:
        """The folder of the result; refuses before any work."""
        from optimum_regcache.config.output import Output
        from optimum_regcache.data import reference

        described = {name: value for name, value in recipe.to_dict().items() if name != "expect"}
        job = {"kind": kind, **described, "more": [self.args.template, *more]}
        models = [] if recipe.model in reference.names() else [recipe.model]
        return Output(path, job, overwrite=self.args.overwrite, models=models, dataset=recipe.dataset)

    def run(self) -> None:
        args = self.args
        try:
            empty = [name for name, value in vars(args).items() if _is_empty(value)]
            if empty:
                raise ValueError(
                    f"--{empty[0].replace('_', '-')} is empty or holds a NUL. Give a value, or leave the option out."
                )
            if getattr(args, "local_files_only", False):  # read when huggingface_hub and datasets are imported, below
                os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
            if not sys.stderr.isatty():  # their bars would fill a log
                for library in ("HF_HUB", "HF_DATASETS"):
                    os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
            from optimum_regcache.commands.launch import require_device, shared

            require_device(args.device)
            shared(self.COMMAND.name, args.device, self.job)
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            from optimum_regcache.commands.launch import fail

            fail(error, args.debug)


def _is_empty(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, str) and (not v.strip() or "\0" in v) for v in values)
