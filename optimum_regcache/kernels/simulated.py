"""Simulated quantization ("fake-quant"): dequantized operands, float32 matrix product. Any device, every form."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from optimum_regcache.kernels.base import LinearBackend, LinearState
from optimum_regcache.math import uniform
from optimum_regcache.math.nonuniform import twin_signed


class SimulatedLinear(LinearBackend):
    """``F.linear(dequantize(quantize(x)), dequantize(codes))`` in float32 whatever the model dtype."""

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        zero = 0 if state.weight_zero_point is None else state.weight_zero_point.reshape(-1, 1)
        self._weight = (state.codes.float() - zero) * state.weight_scale.reshape(-1, 1)
        self._bias = None if state.bias is None else state.bias.detach().float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.state.input_qparams(x)
        if self.state.input_negative_scale is not None:
            rebuilt = twin_signed(x, scale, self.state.input_negative_scale, self.state.activations.bits)
            return F.linear(rebuilt, self._weight, self._bias).to(x.dtype)
        rebuilt = uniform.dequantize(self.state.input_codes(x, scale, zero), scale, zero)
        return F.linear(rebuilt, self._weight, self._bias).to(x.dtype)
