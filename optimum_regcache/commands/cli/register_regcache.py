"""`optimum-cli regcache`. Installed into optimum's command namespace; heavy imports happen inside ``run``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

_PRESETS = ("w8a8", "w6a6", "w4a4", "w8a8-dynamic")
_OBJECTIVES = ("cosine", "patch_cosine", "similarity_kl", "logit_kl", "accuracy", "knn")


def _add_hub(parser: ArgumentParser) -> None:
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
    parser.add_argument("--overwrite", action="store_true", help="replace the result of another job in --output")


def _add_pictures(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--show-photos", action="store_true",
        help="draw outliers.png on the images of --dataset, which then lie in the folder (embedded scenes are always shown)",
    )  # fmt: skip


def hub_options(args: Namespace) -> dict[str, Any]:
    """Those of `load_model` and `load_processor` that were given."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "code_revision")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def _add_common(parser: ArgumentParser, several: bool = False) -> None:
    _add_hub(parser)
    parser.add_argument("--model", help="Hub id, directory, or reference encoder (default: clip-scenes-induced)")
    parser.add_argument(
        "--dataset", help="Hub id, image folder, table of images (default: the embedded encoder's scenes)"
    )
    parser.add_argument("--recipe", help="YAML recipe or preset name; the options below override it")
    more = "; several make one model each, in OUTPUT/PRESET" if several else ""
    options: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {}
    parser.add_argument("--preset", choices=_PRESETS, help=f"bit widths (default w8a8){more}", **options)
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
        "--objective",
        choices=_OBJECTIVES,
        help="what the search maximises (default cosine); accuracy and knn read labels",
    )
    parser.add_argument("--template", help="zero-shot prompt template, for example 'a photo of a {}.'")
    parser.add_argument("--seed", type=int, help="seed of subsets and search (default 0)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
        help="override any recipe field, for example --set search.max_delete=4",
    )  # fmt: skip


def resolve_recipe(args: Namespace, preset: str | None) -> Any:
    """Recipe of the file or preset with the command line on top; ``preset`` is one of ``args.preset``."""
    from dataclasses import replace

    from optimum_regcache.config import DeletionConfig, RegCacheConfig, RegistersConfig
    from optimum_regcache.config.recipe import Recipe

    recipe = Recipe.load(args.recipe) if args.recipe else Recipe()
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
    return replace(recipe, model=args.model or recipe.model, dataset=args.dataset or recipe.dataset, revision=revision)


class _Command(BaseOptimumCLICommand):
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

        job = {"kind": kind, **recipe.to_dict(), "more": [self.args.template, *more]}
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


