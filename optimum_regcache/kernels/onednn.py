"""Real int8 on x86 CPUs through oneDNN (`torch.ops.onednn.qlinear_pointwise`): u8 activations, s8 weights.

Codes and integer sums are those of the reference backend; only the float32 epilogue (scale, bias) may round differently:
observed difference <= 2 ulp of the largest term. Narrower codes (W6A6, W4A4) run in the same int8 containers.

Known traps (all avoided here): signed int8 activations fall back to a scalar kernel, so symmetric codes are stored as
u8 with zero point 128; packed weights are opaque and cannot be copied or saved; without VNNI the u8 x s8 products
saturate in 16 bits (`optimum_regcache.kernels.cpu`), so that there an exact operator of our own takes the layers whose codes
are large enough, or, where it cannot be built, simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from optimum_regcache.kernels import cpu, native
from optimum_regcache.kernels.base import LinearBackend, LinearState
from optimum_regcache.kernels.fused_ops import Codes, quantize


def machine_reason() -> str | None:
    """Why this machine cannot multiply all 8-bit codes as integers, or None if it can."""
    reason = kernel_reason()
    if reason is not None or not cpu.sums_saturate():
        return reason
    reason = native.unavailable_reason()
    if reason is None:
        return None
    return f"the CPU has no VNNI instructions, and the C++ operators that do without are not available: {reason}"


def kernel_reason() -> str | None:
    """Why oneDNN's kernel cannot be used here, or None."""
    if not cpu.capabilities():
        return f"PyTorch {torch.__version__} cannot tell which instructions the CPU has; 2.13 can."
    if cpu.capabilities().get("architecture") != "x86_64":
        return "int8 on the CPU needs an x86-64 processor."
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch build has no oneDNN."
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this PyTorch build has no torch.ops.onednn.qlinear_pointwise."
    return schema_reason()


# PyTorch's own operators, not a public interface: the types of their arguments as `_linear`, `PackedWeight.pack` and
# native/block_op.cpp pass them, by position
_SCHEMAS = {
    ("qlinear_prepack", "default"): "Tensor, int[]? -> Tensor",
    ("qlinear_pointwise", "default"): (
        "Tensor, float, int, Tensor, Tensor, Tensor, Tensor?, float, int, ScalarType?, str, Scalar?[], str -> Tensor"
    ),
    ("qlinear_pointwise", "binary"): (
        "Tensor, float, int, Tensor, Tensor, Tensor, Tensor?, Tensor?, float, int, ScalarType?, float, int, str, float, str, "
        "Scalar?[], str -> Tensor"
    ),
}


@lru_cache(maxsize=1)
def schema_reason() -> str | None:
    """Why this PyTorch's oneDNN operators cannot be called as this package calls them, or None."""
    for (name, overload), expected in _SCHEMAS.items():
        operator = getattr(torch.ops.onednn, name)
        found = _types(str(getattr(operator, overload)._schema)) if overload in operator.overloads() else "missing"
        if found != expected:
            return (
                f"torch.ops.onednn.{name}.{overload} of PyTorch {torch.__version__} has another schema: expected "
                f"({expected}), got ({found}). Use the PyTorch of this package's tests (2.13)."
            )
    return None


def _types(schema: str) -> str:
    """A schema without the names of operator and arguments: ``a::b(Tensor x, int y=0) -> Tensor`` is
    ``Tensor, int -> Tensor``."""
    arguments, _, returned = schema.partition("(")[2].rpartition(") -> ")
    return ", ".join(argument.rpartition(" ")[0] or argument for argument in arguments.split(", ")) + f" -> {returned}"


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the layout of its kernel, with what turns integer sums into values.

    Attributes:
        packed: oneDNN's is opaque: it can be neither copied nor pickled.
        scale: float32 [out].
        zero_point: int64 [out], zeros: the kernel supports symmetric weights only.
        bias: float32 [out] or None.
        own: for our operator, which does not saturate; ``packed`` is int8 then, see `panels`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bias: torch.Tensor | None
    own: bool = False

    @classmethod
    def pack(cls, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, highest: int) -> PackedWeight:
        """From int8 codes [out, in], scales [out] and bias [out]; the inputs' codes go up to ``highest``."""
        own = cpu.sums_saturate() and cpu.needs_vnni(highest, codes)
        packed = panels(codes) if own else torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        zero = torch.zeros(codes.shape[0], dtype=torch.int64)
        return cls(packed, scale.detach().float().contiguous(), zero, bias, own)


