"""Four bits and below: trained weights beside round to nearest, RepQ-ViT, GPTQ and dynamic scales, on unseen images.

    OMP_NUM_THREADS=1 python benchmarks/bench_reconstruction.py
    python benchmarks/bench_reconstruction.py --encoder /models/dinov2-small --images photographs.parquet --no-registers
    python benchmarks/bench_reconstruction.py --ablation --encoder clip-scenes --bits 3 4     # the parts of AIQViT
    python benchmarks/bench_reconstruction.py --table-only

Registers and deletion are searched once for each encoder, bit width and seed, in the small space of ``make bench-static``, and
all rows have the same ones. Scales come from the calibration images, weights are trained on these and the selection images. The
report images chose nothing. With ``--ablation`` query, key, probabilities and value are quantized too, as in AIQViT, and
nothing is installed. A finished row is not measured again.
"""
# pyright: reportCallIssue=false

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bench_images import Peak
from bench_methods import Bench
from bench_norm_tuning import ENCODERS, METRICS, SPACE, paired
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import JoinedBatches
from optimum_regcache.evaluation.dense import PatchCosineObjective
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.search.fit import install_setup
from optimum_regcache.search.plan import split_inputs
from stored_rows import Row, StoredRows

BASE = ["rotation", "mse"]
TRAINED: dict[str, list[Any]] = {
    "rotation + mse + light": ["light"],
    "the same, block loss": [{"name": "light", "loss": "block"}],
    "the same, block loss, 200 steps": [{"name": "light", "loss": "block", "iterations": 200}],
    "the same, low rank": [{"name": "light", "parametrisation": "low_rank"}],
    "the same, adaround": [{"name": "light", "parametrisation": "adaround"}],
    "rotation + mse + light + norm_tuning": ["light", "norm_tuning"],
}
COMPOSITIONS: dict[str, list[Any]] = {
    "rtn": ["rtn"],
    "repq_vit": ["repq_vit"],
    "dynamic + smoothquant + gptq": ["dynamic", "smoothquant", "gptq"],
    "rotation + mse": BASE,
    "rotation + mse + gptq": [*BASE, "gptq"],
    **{name: [*BASE, *methods] for name, methods in TRAINED.items()},
}
STEPS = {"iterations": 100, "batch": 16}
PLAIN = {"name": "aiqvit", "ranks": [20], "first_fraction": 1.0, **STEPS}
ALL = {**PLAIN, "ranks": [10, 20, 50], "first_fraction": 0.5, "search_iterations": 100}
# the parts of AIQViT: methods, and the form of probabilities
ABLATION: dict[str, tuple[list[Any], str]] = {
    "repq_vit, uniform": (["repq_vit"], "uniform"),
    "repq_vit, log sqrt2": (["repq_vit"], "log_sqrt2"),
    "DFQ": (["repq_vit"], "dfq"),
    "low rank 20 + DFQ": (["repq_vit", PLAIN], "dfq"),
    "low rank 50 + DFQ": (["repq_vit", {**PLAIN, "ranks": [50]}], "dfq"),
    "searched rank + DFQ": (["repq_vit", {**ALL, "first_fraction": 1.0}], "dfq"),
    "low rank 20 + DFQ + curriculum": (["repq_vit", {**PLAIN, "first_fraction": 0.5}], "dfq"),
    "searched rank + DFQ + curriculum": (["repq_vit", ALL], "dfq"),
    "low rank 20, log2": (
        ["repq_vit", {"name": "light", "parametrisation": "low_rank", "rank": 20, "loss": "block"}],
        "log2",
    ),
    "all weights, log2": (["repq_vit", {"name": "light", "loss": "block"}], "log2"),
}


