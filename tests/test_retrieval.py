"""Retrieval: ranks against a plain loop, captions that several images share, and pictures that a table holds several times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from optimum_regcache.evaluation import retrieval
from optimum_regcache.evaluation.retrieval import NEVER, first_ranks, own_texts, recalls


def plain_rank(query: np.ndarray, candidates: np.ndarray, own: set[int]) -> int:
    """By sorting, others first among equals."""
    order = sorted(range(len(candidates)), key=lambda c: (-(candidates[c] @ query), c in own))
    return next(place for place, candidate in enumerate(order) if candidate in own)


@pytest.mark.parametrize("rows", [3, 1024])
def test_ranks_are_those_of_a_plain_loop(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (F.normalize(torch.randn(n, 4, generator=generator), dim=-1) for n in (11, 23))
    own = [{(5 * i + j) % 23 for j in range(1 + i % 3)} for i in range(11)]
    pairs = torch.tensor([(i, c) for i, mine in enumerate(own) for c in sorted(mine)])
    ranks = first_ranks(queries, candidates, pairs)
    expected = [plain_rank(queries[i].numpy(), candidates.numpy(), own[i]) for i in range(11)]
    assert ranks.tolist() == expected
    found = recalls(ranks, 23)
    assert list(found) == ["R@1", "R@5", "R@10"]
    for k in (1, 5, 10):
        assert float(found[f"R@{k}"].mean()) == pytest.approx(sum(rank < k for rank in expected) / 11)


def test_a_collapsed_model_and_one_of_nan_find_nothing() -> None:
    same = torch.ones(12, 2) / math.sqrt(2)
    pairs = torch.arange(12)[:, None].expand(12, 2)
    assert first_ranks(same, same, pairs).tolist() == [11] * 12
    queries = same.clone()
    queries[3] = float("nan")
    ranks = first_ranks(queries, F.normalize(torch.randn(12, 2), dim=-1), pairs)
    assert ranks[3] == NEVER
    assert (ranks < 12).sum() == 11
    candidates = torch.eye(12)
    candidates[5] = float("nan")  # of its own query it is the only one, for others it comes last
    assert first_ranks(torch.eye(12), candidates, pairs).tolist() == [0] * 5 + [NEVER] + [0] * 6


def test_recall_at_k_says_nothing_where_k_is_everything() -> None:
    assert list(recalls(torch.zeros(4, dtype=torch.int64), 10)) == ["R@1", "R@5"]
    assert list(recalls(torch.zeros(4, dtype=torch.int64), 2)) == ["R@1"]


def test_equal_captions_are_one_text_of_all_their_images() -> None:
    captions = [["a cat"], ["a dog", "a cat"], ["a bird"], ["a fish"]]
    texts, pairs = own_texts(captions, torch.tensor([0, 1, 2, 2]))  # the last two are one picture
    assert texts == ["a cat", "a dog", "a bird", "a fish"]
    assert pairs.tolist() == [[0, 0], [1, 0], [1, 1], [2, 2], [2, 3], [3, 2], [3, 3]]
    # the cat's text finds image 1, which is a cat as well: a hit
    images, text = torch.eye(4)[[1, 0, 2, 3]], torch.eye(4)[[0]]
    assert first_ranks(text, images, pairs[pairs[:, 1] == 0].flip(1)).tolist() == [0]
