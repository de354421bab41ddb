"""Training images in the order of their difficulty."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_regcache.methods._reconstruction.curriculum import RESORT, Curriculum, fraction

GROUPS = [[0, 1, 2, 3, 4, 5, 6], [10, 11, 12], [20]]
ITEMS = [item for group in GROUPS for item in group]


def hardness(items: list[int]) -> torch.Tensor:
    """Items of small numbers are hard."""
    return torch.tensor([-float(item) for item in items])


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(1, 9000))
def test_the_fraction_grows_from_the_first_to_one(first: float, steps: int) -> None:
    assert fraction(0, steps, first) == first
    assert fraction(steps, steps, first) == pytest.approx(1.0)
    assert fraction(2 * steps, steps, first) == 1.0
    values = [fraction(steps * part // 7, steps, first) for part in range(8)]
    assert values == sorted(values)
    assert fraction(3, 4) == 0.875


def test_a_draw_is_of_the_easiest_of_one_list() -> None:
    steps = 200
    for step, draw in enumerate(islice(Curriculum(GROUPS, 3, 0, steps, hardness), steps + 60)):
        pool = set(sorted(ITEMS, reverse=True)[: math.ceil(fraction(step, steps) * len(ITEMS))])
        assert set(draw) <= pool
        group = next(group for group in GROUPS if draw[0] in group)
        assert set(draw) <= set(group)
        assert len(set(draw)) == len(draw) == min(3, len(pool & set(group)))


def test_the_end_draws_every_item_and_the_start_half_of_them() -> None:
    steps = RESORT * 2
    draws = list(islice(Curriculum(GROUPS, 2, 0, steps, hardness), steps + 300))
    assert {item for draw in draws[:5] for item in draw} <= {20, 12, 11, 10, 6, 5, 4}
    assert {item for draw in draws[steps:] for item in draw} == set(ITEMS)
    whole = islice(Curriculum(GROUPS, 2, 0, steps, hardness, first=1.0), 300)
    assert {item for draw in whole for item in draw} == set(ITEMS)


def test_losses_are_asked_for_anew_in_lists_that_can_run_together() -> None:
    asked: list[list[int]] = []

    def losses(items: list[int]) -> torch.Tensor:
        asked.append(items)
        return hardness(items) * (1 if len(asked) <= 5 else -1)  # the second time the order is the reverse

    draws = list(islice(Curriculum(GROUPS, 3, 0, 10**6, losses), 2 * RESORT))
    assert asked == 2 * [[0, 1, 2], [3, 4, 5], [6], [10, 11, 12], [20]]
    assert {item for draw in draws[:RESORT] for item in draw} == {20, 12, 11, 10, 6, 5}
    assert {item for draw in draws[RESORT:] for item in draw} == {0, 1, 2, 3, 4, 5}


def test_what_has_no_loss_is_the_hardest() -> None:
    def losses(items: list[int]) -> torch.Tensor:
        return torch.tensor([math.nan if item == 20 else -math.inf if item == 0 else 1.0 for item in items])

    draws = list(islice(Curriculum(GROUPS, 1, 0, 10**6, losses), 40))
    assert {item for draw in draws for item in draw} == {0, 1, 2, 3, 4, 5}


def test_the_seed_decides() -> None:
    first, again, other = (list(islice(Curriculum(GROUPS, 2, s, 100, hardness), 120)) for s in (3, 3, 4))
    assert first == again != other


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="A curriculum needs items to draw from"):
        Curriculum([[]], 2, 0, 10, hardness)
    with pytest.raises(ValueError, match="needs size and steps of at least 1, got 0 and 10"):
        Curriculum(GROUPS, 0, 0, 10, hardness)
    for first in (0.0, 1.5):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            Curriculum(GROUPS, 2, 0, 10, hardness, first)