class Division:
    """One encoder at one bit width, its images divided by one seed.

    Args:
        given: encoder, bits, seed and what is installed, as rows have them.
        args: of the command line.
    """

    def __init__(self, given: Row, args: argparse.Namespace) -> None:
        bits, seed = given["bits"], given["seed"]
        # a search that must not install anything is given the least to do
        space = SPACE if given["registers"] else [*SPACE[1:], "search.sensitive_block=0", "search.max_delete=0"]
        recipe = Recipe(
            quantization=RegCacheConfig(weights={"bits": bits}, activations={"bits": bits}),
            search=SearchConfig(seed=seed),
            data=DataConfig(num_samples=args.num_samples, num_report=args.num_report, batch_size=32),
            model=args.folder or given["encoder"],
            dataset=args.images,
        ).override(space)
        name = f"{given['encoder']}-{bits}-{seed}-{given['registers']}-{args.num_samples}"
        self.bench = Bench(open_source(None, None, recipe), recipe, Path(args.work_dir) / name, norms=False)
        inputs = ImageInputs(self.bench.source.search_images, self.bench.source.processor)
        parts = split_inputs(inputs, recipe.data, seed)
        self.training = JoinedBatches(self.bench.calibration, list(parts.selection.batches(32)))
        self.patches = PatchCosineObjective(self.bench.source.model, self.bench.cosine.batches)
        self.setup, self.cache, self.deletion = self.bench.variant("both" if given["registers"] else "none")

    def float_score(self) -> list[float] | None:
        """Top-1 of the float model, None without labels."""
        return (
            None
            if self.bench.metric is self.bench.cosine
            else paired(self.bench.metric.scores(self.bench.source.model))
        )

    def fit(self, methods: list[Any], probabilities: str | None) -> Row:
        """What is measured of one composition."""
        bench = self.bench
        config = bench.recipe.quantization.replace(methods=tuple(methods))
        if probabilities is not None:
            config = config.replace(attention={"quantize": True, "bits": config.activations.bits})
        resolved = resolve(config)
        if probabilities is not None:  # in place of what the methods ask for
            resolved = replace(resolved, config=resolved.config.replace(attention={"probabilities": probabilities}))
        setting = install_setup(resolved, self.cache, self.deletion)
        peak, begun = Peak(), time.perf_counter()
        peak.start()
        result = quantize_with(
            bench.source.model, setting, self.cache, bench.calibration, progress=False, training=self.training
        )
        seconds = time.perf_counter() - begun
        peak.stop()
        objectives = (bench.cosine, self.patches, *(() if bench.metric is bench.cosine else (bench.metric,)))
        scores = zip(METRICS, objectives, strict=False)
        blocks = [b for record in result.measured.values() for b in record.get("blocks", [])]
        return {
            **{name: paired(objective.scores(result.model)) for name, objective in scores},
            "seconds": round(seconds, 1),
            "peak_mib": round(peak.highest["RssAnon"]),
            "kept": [b["block"] for b in blocks if not b["trained"]],
            "ranks": Counter(rank for b in blocks for rank in b.get("ranks", {}).values()),
        }


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| encoder | bits | images, seed | composition | cosine | patch cosine | top-1 | of float | left as given | s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        top, ideal = row.get("top-1"), row.get("float")
        shown = "" if top is None else f"{100 * top[0]:.1f} +- {100 * top[1]:.1f}"
        share = "" if top is None or not ideal else f"{100 * top[0] / ideal[0]:.1f}"
        cosine, patches = (f"{row[name][0]:.4f} +- {row[name][1]:.4f}" for name in METRICS[:2])
        kept, images = ", ".join(map(str, row["kept"])), f"{row['images']}, {row['seed']}"
        cells = (
            row["encoder"], f"W{row['bits']}A{row['bits']}", images, row["composition"], cosine, patches, shown, share,
            kept, f"{row['seconds']:.0f}", row["peak_mib"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=list(ENCODERS))
    parser.add_argument("--folder", help="where the one encoder lies, if its name is none that opens")
    parser.add_argument("--images", help="data set for a model that brings none")
    parser.add_argument("--no-registers", action="store_true", help="install neither registers nor deletion")
    parser.add_argument("--ablation", action="store_true", help="the parts of AIQViT")
    parser.add_argument("--rows", nargs="+", metavar="COMPOSITION", help="default: all")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--num-report", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="docs/results/reconstruction.json")
    parser.add_argument("--work-dir", default="regcache-bench", help="records of the searches")
    parser.add_argument("--table-only", action="store_true", help="only print the tables of the JSON")
    args = parser.parse_args()
    stored = StoredRows(Path(args.output))
    torch.set_num_threads(args.threads)
    entries: dict[str, tuple[list[Any], str | None]] = (
        dict(ABLATION) if args.ablation else {name: (methods, None) for name, methods in COMPOSITIONS.items()}
    )
    registers = not (args.no_registers or args.ablation)
    wanted = [(e, b, s) for e in args.encoder for b in args.bits for s in args.seed]
    for encoder, bits, seed in [] if args.table_only else wanted:
        given = {
            "encoder": encoder, "bits": bits, "seed": seed, "registers": registers, "ablation": args.ablation,
            "images": args.num_samples,
        }  # fmt: skip
        missing = [name for name in args.rows or entries if not stored.matching(**given, composition=name)]
        if not missing:
            continue
        division = Division(given, args)
        shared = {**given, "setup": division.setup.describe(), "float": division.float_score()}
        for name in tqdm(missing, desc=f"{encoder} {bits} bits, seed {seed}"):
            stored.add([{**shared, "composition": name, **division.fit(*entries[name])}])
    for ablation in (False, True):
        if rows := stored.matching(ablation=ablation):
            print(table(rows), end="\n\n")


if __name__ == "__main__":
    main()
