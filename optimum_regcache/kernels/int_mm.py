"""Real int8 through `torch._int_mm` (int8 x int8 -> int32): cuBLASLt on CUDA, a portable kernel on the CPU.

Codes and integer sums are those of the reference backend. The epilogue multiplies and adds in the same order, so eager
results are those of the reference; compiled ones may contract a multiplication and an addition: at most 4 float32 roundings
of the largest term. Everything is plain tensor operations without a value read back, so that `torch.compile` sees one graph,
fuses quantization and epilogue, and CUDA graphs can record it.

The kernel wants signed inputs, more than 16 rows, and both inner sizes divisible by 8. Unsigned codes are shifted by half
their range and the sums corrected; missing rows, columns and channels are filled with zeros, on every device.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from optimum_regcache.kernels.base import LinearBackend, LinearState

MIN_CAPABILITY = (7, 5)  # Turing: the first with int8 tensor cores
MIN_ROWS, MULTIPLE = 17, 8


def device_reason(device: torch.device) -> str | None:
    """Why ``device`` cannot run the kernel, or None if it can."""
    if not hasattr(torch, "_int_mm"):
        return "this PyTorch build has no torch._int_mm."
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the weights are on {device}; torch._int_mm is used on NVIDIA GPUs and the CPU only."
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}; int8 matrix products need 7.5."
    return None


class IntMMLinear(LinearBackend):
    """``y = (s_x * s_w) * sum_k (q_x - z_x) (q_w - z_w) + b`` with the sum in int32.

    With signed codes ``a = q_x - h`` and their zero point ``z = z_x - h`` (h = 0 if symmetric, else half the range):
    ``sum (a - z) (q_w - z_w) = sum a q_w - z (sum q_w - K z_w) - z_w sum a``.
    """

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        a, (self._out, features) = state.activations, state.codes.shape
        self._half = 0 if a.symmetric else 2 ** (a.bits - 1)
        self._columns, channels = -features % MULTIPLE, -self._out % MULTIPLE
        codes = state.codes
        if self._columns or channels:
            codes = F.pad(codes, (0, self._columns, 0, channels))
        self._weight = codes.t()  # [in, out], columns contiguous: what the kernel likes, and no copy
        self._weight_scale = state.weight_scale.expand(self._out)
        self._bias = None if state.bias is None else state.bias.detach().float()
        total = state.codes.sum(1, dtype=torch.int32)
        self._weight_zero: torch.Tensor | None = None
        if state.weight_zero_point is not None:
            self._weight_zero = state.weight_zero_point.expand(self._out)
            total = total - features * self._weight_zero
        self._total = None if a.symmetric else total

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        return cls.no_integer_reason(state) or device_reason(state.codes.device)

    def integer_sum(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """``sum_k (q_x - z_x) (q_w - z_w)``, int32 [..., out] for ``x`` [..., in]."""
        codes = (self.state.input_codes(x, scale, zero) - self._half).to(torch.int8)
        rows = codes.reshape(-1, codes.shape[-1])
        count = rows.shape[0]
        missing = MIN_ROWS - count if count < MIN_ROWS else 0
        if missing or self._columns:
            rows = F.pad(rows, (0, self._columns, 0, missing))
        filled = torch._int_mm(rows.contiguous(), self._weight)  # type: ignore[attr-defined]
        product = filled[:count, : self._out].reshape(*codes.shape[:-1], self._out)
        if self._total is not None:
            product = product - (zero - self._half).to(torch.int32) * self._total
        if self._weight_zero is not None:
            product = product - codes.sum(-1, keepdim=True, dtype=torch.int32) * self._weight_zero
        return product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.state.input_qparams(x)
        y = self.integer_sum(x, scale, zero).float() * (scale * self._weight_scale)
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype)
