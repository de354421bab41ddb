"""What a backend is given and what it must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from optimum_regcache.config import ActivationsConfig
from optimum_regcache.math import uniform


@dataclass(frozen=True)
class LinearState:
    """A quantized linear layer, ready to run.

    Attributes:
        codes: int8 [out, in] weight codes.
        weight_scale: float32 [out] or [1].
        bias: [out] or None.
        activations: how the input is quantized.
        input_scale, input_zero_point: 0-dim float32 / int32, None when dynamic.
        weight_zero_point: int32 of the shape of ``weight_scale``, None when symmetric.
        input_negative_scale: 0-dim float32, step of the negative values of a twin quantizer, else None.
    """

    codes: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    activations: ActivationsConfig
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    weight_zero_point: torch.Tensor | None = None
    input_negative_scale: torch.Tensor | None = None

    def input_qparams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for ``x``; shape [] (per tensor) or [..., 1] (per token)."""
        a = self.activations
        if self.input_scale is not None and self.input_zero_point is not None:
            if a.outlier_tokens == "clip":
                return self.input_scale, self.input_zero_point
            return torch.maximum(token_scale(x, a.bits), self.input_scale), self.input_zero_point
        return uniform.dynamic_qparams(x, a.bits, a.symmetric, a.granularity)

    def input_codes(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Whole-number float32 codes of ``x``."""
        return uniform.quantize(x, scale, zero_point, self.activations.bits, self.activations.symmetric)


def token_scale(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric scale of every token, [..., 1] for ``x`` [..., features]; 0 for a token of zeros."""
    return x.float().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)


class LinearBackend(ABC):
    """Prepared once from a `LinearState`, called for each input.

    Attributes:
        differentiable: whether gradients reach the input and the bias.
        rounds_input: whether the input is quantized at all.
    """

    differentiable = False
    rounds_input = True

    def __init__(self, state: LinearState) -> None:
        self.state = state

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        """Why this layer cannot run here, or None if it can."""
        del state
        return None

    @staticmethod
    def no_integer_reason(state: LinearState) -> str | None:
        """Why the input codes of this layer do not fit an integer product of one step, or None."""
        if state.input_negative_scale is not None:
            return "a twin quantizer has two steps and is simulated."
        if state.activations.bits > 8:
            return "16-bit inputs are simulated."
        return None

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] of any float dtype -> [..., out] of the same dtype."""
