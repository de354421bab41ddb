"""The pure functions behind token deletion, against brute force."""
# pyright: reportArgumentType=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from references import neighbour_mean

from optimum_regcache import DeletionConfig
from optimum_regcache.encoders.tower import PatchSpan
from optimum_regcache.registers import deletion as D

NEVER = float("-inf")
LOWEST = torch.finfo(torch.float32).min


def chosen(scores: list[float], count: int, valid: list[int] | None = None, **settings: Any) -> list[int]:
    """Positions that `choose_dropped` takes from one image."""
    row = torch.tensor([scores])
    real = torch.ones_like(row, dtype=torch.bool) if valid is None else torch.tensor([valid]).bool()
    config = DeletionConfig(block=0, count=count, **settings)
    return D.choose_dropped(row, real, config)[0].nonzero().flatten().tolist()


def random_selection(seed: int, tokens: int, lead: int, count: int, batch: int = 3) -> torch.Tensor:
    """bool [batch, tokens]: ``count`` random patches of each image."""
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in dropped:
        row[lead + torch.randperm(tokens - lead, generator=generator)[:count]] = True
    return dropped


def test_topk_takes_the_largest_and_the_first_of_equals() -> None:
    assert chosen([NEVER, 1.0, 5.0, 3.0, 4.0, 2.0], 2) == [2, 4]
    assert chosen([2.0, 1.0, 2.0, 2.0, 0.0, 0.0], 2) == [0, 2]


def test_small_images_lose_at_most_half_and_padding_makes_up_the_rest() -> None:
    scores = [4.0, 3.0, 2.0, 1.0, NEVER, NEVER, NEVER, NEVER]
    valid = [1, 1, 1, 1, 0, 0, 0, 0]
    assert chosen(scores, 2, valid) == [0, 1]
    assert chosen(scores, 4, valid) == [0, 1, 4, 5]
    assert chosen([5.0, 3.0, 1.0, *[NEVER] * 5], 4, [1, 1, 1, 0, 0, 0, 0, 0]) == [0, 3, 4, 5]


def test_protected_tokens_are_never_chosen_and_never_count_as_padding() -> None:
    assert chosen([NEVER, NEVER, 1.0, 2.0], 1) == [3]
    assert chosen([NEVER, NEVER, 1.0, 2.0], 2) == [3]  # of two real tokens one may go; no padding to take


def test_threshold_compares_with_the_median_of_the_candidates() -> None:
    scores = [NEVER, 1.0, 1.0, 1.0, 9.0, 11.0]
    assert chosen(scores, 3, rule="threshold", kappa=10.0) == [5]
    assert chosen(scores, 3, rule="threshold", kappa=8.0) == [4, 5]
    assert chosen(scores, 1, rule="threshold", kappa=8.0) == [5]
    assert chosen(scores, 3, rule="threshold", kappa=11.0) == []  # "exceeds" is strict
    # padding and protected tokens are not in the median
    assert chosen([NEVER] * 20 + [1.0, 1.0, 9.0], 3, [0] * 20 + [1, 1, 1], rule="threshold", kappa=8.0) == [22]


@pytest.mark.parametrize("seed", range(5))
def test_kept_positions_and_spreading_undo_the_gather(seed: int) -> None:
    dropped = random_selection(seed, 11, 1, 4)
    kept = D.kept_positions(dropped, 4)
    for row, positions in zip(dropped, kept, strict=True):
        assert positions.tolist() == (~row).nonzero().flatten().tolist()
    hidden = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(seed))
    gathered = D.gather_tokens(hidden, kept)
    assert gathered.shape == (3, 7, 5)
    spread = D.spread_tokens(gathered, D.Selection(dropped, kept, 4, None, PatchSpan(1)))
    assert spread.shape == hidden.shape
    assert torch.equal(spread[~dropped], hidden[~dropped])
    assert D.spread_tokens(hidden, D.Selection(dropped, None, 4, None, PatchSpan(1))) is hidden


def test_outlier_scores_are_the_largest_magnitude() -> None:
    hidden = torch.tensor([[[1.0, -7.0], [3.0, 3.0], [-9.0, 0.0]]], dtype=torch.bfloat16)
    scores = D.outlier_scores(hidden, torch.tensor([[True, True, False]]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[7.0, 3.0, NEVER]]


def test_valid_tokens_reads_every_kind_of_mask() -> None:
    real = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    square = real[:, None, None, :].expand(2, 1, 3, 3)
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~square, LOWEST)
    infinite = torch.zeros(2, 1, 3, 3).masked_fill(~square, NEVER)
    for mask in (real, real.long(), square, additive, infinite, additive.bfloat16()):
        assert torch.equal(D.valid_tokens(mask, 2, 3, torch.device("cpu")), real)
    assert D.valid_tokens(None, 2, 3, torch.device("cpu")).tolist() == [[True] * 3] * 2
    one = D.valid_tokens(square[:1], 2, 3, torch.device("cpu"))
    assert torch.equal(one, real[:1].expand(2, 3))


