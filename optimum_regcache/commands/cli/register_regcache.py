"""`optimum-cli regcache`. Installed into optimum's command namespace; heavy imports happen inside ``run``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.register.regcache_base import (  # pyright: ignore[reportMissingImports] (its installed place)
    TASKS,
    Command,
    add_common,
    add_hub,
    add_pictures,
    hub_options,
    resolve_recipe,
)
from optimum.commands.register.regcache_demo import DemoCommand  # pyright: ignore[reportMissingImports]
from optimum.commands.register.regcache_push import PushCommand  # pyright: ignore[reportMissingImports]
from optimum.commands.register.regcache_report import ReportCommand  # pyright: ignore[reportMissingImports]


class QuantizeCommand(Command):
    COMMAND = CommandInfo(name="quantize", help="Quantize a vision encoder with registers and token deletion.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_common(parser, several=True)
        parser.add_argument("--output", required=True, help="directory of the quantized model")
        QuantizeCommand.add_options(parser)

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Those of the work itself."""
        add_pictures(parser)
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
            "ptq4vit, repq_vit, noisyquant, smoothquant, gptq, reconstruction, light, glf_q, aiqvit, rotation, "
            "bias_correction, norm_tuning, mixed_precision, test_time_registers; "
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
        self.quantize()

    def quantize(self) -> list[dict[str, Any]]:
        """Make what is asked for; the results of each preset, none in a process that only helps."""
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
        made: list[dict[str, Any]] = []
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
            made.append(results)
        return made


class RunCommand(QuantizeCommand):
    COMMAND = CommandInfo(name="run", help="Quantize as a recipe says, and compare with what it expects.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_common(parser, several=True, recipe="recipe")
        parser.add_argument("--output", help="directory of the quantized model (default: the name of the recipe, here)")
        QuantizeCommand.add_options(parser)

    def job(self) -> None:
        from pathlib import Path

        from optimum_regcache.commands.failures import MISSED

        self.args.output = self.args.output or Path(self.args.recipe).resolve().stem.partition("@")[0]
        checks = [check for results in self.quantize() for check in results["expected"]]
        if not checks:
            print("the recipe expects nothing: it has no section 'expect'")
        if any(check["passed"] is False for check in checks):
            sys.exit(MISSED)


class AnalyzeCommand(Command):
    COMMAND = CommandInfo(
        name="analyze",
        help="Sensitivity and token norms per block; or whether a quantized model fits some images.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_common(parser)
        parser.add_argument("--output", required=True, help="directory of the analysis")
        add_pictures(parser)
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


class EvaluateCommand(Command):
    COMMAND = CommandInfo(name="evaluate", help="Evaluate a saved or exported model beside its float original.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_common(parser, templates=True)
        parser.add_argument("--float-model", help="the float original (default: the one recorded in recipe.yaml)")
        parser.add_argument("--output", required=True, help="JSON file of the results")
        parser.add_argument(
            "--task", nargs="+", action="extend", default=[], choices=TASKS, metavar="NAME",
            help=f"what to measure: {', '.join(TASKS)} (default: the first four, as far as they can be done)",
        )  # fmt: skip
        parser.add_argument("--caption-column", help="column of the captions, for --task retrieval")
        parser.add_argument("--mask-column", help="column of the class masks, for --task segmentation")
        parser.add_argument(
            "--ignore-index",
            type=int,
            default=255,
            help="number in masks that is no class, for --task segmentation (default 255; -1: none)",
        )
        parser.add_argument("--depth-column", help="column of the depth maps, for --task depth")
        parser.add_argument("--objects-column", help="column of boxes and classes of objects, for --task detection")
        parser.add_argument(
            "--box-format",
            default="coco",
            choices=("coco", "corners"),
            help="boxes are left, top, width, height (coco, the default) or left, top, right, bottom (corners), in pixels",
        )
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
        from optimum_regcache.commands.harness import Columns
        from optimum_regcache.data.reference import DEFAULT

        unread = [f"--{name}" for name in ("preset", "objective") if getattr(self.args, name) is not None]
        if unread:
            raise ValueError(f"{', '.join(unread)} has no effect: evaluate opens a finished model. Leave it out.")
        model, dataset, hub = self.args.model or DEFAULT, self.args.dataset, hub_options(self.args)
        self.args.model = self.args.dataset = self.args.revision = None
        recipe = resolve_recipe(self.args, self.args.preset)
        args = self.args
        template = None if args.template is None else tuple(args.template)
        named = (args.caption_column, args.mask_column, args.depth_column, args.ignore_index)
        columns = Columns(*named, args.objects_column, args.box_format)
        subject = Subject(model, args.float_model, dataset, template, args.device, hub, columns)
        options = {"tasks": tuple(dict.fromkeys(args.task)), "metrics": args.metric, "fused": args.fused}
        print(evaluate_job(subject, recipe, args.output, **options, overwrite=args.overwrite)[1])


class ExportCommand(Command):
    COMMAND = CommandInfo(name="export", help="Write a saved model for other runtimes and check it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_hub(parser)
        parser.add_argument("--model", required=True, help="directory, Hub id, or reference encoder")
        parser.add_argument("--format", required=True, choices=("onnx", "openvino", "compressed-tensors"))
        parser.add_argument(
            "--layout", default="flat", choices=("flat", "transformers.js"),
            help="of the format onnx: model.onnx, or text tower too, as transformers.js reads it (default flat)",
        )  # fmt: skip
        parser.add_argument("--output", required=True, help="directory of the exported encoder")
        parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
        parser.add_argument("--dataset", help="images of the check (default: the recipe's embedded ones, else random)")
        parser.add_argument("--num-images", type=int, default=8, help="images of the check (default 8)")
        parser.set_defaults(device="cpu")

    def job(self) -> None:
        from optimum_regcache.commands.export import export_job

        a = self.args
        options: dict[str, Any] = {"layout": a.layout, "overwrite": a.overwrite, "hub": hub_options(a)}
        print(export_job(a.model, a.format, a.output, a.image_size, a.dataset, a.num_images, **options)[1])


class BuildCommand(Command):
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
        CommandInfo("run", help=RunCommand.COMMAND.help, subcommand_class=RunCommand),
        CommandInfo("analyze", help=AnalyzeCommand.COMMAND.help, subcommand_class=AnalyzeCommand),
        CommandInfo("evaluate", help=EvaluateCommand.COMMAND.help, subcommand_class=EvaluateCommand),
        CommandInfo("report", help=ReportCommand.COMMAND.help, subcommand_class=ReportCommand),
        CommandInfo("demo", help=DemoCommand.COMMAND.help, subcommand_class=DemoCommand),
        CommandInfo("export", help=ExportCommand.COMMAND.help, subcommand_class=ExportCommand),
        CommandInfo("push", help=PushCommand.COMMAND.help, subcommand_class=PushCommand),
        CommandInfo("build", help=BuildCommand.COMMAND.help, subcommand_class=BuildCommand),
    )


REGISTER_COMMANDS = [RegCacheCommand]
