"""One oneDNN int8 matrix product for one or several quantized linear layers that read the same codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optimum_regcache.kernels import onednn
from optimum_regcache.kernels.fused_ops import Codes
from optimum_regcache.modules import QuantLinear

# transformers' name of an activation function -> (oneDNN post operation, its algorithm, factor on the input)
ACTIVATIONS: dict[str, tuple[str, str, float]] = {
    "gelu": ("gelu", "none", 1.0),
    "gelu_python": ("gelu", "none", 1.0),
    "gelu_new": ("gelu", "tanh", 1.0),
    "gelu_pytorch_tanh": ("gelu", "tanh", 1.0),
    "gelu_fast": ("gelu", "tanh", 1.0),
    "gelu_accurate": ("gelu", "tanh", 1.0),
    "quick_gelu": ("swish", "", 1.702),  # x sigmoid(1.702 x) = swish(1.702 x) / 1.702
    "silu": ("swish", "", 1.0),
    "swish": ("swish", "", 1.0),
    "relu": ("relu", "", 1.0),
    "linear": ("none", "", 1.0),
}


class Unfusable(ValueError):
    """A block that cannot run fused; the message says why."""


@dataclass(frozen=True)
class _Epilogue:
    """Post operation of a product, and what it needs folded in."""

    name: str = "none"
    algorithm: str = ""
    factor: float = 1.0


def input_codes(linear: QuantLinear) -> Codes:
    """The static per-tensor quantizer of the layer's input.

    Raises:
        Unfusable: another form of quantization.
    """
    a, state = linear.activations, linear.state()
    reason = onednn.OneDNNLinear.unsupported_reason(state)
    if reason is not None:
        raise Unfusable(reason)
    scale, zero = state.input_scale, state.input_zero_point
    if scale is None or zero is None or a.outlier_tokens != "clip":
        raise Unfusable("activation scales are computed from each input; fusing needs static scales.")
    if linear.weight_zero_point is not None:
        raise Unfusable("weights have zero points; fusing needs symmetric weights.")
    if linear.input_offset is not None or linear.hadamard_order != 1:
        raise Unfusable("the input is shifted or transformed before it is quantized (NoisyQuant, Hadamard).")
    shift = 2 ** (a.bits - 1) if a.symmetric else 0
    return Codes(float(1.0 / scale), float(scale), int(zero) + shift, 2**a.bits - 1)


def epilogue(activation: str) -> _Epilogue:
    """The post operation that computes the activation function called ``activation`` in a transformers config.

    Raises:
        Unfusable: oneDNN has none.
    """
    if activation not in ACTIVATIONS:
        raise Unfusable(f"the activation function {activation!r} has no fused form.")
    return _Epilogue(*ACTIVATIONS[activation])


class PackedGemm:
    """``post(s_x s_w (q_x - z) q_w + b)`` in one call, the layers' outputs side by side.

    Args:
        linears: layers that read the same codes.
        codes: quantizer of their input.
        channel_scale: [out], multiplied into the output (LayerScale).
        activation: applied to the output.
        out_codes: the output leaves as u8 codes of this quantizer; None for float32. Needs 8 bits.
    """

    def __init__(
        self,
        linears: Sequence[QuantLinear],
        codes: Codes,
        *,
        channel_scale: torch.Tensor | None = None,
        activation: _Epilogue | None = None,
        out_codes: Codes | None = None,
    ) -> None:
        self.codes = codes
        post = activation or _Epilogue()
        weight = torch.cat([linear.codes() for linear in linears])
        self.out_features = weight.shape[0]
        self.packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        scale = torch.cat([linear.weight_scale.expand(linear.out_features) for linear in linears]).detach().float()
        bias = _bias(linears)
        if channel_scale is not None:
            factor = channel_scale.detach().float()
            scale, bias = scale * factor, None if bias is None else bias * factor
        if post.factor != 1.0:
            scale, bias = scale * post.factor, None if bias is None else bias * post.factor
        self.scale, self.bias = scale.contiguous(), bias
        self.zero = torch.zeros(self.out_features, dtype=torch.int64)
        self.post, self.algorithm, self.factor = post.name, post.algorithm, post.factor
        if out_codes is None:
            self.out_scale, self.out_zero, self.out_dtype = 1.0, 0, torch.float32
        else:
            self.out_scale, self.out_zero = out_codes.scale * post.factor, out_codes.zero_point
            self.out_dtype = torch.uint8

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """u8 [..., in] -> float32 or u8 [..., out]."""
        y = torch.ops.onednn.qlinear_pointwise(
            codes, self.codes.scale, self.codes.zero_point, self.packed, self.scale, self.zero, self.bias,
            self.out_scale, self.out_zero, self.out_dtype, self.post, [], self.algorithm,
        )  # fmt: skip
        return y.div_(self.factor) if self.out_dtype == torch.float32 and self.factor != 1.0 else y

    def add(self, codes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product plus ``other`` float32 [..., out], as a new tensor (``other`` may be a collected hidden state)."""
        return torch.ops.onednn.qlinear_pointwise.binary(
            codes, self.codes.scale, self.codes.zero_point, self.packed, self.scale, self.zero, other, self.bias,
            1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], "",
        )  # fmt: skip


def _bias(linears: Sequence[Any]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    zeros = [linear.weight_scale.new_zeros(linear.out_features) for linear in linears]
    parts = [z if linear.bias is None else linear.bias.detach().float() for linear, z in zip(linears, zeros, strict=True)]
    return torch.cat(parts).contiguous()


def same_codes(found: Sequence[Codes]) -> bool:
    """Whether all layers read the same codes."""
    return all(math.isclose(c.scale, found[0].scale, rel_tol=0) and c == found[0] for c in found)
