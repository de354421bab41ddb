"""Which registers: mined, averaged, clustered, with tau per block, or tuned by gradients, with and without deletion; and what
may happen to outlier tokens instead of deletion.

    OMP_NUM_THREADS=1 python benchmarks/bench_registers.py                     # a quarter of an hour for each encoder
    python benchmarks/bench_registers.py --encoder clip-scenes-induced --preset w4a4 --seed 0 1 2
    python benchmarks/bench_registers.py --preset w4a4 --more                  # where the rest of the loss comes from
    python benchmarks/bench_registers.py --instead --output instead.json       # other fates of the outlier tokens

Start block, tau and ``k~`` of the averaged register are chosen on the selection images by a grid; all other rows start from
that choice and change one thing, judged on the same images. ``--instead`` starts from the best averaged register with deletion,
and from the best deletion alone; each row has the best of the variants that the search tries. Tuning trains on the selection
images and stops by the confirmation images. The report images choose nothing. Results are added to the JSON file as they come,
and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from optimum_regcache.commands.sources import accuracy_data, open_source
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DELETION_REFINEMENTS, Recipe
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective, score_both
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.block_copies import tune_copies
from optimum_regcache.search.fit import search_config
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.refine import deletions
from optimum_regcache.search.setups import Setup
from optimum_regcache.search.trials import TrialRunner
from optimum_regcache.search.tuning import TuningSettings, tune_registers
from stored_rows import StoredRows

SENSITIVE = {"clip-scenes-induced": 3, "siglip-scenes-induced": 3}
TAUS = (0.25, 0.7, 1.0, 2.0, 4.0, 8.0, 15.0)
COUNTS = (1, 2, 3, 4, 5, 6)
CANDIDATES = 8
INSTEAD = {  # refinement -> row
    "replace": "replace",
    "late_deletion": "late",
    "per_token": "per token at fc2",
    "threshold": "threshold",
}


@dataclass
class Start:
    """The best averaged register: where, how often, how many tokens are deleted."""

    block: int
    tau: float
    count: int


class Bench:
    """One encoder at one width with one division of the images."""

    def __init__(self, encoder: str, preset: str, seed: int, steps: int) -> None:
        recipe = Recipe.load(preset).override([f"search.seed={seed}"])
        source = open_source(encoder, None, recipe)
        plan = QuantizationPlan.of(recipe)
        parts = ReferenceImages(source.search_images, source.processor, template=source.template).split(
            recipe.data, seed
        )
        calibration, selection, confirmation = (
            list(p.batches(size))
            for p, size in ((parts.calibration, 32), (parts.selection, 16), (parts.confirmation, 32))
        )
        self.config = config = search_config(plan.resolved.config)
        self.runner = TrialRunner(source.model, config, calibration)
        token = {"mode": "dynamic", "granularity": "per_token"}
        self.limits = {
            name: TrialRunner(source.model, config.replace(activations=activations), calibration)
            for name, activations in (("weights only", {"bits": 16}), ("per token", token))
        }
        self.selection, self.confirmation = (
            CosineObjective(self.runner.float_model, b) for b in (selection, confirmation)
        )
        self.seed, self.sensitive, self.depth = seed, SENSITIVE[encoder], self.runner.depth
        self.settings = TuningSettings(
            steps=steps, learning_rate=0.1, bias_learning_rate=0.2, recalibrate_every=10, evaluate_every=25, seed=seed
        )
        report = ImageInputs(source.report_images, source.processor)
        batches = list(report.batches(64))
        labels, text = accuracy_data(source, report)
        self.cosine = CosineObjective(self.runner.float_model, batches)
        self.accuracy = None if labels is None else AccuracyObjective(batches, labels, text)
        blocks = [b for b in range(self.sensitive - 1, self.sensitive + 1) if b >= 0]
        self.mined: dict[int, MinedTokens] = mine_tokens(
            self.runner.float_model, calibration + selection, blocks, seed=seed, progress=False
        )

    def score(self, cache: RegisterCache | None, deletion: DeletionConfig) -> float:
        """On the selection images."""
        return float(self.runner.score(cache, deletion, self.selection).mean())

    def report(
        self, cache: RegisterCache | None, deletion: DeletionConfig, limit: str | None = None
    ) -> dict[str, float | None]:
        """Cosine and top-1 on the report images; ``limit`` names another quantization of the activations."""
        runner = self.runner if limit is None else self.limits[limit]
        runner.install(cache, deletion)
        scores, hits = score_both(runner.quantized, self.cosine, self.accuracy)
        runner.reset()
        return {"cosine": float(scores.mean()), "accuracy": None if hits is None else float(hits.mean())}

    def deletion(self, count: int) -> DeletionConfig:
        """At the sensitive block."""
        return DeletionConfig(block=self.sensitive, count=count) if count else DeletionConfig()

    def blocks(self, start: Start) -> tuple[int, ...]:
        return tuple(range(start.block, self.depth))

    def average(self, start: Start) -> RegisterCache:
        blocks = self.blocks(start)
        return self.mined[start.block].average(blocks, self.depth).restricted(blocks, start.tau)

    def start(self, delete: bool) -> Start:
        """The best averaged register with tau 1, then its tau, then its ``k~`` again."""
        counts = COUNTS if delete else (0,)
        starts = [Start(block, 1.0, count) for block, count in product(self.mined, counts)]
        best = max(starts, key=lambda s: self.score(self.average(s), self.deletion(s.count)))
        starts = [Start(best.block, tau, best.count) for tau in TAUS]
        best = max(starts, key=lambda s: self.score(self.average(s), self.deletion(s.count)))
        if not delete:
            return best
        starts = [Start(best.block, best.tau, count) for count in COUNTS]
        return max(starts, key=lambda s: self.score(self.average(s), self.deletion(s.count)))

    def start_alone(self) -> Start:
        """The best deletion without a register."""
        best = max(COUNTS, key=lambda count: self.score(None, self.deletion(count)))
        return Start(self.sensitive, 1.0, best)

    def instead(self, start: Start, cache: RegisterCache | None) -> Iterator[tuple[str, DeletionConfig]]:
        """(name, deletion): deletion as it is, and the best variant of each other fate of the outlier tokens."""
        yield "delete", self.deletion(start.count)
        for name, row in INSTEAD.items():
            tried = [
                DeletionConfig(self.sensitive, s.count, kappa=s.kappa or 5.0, **DELETION_REFINEMENTS[name])
                for s in deletions(name, Setup(count=start.count), max(COUNTS))
            ]
            yield row, max(tried, key=lambda deletion: self.score(cache, deletion))

    def more(self, start: Start) -> Iterator[tuple[str, RegisterCache, str | None]]:
        """(name, registers, limit): 16-bit activations before, or in, the blocks with registers; other ways to tune."""
        average, blocks, deletion = self.average(start), self.blocks(start), self.deletion(start.count)
        for name, wide in (("before", range(start.block)), ("in", blocks)):
            patterns = tuple(f"*layers.{block}.*" for block in wide)
            name = f"averaged, scalar tau; 16 bits {name} its blocks"
            config = self.config.replace(modules={"mixed_precision": patterns})
            self.limits[name] = TrialRunner(self.runner.float_model, config, self.runner.calibration)
            yield name, average, name
        four = self.mined[start.block].clusters(4, blocks, self.depth, self.seed).restricted(blocks, start.tau / 4)
        weighted = replace(self.settings, norm_weight=1e-3)
        for name, cache, settings in (
            ("k-means 4, gradient-tuned", four, self.settings),
            ("gradient-tuned, norm term 0.001", average, weighted),
        ):
            found, _ = tune_registers(
                self.runner, cache, deletion, self.selection, self.confirmation, settings, progress=False
            )
            yield name, found, None

    def rows(self, start: Start) -> Iterator[tuple[str, RegisterCache | None, dict[str, Any]]]:
        """(name, registers, what was found) of every row but float."""
        deletion, blocks, mined = self.deletion(start.count), self.blocks(start), self.mined[start.block]

        def best(caches: list[RegisterCache]) -> RegisterCache:
            return max(caches, key=lambda c: self.score(c, deletion))

        def taus(cache: RegisterCache) -> list[RegisterCache]:
            return [cache.restricted(blocks, tau) for tau in TAUS]

        yield "no register", None, {}
        singles = [mined.single(i, blocks, self.depth) for i in range(min(CANDIDATES, len(mined.norms)))]
        cache = best(taus(best(singles)))
        yield "mined single", cache, {}
        yield "averaged, tau 1", self.average(start).restricted(blocks, 1.0), {}
        average = self.average(start)
        yield "averaged, scalar tau", average, {}
        for k in (2, 4):
            cache = best(taus(mined.clusters(k, blocks, self.depth, self.seed)))
            yield f"k-means {k}", cache, {"rows": cache.num_registers}
        cache, trials = tune_copies(self.runner, average, deletion, self.selection, progress=False)
        yield "averaged, tau per block", cache, {"trials": len(trials)}
        cache, record = tune_registers(
            self.runner, average, deletion, self.selection, self.confirmation, self.settings, progress=False
        )
        yield "gradient-tuned", cache, {"record": record.to_dict()}


def measure(bench: Bench, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All rows, one after the other."""
    bench.runner.reset()
    scores, hits = score_both(bench.runner.float_model, bench.cosine, bench.accuracy)
    accuracy = None if hits is None else float(hits.mean())
    yield {**given, "deletion": 0, "row": "float", "cosine": float(scores.mean()), "accuracy": accuracy}
    for name in bench.limits:  # what no register can reach: weights quantized, activations hardly or for each token
        yield {**given, "deletion": 0, "row": name, **bench.report(None, DeletionConfig(), name)}
    for delete in (False, True):
        start = bench.start(delete)
        begun = time.perf_counter()
        for name, cache, found in bench.rows(start):
            seconds, row = round(time.perf_counter() - begun, 1), {**given, "deletion": start.count, "row": name}
            blocks, taus = (cache.blocks, cache.num_copies) if cache is not None else ((), None)
            selection = bench.score(cache, bench.deletion(start.count))
            row |= {"blocks": list(blocks), "tau": taus, "selection": selection, "seconds": seconds}
            yield {**row, **bench.report(cache, bench.deletion(start.count)), **found}
            begun = time.perf_counter()


