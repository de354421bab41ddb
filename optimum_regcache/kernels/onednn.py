"""Real int8 on x86 CPUs through oneDNN (`torch.ops.onednn.qlinear_pointwise`): u8 activations, s8 weights.

Codes and integer sums are those of the reference backend; only the float32 epilogue (scale, bias) may round differently:
observed difference <= 2 ulp of the largest term. Narrower codes (W6A6, W4A4) run in the same int8 containers.

Known traps (all avoided here): signed int8 activations fall back to a scalar kernel, so symmetric codes are stored as
u8 with zero point 128; packed weights are opaque and cannot be copied or saved; without VNNI the u8 x s8 products
saturate in 16 bits, so such machines use simulation.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from optimum_regcache.kernels.base import LinearBackend, LinearState


@lru_cache(maxsize=1)
def machine_reason() -> str | None:
    """Why this machine cannot run the int8 kernel, or None if it can."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    if probe is None or not probe():
        return "the CPU has no VNNI instructions (AVX512-VNNI or AVX-VNNI)."
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch build has no oneDNN."
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this PyTorch build has no torch.ops.onednn.qlinear_pointwise."
    return None


class OneDNNLinear(LinearBackend):
    """int8 matrix product with fused dequantization and bias."""

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        self._packed = torch.ops.onednn.qlinear_prepack(state.codes.contiguous(), None)
        self._weight_scale = state.weight_scale.expand(state.codes.shape[0]).contiguous()
        self._weight_zero = torch.zeros(state.codes.shape[0], dtype=torch.int64)
        self._bias = None if state.bias is None else state.bias.detach().float().contiguous()
        self._shift = 2 ** (state.activations.bits - 1) if state.activations.symmetric else 0
        bits = state.activations.bits
        self._lowest, self._highest = 0, 2**bits - 1
        self._static: tuple[float, float, int] | None = None
        self._weight_shift: torch.Tensor | None = None  # s_w z_w, for weights with a zero point
        if state.weight_zero_point is not None:
            self._weight_shift = (state.weight_zero_point.float() * state.weight_scale).expand(state.codes.shape[0])
        fixed = state.activations.outlier_tokens == "clip"
        if fixed and state.input_scale is not None and state.input_zero_point is not None:
            inverse = 1.0 / state.input_scale  # float32, the same number that the other backends multiply by
            self._static = float(inverse), float(state.input_scale), int(state.input_zero_point) + self._shift

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        if state.codes.device.type != "cpu":
            return f"the weights are on {state.codes.device}, the kernel runs on the CPU."
        reason = cls.no_integer_reason(state)
        if reason is not None:
            return reason
        if state.activations.granularity == "per_token" and not state.activations.symmetric:
            return "per-token zero points are not supported by the kernel."
        return machine_reason()

    def _product(self, codes: torch.Tensor, scale: float, zero_point: int, bias: torch.Tensor | None) -> torch.Tensor:
        if codes.numel() == 0:  # the kernel flattens the leading axes of an empty input
            return codes.new_empty(*codes.shape[:-1], self._weight_scale.numel(), dtype=torch.float32)
        y = torch.ops.onednn.qlinear_pointwise(
            codes, scale, zero_point, self._packed, self._weight_scale, self._weight_zero, bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if self._weight_shift is not None:  # sum (q_x - z_x)(q_w - z_w) = sum (q_x - z_x) q_w - z_w sum (q_x - z_x)
            total = codes.sum(-1, keepdim=True, dtype=torch.int32) - zero_point * codes.shape[-1]
            y -= (scale * total.float()) * self._weight_shift
        return y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._static is not None:
            inverse, scale, zero = self._static
            # in-place passes over one float32 buffer: round before the shift, as the other backends do
            codes = (
                x.float()
                .contiguous()
                .mul(inverse)
                .round_()
                .add_(zero)
                .clamp_(self._lowest, self._highest)
                .to(torch.uint8)
            )
            return self._product(codes, scale, zero, self._bias).to(x.dtype)
        scale_t, zero_t = self.state.input_qparams(x)
        codes = (self.state.input_codes(x.contiguous(), scale_t, zero_t) + self._shift).to(torch.uint8)
        if scale_t.ndim == 0:
            return self._product(codes, float(scale_t), int(zero_t) + self._shift, self._bias).to(x.dtype)
        y = self._product(codes, 1.0, self._shift, None) * scale_t
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype)
