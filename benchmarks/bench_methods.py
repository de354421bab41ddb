"""Every quantization method alone and under registers, on unseen images: one JSON of cells, one Markdown table.

    python benchmarks/bench_methods.py --output docs/results/methods.json
    python benchmarks/bench_methods.py --model DIR --images FOLDER_OR_PARQUET --methods rtn repq_vit
    python benchmarks/bench_methods.py --output docs/results/methods.json --table-only
    make bench-static

For each encoder and bit width registers and deletion are searched once, with round to nearest. Then each method is fitted
four times: without registers (none), with the prefix, with the deletion, and with both, always of the same setup. A finished
cell is not measured again; interrupt and continue at will. Which of the four "install" takes is decided on confirmation
images that are neither reported nor used by the search's ranking: a variant counts only if it beats "none" there by more
than twice the paired standard error. ``--set`` pins the search: with one place, one tau and few deletions it takes seconds.
"""
# pyright: reportCallIssue=false

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from optimum_regcache.commands.report import environment
from optimum_regcache.commands.sources import Source, accuracy_data, open_source
from optimum_regcache.config import DeletionConfig, RegCacheConfig
from optimum_regcache.config.files import write_json, write_text
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective, Objective
from optimum_regcache.methods import METHODS, quantize_with, resolve
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.fit import FitResult, fit_registers, install_setup
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages, split_inputs
from optimum_regcache.search.setups import Setup

ENCODERS = ("clip-scenes-induced", "siglip-scenes-induced", "planted-outlier")
VARIANTS = ("none", "prefix", "delete", "both")
ALL_POINTS = " (all points)"
GIVEN, SEARCHED = " (rows given)", " (rows searched)"


def _with_gptq(*methods: str) -> dict[str, list[Any]]:
    """``methods`` and GPTQ, with the weight scales that they give and with searched ones."""
    name = " + ".join((*methods, "gptq"))
    rows = {GIVEN: "given", SEARCHED: "searched"}
    return {f"{name}{mark}": [*methods, {"name": "gptq", "row_scales": value}] for mark, value in rows.items()}


ENTRIES: dict[str, list[Any]] = {
    **{n: [n] for n, cls in METHODS.items() if n not in ("percentile", "test_time_registers") and not cls.trains},
    **{f"percentile {p:g}": [{"name": "percentile", "percentile": p}] for p in (99.9, 99.99, 99.999)},
    **{f"test_time_registers ({v})": [{"name": "test_time_registers", "variant": v}] for v in ("kv", "token")},
    "output_mse + gptq": ["output_mse", "gptq"],
    "ptq4vit + gptq": ["ptq4vit", "gptq"],
    "ptq4vit + noisyquant": ["ptq4vit", "noisyquant"],
    "repq_vit + gptq + bias_correction": ["repq_vit", "gptq", "bias_correction"],
    "smoothquant + output_mse + gptq": ["smoothquant", "output_mse", "gptq"],
    "dynamic + smoothquant + gptq": ["dynamic", "smoothquant", "gptq"],
    **{f"{name}{ALL_POINTS}": [name] for name in ("rtn", "ptq4vit", "repq_vit")},
}
STATIC: dict[str, list[Any]] = {
    **{name: [name] for name in ("rtn", "mse", "rotation")},
    "rotation + mse": ["rotation", "mse"],
    **_with_gptq(),
    **_with_gptq("rotation"),
    **_with_gptq("mse"),
    **_with_gptq("rotation", "mse"),
    "light": ["light"],
    "mse + light": ["mse", "light"],
    "rotation + mse + light": ["rotation", "mse", "light"],
    "dynamic": ["dynamic"],
}
KNOWN = ENTRIES | STATIC


