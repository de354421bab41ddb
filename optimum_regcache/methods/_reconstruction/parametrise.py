"""What of a quantized weight is trained: all of it, a low-rank addition, or which way each value is rounded. The result is one
set of codes and scales in every case."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from optimum_regcache.math.uniform import code_range, weight_codes
from optimum_regcache.methods._reconstruction.ste import LearnedScale, quantize_through
from optimum_regcache.methods.gptq import WeightGrid

_LOWER, _UPPER = -0.1, 1.1  # the rectified sigmoid runs over this range and is cut to 0 to 1
_WARM_UP = 0.2  # of the steps, before the rounding offsets are drawn to 0 and 1
_SHARP, _SOFT = 20.0, 2.0  # exponent of the penalty after the warm-up, and at the end
_OFFSET_UNIT = 10.0  # rounding offsets run over about 6, weights over about 1, in units of their root mean square


class Parametrisation(ABC):
    """A weight under training.

    Args:
        weight: float32 [out, in], the online Hadamard transform folded into it.
        grid: the scales and zero points that it was rounded with.
    """

    def __init__(self, weight: torch.Tensor, grid: WeightGrid) -> None:
        self.start, self.grid = weight.detach().float(), grid
        self.size = float(self.start.square().mean().sqrt()) or 1.0

    @abstractmethod
    def parameters(self) -> list[tuple[torch.Tensor, float]]:
        """What is trained besides scales, each with the unit of its learning rate."""

    def scales(self) -> list[torch.Tensor]:
        """Weight scales that are trained."""
        return []

    @abstractmethod
    def weight(self, hard: bool) -> torch.Tensor:
        """float32 [out, in] as the layer multiplies it, with gradients; ``hard``: what :meth:`merged` stands for."""

    @abstractmethod
    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes float32 [out, in], scale of the shape of ``grid.scale``), without gradients."""

    def penalty(self, progress: float) -> torch.Tensor | None:
        """Added to the loss at ``progress`` from 0 to 1; None for nothing."""
        del progress
        return None


class FullWeight(Parametrisation):
    """``Q(W)``: all weights, through straight-through rounding, and their scales."""

    def __init__(self, weight: torch.Tensor, grid: WeightGrid) -> None:
        super().__init__(weight, grid)
        self.leaf = self.start.clone().requires_grad_()
        self.scale = LearnedScale(grid.scale, grid.zero_point)

    def parameters(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.leaf, self.size)]

    def scales(self) -> list[torch.Tensor]:
        return [self.scale.theta]

    def weight(self, hard: bool) -> torch.Tensor:
        del hard
        return _rounded(self.leaf, self.scale.value(), self.grid)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale.value().detach()
        return weight_codes(self.leaf.detach(), scale, self.grid.zero_point, self.grid.bits), scale


class LowRank(Parametrisation):
    """``Q(W0 + B A)`` (AIQViT, arXiv 2502.04628): W0 stays, A starts Gaussian and B at 0, scales stay.

    Args:
        weight, grid: as of `Parametrisation`.
        rank: of ``B A``; the smaller side of the weight at most.
        generator: draws A.
    """

    def __init__(self, weight: torch.Tensor, grid: WeightGrid, rank: int, generator: torch.Generator) -> None:
        super().__init__(weight, grid)
        self.rank = min(rank, *weight.shape)
        right = torch.randn(self.rank, weight.shape[1], generator=generator) * (self.size / math.sqrt(self.rank))
        self.right = right.to(self.start).requires_grad_()
        self.left = self.start.new_zeros(len(weight), self.rank).requires_grad_()

    def parameters(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.left, 1.0), (self.right, self.size)]

    def _sum(self) -> torch.Tensor:
        return self.start + self.left @ self.right

    def weight(self, hard: bool) -> torch.Tensor:
        del hard
        return _rounded(self._sum(), self.grid.scale, self.grid)

    @torch.no_grad()
    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        codes = weight_codes(self._sum(), self.grid.scale, self.grid.zero_point, self.grid.bits)
        return codes, self.grid.scale


class RoundingOffsets(Parametrisation):
    """``floor(W / s) + h(V)`` (AdaRound, arXiv 2004.10568): h, a rectified sigmoid, starts where the float weight is and is
    drawn to 0 or 1 by a penalty; scales stay, and so do clipped codes."""

    def __init__(self, weight: torch.Tensor, grid: WeightGrid) -> None:
        super().__init__(weight, grid)
        steps = self.start * (1.0 / grid.scale.reshape(-1, 1))
        self.floor = steps.floor()
        rest = (steps - self.floor).clamp(0.0, 1.0)
        self.offsets = -torch.log((_UPPER - _LOWER) / (rest - _LOWER) - 1.0)
        self.offsets.requires_grad_()

    def parameters(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.offsets, _OFFSET_UNIT)]

    def _share(self) -> torch.Tensor:
        return (torch.sigmoid(self.offsets) * (_UPPER - _LOWER) + _LOWER).clamp(0.0, 1.0)

    def _codes(self, share: torch.Tensor) -> torch.Tensor:
        return (self.floor + share + self.grid.zero_point.reshape(-1, 1)).clamp(*code_range(self.grid.bits, True))

    def weight(self, hard: bool) -> torch.Tensor:
        share = (self._share() > 0.5).float() if hard else self._share()
        return (self._codes(share) - self.grid.zero_point.reshape(-1, 1)) * self.grid.scale.reshape(-1, 1)

    @torch.no_grad()
    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._codes((self._share() > 0.5).float()), self.grid.scale

    def penalty(self, progress: float) -> torch.Tensor | None:
        if progress < _WARM_UP:
            return None
        sharpness = _SOFT + (_SHARP - _SOFT) * (1.0 - (progress - _WARM_UP) / (1.0 - _WARM_UP))
        return (1.0 - (2.0 * self._share() - 1.0).abs().pow(sharpness)).mean()


def _rounded(weight: torch.Tensor, scale: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    return quantize_through(weight, scale.reshape(-1, 1), grid.zero_point.reshape(-1, 1), grid.bits, True)