def narrow(mask: torch.Tensor | None, gather: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    dropped = random_selection(0, 6, 1, 2, batch=2)
    kept = D.kept_positions(dropped, 2)
    return D.narrow_mask(
        mask, D.Selection(dropped, kept if gather else None, 2, None, PatchSpan(1)), torch.float32
    ), dropped


def test_narrow_mask_after_gathering() -> None:
    assert narrow(None, True)[0] is None
    values = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    dropped = narrow(None, True)[1]
    for i in range(2):
        rows = (~dropped[i]).nonzero().flatten()
        assert torch.equal(narrow(values, True)[0][i, 0], values[i, 0][rows][:, rows])
        assert torch.equal(narrow(values[:1], True)[0][i, 0], values[0, 0][rows][:, rows])
        assert torch.equal(narrow(values[:, :, :1], True)[0][i, 0], values[i, 0, :1][:, rows])
        assert torch.equal(narrow(values[:, 0, 0] > 0, True)[0][i], values[i, 0, 0][rows] > 0)
        assert torch.equal(narrow(values > 0, True)[0][i, 0], values[i, 0][rows][:, rows] > 0)


def test_narrow_mask_in_place() -> None:
    """Deleted columns are closed, the rest of the mask stays."""
    dropped: Any = narrow(None, False)[1]
    closed = dropped[:, None, None, :]
    assert torch.equal(narrow(None, False)[0], torch.zeros(2, 1, 1, 6).masked_fill(closed, LOWEST))
    open_ = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~open_, LOWEST)
    expected = additive.masked_fill(closed, LOWEST)
    assert torch.equal(narrow(additive, False)[0], expected)
    assert torch.equal(narrow(open_, False)[0], expected)
    flat = open_[:, 0, 0]
    assert torch.equal(narrow(flat, False)[0], flat & ~dropped)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 3), (1, 14)])
@pytest.mark.parametrize("lead", [0, 1, 5])
def test_fill_equals_brute_force(grid: tuple[int, int], lead: int, count: int) -> None:
    size = grid[0] * grid[1]
    dropped = random_selection(size + lead + count, lead + size, lead, count)
    full = torch.randn(3, lead + size, 6, generator=torch.Generator().manual_seed(count))
    selection = D.Selection(dropped, None, count, grid, PatchSpan(lead))
    filled = D.fill_deleted(full.masked_fill(dropped[..., None], float("1e9")), selection)
    for before, after, gone in zip(full.numpy(), filled.numpy(), dropped, strict=True):
        patches = gone[lead:].nonzero().flatten().tolist()
        np.testing.assert_array_equal(after[:lead], before[:lead])
        np.testing.assert_allclose(after[lead:], neighbour_mean(before[lead:], patches, grid), rtol=1e-5, atol=1e-6)


def test_fill_on_a_grid_per_image_skips_padding() -> None:
    grids = torch.tensor([[3, 4], [2, 3], [4, 3]])
    size = grids.prod(1, keepdim=True)
    valid = torch.arange(12) < size
    full = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(0))
    full[~valid] = 1e9
    dropped = torch.zeros(3, 12, dtype=torch.bool)
    for row, patches in zip(dropped, ([0, 11], [2, 5], [4, 8]), strict=True):
        row[patches] = True
    filled = D.fill_deleted(full, D.Selection(dropped, None, 2, grids, PatchSpan(0)), valid)
    for i, (rows, columns) in enumerate(grids.tolist()):
        n = rows * columns
        patches = dropped[i, :n].nonzero().flatten().tolist()
        expected = neighbour_mean(full[i, :n].numpy(), patches, (rows, columns))
        np.testing.assert_allclose(filled[i, :n].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(filled[i, n:], full[i, n:])


def test_fill_without_a_known_grid() -> None:
    """A square is assumed, as for grids that do not fit; where there is none, the mean of all kept patches is used."""
    full = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    dropped = torch.zeros(1, 10, dtype=torch.bool)
    dropped[0, 1] = True
    square = neighbour_mean(full[0, 1:].numpy(), [0], (3, 3))
    for grid in (None, (3, 3), (2, 5)):
        filled = D.fill_deleted(full, D.Selection(dropped, None, 1, grid, PatchSpan(1)))
        np.testing.assert_allclose(filled[0, 1:].numpy(), square, rtol=1e-5, atol=1e-6)
    filled = D.fill_deleted(full, D.Selection(dropped, None, 1, None, PatchSpan(0)))
    kept = [i for i in range(10) if i != 1]
    torch.testing.assert_close(filled[0, 1], full[0, kept].mean(0))
    assert torch.equal(filled[0, kept], full[0, kept])


def test_fill_leaves_images_alone_that_lost_nothing() -> None:
    full = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    dropped = torch.zeros(2, 9, dtype=torch.bool)
    dropped[1, 4] = True
    filled = D.fill_deleted(full, D.Selection(dropped, None, 3, (3, 3), PatchSpan(0)))
    assert torch.equal(filled[0], full[0])
    others = [i for i in range(9) if i != 4]
    assert torch.equal(filled[1, others], full[1, others])
    torch.testing.assert_close(filled[1, 4], full[1, others].mean(0))


def test_fill_keeps_the_dtype() -> None:
    full = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    dropped = torch.zeros(1, 9, dtype=torch.bool)
    dropped[0, 0] = True
    filled = D.fill_deleted(full, D.Selection(dropped, None, 1, (3, 3), PatchSpan(0)))
    assert filled.dtype == torch.bfloat16
    torch.testing.assert_close(filled[0, 0].float(), full[0, [1, 3, 4]].float().mean(0), rtol=0.02, atol=0.02)
