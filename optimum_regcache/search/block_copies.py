"""tau of each block by itself: a greedy search along one block after the other (docs/method.md 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.trials import TrialRunner

STEPS = ((-3.0, -1.5, 1.5, 3.0), (-0.7, 0.7))  # of ln(tau), in the rounds


@dataclass(frozen=True)
class CopiesTrial:
    """One configuration that was tried.

    Attributes:
        copies: block -> tau; a block that is not there has no register.
        score: mean over the images.
    """

    copies: dict[int, float]
    score: float


def tune_copies(
    runner: TrialRunner,
    cache: RegisterCache,
    deletion: DeletionConfig,
    objective: Objective,
    *,
    steps: tuple[tuple[float, ...], ...] = STEPS,
    progress: bool = True,
) -> tuple[RegisterCache, list[CopiesTrial]]:
    """Choose tau block by block, or no register for a block, by the mean score after calibration.

    Each round goes through the blocks in ascending order; a block takes the best of its tau times ``exp(step)`` and, in the
    first round, of "off", where that is better than what it has, and the next block is judged with it.

    Args:
        runner: calibrates and scores.
        cache: start; its rows do not change.
        deletion: what is deleted meanwhile.
        objective: on the images that choose.
        steps: of ``ln(tau)``, one tuple for each round.
        progress: show a progress bar.

    Returns:
        (registers, every trial in order, the start first). ``cache`` itself if nothing was better; one block keeps its rows
        in any case.

    Raises:
        ValueError: a cache without rows.
    """
    require(bool(cache.blocks), "There is no block whose tau could be searched: the cache has no rows.")
    trials: list[CopiesTrial] = []

    def score(copies: dict[int, float]) -> float:
        candidate = cache.restricted(tuple(copies), copies)
        trials.append(CopiesTrial(copies, float(runner.score(candidate, deletion, objective).mean())))
        return trials[-1].score

    start = {b: cache.copies(b) for b in cache.blocks}
    best, top = start, score(start)
    with bar(name="tau per block", total=len(steps) * len(start), shown=progress) as shown:
        for number, round_steps in enumerate(steps):
            for block in cache.blocks:
                shown.update()
                if block not in best:
                    continue
                tried = [{**best, block: best[block] * math.exp(step)} for step in round_steps]
                if number == 0 and len(best) > 1:
                    tried.append({b: tau for b, tau in best.items() if b != block})
                for copies in tried:
                    found = score(copies)
                    if found > top or math.isnan(top):
                        best, top = copies, found
    return (cache if best is start else cache.restricted(tuple(best), best)), trials
