"""Integer reference in plain PyTorch: exact integer accumulation, one float32 rescale. Slow; it defines the result."""

from __future__ import annotations

import torch

from optimum_regcache.kernels.base import LinearBackend, LinearState


class ReferenceLinear(LinearBackend):
    """``y = (s_x * s_w) * sum_k (q_x - z_x) (q_w - z_w) + b``; the sum is exact in int32 (|sum| < 2^31 for in <= 32,896)."""

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        codes = state.codes.to(torch.int32)
        if state.weight_zero_point is not None:
            codes = codes - state.weight_zero_point.reshape(-1, 1)
        self._codes = codes.t().contiguous()

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        return cls.no_integer_reason(state)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.state.input_qparams(x)
        codes = (self.state.input_codes(x, scale, zero) - zero).to(torch.int32)
        accumulator = torch.matmul(codes, self._codes)
        y = accumulator.float() * (scale * self.state.weight_scale)
        if self.state.bias is not None:
            y = y + self.state.bias.float()
        return y.to(x.dtype)
