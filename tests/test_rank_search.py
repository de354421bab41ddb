"""The search of the rank of a low-rank addition."""
# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import nn

from optimum_regcache.math import uniform
from optimum_regcache.methods._reconstruction.rank_search import (
    RANKS,
    SearchedLinear,
    SearchSettings,
    candidate_ranks,
    search_ranks,
)

ITEMS = 128
QUICK = SearchSettings(200, learning_rate=5e-3, alpha_learning_rate=1e-3)


def rounded_weight(size: int = 32, seed: int = 0) -> torch.Tensor:
    """[size, size] on the grid of 3 bits."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size)
    scale, zero = uniform.weight_qparams(weight, 3, "per_channel", "mse")
    return uniform.fake_quantize(weight, scale[:, None], zero[:, None], 3, True)


def planted(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W0, inputs and outputs of ``W0 + R``, R of this rank."""
    weight, generator = rounded_weight(seed=seed), torch.Generator().manual_seed(seed)
    residual = torch.randn(32, rank, generator=generator) @ torch.randn(rank, 32, generator=generator)
    residual = residual * (0.3 * weight.norm() / residual.norm())
    x = torch.randn(ITEMS, 2, 32, generator=generator)
    return weight, x, x @ (weight + residual).T


def draws(items: range, seed: int, size: int = 16) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        yield from ([items[i] for i in order[at : at + size]] for at in range(0, len(items), size))


