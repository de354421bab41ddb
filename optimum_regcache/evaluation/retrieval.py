"""Retrieval between images and texts: which query finds one of its own among the first k (docs/method.md 12)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CUTOFFS = (1, 5, 10)
NEVER = 2**62
_ROWS = 1024  # queries that are compared with all candidates at a time


def own_texts(captions: Sequence[Sequence[str]], pictures: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The distinct captions, and which images each belongs to.

    Equal captions are one text that belongs to all their images; images that are one picture share their captions.

    Args:
        captions: of each of n images.
        pictures: int64 [n], equal for images that are the same picture.

    Returns:
        (m texts; pairs int64 [p, 2] of an image and a text that belong together, each once).
    """
    numbers: dict[str, int] = {}
    shared: dict[int, set[int]] = {}
    for picture, texts in zip(pictures.tolist(), captions, strict=True):
        shared.setdefault(picture, set()).update(numbers.setdefault(text, len(numbers)) for text in texts)
    pairs = [(image, text) for image, picture in enumerate(pictures.tolist()) for text in sorted(shared[picture])]
    return list(numbers), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def first_ranks(queries: torch.Tensor, candidates: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """How many candidates of others come before a query's best own one; of equals, those of others do.

    Args:
        queries: float [n, D], normalised.
        candidates: float [m, D], normalised; one of nan comes last.
        pairs: int64 [p, 2], query and candidate that belong together.

    Returns:
        int64 [n]; `NEVER` for a query of nan, or without a candidate of its own.
    """
    ranks = []
    for start in range(0, len(queries), _ROWS):
        scores = (queries[start : start + _ROWS] @ candidates.T).nan_to_num(nan=float("-inf"))
        here = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + _ROWS)]
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[here[:, 0] - start, here[:, 1]] = True
        best = scores.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
        before = ((scores >= best) & ~own).sum(1)
        ranks.append(before.masked_fill(best[:, 0] == float("-inf"), NEVER))
    return torch.cat(ranks)


def recalls(ranks: torch.Tensor, candidates: int) -> dict[str, torch.Tensor]:
    """``R@k`` -> float32 [n], 1 where a query finds one of its own among the first k; for each k of fewer than all candidates.

    Args:
        ranks: as `first_ranks` gives them.
        candidates: how many there are.
    """
    return {f"R@{k}": (ranks < k).float() for k in CUTOFFS if k < candidates}
