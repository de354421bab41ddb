"""Rounding that gradients pass straight through (arXiv 1308.3432), and scales that learn from it (LSQ, arXiv 1902.08153)."""

from __future__ import annotations

from typing import Any

import torch

from optimum_regcache.math.uniform import code_range


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        return gradients[0]


def round_through(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded half to even, with the gradient of ``x``."""
    return _Round.apply(x)  # type: ignore[return-value]


def quantize_through(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    """`uniform.fake_quantize` with gradients for ``x`` and ``scale``; the values are the same bit for bit.

    Where the code is not clipped ``x`` gets the whole gradient and ``scale`` gets ``code - zero_point - x / scale``;
    elsewhere ``x`` gets none and ``scale`` gets ``code - zero_point``.

    Args:
        x: float, any shape.
        scale, zero_point: broadcast against ``x``.
        bits: 2 to 8.
        symmetric: signed codes.
    """
    lowest, highest = code_range(bits, symmetric)
    codes = (round_through(x * (1.0 / scale)) + zero_point).clamp(lowest, highest)
    return (codes - zero_point) * scale


class LearnedScale:
    """A scale that stays positive: ``scale * exp(theta)``, theta from 0 on, so that a step counts relative to its size.

    Args:
        scale: where it starts, float32 of any shape.
        zero_point: of the same shape, or of one that broadcasts; it stays.
    """

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.start, self.zero_point = scale.detach().float().clone(), zero_point.detach().clone()
        self.theta = torch.zeros_like(self.start).requires_grad_()

    def value(self) -> torch.Tensor:
        """The scale, with gradients for theta."""
        return self.start * self.theta.exp()
