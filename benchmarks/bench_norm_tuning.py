"""Norm tuning on top of static compositions: gain on unseen images, image by image, over several divisions of the images.

    OMP_NUM_THREADS=1 python benchmarks/bench_norm_tuning.py --output docs/results/norm-tuning.json
    python benchmarks/bench_norm_tuning.py --output docs/results/norm-tuning.json --table-only

Registers and deletion are searched once for each encoder, bit width and seed, in the small space of ``make bench-static``. Each
row is then fitted with both and measured on report images, which chose nothing. A finished row is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bench_methods import Bench
from optimum_regcache.commands.report import environment
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.files import write_json
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.evaluation.dense import PatchCosineObjective
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.search.fit import install_setup

ENCODERS = ("clip-scenes-induced", "siglip-scenes-induced")
SPACE = ["search.sensitive_block=3", "search.blocks_before=0", "search.num_copies=[1]", "search.max_delete=3"]
TUNING = {"name": "norm_tuning"}
ROWS: dict[str, dict[str, Any]] = {
    "norms": {**TUNING, "registers": False},
    "registers": {**TUNING, "norms": False},
    "norms and registers": TUNING,
}
BASES: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "rotation + mse": (["rotation", "mse"], tuple(ROWS)),
    "rotation + mse + gptq": (["rotation", "mse", "gptq"], ("norms and registers",)),
}
METRICS = ("cosine", "patch cosine", "top-1")


class Division:
    """One encoder at one bit width, its images divided by one seed.

    Args:
        encoder: reference encoder or directory.
        preset: bits.
        seed: of the division.
        args: of the command line.
    """

    def __init__(self, encoder: str, preset: str, seed: int, args: argparse.Namespace) -> None:
        recipe = Recipe(
            quantization=RegCacheConfig.from_preset(preset),
            search=SearchConfig(seed=seed),
            data=DataConfig(num_samples=args.num_samples, num_report=args.num_report, batch_size=32),
            model=encoder,
        ).override(SPACE)
        directory = Path(args.work_dir) / f"{Path(encoder).name}-{preset}-{seed}"
        self.bench = Bench(open_source(None, None, recipe), recipe, directory, norms=False)
        self.patches = PatchCosineObjective(self.bench.source.model, self.bench.cosine.batches)
        self.setup, self.cache, self.deletion = self.bench.variant("both")

    def fit(self, methods: list[Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Scores of every report image, and what was measured."""
        bench = self.bench
        resolved = resolve(bench.recipe.quantization.replace(methods=tuple(methods)))
        setting = install_setup(resolved, self.cache, self.deletion)
        result = quantize_with(bench.source.model, setting, self.cache, bench.calibration, progress=False)
        objectives = (bench.cosine, self.patches, bench.metric)
        scores = {name: o.scores(result.model) for name, o in zip(METRICS, objectives, strict=True)}
        return scores, {"tuning": result.measured.get("norm_tuning"), "seconds": result.seconds["tune"]}


def paired(values: torch.Tensor) -> list[float]:
    """Mean and standard error."""
    return [float(values.mean()), float(values.std() / math.sqrt(len(values)))]


def measure(division: Division, given: dict[str, Any], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a division that are not known, each with its gain over the composition without norm tuning."""
    found: list[dict[str, Any]] = []
    for base, (methods, rows) in BASES.items():
        missing = [name for name in rows if not any(r["base"] == base and r["row"] == name for r in known)]
        if not missing:
            continue
        start, _ = division.fit(methods)
        shared = {**given, "base": base, "setup": division.setup.describe()}
        if not any(r["base"] == base and r["row"] == "" for r in known):
            found.append({**shared, "row": "", **{m: paired(start[m]) for m in METRICS}})
        for name in tqdm(missing, desc=f"{base} {given['preset']} seed {given['seed']}"):
            scores, record = division.fit([*methods, ROWS[name]])
            gains = {f"{m} gain": paired(scores[m] - start[m]) for m in METRICS}
            found.append({**shared, "row": name, **{m: paired(scores[m]) for m in METRICS}, **gains, **record})
    return found


def _signed(gain: list[float] | None, scale: int, digits: int) -> str:
    return "" if gain is None else f"{scale * gain[0]:+.{digits}f} +- {scale * gain[1]:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| encoder | bits | composition | tuned | seed | cosine | gain | patch cosine gain | top-1 | gain | steps (best) | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tuned, record = row["row"], row.get("tuning") or {}
        scales = zip(METRICS, (1, 1, 100), (4, 4, 1), strict=True)
        gains = [_signed(row.get(f"{name} gain"), scale, digits) for name, scale, digits in scales]
        best = record.get("best_iteration") if record.get("installed") else "start"
        steps = f"{record['iterations']} ({best})" if record else ""
        seconds = f"{row['seconds']:.0f}" if tuned else ""
        cells = (
            row["encoder"], row["preset"], row["base"], tuned, row["seed"], f"{row['cosine'][0]:.4f}", gains[0], gains[1],
            f"{100 * row['top-1'][0]:.1f}", gains[2], steps, seconds,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=list(ENCODERS))
    parser.add_argument("--preset", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--num-report", type=int, default=256)
    parser.add_argument("--output", default="docs/results/norm-tuning.json")
    parser.add_argument("--work-dir", default="regcache-bench", help="records of the searches")
    parser.add_argument("--table-only", action="store_true", help="only print the table of the JSON")
    args = parser.parse_args()
    path = Path(args.output)
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows: list[dict[str, Any]] = stored["rows"]
    torch.set_num_threads(1)
    wanted = [(s, p, e) for s in args.seed for p in args.preset for e in args.encoder]
    for seed, preset, encoder in [] if args.table_only else wanted:
        given = {"encoder": encoder, "preset": preset, "seed": seed}
        known = [row for row in rows if all(row[key] == value for key, value in given.items())]
        if all(any(r["base"] == b and r["row"] == n for r in known) for b, (_, names) in BASES.items() for n in names):
            continue
        rows += measure(Division(encoder, preset, seed, args), given, known)
        order = ["", *ROWS]
        rows.sort(key=lambda r: (r["encoder"], r["preset"], r["base"], r["seed"], order.index(r["row"])))
        write_json(path, {"rows": rows, "environment": environment()})
    print(table(rows))


if __name__ == "__main__":
    main()
