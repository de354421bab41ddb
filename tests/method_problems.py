"""Small seeded problems for the searches of the methods."""

from __future__ import annotations

import torch

from optimum_regcache.config import AttentionConfig
from optimum_regcache.layers.attention import AttentionProducts
from optimum_regcache.methods._search.gradients import Watched

GELU_MINIMUM = 0.16997124


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(seed: int, *shape: int) -> torch.Tensor:
    """Normal values with a few tokens and channels many times larger. The largest is positive: the first scale of a search puts
    it exactly halfway between two codes, and only a negative one has a code on both sides, of which rounding picks either."""
    x = randn(seed, *shape)
    x[::7] *= 4
    x[:, ::5] *= 3
    return x * x.flatten()[x.abs().argmax()].sign()


def products_problem(bits: int, seed: int) -> tuple[AttentionProducts, dict[str, Watched]]:
    """Two images, two heads of size 4, six tokens."""
    q, k, v = (randn(seed + i, 2, 2, 6, 4) * torch.tensor([1.0, 2.5]).reshape(2, 1, 1) for i in range(3))
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    nothing = torch.zeros(0)
    watched = {n: Watched(x, nothing) for n, x in (("query", q), ("key", k), ("probabilities", p), ("value", v))}
    watched["logits"] = Watched(nothing, randn(seed + 3, 2, 2, 6, 6) ** 2)
    watched["output"] = Watched(nothing, randn(seed + 4, 2, 2, 6, 4) ** 2)
    config = AttentionConfig(quantize=True, bits=bits, granularity="per_head", probabilities="twin")
    return AttentionProducts(2, config), watched


def correlated(seed: int, tokens: int, size: int) -> torch.Tensor:
    return randn(seed, tokens, size) @ (torch.eye(size) + 0.7 * randn(seed + 1, size, size))
