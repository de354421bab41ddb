"""Refinements of the best setups of a search: other registers, or another fate of the outlier tokens, in their place,
installed only if they win (docs/method.md 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import REFINEMENTS
from optimum_regcache.encoders.passes import ImageRange, count_images
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.block_copies import tune_copies
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.mining import MinedTokens
from optimum_regcache.search.setups import Setup, Trial, mean_and_error
from optimum_regcache.search.trials import TrialRunner
from optimum_regcache.search.tuning import TuningSettings, tune_registers

CLUSTERS = (2, 4)
TUNING = TuningSettings()
KAPPAS = (2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Start:
    """What a refinement starts from. It sees no confirmation image.

    Attributes:
        runner: models and calibration images.
        selection: objective on the selection images.
        cache: registers of the best setup with a prefix.
        copies: their tau.
        deletion: what is deleted with them.
        tokens: that the registers were made of.
        seed: of everything random.
    """

    runner: TrialRunner
    selection: Objective
    cache: RegisterCache
    copies: float
    deletion: DeletionConfig
    tokens: MinedTokens
    seed: int


def clusters(start: Start) -> RegisterCache:
    """2 or 4 registers per block, each with the tau of the start or with its share of it: the best on the selection images."""
    blocks, depth, tau = start.cache.blocks, len(start.cache.layers), start.copies
    made = [start.tokens.clusters(k, blocks, depth, start.seed) for k in CLUSTERS]
    tried = [c.restricted(blocks, t) for c in made for t in dict.fromkeys((tau, tau / c.num_registers))]
    scores = [float(start.runner.score(c, start.deletion, start.selection).mean()) for c in tried]
    return tried[max(range(len(tried)), key=lambda i: (scores[i] == scores[i], scores[i], -i))]


def block_copies(start: Start) -> RegisterCache:
    """tau of each block by itself, or no register there (`tune_copies`), by the selection images."""
    return tune_copies(start.runner, start.cache, start.deletion, start.selection, progress=False)[0]


def tuned(start: Start) -> RegisterCache:
    """Gradients (`tune_registers`) from the later three quarters of the selection images; the first quarter ends it."""
    held_out = max(1, count_images(start.selection.batches) // 4)
    train = ImageRange(start.selection.batches, first=held_out)
    settings = replace(TUNING, seed=start.seed)
    return tune_registers(
        start.runner, start.cache, start.deletion, train, start.selection.first(held_out), settings, progress=False
    )[0]


MAKERS: dict[str, Callable[[Start], RegisterCache]] = {
    "clusters": clusters,
    "block_copies": block_copies,
    "tuned": tuned,
}


def deletions(name: str, start: Setup, most: int) -> list[Setup]:
    """What ``name`` of `DELETION_REFINEMENTS` tries in the place of the deletion of ``start``, or of none: neighbouring k~ up
    to ``most``. A threshold takes k~ or fewer tokens, so it tries k~ and twice that, each with several kappas."""
    k = start.count
    near = ({k, 2 * k} if name == "threshold" else {k - 1, k, k + 1, 2 * k}) if k else {1, 2}
    kappas = KAPPAS if name == "threshold" else (None,)
    counts = sorted(count for count in near if 0 < count <= most)
    return [replace(start, count=count, refinement=name, kappa=kappa) for count in counts for kappa in kappas]


@dataclass(frozen=True)
class RefinementTrial:
    """How a refinement did.

    Attributes:
        setup: with the refinement.
        score: mean on the selection images, with round to nearest.
        rival: what would be installed without refinements, or the start if that is nothing.
        gain, error, needed: paired gain over ``rival`` on the confirmation images, its standard error, and what it needs to be.
        over_nothing, over_nothing_error, over_nothing_needed: the same over "nothing".
        chosen: the first in order of ``score`` that reaches both.
    """

    setup: Setup
    score: float
    rival: Setup
    gain: float
    error: float
    needed: float
    over_nothing: float
    over_nothing_error: float
    over_nothing_needed: float
    chosen: bool = False

    def describe(self) -> str:
        """Words for a report."""
        what = REFINEMENTS[str(self.setup.refinement)]
        return f"{what} {self.gain:+.4f} +- {self.error:.4f}, needed {self.needed:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "name": self.setup.refinement,
            "text": self.setup.describe(),
            "score": self.score,
            "over": self.rival.describe(),
            "gain": self.gain,
            "error": self.error,
            "needed": self.needed,
            "over_nothing": {
                "gain": self.over_nothing,
                "error": self.over_nothing_error,
                "needed": self.over_nothing_needed,
            },
            "chosen": self.chosen,
        }


def judge_refinements(
    trials: Sequence[Trial], rival: Setup, confirm: Callable[[Setup], torch.Tensor], min_gain: float, sigmas: float
) -> list[RefinementTrial]:
    """Compare refinements with "nothing" and with ``rival`` on the confirmation images.

    Args:
        trials: on the selection images, in the order in which they may win.
        rival: see `RefinementTrial`.
        confirm: scores of a setup on the confirmation images, float32 [n].
        min_gain: smallest gain worth anything.
        sigmas: standard errors that a gain needs, corrected for the number of tests.
    """
    records: list[RefinementTrial] = []
    for trial in trials:
        scores = confirm(trial.setup)
        gain, error = mean_and_error(scores - confirm(rival))
        over, over_error = mean_and_error(scores - confirm(Setup()))
        needed, over_needed = (max(min_gain, sigmas * e) for e in (error, over_error))
        wins = gain > 0 and gain >= needed and over >= over_needed and not any(r.chosen for r in records)
        records.append(
            RefinementTrial(trial.setup, trial.mean, rival, gain, error, needed, over, over_error, over_needed, wins)
        )
    return records


class RefinedRegisters:
    """Registers of refinements, each made once and kept beside the journal.

    Args:
        journal: of the fit; without a file everything stays in memory.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._made: dict[Setup, RegisterCache] = {}

    def __call__(self, setup: Setup, make: Callable[[], RegisterCache]) -> RegisterCache:
        """The registers of ``setup``, on the CPU.

        Raises:
            ValueError: a file that is not what was written, or is gone.
        """
        if setup not in self._made:
            name, file = f"registers {setup.key}", str(setup.refinement)
            self._made[setup] = from_tensors(self.journal.kept(name, file, lambda: to_tensors(make())))
        return self._made[setup]


def to_tensors(cache: RegisterCache) -> dict[str, torch.Tensor]:
    """Rows and tau of each block by name, for a file."""
    tensors = {"blocks": torch.tensor(len(cache.layers))}
    for block in cache.blocks:
        keys, values = cache.rows(block)
        tensors[f"{block}.key"] = keys.detach().cpu().clone()
        tensors[f"{block}.value"] = values.detach().cpu().clone()
        tensors[f"{block}.copies"] = torch.tensor(cache.copies(block), dtype=torch.float64)
    return tensors


def from_tensors(tensors: dict[str, torch.Tensor]) -> RegisterCache:
    """From what :func:`to_tensors` made."""
    blocks = sorted(int(name.partition(".")[0]) for name in tensors if name.endswith(".key"))
    keys, values = ({b: tensors[f"{b}.{kind}"] for b in blocks} for kind in ("key", "value"))
    return RegisterCache(keys, values, int(tensors["blocks"]), {b: float(tensors[f"{b}.copies"]) for b in blocks})