def measure_more(bench: Bench, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of `Bench.more`, with deletion."""
    start = bench.start(True)
    for name, cache, limit in bench.more(start):
        where = {"blocks": list(cache.blocks), "tau": cache.num_copies}
        row = {**given, "deletion": start.count, "row": name, **where}
        yield {**row, **bench.report(cache, bench.deletion(start.count), limit)}


def measure_instead(bench: Bench, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of `Bench.instead`, with the best averaged register and without."""
    for prefix in (True, False):
        start = bench.start(True) if prefix else bench.start_alone()
        cache = bench.average(start) if prefix else None
        where: dict[str, Any] = {"blocks": [], "tau": None}
        if cache is not None:
            where = {"blocks": list(cache.blocks), "tau": cache.num_copies}
        begun = time.perf_counter()
        for name, deletion in bench.instead(start, cache):
            row = {**given, "deletion": deletion.count, "row": name if prefix else f"{name}, no register", **where}
            if deletion.rule == "threshold":
                row["kappa"] = deletion.kappa
            row |= {"selection": bench.score(cache, deletion), "seconds": round(time.perf_counter() - begun, 1)}
            yield {**row, **bench.report(cache, deletion)}
            begun = time.perf_counter()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ``gap closed``: of the cosine that the row "averaged, scalar tau" of the same deletion lacks to 1."""
    lines = [
        "| encoder | bits | seed | deleted | registers | blocks | tau | cosine | gap closed | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    group = ("encoder", "preset", "seed")
    base = {tuple(r[k] for k in (*group, "deletion")): r["cosine"] for r in rows if r["row"] == "averaged, scalar tau"}
    for r in rows:
        known = base.get(tuple(r[k] for k in (*group, "deletion")))
        gap = "-" if known is None or not r.get("blocks") else f"{100 * (r['cosine'] - known) / (1 - known):+.0f} %"
        taus = r.get("tau")
        taus = [] if taus is None else taus if isinstance(taus, (list, tuple)) else [taus]
        top1 = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.2f} %"
        where = ", ".join(map(str, r.get("blocks", []))) or "-"
        lines.append(
            f"| {r['encoder']} | {r['preset']} | {r['seed']} | {r['deletion']} | {r['row']} | {where} | "
            f"{', '.join(f'{t:.3g}' for t in taus) or '-'} | {r['cosine']:.4f} | {gap} | {top1} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=list(SENSITIVE), choices=tuple(SENSITIVE))
    parser.add_argument("--preset", nargs="+", default=["w4a4", "w6a6", "w8a8"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300, help="of the gradient tuning")
    rows_wanted = parser.add_mutually_exclusive_group()
    rows_wanted.add_argument("--more", action="store_true", help="rows that tell where the rest of the loss comes from")
    rows_wanted.add_argument("--instead", action="store_true", help="rows of what may happen instead of deletion")
    parser.add_argument("--output", type=Path, default=Path("bench-registers.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    measured, mark = measure, ""  # what is measured, and a word of a row of it
    if arguments.more:
        measured, mark = measure_more, "16 bits"
    elif arguments.instead:
        measured, mark = measure_instead, "per token at fc2"
    stored = StoredRows(arguments.output)
    for encoder, preset, seed in product(arguments.encoder, arguments.preset, arguments.seed):
        given = {"encoder": encoder, "preset": preset, "seed": seed}
        if any(mark in row["row"] for row in stored.matching(**given)):
            continue
        found: list[dict[str, Any]] = []
        for row in measured(Bench(encoder, preset, seed, arguments.steps), given):
            found.append(row)
            print({k: v for k, v in row.items() if k != "record"}, flush=True)
        stored.add(found)
    print(table(stored.rows))


if __name__ == "__main__":
    main()
