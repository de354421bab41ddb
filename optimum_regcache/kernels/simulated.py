"""Simulated quantization ("fake-quant"): dequantized operands, float32 matrix product. Any device and form, with gradients."""

from __future__ import annotations

import torch

from optimum_regcache.kernels.base import LinearBackend, LinearState
from optimum_regcache.math import uniform
from optimum_regcache.math.linear import linear
from optimum_regcache.math.nonuniform import twin_signed


class SimulatedLinear(LinearBackend):
    """``linear(dequantize(quantize(x)), dequantize(codes))`` in float32 whatever the model dtype.

    Gradients pass the quantizer of the input straight through (`uniform.straight_through`) and reach the bias; weight codes
    and scales are constants.
    """

    differentiable = True

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        zero = 0 if state.weight_zero_point is None else state.weight_zero_point.reshape(-1, 1)
        self._weight = (state.codes.float() - zero) * state.weight_scale.reshape(-1, 1)
        self._bias = state.bias  # itself: an optimizer may change it

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._bias is None else self._bias.float()
        return linear(self.rounded(x), self.weight(), bias).to(x.dtype)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The values that are multiplied in place of ``x``, float32."""
        scale, zero = self.state.input_qparams(x)
        a = self.state.activations
        if self.state.input_negative_scale is not None:
            return twin_signed(x, scale, self.state.input_negative_scale, a.bits)
        return uniform.fake_quantize(x, scale, zero, a.bits, a.symmetric)

    def weight(self) -> torch.Tensor:
        """float32 [out, in] that the codes stand for."""
        return self._weight
