"""Registers searched on one data set, measured on others.

    OMP_NUM_THREADS=1 python benchmarks/bench_transfer.py --images CIFAR10 IMAGENET --output docs/results/transfer.json

Searched (and calibrated) on the embedded encoder's scenes and on each data set of ``--images`` (all that `--dataset` takes),
measured on the report side of each, and on scenes that are drawn otherwise. Every row is the feature cosine to the float model,
mean and standard error. Results are added to the JSON file as they come, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from optimum_regcache.commands.sources import Source, open_source
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data import scenes
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.evaluation.objective import CosineObjective
from optimum_regcache.search.fit import fit_registers, search_config
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.setups import mean_and_error
from optimum_regcache.search.trials import TrialRunner
from stored_rows import StoredRows

SCENES = "scenes"
VARIANTS = {  # of the scenes: arguments of `scenes.load_dataset`
    "scenes, another seed": {"seed": 1},
    "scenes drawn at 32 pixels": {"size": 32},
    "scenes drawn at 160 pixels": {"size": 160},
}


def sources(encoder: str, paths: list[str], recipe: Recipe) -> dict[str, Source]:
    """Name of the images -> encoder with them."""
    named = {SCENES: None, **{Path(path).name: path for path in paths}}
    return {name: open_source(encoder, path, recipe) for name, path in named.items()}


def reports(opened: dict[str, Source], recipe: Recipe) -> dict[str, ImageInputs]:
    """Name -> images that are measured on."""
    processor = opened[SCENES].processor
    found = {name: source.report_images for name, source in opened.items()}
    for name, options in VARIANTS.items():
        found[name] = scenes.load_dataset("report", recipe.data.num_report, **options)
    return {name: ImageInputs(images, processor) for name, images in found.items()}


def measure(
    source: Source, searched: str, preset: str, measured: dict[str, ImageInputs], recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """One fit, and a row for each of the images that it is measured on."""
    images = ReferenceImages(source.search_images, source.processor, template=source.template)
    fit = fit_registers(source.model, images, QuantizationPlan.of(recipe), progress=False)
    size = recipe.data.batch_size
    runner = TrialRunner(source.model, search_config(fit.config), list(fit.parts.calibration.batches(size)))
    for name, inputs in measured.items():
        cosine = CosineObjective(source.model, list(inputs.batches(size)))
        row = {
            "preset": preset, "searched": searched, "measured": name, "images": len(inputs),
            "installed": fit.search.chosen.describe(),
        }  # fmt: skip
        scores = {}
        for kind, what in (("naive", (None, DeletionConfig())), ("regcache", (fit.cache, fit.config.deletion))):
            runner.install(*what)
            scores[kind] = cosine.scores(runner.quantized)
            row[kind], row[f"{kind}_error"] = mean_and_error(scores[kind])
        row["gain"], row["gain_error"] = mean_and_error(scores["regcache"] - scores["naive"])
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| bits | searched on | installed | measured on | naive | RegCache | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (f"{r[k]:.4f} ± {r[f'{k}_error']:.4f}" for k in ("naive", "regcache"))
        lines.append(
            f"| {r['preset']} | {r['searched']} | {r['installed']} | {r['measured']} | {' | '.join(cells)} | "
            f"{r['gain']:+.4f} ± {r['gain_error']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="clip-scenes-induced")
    parser.add_argument("--preset", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--images", nargs="*", default=[], help="data sets beside the scenes")
    parser.add_argument("--num-report", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("bench-transfer.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    stored = StoredRows(arguments.output)
    for preset in arguments.preset:
        recipe = Recipe.load(preset).with_effort("quick").override([f"data.num_report={arguments.num_report}"])
        opened = sources(arguments.encoder, arguments.images, recipe)
        measured = reports(opened, recipe)
        for searched, source in opened.items():
            if stored.matching(preset=preset, searched=searched):
                continue
            found = list(measure(source, searched, preset, measured, recipe))
            stored.add(found)
            print(table(found), flush=True)
    print(table(stored.rows))


if __name__ == "__main__":
    main()