def panels(codes: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> [ceil(out / 16), ceil(in / 2), 16, 2], filled up with zeros, flat: torch.compile would take an axis
    of two for the batch size."""
    rows, columns = codes.shape
    filled = F.pad(codes, (0, columns % 2, 0, -rows % 16))
    return filled.unflatten(1, (-1, 2)).unflatten(0, (-1, 16)).transpose(1, 2).flatten()


@dataclass(frozen=True)
class Epilogue:
    """What happens to ``y = s_x s_w (q_x - z) q_w + b`` inside the kernel.

    Attributes:
        post, algorithm: activation function in oneDNN's words ("gelu" with "none" or "tanh", "swish", "relu", "none").
        out_scale, out_zero_point: quantizer of the output if ``as_codes``.
        as_codes: u8 output, saturating at 0 and 255; else float32.
    """

    post: str = "none"
    algorithm: str = ""
    out_scale: float = 1.0
    out_zero_point: int = 0
    as_codes: bool = False


def int8_linear(
    codes: torch.Tensor,
    scale: float,
    zero_point: int,
    weight: PackedWeight,
    epilogue: Epilogue = Epilogue(),
    other: torch.Tensor | None = None,
) -> torch.Tensor:
    """u8 ``codes`` [..., in] -> float32 or u8 [..., out]; ``other`` float32 [..., out] is added (a new tensor comes back).

    Under `torch.compile` an operator of our own stands for the call: inductor wants to lower oneDNN's itself, which it can
    only where the weights are constants of the graph.
    """
    e = epilogue
    if weight.own:
        return torch.ops.regcache.linear(
            codes, scale, zero_point, weight.packed, weight.scale, weight.bias, other,
            e.out_scale, e.out_zero_point, e.as_codes, e.post, e.algorithm,
        )  # fmt: skip
    call = torch.ops.regcache_onednn.linear if torch.compiler.is_compiling() else _linear
    return call(
        codes, scale, zero_point, weight.packed, weight.scale, weight.zero_point, weight.bias, other,
        e.out_scale, e.out_zero_point, e.as_codes, e.post, e.algorithm,
    )  # fmt: skip


def _output(codes: torch.Tensor, weight_scale: torch.Tensor, as_codes: bool) -> torch.Tensor:
    """An empty tensor of the shape and dtype of the result."""
    dtype = torch.uint8 if as_codes else torch.float32
    return codes.new_empty(*codes.shape[:-1], weight_scale.shape[0], dtype=dtype)


def _linear(
    codes: torch.Tensor,
    scale: float,
    zero_point: int,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    out_scale: float,
    out_zero: int,
    as_codes: bool,
    post: str,
    algorithm: str,
) -> torch.Tensor:
    if codes.numel() == 0:  # the kernel flattens the leading axes of an empty input
        return _output(codes, weight_scale, as_codes)
    if other is not None:  # "sum" would write into ``other``
        return torch.ops.onednn.qlinear_pointwise.binary(
            codes, scale, zero_point, packed, weight_scale, weight_zero, other, bias,
            1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], "",
        )  # fmt: skip
    return torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero_point, packed, weight_scale, weight_zero, bias,
        out_scale, out_zero, torch.uint8 if as_codes else torch.float32, post, [], algorithm,
    )  # fmt: skip


_LIBRARY = torch.library.Library("regcache_onednn", "DEF")
_LIBRARY.define(
    "linear(Tensor codes, float scale, int zero_point, Tensor packed, Tensor weight_scale, Tensor weight_zero, Tensor? bias, "
    "Tensor? other, float out_scale, int out_zero, bool as_codes, str post, str algorithm) -> Tensor"
)
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("regcache_onednn::linear", lib=_LIBRARY)
def _linear_shape(
    codes: torch.Tensor, scale: float, zero: int, packed: object, weight_scale: torch.Tensor, *rest: Any
) -> Any:
    return _output(codes, weight_scale, as_codes=rest[5])


class OneDNNLinear(LinearBackend):
    """int8 matrix product with fused dequantization and bias."""

    def __init__(self, state: LinearState) -> None:
        super().__init__(state)
        bias = None if state.bias is None else state.bias.detach().float().contiguous()
        highest = 2**state.activations.bits - 1
        self._weight = PackedWeight.pack(state.codes, state.weight_scale.expand(state.codes.shape[0]), bias, highest)
        self._plain = replace(self._weight, bias=None)
        self.state = replace(state, codes=state.codes.new_empty(0))  # the packed copy is enough
        self._shift = 2 ** (state.activations.bits - 1) if state.activations.symmetric else 0
        self._static = Codes.of(state)
        self._weight_shift: torch.Tensor | None = None  # s_w z_w, for weights with a zero point
        if state.weight_zero_point is not None:
            self._weight_shift = (state.weight_zero_point.float() * state.weight_scale).expand(state.codes.shape[0])

    @classmethod
    def layer_reason(cls, state: LinearState) -> str | None:
        """Why this layer cannot run as int8 on any CPU, or None."""
        if state.codes.device.type != "cpu":
            return f"the weights are on {state.codes.device}, the kernel runs on the CPU."
        reason = cls.no_integer_reason(state)
        if reason is not None:
            return reason
        if state.activations.granularity == "per_token" and not state.activations.symmetric:
            return "per-token zero points are not supported by the kernel."
        return None

    @classmethod
    def unsupported_reason(cls, state: LinearState) -> str | None:
        reason = cls.layer_reason(state)
        if reason is not None:
            return reason
        large = cpu.needs_vnni(2**state.activations.bits - 1, state.codes)
        return machine_reason() if large else kernel_reason()

    def _product(self, codes: torch.Tensor, scale: float, zero_point: int, weight: PackedWeight) -> torch.Tensor:
        y = int8_linear(codes, scale, zero_point, weight)
        if self._weight_shift is not None:  # sum (q_x - z_x)(q_w - z_w) = sum (q_x - z_x) q_w - z_w sum (q_x - z_x)
            total = codes.sum(-1, keepdim=True, dtype=torch.int32) - zero_point * codes.shape[-1]
            y -= (scale * total.float()) * self._weight_shift
        return y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._static is not None:
            codes = quantize(x.float().contiguous(), self._static, native=False)
            return self._product(codes, self._static.scale, self._static.zero_point, self._weight).to(x.dtype)
        scale_t, zero_t = self.state.input_qparams(x)
        codes = (self.state.input_codes(x.contiguous(), scale_t, zero_t) + self._shift).to(torch.uint8)
        if scale_t.ndim == 0:
            return self._product(codes, float(scale_t), int(zero_t) + self._shift, self._weight).to(x.dtype)
        y = self._product(codes, 1.0, self._shift, self._plain) * scale_t
        if self._weight.bias is not None:
            y += self._weight.bias
        return y.to(x.dtype)