class QuantizeCommand(_Command):
    COMMAND = CommandInfo(name="quantize", help="Quantize a vision encoder with registers and token deletion.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_common(parser, several=True)
        parser.add_argument("--output", required=True, help="directory of the quantized model")
        _add_pictures(parser)
        parser.add_argument(
            "--report-seeds", type=int, default=1, metavar="N",
            help="repeat the main rows on N sets of embedded scenes and report the spread (default 1)",
        )  # fmt: skip
        parser.add_argument(
            "--no-registers", action="store_true", help="without registers and deletion, for comparison"
        )
        parser.add_argument(
            "--method", nargs="+", action="extend", metavar="NAME",
            help="quantization methods, several work together: rtn (default), percentile, mse, output_mse, dynamic, oracle, "
            "ptq4vit, repq_vit, noisyquant, smoothquant, gptq, rotation, bias_correction, mixed_precision, "
            "test_time_registers; "
            "parameters through --set quantization.methods=[{name: gptq, damping: 0.1}]",
        )  # fmt: skip
        parser.add_argument(
            "--quantize-attention", action="store_true",
            help="quantize both attention products too (simulated): the protocol of the ViT literature",
        )  # fmt: skip
        effort = parser.add_mutually_exclusive_group()
        for name, text in (
            ("quick", "fewer images and a coarser search"),
            ("thorough", "more images and a finer search"),
        ):
            effort.add_argument(f"--{name}", action="store_const", const=name, dest="effort", help=text)
        advice = parser.add_mutually_exclusive_group()
        advice.add_argument(
            "--no-recommend", action="store_false", dest="recommend",
            help="do not try other quantizers where the result of the search leaves something to gain",
        )  # fmt: skip
        advice.add_argument(
            "--best", action="store_true", help="try them, and save the best one instead if it is clearly better"
        )

    def job(self) -> None:
        from dataclasses import replace
        from functools import partial
        from pathlib import Path

        from optimum_regcache.commands.failures import require_finished
        from optimum_regcache.commands.quantize import quantize_job
        from optimum_regcache.commands.recommend import ReportOptions, suggested_command
        from optimum_regcache.search.processes import on_main

        args, path = self.args, Path(self.args.output)
        presets = list(dict.fromkeys(args.preset or [""]))
        options = ReportOptions(args.show_photos, args.report_seeds, args.recommend, args.best)
        more = [args.show_photos, args.report_seeds, *(["best"] if args.best else [])]
        jobs = []
        for preset in presets:  # all are checked before the first is begun
            recipe = resolve_recipe(args, preset)
            folder = path / preset if len(presets) > 1 else path
            jobs.append((preset, recipe, on_main(partial(self.output, folder, "quantize", recipe, *more))))
        for preset, recipe, output in jobs:
            if output is None:  # not the main process
                quantize_job(self.open(recipe), recipe, None)
                continue
            asked = Namespace(**{**vars(args), "preset": [preset] if preset else None, "output": str(output.path)})
            command = partial(suggested_command, asked, self.parser.get_default, partial(resolve_recipe, preset=preset))
            wanted = replace(options, command=command)
            results, table = quantize_job(self.open(recipe), recipe, output, options=wanted, hub=hub_options(args))
            print(f"{table}\nsaved to {output.path} in {results['seconds']:.0f} s", flush=True)
            require_finished(results)


class AnalyzeCommand(_Command):
    COMMAND = CommandInfo(
        name="analyze",
        help="Sensitivity and token norms per block; or whether a quantized model fits some images.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_common(parser)
        parser.add_argument("--output", required=True, help="directory of the analysis")
        _add_pictures(parser)
        parser.add_argument(
            "--check", metavar="MODEL",
            help="quantized model (directory or Hub id): do its registers, deletion and activation scales fit the images of "
            "--dataset? Exit code 5 if they do not",
        )  # fmt: skip
        parser.add_argument("--float-model", help="with --check: the float original, to look for outlier tokens in")

    def job(self) -> None:
        from optimum_regcache.commands.analyze import analyze_job

        args = self.args
        if args.check is not None:
            return self.check()
        if args.float_model is not None:
            raise ValueError("--float-model has no effect without --check. Leave it out, or give the quantized model.")
        recipe = resolve_recipe(args, args.preset)
        output = self.output(args.output, "analyze", recipe, args.show_photos)
        print(analyze_job(self.open(recipe), recipe, output, show_photos=args.show_photos)[1])
        return None

    def check(self) -> None:
        """``--check``."""
        from dataclasses import replace

        from optimum_regcache.commands.check import check_job
        from optimum_regcache.commands.evaluate import Subject
        from optimum_regcache.commands.failures import DOES_NOT_FIT
        from optimum_regcache.search.check import UNFIT

        args, hub = self.args, hub_options(self.args)
        names = ("model", "preset", "objective", "template", "num_samples", "show_photos")
        unread = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if unread:
            raise ValueError(f"{', '.join(unread)} has no effect: --check opens a finished model. Leave it out.")
        subject = Subject(args.check, args.float_model, args.dataset, None, args.device, hub)
        args.dataset = args.revision = None
        recipe = resolve_recipe(args, None)
        job = replace(recipe, model=args.check, dataset=subject.dataset, revision=hub.get("revision"))
        output = self.output(args.output, "check", job, args.float_model)
        results, text = check_job(subject, recipe, output)
        print(text, flush=True)
        if results["verdict"] == UNFIT:
            sys.exit(DOES_NOT_FIT)


class EvaluateCommand(_Command):
    COMMAND = CommandInfo(name="evaluate", help="Evaluate a saved or exported model beside its float original.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_common(parser)
        parser.add_argument("--float-model", help="the float original (default: the one recorded in recipe.yaml)")
        parser.add_argument("--output", required=True, help="JSON file of the results")
        parser.add_argument(
            "--metric", action="append", default=[],
            help="further metric: a name that the evaluate library ships (its script is downloaded from the Hub and run), or "
            "the path of a script, which is run with your rights",
        )  # fmt: skip
        parser.add_argument(
            "--fused", action="store_true", help="evaluate also with fused int8 blocks, with float32 and int8 attention"
        )

    def job(self) -> None:
        from optimum_regcache.commands.evaluate import Subject, evaluate_job
        from optimum_regcache.data.reference import DEFAULT

        unread = [f"--{name}" for name in ("preset", "objective") if getattr(self.args, name) is not None]
        if unread:
            raise ValueError(f"{', '.join(unread)} has no effect: evaluate opens a finished model. Leave it out.")
        model, dataset, hub = self.args.model or DEFAULT, self.args.dataset, hub_options(self.args)
        self.args.model = self.args.dataset = self.args.revision = None
        recipe = resolve_recipe(self.args, self.args.preset)
        args = self.args
        subject = Subject(model, args.float_model, dataset, args.template, args.device, hub)
        print(
            evaluate_job(subject, recipe, args.output, metrics=args.metric, fused=args.fused, overwrite=args.overwrite)[
                1
            ]
        )


class ExportCommand(_Command):
    COMMAND = CommandInfo(name="export", help="Write a saved model for ONNX Runtime or OpenVINO and check it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_hub(parser)
        parser.add_argument("--model", required=True, help="directory, Hub id, or reference encoder")
        parser.add_argument("--format", required=True, choices=("onnx", "openvino"))
        parser.add_argument("--output", required=True, help="directory of the exported encoder")
        parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
        parser.add_argument("--dataset", help="images of the check (default: the recipe's embedded ones, else random)")
        parser.add_argument("--num-images", type=int, default=8, help="images of the check (default 8)")
        parser.set_defaults(device="cpu")

    def job(self) -> None:
        from optimum_regcache.commands.export import export_job

        a = self.args
        options: dict[str, Any] = {"overwrite": a.overwrite, "hub": hub_options(a)}
        print(export_job(a.model, a.format, a.output, a.image_size, a.dataset, a.num_images, **options)[1])


class BuildCommand(_Command):
    COMMAND = CommandInfo(name="build", help="Build the C++ operators for int8 on CPUs ahead of time.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--instructions", default="auto", choices=("auto", "avx512_vnni", "avx2", "all"),
            help="auto builds what this CPU runs and loads it; the others need only a compiler (default auto)",
        )  # fmt: skip
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(device="cpu")

    def job(self) -> None:
        from optimum_regcache.kernels import native

        reports = native.build(self.args.instructions)
        for report in reports:
            print(report, file=sys.stdout if report.reason is None else sys.stderr)
        if any(report.reason is not None for report in reports):
            sys.exit(1)


class RegCacheCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="regcache", help="RegCache: quantize vision encoders with prefixed registers.")
    SUBCOMMANDS = (
        CommandInfo("quantize", help=QuantizeCommand.COMMAND.help, subcommand_class=QuantizeCommand),
        CommandInfo("analyze", help=AnalyzeCommand.COMMAND.help, subcommand_class=AnalyzeCommand),
        CommandInfo("evaluate", help=EvaluateCommand.COMMAND.help, subcommand_class=EvaluateCommand),
        CommandInfo("export", help=ExportCommand.COMMAND.help, subcommand_class=ExportCommand),
        CommandInfo("build", help=BuildCommand.COMMAND.help, subcommand_class=BuildCommand),
    )


REGISTER_COMMANDS = [RegCacheCommand]
