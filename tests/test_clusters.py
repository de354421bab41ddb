"""Several distinct registers: k-means of the mined tokens (docs/method.md 4)."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from models import BLOCKS, TOWERS

from optimum_regcache.registers import set_registers
from optimum_regcache.search import MinedTokens, mine_tokens
from optimum_regcache.search.kmeans import kmeans

CLIP = TOWERS["clip"]


@pytest.fixture(scope="module")
def mined() -> MinedTokens:
    return mine_tokens(CLIP.build(), [CLIP.inputs(seed=s) for s in range(4)], [1], per_image=3, progress=False)[1]


def cost(points: torch.Tensor, labels: torch.Tensor) -> float:
    groups = [points[labels == c] for c in labels.unique()]
    return sum(float((g - g.mean(0)).square().sum()) for g in groups)


def test_kmeans_finds_the_best_partition_of_few_points() -> None:
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    for k in (2, 3):
        every = (torch.tensor(labels) for labels in product(range(k), repeat=8))
        least = min(cost(points, labels) for labels in every)
        found = kmeans(points, k, 0)
        assert cost(points, found) == pytest.approx(least)
        assert torch.equal(found, kmeans(points, k, 0))
        sizes = torch.bincount(found, minlength=k)
        assert torch.equal(sizes, sizes.sort(descending=True).values)
        assert sizes.min() > 0


def test_no_cluster_is_empty_and_none_repeats_a_point() -> None:
    points = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [5.0]])
    assert kmeans(points, 6, 0).tolist() == [0, 0, 0, 1, 1, 2]
    assert kmeans(points[:3], 2, 0).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        kmeans(points, 0, 0)
    with pytest.raises(ValueError, match="There are no points to cluster"):
        kmeans(points[:0], 1, 0)


def test_one_cluster_is_the_average_bit_for_bit(mined: MinedTokens) -> None:
    one, average = mined.clusters(1, (1, 3), BLOCKS), mined.average((1, 3), BLOCKS)
    assert (one.blocks, one.num_copies) == (average.blocks, average.num_copies)
    for block in one.blocks:
        assert all(torch.equal(a, b) for a, b in zip(one.rows(block), average.rows(block), strict=True))


def test_rows_are_the_means_of_the_clusters(mined: MinedTokens) -> None:
    blocks = (1, 2, 3)
    cache = mined.clusters(3, blocks, BLOCKS, seed=1)
    assert cache.num_registers == 3
    parts = [t[b].flatten(1) for b in blocks for t in (mined.keys, mined.values)]
    labels = kmeans(torch.cat([p / p.norm(dim=1, keepdim=True) for p in parts], 1), 3, 1)
    for block in blocks:
        for rows, store in zip(cache.rows(block), (mined.keys, mined.values), strict=True):
            for cluster in range(3):
                torch.testing.assert_close(rows[:, cluster], store[block][labels == cluster].mean(0))
    again = mined.clusters(3, blocks, BLOCKS, seed=1)
    assert all(torch.equal(a, b) for b_ in blocks for a, b in zip(cache.rows(b_), again.rows(b_), strict=True))
    model = CLIP.build()
    set_registers(model, cache)
    assert CLIP.run(model).isfinite().all()


def test_fewer_distinct_tokens_give_fewer_rows(mined: MinedTokens) -> None:
    assert mined.first(2).clusters(5, (1, 2), BLOCKS).num_registers == 2
    with pytest.raises(ValueError, match="Clusters of mined tokens need blocks"):
        mined.clusters(2, (), BLOCKS)