def searched(rank: int, seed: int, settings: SearchSettings = QUICK, drop_path: float = 0.2) -> SearchedLinear:
    """The layer behind a search for ``rank`` among 2, 4, 8 and 16."""
    weight, x, y = planted(rank, seed)
    layer = SearchedLinear(weight, None, (2, 4, 8, 16), drop_path, seed)
    unit = (y - x @ weight.T).square().mean()
    found = search_ranks(
        {"fc1": layer},
        lambda items: (layer(x[items]) - y[items]).square().mean() / unit,
        draws(range(ITEMS // 2), seed),
        draws(range(ITEMS // 2, ITEMS), seed + 1),
        settings,
    )
    assert found == {"fc1": layer.rank()}
    assert not layer.training
    with torch.no_grad():
        assert float((layer(x) - y).square().mean() / unit) < 0.5
    return layer


def test_candidates_are_capped_at_half_the_smaller_side() -> None:
    assert candidate_ranks(768, 3072) == RANKS == (10, 20, 50, 100, 150)
    assert candidate_ranks(64, 256) == (10, 20, 32)
    assert candidate_ranks(256, 12) == (6,)
    assert candidate_ranks(1, 1) == (1,)


def test_the_search_begins_at_the_rounded_weight() -> None:
    linear = nn.Linear(12, 20)
    layer = SearchedLinear(linear.weight, linear.bias, (2, 5))
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
    assert layer.training
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.shares().tolist() == [0.5, 0.5]
    assert layer.rank() == 2
    assert not layer.weight.requires_grad
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_every_rank_has_matrices_of_its_own() -> None:
    weight = rounded_weight()
    layer = SearchedLinear(weight, None, (2, 5)).eval()
    with torch.no_grad():
        for left in layer.left:
            left.normal_(generator=torch.Generator().manual_seed(left.shape[1]))
        layer.alpha.copy_(torch.tensor([0.3, -0.2]))
    shares = torch.tensor([0.3, -0.2]).softmax(0)
    whole = weight + sum(p * b @ a for p, b, a in zip(shares, layer.left, layer.right, strict=True))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ whole.T, atol=1e-4, rtol=1e-4)
    assert [tuple(m.shape) for m, _ in layer.matrices()] == [(32, 2), (32, 5), (2, 32), (5, 32)]


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    layer = SearchedLinear(torch.zeros(1, 1), None, (1,), drop_path=0.2)
    with torch.no_grad():
        for matrix, _ in layer.matrices():
            matrix.fill_(1.0)
    y = layer(torch.ones(4000, 3, 1)).detach()
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(y[:, 0], y[:, 2])
    assert float(y.mean()) == pytest.approx(1.0, abs=0.03)
    assert layer.eval()(torch.ones(2, 3, 1)).unique().tolist() == [1.0]


@pytest.mark.parametrize("seed", range(3))
def test_ranks_below_the_planted_one_lose(seed: int) -> None:
    """Nothing in the loss holds against a rank that is larger than needed, so these may win; smaller ones do not."""
    layer = searched(8, seed)
    shares = dict(zip(layer.ranks, layer.shares().tolist(), strict=True))
    assert layer.rank() >= 8
    assert max(shares[2], shares[4]) < min(shares[8], shares[16])


def test_the_seed_decides() -> None:
    few = SearchSettings(20, learning_rate=5e-3, alpha_learning_rate=1e-3)
    weight, x, y = planted(4, 0)

    def alpha(seed: int) -> list[float]:
        layer = SearchedLinear(weight, None, (2, 8), 0.2, seed)
        numbers = draws(range(ITEMS // 2), 0), draws(range(ITEMS // 2, ITEMS), 1)
        search_ranks({"a": layer}, lambda items: (layer(x[items]) - y[items]).square().mean(), *numbers, few)
        return layer.alpha.tolist()

    assert alpha(0) == alpha(0) != alpha(1)


def test_alpha_learns_on_one_half_and_the_matrices_on_the_other() -> None:
    weight, x, y = planted(4, 0)
    layer, asked = SearchedLinear(weight, None, (2, 8)), list[tuple[int, list[float], list[float]]]()

    def loss(items: list[int]) -> torch.Tensor:
        asked.append((items[0], layer.alpha.tolist(), layer.left[0][0].tolist()))
        return (layer(x[items]) - y[items]).square().mean()

    search_ranks({"a": layer}, loss, iter([[1, 2]] * 3), iter([[101, 102]] * 3), SearchSettings(3))
    assert [first for first, _, _ in asked] == [101, 1, 101, 1, 101, 1]
    for (_, alpha, left), (first, alpha_then, left_then) in pairwise(asked[2:]):
        assert (alpha != alpha_then, left != left_then) == ((True, False) if first == 1 else (False, True))


def test_layers_of_a_block_are_searched_together() -> None:
    layers = {
        name: SearchedLinear(rounded_weight(seed=n), None, (2, 8), seed=n) for n, name in enumerate(("fc1", "fc2"))
    }
    x = torch.randn(ITEMS, 3, 32, generator=torch.Generator().manual_seed(0))
    y = torch.randn(ITEMS, 3, 32, generator=torch.Generator().manual_seed(1))

    def loss(items: list[int]) -> torch.Tensor:
        return (layers["fc2"](layers["fc1"](x[items]).relu()) - y[items]).square().mean()

    found = search_ranks(layers, loss, draws(range(64), 0), draws(range(64, 128), 1), SearchSettings(30))
    assert set(found) == {"fc1", "fc2"}
    assert set(found.values()) <= {2, 8}
    assert all(layer.alpha.abs().max() > 0 for layer in layers.values())


def test_what_makes_no_sense_is_refused() -> None:
    weight = rounded_weight()
    for ranks in ((), (0, 4), (4, 4), (8, 4)):
        with pytest.raises(ValueError, match="ranks must be ascending, from 1 on"):
            SearchedLinear(weight, None, ranks)
    with pytest.raises(ValueError, match="drop_path must be at least 0 and below 1"):
        SearchedLinear(weight, None, (4,), drop_path=1.0)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        SearchSettings(0)
    for name in ("learning_rate", "alpha_learning_rate"):
        with pytest.raises(ValueError, match=f"{name} must be > 0 and finite"):
            SearchSettings(**{name: math.inf})
    with pytest.raises(ValueError, match="There is no layer whose rank could be searched"):
        search_ranks({}, lambda items: torch.zeros(()), iter([]), iter([]), QUICK)
    layer = SearchedLinear(weight, None, (4,))
    x = torch.full((2, 32), float("nan"))
    with pytest.raises(ValueError, match="The loss of the rank search is not finite"):
        search_ranks({"a": layer}, lambda items: layer(x).sum(), iter([[0]]), iter([[0]]), QUICK)