class Bench:
    """One encoder at one bit width.

    Args:
        source: encoder and images.
        recipe: preset, search settings and amounts.
        directory: for the record of the search.
        norms: measure the largest token norms too.
    """

    def __init__(self, source: Source, recipe: Recipe, directory: Path, norms: bool = True) -> None:
        self.source, self.recipe = source, recipe
        data = recipe.data
        inputs = ImageInputs(source.search_images, source.processor)
        parts = split_inputs(inputs, data, recipe.search.seed)
        self.calibration = list(parts.calibration.batches(data.batch_size))
        self.confirmation = CosineObjective(source.model, list(parts.confirmation.batches(data.batch_size)))
        report = ImageInputs(source.report_images, source.processor)
        batches = list(report.batches(data.batch_size))
        labels, text = accuracy_data(source, report)
        self.norm_batches = batches[: max(1, 64 // data.batch_size)] if norms else []
        self.cosine = CosineObjective(source.model, batches)
        self.metric: Objective = self.cosine if labels is None else AccuracyObjective(batches, labels, text)
        begun = time.perf_counter()
        self.fit: FitResult = fit_registers(
            source.model,
            ReferenceImages(source.search_images, source.processor, template=source.template),
            QuantizationPlan.of(recipe),
            work_dir=directory,
        )
        self.search_seconds = time.perf_counter() - begun
        self.cosines: dict[tuple[str, str], torch.Tensor] = {}  # of the methods so far, image by image

    def header(self) -> dict[str, Any]:
        """What the cells of this encoder and bit width have in common."""
        norms = self._norms(self.source.model, "float_max_norm", "float_max_fc2")
        return {
            "metric": self.metric.name,
            "images": len(self.source.report_images),
            "float": float(self.metric.scores(self.source.model).mean()),
            **norms,
            "setup": self.both().describe(),
            "search_reason": self.fit.search.reason,
            "search_seconds": round(self.search_seconds, 1),
        }

    def _norms(self, model: Any, block_input: str, fc2: str) -> dict[str, float]:
        """The largest token norms under these names; nothing if they are not asked for."""
        if not self.norm_batches:
            return {}
        norms = measure_token_norms(model, self.norm_batches)
        return {block_input: float(norms.max_block_input.max()), fc2: float(norms.max_any_fc2_input.max())}

    def both(self) -> Setup:
        """The best setup with prefix and deletion, installed or not."""
        trial = self.fit.search.best_both or self.fit.search.best_prefix
        return trial.setup if trial is not None else Setup()

    def variant(self, kind: str) -> tuple[Setup, RegisterCache | None, DeletionConfig]:
        """Setup, registers and deletion of ``none``, ``prefix``, ``delete`` or ``both``."""
        both = self.both()
        setup = {
            "none": Setup(),
            "prefix": replace(both, count=0),
            "delete": Setup(count=both.count),
            "both": both,
        }[kind]
        deletion = DeletionConfig()
        if setup.count:
            deletion = replace(self.fit.requested.deletion, block=self.fit.sensitive_block, count=setup.count)
        cache = None
        if setup.start_block is not None:
            depth = len(find_tower(self.source.model).blocks)
            blocks = setup.blocks(depth)
            cache = self.fit.mined[setup.start_block].average(blocks, depth).restricted(blocks, setup.num_copies)
        return setup, cache, deletion

    def run(self, name: str, variants: tuple[str, ...]) -> dict[str, Any]:
        """Variants of one of `KNOWN`."""
        base = self.recipe.quantization.replace(methods=tuple(KNOWN[name]))
        if name.endswith(ALL_POINTS):
            base = base.replace(attention={"quantize": True, "bits": base.activations.bits})
        resolved = resolve(base)
        cells: dict[str, Any] = {}
        plain: dict[str, torch.Tensor] = {}
        for kind in variants:
            _, cache, deletion = self.variant(kind)
            setting = install_setup(resolved, cache, deletion)
            begun = time.perf_counter()
            result = quantize_with(self.source.model, setting, cache, self.calibration, progress=False)
            seconds = time.perf_counter() - begun
            cosine, confirm = self.cosine.scores(result.model), self.confirmation.scores(result.model)
            scores = cosine if self.metric is self.cosine else self.metric.scores(result.model)
            if kind == "none":
                plain = {"scores": scores, "confirm": confirm}
            self.cosines[name, kind] = cosine
            given = self.cosines.get((name.replace(SEARCHED, GIVEN), kind)) if name.endswith(SEARCHED) else None
            cells[kind] = {
                "metric": float(scores.mean()),
                "error": _paired(scores)["error"],
                "cosine": float(cosine.mean()),
                "cosine_error": _paired(cosine)["error"],
                "cosine_gain": _paired(cosine - self.cosines[name, "none"]),
                "over_given": None if given is None else _paired(cosine - given),
                "gain": _paired(scores - plain["scores"]),
                "confirmed_gain": _paired(confirm - plain["confirm"]),
                **self._norms(result.float_model, "max_norm", "max_fc2"),
                "seconds": round(seconds, 2),
                "simulated": result.config.simulated_reason,
                "protocol": result.config.protocol,
            }
        return {"methods": list(result.config.methods), "variants": cells, "installed": installed(cells)}


def _paired(difference: torch.Tensor) -> dict[str, float]:
    """Mean and standard error of a paired difference."""
    return {"mean": float(difference.mean()), "error": float(difference.std() / math.sqrt(len(difference)))}


def installed(cells: dict[str, Any]) -> str:
    """The variant with the largest confirmed gain, if that exceeds the noise and 0.001; else ``none``."""
    best = max((k for k in cells if k != "none"), key=lambda k: cells[k]["confirmed_gain"]["mean"])
    gain = cells[best]["confirmed_gain"]
    return best if gain["mean"] >= max(0.001, 2 * gain["error"]) else "none"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(ENCODERS), help="reference encoders, directories or Hub ids")
    parser.add_argument("--images", help="data set for a model that brings none")
    parser.add_argument("--name", help="name of the model in the table")
    parser.add_argument("--preset", nargs="+", default=["w8a8", "w6a6", "w4a4"])
    parser.add_argument("--methods", nargs="+", choices=list(KNOWN), metavar="METHOD", help="default: all")
    parser.add_argument(
        "--static", action="store_true", help="static compositions, GPTQ with and without searched row scales"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="'none' comes first")
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--num-report", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as of the quantize command")
    parser.add_argument("--output", default="docs/results/methods.json")
    parser.add_argument("--work-dir", default="regcache-bench", help="records of the searches")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--table-only", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args(arguments)
    if args.variants[0] != "none" or "both" not in args.variants:
        parser.error(
            "--variants starts with none and contains both: gains are relative to the one, tables show the other."
        )
    args.methods = args.methods or list(STATIC if args.static else ENTRIES)
    path = Path(args.output)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}, "runs": {}}
    if not args.table_only:
        if args.threads:
            torch.set_num_threads(args.threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        for model in args.model:
            for preset in args.preset:
                measure(model, preset, args, results, path)
    text = static_markdown(results) if args.static else markdown(results)
    write_text(path.with_suffix(".md"), text)
    print(text)


def measure(model: str, preset: str, args: argparse.Namespace, results: dict[str, Any], path: Path) -> None:
    """Add the missing cells of one encoder and bit width to the JSON."""
    name = args.name or model
    absent = {m for m in args.methods if f"{name}/{preset}/{m}" not in results["cells"]}
    missing = [
        m for m in args.methods if m in absent or m.replace(GIVEN, SEARCHED) in absent
    ]  # compared image by image
    if not missing:
        return
    recipe = Recipe(
        quantization=RegCacheConfig.from_preset(preset),
        search=SearchConfig(),
        data=DataConfig(num_samples=args.num_samples, num_report=args.num_report, batch_size=args.batch_size),
        model=model,
        dataset=args.images,
    ).override(args.set)
    directory = Path(args.work_dir) / f"{Path(name).name}-{preset}"
    bench = Bench(open_source(None, None, recipe), recipe, directory, norms=not args.static)
    results["runs"][f"{name}/{preset}"] = bench.header()
    for method in tqdm(missing, desc=f"{Path(name).name} {preset}"):
        key = f"{name}/{preset}/{method}"
        try:
            results["cells"][key] = bench.run(method, tuple(args.variants))
        except ValueError as error:  # a method that this encoder cannot have, with the reason
            results["cells"][key] = {"refused": str(error)}
        results["environment"] = environment()
        write_json(path, results)


def markdown(results: dict[str, Any]) -> str:
    """One table per encoder and bit width."""
    lines = [
        "# Methods alone and under registers",
        "",
        "Written by `make bench-methods`; see methods-discussion.md for how to read it.",
        "",
    ]
    for run, head in results["runs"].items():
        percent = head["metric"] == "top-1 accuracy"
        show = (lambda v: f"{100 * v:.1f}") if percent else (lambda v: f"{v:.4f}")
        lines += [
            f"## {run}",
            "",
            f"{head['metric']}{' (%)' if percent else ''} on {head['images']} unseen images, float {show(head['float'])}; "
            f"setup: {head['setup']}. Largest token norm {head['float_max_norm']:.0f}, fc2 input {head['float_max_fc2']:.0f}.",
            "",
            "| method | none | prefix | delete | both | both - none | retention | installs | fc2 input | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key, cell in results["cells"].items():
            if not key.startswith(f"{run}/"):
                continue
            method = key.rsplit("/", 1)[1]
            if "refused" in cell:
                lines.append(f"| {method} | refused: {cell['refused']} |" + " |" * 8)
                continue
            v = cell["variants"]
            final = v[cell["installed"]]
            gain = v["both"]["gain"]
            scale = 100 if percent else 1
            mark = " *" if final["simulated"] else ""
            values = " | ".join(show(v[k]["metric"]) if k in v else "" for k in VARIANTS)
            digits = 1 if percent else 4
            lines.append(
                f"| {method}{mark} | {values} | {scale * gain['mean']:+.{digits}f} +- {scale * gain['error']:.{digits}f} | "
                f"{100 * final['metric'] / head['float']:.1f} % | {cell['installed']} | "
                f"{final['max_fc2']:.0f} | {final['seconds']:.1f} |"
            )
        lines.append("")
    lines.append("\\* simulated: not a plain set of scales and weights (`RegCacheConfig.simulated_reason`).")
    return "\n".join(lines) + "\n"


def static_markdown(results: dict[str, Any]) -> str:
    """What `--static` shows: feature cosine and paired differences for each encoder and bit width."""
    columns = ("method", "none", "both", "both - none", "searched - given, none", "searched - given, both", "installs")
    lines = [
        "# Static compositions",
        "",
        "Written by `make bench-static`; [how to read it](methods-discussion.md#static-compositions). Mean feature cosine to "
        "the float model on unseen images; differences are paired, image by image; +- is one standard error. In brackets top-1 "
        "in %.",
        "",
    ]
    for run, head in results["runs"].items():
        percent = head["metric"] == "top-1 accuracy"
        top = f", float top-1 {100 * head['float']:.1f} %" if percent else ""
        lines += [f"## {run}", "", f"{head['images']} unseen images{top}; setup: {head['setup']}.", ""]
        lines += [f"| {' | '.join((*columns, 'seconds'))} |", "|---" * (len(columns) + 1) + "|"]
        for key, cell in results["cells"].items():
            if not key.startswith(f"{run}/"):
                continue
            none, both = cell["variants"]["none"], cell["variants"]["both"]
            values = [
                f"{v['cosine']:.4f} +- {v['cosine_error']:.4f}{' (%.1f)' % (100 * v['metric']) if percent else ''}"
                for v in (none, both)
            ]
            gains = [_signed(v) for v in (both["cosine_gain"], none["over_given"], both["over_given"])]
            cells = (key.rsplit("/", 1)[1], *values, *gains, cell["installed"], f"{none['seconds']:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _signed(difference: dict[str, float] | None) -> str:
    return "" if difference is None else f"{difference['mean']:+.4f} +- {difference['error']:.4f}"


if __name__ == "__main__":
    main()
