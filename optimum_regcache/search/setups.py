"""What a search chooses from: configurations, their scores, and the space of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from optimum_regcache.config.recipe import REFINEMENTS

_INSTEAD = {  # how a table says what happens to k~ tokens
    "replace": "replace {}",
    "late_deletion": "delete {} late",
    "per_token": "{} per token at fc2",
    "threshold": "delete up to {} beyond {:g} x median",
}


@dataclass(frozen=True)
class Setup:
    """One configuration of the search.

    Attributes:
        start_block: l_p; None for no prefix.
        scope: ``onwards`` or ``single``.
        candidate: number of the mined token (strategy ``single_token``); None for the average.
        num_copies: tau.
        count: k~.
        refinement: one of ``search.refinements`` that took this setup's registers or deletion as its start; None for neither.
        kappa: of ``deletion.rule="threshold"``; None for that of the recipe.
    """

    start_block: int | None = None
    scope: str = "onwards"
    candidate: int | None = None
    num_copies: float = 1.0
    count: int = 0
    refinement: str | None = None
    kappa: float | None = None

    @property
    def key(self) -> str:
        """Stable identity in the record."""
        values = asdict(self)
        for name in ("refinement", "kappa"):
            if values[name] is None:  # as before there were any
                del values[name]
        return json.dumps(values, sort_keys=True)

    @property
    def kind(self) -> str:
        """``nothing``, ``prefix``, ``delete`` or ``both``."""
        if self.start_block is None:
            return "delete" if self.count else "nothing"
        return "both" if self.count else "prefix"

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that get the prefix."""
        if self.start_block is None:
            return ()
        return (self.start_block,) if self.scope == "single" else tuple(range(self.start_block, num_blocks))

    def describe(self) -> str:
        """Short text for tables."""
        parts, instead = [], _INSTEAD.get(self.refinement or "")
        if self.start_block is not None:
            token = "" if self.candidate is None else f" token {self.candidate}"
            only = " only" if self.scope == "single" else ""
            parts.append(f"prefix from block {self.start_block}{only}{token}, tau {self.num_copies:.3g}")
        if self.count:
            parts.append(f"delete {self.count}" if instead is None else instead.format(self.count, self.kappa))
        if self.refinement is not None and instead is None:
            parts.append(REFINEMENTS[self.refinement])
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True)
class Trial:
    """A configuration and its score on each selection image that it was tried on."""

    setup: Setup
    scores: torch.Tensor

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    def lead(self, other: Trial) -> tuple[float, float]:
        """Mean of the paired difference to ``other``, and its standard error (infinite for one image)."""
        return mean_and_error(self.scores - other.scores)


def mean_and_error(differences: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error, infinite for a single value."""
    count = len(differences)
    return float(differences.mean()), float(differences.std() / math.sqrt(count)) if count > 1 else math.inf


def best(trials: Iterable[Trial], kind: str | None = None) -> Trial | None:
    """Largest mean (of one kind); the earliest of equals. A score that is not a number never wins."""
    wanted = (t for t in trials if not math.isnan(t.mean) and kind in (None, t.setup.kind))
    return max(wanted, key=lambda t: t.mean, default=None)


def sparing(trials: Iterable[Trial], kind: str, min_gain: float) -> Trial | None:
    """The trial of one kind with the smallest ``k~`` among those that are less than ``min_gain`` behind the best."""
    top = best(trials := list(trials), kind)
    if top is None:
        return None
    near = [t for t in trials if t.setup.kind == kind and (t is top or top.mean - t.mean < min_gain)]
    least = min(t.setup.count for t in near)
    return best(t for t in near if t.setup.count == least)


@dataclass(frozen=True)
class Space:
    """Everything that may be installed.

    Attributes:
        starts: (start block, number of the mined token or None for the average, scope).
        copies: tau.
        max_count: largest k~.
    """

    starts: tuple[tuple[int, int | None, str], ...]
    copies: tuple[float, ...]
    max_count: int

    def prefixes(self, copies: tuple[float, ...] | None = None) -> list[Setup]:
        """Every prefix without deletion; with ``copies`` in place of every tau."""
        copies = self.copies if copies is None else copies
        return [Setup(block, scope, number, tau) for block, number, scope in self.starts for tau in copies]

    @property
    def counts(self) -> range:
        """k~ from 1."""
        return range(1, self.max_count + 1)

    @property
    def few_counts(self) -> tuple[int, ...]:
        """1, 2, 4, ... and the largest k~."""
        found = {1 << power for power in range(self.max_count.bit_length())}
        return tuple(sorted(found | {self.max_count} if self.max_count else ()))

    @property
    def few_copies(self) -> tuple[float, ...]:
        """Every second tau from the ends on."""
        last = len(self.copies) - 1
        return tuple(c for i, c in enumerate(self.copies) if i % 2 == 0 or i == last)
