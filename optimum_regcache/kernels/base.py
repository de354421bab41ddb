"""What a backend is given and what it must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from optimum_regcache import numerics
from optimum_regcache.config import ActivationsConfig


@dataclass(frozen=True)
class LinearState:
    """A quantized linear layer, ready to run.

    Attributes:
        codes: int8 [out, in] weight codes.
        weight_scale: float32 [out] or [1].
        bias: [out] or None.
        activations: how the input is quantized.
        input_scale, input_zero_point: 0-dim float32 / int32, None when dynamic.
    """

    codes: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    activations: ActivationsConfig
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None

    def input_qparams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for ``x``; shape [] (per tensor) or [..., 1] (per token)."""
        if self.input_scale is not None and self.input_zero_point is not None:
            return self.input_scale, self.input_zero_point
        a = self.activations
        return numerics.dynamic_qparams(x, a.bits, a.symmetric, a.granularity)

    def input_codes(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Whole-number float32 codes of ``x``."""
        return numerics.quantize(x, scale, zero_point, self.activations.bits, self.activations.symmetric)


class LinearBackend(ABC):
    """Prepared once from a `LinearState`, called for each input."""

    def __init__(self, state: LinearState) -> None:
        self.state = state

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        """Why this layer cannot run here, or None if it can."""
        del state
        return None

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] of any float dtype -> [..., out] of the same dtype."""
