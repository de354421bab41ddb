"""Simulated quantization ("fake-quant"): dequantized operands, float32 matrix product. Any device, 2 to 8 bits."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from optimum_regcache import numerics
from optimum_regcache.kernels.base import LinearBackend, LinearState


class SimulatedLinear(LinearBackend):
    """``F.linear(dequantize(quantize(x)), dequantize(codes))`` in float32 whatever the model dtype."""

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        self._weight = state.codes.float() * state.weight_scale.reshape(-1, 1)
        self._bias = None if state.bias is None else state.bias.detach().float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.state.input_qparams(x)
        rebuilt = numerics.dequantize(self.state.input_codes(x, scale, zero), scale, zero)
        return F.linear(rebuilt, self._weight, self._bias).to(x.dtype)
