"""How much work each search algorithm takes, and how good what it chooses is on images that no search saw.

    python benchmarks/bench_search.py                                          # most of an hour on two cores
    python benchmarks/bench_search.py --encoder siglip-scenes-induced --preset w4a4 --seed 0 1 2
    python benchmarks/bench_search.py --preset w8a8 w4a4 --algorithm quick halving thorough --output efforts.json

``exhaustive`` has the paper's grid (tau 1 to 15, every k~, every start block); the others the default grid;
``quick`` and ``thorough`` are the efforts of that name, beside which ``halving`` is the default. Work is counted in
images times blocks, in both models, of the search alone; it does not depend on the machine. Seconds are those of the whole fit,
on the clock and of all processors; the latter depend less on what else runs. Results are added to the JSON file
as they come, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from optimum_regcache.commands.sources import accuracy_data, open_source
from optimum_regcache.config.efforts import EFFORTS
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective, score_both
from optimum_regcache.search.fit import fit_registers, search_config
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.trials import TrialRunner
from stored_rows import StoredRows

ENCODERS = ("clip-scenes-induced", "siglip-scenes-induced", "planted-outlier")
PAPER = ["search.num_copies=[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]"]
SETTINGS = {"halving": [], "coordinate": [], "exhaustive": PAPER}
CHOICES = (*SETTINGS, *EFFORTS)


def measure(encoder: str, preset: str, algorithm: str, seed: int) -> dict[str, Any]:
    """One fit, and its choice on the report images."""
    recipe = Recipe.load(preset).override([f"search.seed={seed}", "search.always=true"])
    if algorithm in EFFORTS:
        recipe = recipe.with_effort(algorithm)
    else:
        recipe = recipe.override([f"search.algorithm={algorithm}", *SETTINGS[algorithm]])
    source = open_source(encoder, None, recipe)
    images = ReferenceImages(source.search_images, source.processor, template=source.template)
    plan = QuantizationPlan.of(recipe)
    begun, busy = time.perf_counter(), time.process_time()
    fit = fit_registers(source.model, images, plan, progress=False)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    report = ImageInputs(source.report_images, source.processor)
    batches = list(report.batches(recipe.data.batch_size))
    calibration = list(fit.parts.calibration.batches(recipe.data.batch_size))
    runner = TrialRunner(source.model, search_config(fit.config), calibration)
    labels, text = accuracy_data(source, report)
    cosine = CosineObjective(runner.float_model, batches)
    accuracy = None if labels is None else AccuracyObjective(batches, labels, text)
    runner.install(fit.cache, fit.config.deletion)
    scores, hits = score_both(runner.quantized, cosine, accuracy)
    return {
        "encoder": encoder,
        "preset": preset,
        "algorithm": algorithm,
        "seed": seed,
        "trials": len(fit.search.trials),
        "block_forwards": fit.search.block_forwards,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "chosen": fit.search.chosen.describe(),
        "cosine": float(scores.mean()),
        "accuracy": None if hits is None else float(hits.mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the work as a fraction of the exhaustive one of the same line."""
    lines = [
        "| encoder | bits | seed | algorithm | images x blocks | exhaustive / this | chosen | cosine | top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole = {
        (r["encoder"], r["preset"], r["seed"]): r["block_forwards"] for r in rows if r["algorithm"] == "exhaustive"
    }
    for r in sorted(rows, key=lambda r: (r["encoder"], r["preset"], r["seed"], -r["block_forwards"])):
        base = whole.get((r["encoder"], r["preset"], r["seed"]))
        ratio = "-" if base is None else f"{base / r['block_forwards']:.1f}"
        top1 = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.2f} %"
        lines.append(
            f"| {r['encoder']} | {r['preset']} | {r['seed']} | {r['algorithm']} | {r['block_forwards']:,} | "
            f"{ratio} | {r['chosen']} | {r['cosine']:.4f} | {top1} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=list(ENCODERS), choices=ENCODERS)
    parser.add_argument("--preset", nargs="+", default=["w8a8", "w6a6", "w4a4"])
    parser.add_argument("--algorithm", nargs="+", default=list(SETTINGS), choices=CHOICES)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("bench-search.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    stored = StoredRows(arguments.output)
    for encoder, preset, seed, algorithm in product(
        arguments.encoder, arguments.preset, arguments.seed, arguments.algorithm
    ):
        if stored.matching(encoder=encoder, preset=preset, algorithm=algorithm, seed=seed):
            continue
        row = measure(encoder, preset, algorithm, seed)
        stored.add([row])
        print(row, flush=True)
    print(table(stored.rows))


if __name__ == "__main__":
    main()
