"""The rank of a low-rank addition, searched by gradients (AIQViT, arXiv 2502.04628; docs/method.md 11.14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require

RANKS = (10, 20, 50, 100, 150)

Loss = Callable[[list[int]], torch.Tensor]


def candidate_ranks(out_features: int, in_features: int, ranks: tuple[int, ...] = RANKS) -> tuple[int, ...]:
    """``ranks`` capped at half the smaller side of a weight, ascending; those that become equal count once."""
    cap = max(1, min(out_features, in_features) // 2)
    return tuple(sorted({min(rank, cap) for rank in ranks}))


class SearchedLinear(nn.Module):
    """Takes the place of a layer for a search: ``y = x W0^T + sum_j phi(p_j x A_j^T B_j^T) + bias``, ``p = softmax(alpha)``.

    ``phi`` drops a branch for a whole image (for a token where images are packed) and scales those that stay; in evaluation
    mode it does nothing. Every rank has matrices of its own, A Gaussian and B zero at the start, so that the search begins at
    ``W0``.

    Args:
        weight: W0, the values of the quantized weight, float32 [out, in]; it stays.
        bias: float32 [out] or None; it stays.
        ranks: of the branches, ascending.
        drop_path: probability of a branch to be dropped.
        seed: of A and of what is dropped.

    Raises:
        ValueError: ranks that are not ascending from 1 on, or a probability outside [0, 1).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ranks: tuple[int, ...],
        drop_path: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        steps = [b - a for a, b in zip((0, *ranks), ranks, strict=False)]
        require(bool(ranks) and min(steps) > 0, f"ranks must be ascending, from 1 on, got {list(ranks)}.")
        require(0.0 <= drop_path < 1.0, f"drop_path must be at least 0 and below 1, got {drop_path}.")
        self.ranks, self.drop_path = ranks, drop_path
        self.weight = weight.detach().float()
        self.bias = None if bias is None else bias.detach().float()
        self._generator = torch.Generator().manual_seed(seed)
        self.size = float(self.weight.square().mean().sqrt()) or 1.0
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        for rank in ranks:
            drawn = torch.randn(rank, self.weight.shape[1], generator=self._generator) * (self.size / math.sqrt(rank))
            self.right.append(nn.Parameter(drawn.to(self.weight)))
            self.left.append(nn.Parameter(self.weight.new_zeros(len(self.weight), rank)))
        self.alpha = nn.Parameter(self.weight.new_zeros(len(ranks)))

    def matrices(self) -> list[tuple[nn.Parameter, float]]:
        """Every B and A, each with the unit of its learning rate."""
        return [(left, 1.0) for left in self.left] + [(right, self.size) for right in self.right]

    def shares(self) -> torch.Tensor:
        """p, float32 [ranks]."""
        return self.alpha.softmax(0)

    def rank(self) -> int:
        """The one of the largest alpha; the smallest of equal ones."""
        return self.ranks[int(self.alpha.argmax())]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ..., in], as the quantized layer would multiply it -> [B, ..., out], dtype of ``x``."""
        rows, shares = x.float(), self.shares()
        total = F.linear(rows, self.weight, self.bias)
        for share, left, right in zip(shares, self.left, self.right, strict=True):
            total = total + self._kept(rows) * share * F.linear(F.linear(rows, right), left)
        return total.to(x.dtype)

    def _kept(self, x: torch.Tensor) -> torch.Tensor | float:
        """phi's factor of one branch, [B, 1, ...]."""
        if not self.training or self.drop_path == 0.0:
            return 1.0
        kept = torch.rand(len(x), generator=self._generator) >= self.drop_path
        return (kept.to(x) / (1.0 - self.drop_path)).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class SearchSettings:
    """How ranks are searched.

    Attributes:
        iterations: each a step for alpha and one for the matrices.
        learning_rate: of Adam for B, and for A in units of the root mean square weight; falls to 0 by a cosine.
        alpha_learning_rate: of Adam for alpha; stays.
    """

    iterations: int = 2000
    learning_rate: float = 1e-3
    alpha_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        require(self.iterations >= 1, f"iterations must be at least 1, got {self.iterations}.")
        for name in ("learning_rate", "alpha_learning_rate"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be > 0 and finite, got {value}.")


def search_ranks(
    linears: Mapping[str, SearchedLinear],
    loss: Loss,
    training: Iterator[list[int]],
    validation: Iterator[list[int]],
    settings: SearchSettings,
    progress: bool = False,
) -> dict[str, int]:
    """Train alpha on one half of the samples and the matrices on the other, in turn (DARTS of first order, arXiv 1806.09055):
    alpha follows the gradient at the matrices as they are.

    Args:
        linears: name -> layer, in place in whatever ``loss`` runs.
        loss: numbers of samples -> loss, 0-dim, with gradients.
        training, validation: draws of the two halves, without end.
        settings: how.
        progress: show a progress bar.

    Returns:
        name -> rank of the largest alpha.

    Raises:
        ValueError: a loss that is not finite.
    """
    require(bool(linears), "There is no layer whose rank could be searched.")
    layers = list(linears.values())
    alphas = [layer.alpha for layer in layers]
    matrices = [pair for layer in layers for pair in layer.matrices()]
    upper = torch.optim.Adam(alphas, lr=settings.alpha_learning_rate, foreach=False)
    groups = [{"params": [leaf], "lr": settings.learning_rate * unit} for leaf, unit in matrices]
    lower = torch.optim.Adam(groups, foreach=False)
    rates = [group["lr"] for group in lower.param_groups]
    leaves = [leaf for leaf, _ in matrices]
    for layer in layers:
        layer.train()
    with torch.enable_grad():
        for step in bar(range(settings.iterations), "rank search", unit="step", shown=progress):
            for group, rate in zip(lower.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * step / settings.iterations))
            _step(upper, alphas, loss(next(validation)))
            _step(lower, leaves, loss(next(training)))
    for layer in layers:
        layer.eval()
    return {name: layer.rank() for name, layer in linears.items()}


def _step(optimizer: torch.optim.Adam, leaves: list[nn.Parameter], loss: torch.Tensor) -> None:
    require(bool(loss.isfinite()), "The loss of the rank search is not finite. Use a smaller learning rate.")
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = gradient
    optimizer.step()
