"""`optimum-cli regcache`. Installed into optimum's command namespace; heavy imports happen inside ``run``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

_PRESETS = ("w8a8", "w6a6", "w4a4", "w8a8-dynamic")


def _add_common(parser: ArgumentParser, several: bool = False) -> None:
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
        "--objective", choices=("cosine", "accuracy"), help="what the search maximises (default cosine)"
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
    if hasattr(args, "no_registers") and recipe.quantization.registers.mode != "search":
        unread = [a for a in (*assignments, *args.assignments) if a.startswith("search.") and "search.seed=" not in a]
        unread = [a for a in unread if not a.startswith("search.kv_mode=")]  # the old name of a field of the registers
        if unread:
            raise ValueError(
                f"{', '.join(unread)} has no effect: nothing is searched with registers.mode="
                f"{recipe.quantization.registers.mode!r}. Use registers.mode='search', or leave it out."
            )
    return replace(recipe, model=args.model or recipe.model, dataset=args.dataset or recipe.dataset)


class _Command(BaseOptimumCLICommand):
    """Turns expected errors into one line and exit code 2."""

    args: Any

    def job(self) -> None:
        """Do it and print the summary."""
        raise NotImplementedError

    def open(self, preset: str | None) -> tuple[Any, Any]:
        """Model with its images, and the resolved recipe."""
        from optimum_regcache.commands.sources import open_source

        recipe = resolve_recipe(self.args, preset)
        return open_source(None, None, recipe, template=self.args.template, device=self.args.device), recipe

    def run(self) -> None:
        try:
            if self.args.device == "cuda":
                import torch

                if not torch.cuda.is_available():
                    raise ValueError("--device cuda: this machine or this PyTorch build has no CUDA. Use --device cpu.")
            self.job()
        except (ValueError, FileNotFoundError, ImportError, TypeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


class QuantizeCommand(_Command):
    COMMAND = CommandInfo(name="quantize", help="Quantize a vision encoder with registers and token deletion.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_common(parser, several=True)
        parser.add_argument("--output", required=True, help="directory of the quantized model")
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

    def job(self) -> None:
        from pathlib import Path

        from optimum_regcache.commands.quantize import quantize_job

        output = Path(self.args.output)
        presets = list(dict.fromkeys(self.args.preset or [""]))
        for preset in presets:
            source, recipe = self.open(preset)
            path = output / preset if len(presets) > 1 else output
            results, table = quantize_job(source, recipe, path)
            print(f"{table}\nsaved to {path} in {results['seconds']:.0f} s", flush=True)


class AnalyzeCommand(_Command):
    COMMAND = CommandInfo(name="analyze", help="Sensitivity and token norms per block, as JSON and pictures.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_common(parser)
        parser.add_argument("--output", required=True, help="directory of the analysis")

    def job(self) -> None:
        from optimum_regcache.commands.analyze import analyze_job

        source, recipe = self.open(self.args.preset)
        print(analyze_job(source, recipe, self.args.output)[1])


class EvaluateCommand(_Command):
    COMMAND = CommandInfo(name="evaluate", help="Evaluate a saved or exported model beside its float original.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_common(parser)
        parser.add_argument("--float-model", help="the float original (default: the one recorded in recipe.yaml)")
        parser.add_argument("--output", required=True, help="JSON file of the results")
        parser.add_argument(
            "--metric", action="append", default=[], help="further metric of the evaluate library, for example accuracy"
        )
        parser.add_argument(
            "--fused", action="store_true", help="evaluate also with fused int8 blocks, with float32 and int8 attention"
        )

    def job(self) -> None:
        from optimum_regcache.commands.evaluate import Subject, evaluate_job
        from optimum_regcache.data.reference import DEFAULT

        unread = [f"--{name}" for name in ("preset", "objective") if getattr(self.args, name) is not None]
        if unread:
            raise ValueError(f"{', '.join(unread)} has no effect: evaluate opens a finished model. Leave it out.")
        model, dataset = self.args.model or DEFAULT, self.args.dataset
        self.args.model = self.args.dataset = None
        recipe = resolve_recipe(self.args, self.args.preset)
        args = self.args
        subject = Subject(model, args.float_model, dataset, args.template, args.device)
        print(evaluate_job(subject, recipe, args.output, metrics=args.metric, fused=args.fused)[1])


class ExportCommand(_Command):
    COMMAND = CommandInfo(name="export", help="Write a saved model for ONNX Runtime or OpenVINO and check it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
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
        _, text = export_job(a.model, a.format, a.output, a.image_size, a.dataset, a.num_images)
        print(text)


class BuildCommand(_Command):
    COMMAND = CommandInfo(name="build", help="Build the C++ operators for int8 on CPUs ahead of time.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--instructions", default="auto", choices=("auto", "avx512_vnni", "avx2", "all"),
            help="auto builds what this CPU runs and loads it; the others need only a compiler (default auto)",
        )  # fmt: skip
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
