"""The form that a quantized linear layer takes in an ONNX file. Only for tracing: the nodes have no eager computation.

Static scales become QuantizeLinear, DequantizeLinear, MatMul, Add, the pattern that ONNX Runtime and OpenVINO turn into one
product of u8 and s8 numbers. Scales that are computed from the input become MatMulInteger. Codes below 8 bits run in the
same 8-bit containers, their range kept by a clamp before rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from optimum_regcache.kernels.base import LinearBackend, LinearState

OPSET = 21


def _node(name: str, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> Any:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)


class QDQLinear(LinearBackend):
    """Codes of the reference backend up to ties: QuantizeLinear divides by the scale, the others multiply by its inverse."""

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        a = state.activations
        self._shift = 2 ** (a.bits - 1) if a.symmetric else 0  # symmetric codes are u8 around the middle
        self._codes = state.codes.t().contiguous()  # [in, out]
        self._weight_scale = state.weight_scale.clone()
        zero = state.weight_zero_point
        self._weight_zero: tuple[torch.Tensor, ...] = () if zero is None else (zero.to(torch.int8),)
        self._per_channel = state.weight_scale.numel() > 1
        if not self._per_channel:
            self._weight_scale = self._weight_scale.reshape(())
            self._weight_zero = tuple(zero.reshape(()) for zero in self._weight_zero)
        self._bias = None if state.bias is None else state.bias.detach().float()
        self._scale = self._zero = self._limits = None
        if state.input_scale is not None and state.input_zero_point is not None and a.outlier_tokens == "clip":
            self._scale = state.input_scale.clone()
            zero_point = int(state.input_zero_point) + self._shift
            self._zero = torch.tensor(zero_point, dtype=torch.uint8)
            if a.bits < 8:
                scale = float(state.input_scale)
                self._limits = -zero_point * scale, (2**a.bits - 1 - zero_point) * scale

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        reason = cls.no_integer_reason(state)
        if reason is not None:
            return reason
        a = state.activations
        if a.mode == "dynamic" and not a.symmetric and (a.granularity == "per_token" or a.bits != 8):
            return "dynamic zero points exist in ONNX for 8 bits per tensor only; use symmetric or static activations."
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._dynamic_product(x) if self._scale is None else self._static_product(x)
        return y if self._bias is None else y + self._bias

    def _static_product(self, x: torch.Tensor) -> torch.Tensor:
        if self._limits is not None:
            x = x.clamp(*self._limits)
        scale: Any = self._scale
        zero: Any = self._zero
        codes = _node("QuantizeLinear", (x, scale, zero), torch.uint8, x.shape, axis=0)
        rounded = _node("DequantizeLinear", (codes, scale, zero), torch.float32, x.shape, axis=0)
        parts = (self._codes, self._weight_scale, *self._weight_zero)
        weight = _node("DequantizeLinear", parts, torch.float32, self._codes.shape, axis=int(self._per_channel))
        return torch.matmul(rounded, weight)

    def _dynamic_product(self, x: torch.Tensor) -> torch.Tensor:
        a = self.state.activations
        shape = (*x.shape[:-1], self._codes.shape[1])
        if a.symmetric:
            scale, zero_point = self.state.input_qparams(x)
            codes = (self.state.input_codes(x, scale, zero_point) + self._shift).to(torch.uint8)
            zero: Any = torch.tensor(self._shift, dtype=torch.uint8)
        else:  # DynamicQuantizeLinear: the range of the whole input, widened to contain zero
            codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
                "DynamicQuantizeLinear",
                (x,),
                dtypes=(torch.uint8, torch.float32, torch.uint8),
                shapes=(x.shape, (), ()),
                version=OPSET,
            )
        accumulator = _node("MatMulInteger", (codes, self._codes, zero, *self._weight_zero), torch.int32, shape)
        if (
            scale.ndim
        ):  # one factor after the other: ONNX Runtime would fuse their product as if it were the same for all rows
            return accumulator.to(torch.float32) * self._weight_scale * scale
        return accumulator.to(torch.float32) * (scale * self._weight_scale)
