"""Training images in the order of their difficulty (AIQViT, arXiv 2502.04628; docs/method.md 11.14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from optimum_regcache.config.validation import require

RESORT = 50  # steps that an order is used for


def fraction(step: int, steps: int, first: float = 0.5) -> float:
    """``min(1, l0 + (1 - l0) t / T)``: the share of the items that step t of T draws from, ``first`` being l0."""
    return min(1.0, first + (1.0 - first) * step / steps)


class Curriculum:
    """Draws training items out of the easiest ones: at step t those `fraction` of all with the smallest losses, which are
    computed anew every `RESORT` steps.

    Args:
        groups: lists of items that can be run together.
        size: items of a draw, fewer where a list has no more.
        seed: of the draws.
        steps: T, after which all items take part.
        losses: items of one list, at most ``size`` -> loss of each, [items]; one that is not a number counts as the largest.
        first: l0.

    Raises:
        ValueError: no items, a size or number of steps below 1, or l0 outside (0, 1].
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        size: int,
        seed: int,
        steps: int,
        losses: Callable[[list[int]], torch.Tensor],
        first: float = 0.5,
    ) -> None:
        require(any(len(group) > 0 for group in groups), "A curriculum needs items to draw from.")
        require(size >= 1 and steps >= 1, f"A curriculum needs size and steps of at least 1, got {size} and {steps}.")
        require(0.0 < first <= 1.0, f"The first fraction of a curriculum must be above 0 and at most 1, got {first}.")
        self.groups, self.size, self.steps, self.losses, self.first = groups, size, steps, losses, first
        self.total = sum(len(group) for group in groups)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        step, order = 0, list[int]()
        while True:
            if step % RESORT == 0:
                order = self._order()
            yield self._draw(order[: math.ceil(fraction(step, self.steps, self.first) * self.total)])
            step += 1

    def _order(self) -> list[int]:
        """All items, the easiest first."""
        items, found = list[int](), list[torch.Tensor]()
        for group in self.groups:
            for start in range(0, len(group), self.size):
                part = list(group[start : start + self.size])
                items += part
                found.append(self.losses(part).detach().float().cpu())
        return [items[place] for place in torch.cat(found).nan_to_num(math.inf, math.inf).argsort(stable=True).tolist()]

    def _draw(self, pool: Sequence[int]) -> list[int]:
        """Some of ``pool``, of the list of one that is drawn first."""
        inside = set(pool)
        one = pool[int(torch.randint(len(pool), (1,), generator=self._generator))]
        group = [item for item in next(group for group in self.groups if one in group) if item in inside]
        return [group[i] for i in torch.randperm(len(group), generator=self._generator)[: self.size].tolist()]
