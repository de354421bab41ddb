"""k-means of a few points: seeded, with a fixed number of starts (Lloyd's iterations, k-means++ starts)."""

from __future__ import annotations

import torch

from optimum_regcache.config.validation import require

STARTS, ITERATIONS = 10, 100


def kmeans(points: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Cluster of each point, of the start with the smallest sum of squared distances.

    Args:
        points: [n, D], finite.
        k: clusters; no more are made than there are distinct points, and none is empty.
        seed: of the starts.

    Returns:
        int64 [n]; cluster 0 is the largest, equal sizes are in the order of their first points.

    Raises:
        ValueError: k below 1, or no points.
    """
    require(k >= 1, f"k must be at least 1, got {k}.")
    require(len(points) > 0, "There are no points to cluster.")
    points = points.double()
    k = min(k, len(torch.unique(points, dim=0)))
    generator = torch.Generator(points.device).manual_seed(seed)
    best, least = torch.zeros(len(points), dtype=torch.int64, device=points.device), float("inf")
    for _ in range(STARTS if k > 1 else 0):
        labels, cost = _lloyd(points, _spread(points, k, generator))
        if cost < least:
            best, least = labels, cost
    sizes = torch.bincount(best, minlength=k)
    firsts = [int((best == cluster).nonzero()[0]) for cluster in range(k)]
    order = sorted(range(k), key=lambda cluster: (-int(sizes[cluster]), firsts[cluster]))
    rank = torch.empty(k, dtype=torch.int64, device=points.device)
    rank[order] = torch.arange(k, device=points.device)
    return rank[best]


def _distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances [n, k]."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


def _spread(points: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """``k`` distinct points as centres, each far from those before it (k-means++)."""
    chance = points.new_ones(len(points))
    chosen: list[torch.Tensor] = []
    for _ in range(k):
        chosen.append(points[torch.multinomial(chance, 1, generator=generator)[0]])
        chance = _distances(points, torch.stack(chosen)).amin(1)
    return torch.stack(chosen)


def _lloyd(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Labels [n] and the sum of squared distances, after the last change."""
    labels = points.new_full((len(points),), -1, dtype=torch.int64)
    for _ in range(ITERATIONS):
        distances = _distances(points, centres)
        found = distances.argmin(1)
        for cluster in range(len(centres)):
            if not bool((found == cluster).any()):  # it takes the worst point of a cluster that has others
                spare = torch.bincount(found, minlength=len(centres))[found] > 1
                own = distances.gather(1, found[:, None])[:, 0]
                found[own.masked_fill(~spare, -1.0).argmax()] = cluster
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(len(centres))])
    return labels, float(_distances(points, centres).gather(1, labels[:, None]).sum())
