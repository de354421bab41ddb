"""One oneDNN int8 matrix product for one or several quantized linear layers that read the same codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from optimum_regcache.kernels import onednn
from optimum_regcache.kernels.fused_ops import Codes
from optimum_regcache.layers.linear import QuantLinear


class UnfusableError(ValueError):
    """A block that cannot run fused; the message says why."""


@dataclass(frozen=True)
class Activation:
    """An activation function as oneDNN's post operation, and the factor that has to be folded into its input."""

    name: str = "none"
    algorithm: str = ""
    factor: float = 1.0


_GELU, _TANH_GELU, _SILU = Activation("gelu", "none"), Activation("gelu", "tanh"), Activation("swish")
ACTIVATIONS = {  # by their names in transformers
    "gelu": _GELU,
    "gelu_python": _GELU,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_accurate": _TANH_GELU,
    "quick_gelu": Activation("swish", factor=1.702),  # x sigmoid(1.702 x) = swish(1.702 x) / 1.702
    "silu": _SILU,
    "swish": _SILU,
    "relu": Activation("relu"),
    "linear": Activation(),
}


def input_codes(linear: QuantLinear) -> Codes:
    """The static per-tensor quantizer of the layer's input.

    Raises:
        UnfusableError: another form of quantization.
    """
    if linear.backend not in ("auto", "onednn"):
        raise UnfusableError(f"the execution backend {linear.backend!r} was chosen.")
    state = linear.state()
    reason = onednn.OneDNNLinear.unsupported_reason(state)
    if reason is not None:
        raise UnfusableError(reason)
    codes = Codes.of(state)
    if codes is None:
        raise UnfusableError("activation scales are computed from each input; fusing needs static scales.")
    if linear.weight_zero_point is not None:
        raise UnfusableError("weights have zero points; fusing needs symmetric weights.")
    if linear.input_offset is not None or linear.hadamard_order != 1:
        raise UnfusableError("the input is shifted or transformed before it is quantized (NoisyQuant, Hadamard).")
    return codes


def fused_activation(name: str) -> Activation:
    """The post operation that computes the activation function called ``name`` in a transformers config.

    Raises:
        UnfusableError: oneDNN has none.
    """
    if name not in ACTIVATIONS:
        raise UnfusableError(f"the activation function {name!r} has no fused form.")
    return ACTIVATIONS[name]


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
        activation: Activation = Activation(),
        out_codes: Codes | None = None,
    ) -> None:
        self.codes = codes
        scale = torch.cat([linear.weight_scale.expand(linear.out_features) for linear in linears]).detach().float()
        bias = _bias(linears)
        for factor in (channel_scale, activation.factor):
            if factor is not None:
                scale, bias = scale * factor, None if bias is None else bias * factor
        weight = torch.cat([linear.codes() for linear in linears])
        self.weight = onednn.PackedWeight.pack(weight, scale, bias, codes.highest)
        self.epilogue = onednn.Epilogue(activation.name, activation.algorithm)
        self.factor = activation.factor
        if out_codes is not None:
            out_scale = out_codes.scale * self.factor
            self.epilogue = replace(
                self.epilogue, out_scale=out_scale, out_zero_point=out_codes.zero_point, as_codes=True
            )

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """u8 [..., in] -> float32 or u8 [..., out]."""
        y = onednn.int8_linear(codes, self.codes.scale, self.codes.zero_point, self.weight, self.epilogue)
        return y if self.epilogue.as_codes or self.factor == 1.0 else y.div_(self.factor)

    def add(self, codes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product plus ``other`` float32 [..., out], as a new tensor (``other`` may be a collected hidden state)."""
        return onednn.int8_linear(codes, self.codes.scale, self.codes.zero_point, self.weight, other=other)


def _bias(linears: Sequence[Any]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    zeros = [linear.weight_scale.new_zeros(linear.out_features) for linear in linears]
    parts = [
        z if linear.bias is None else linear.bias.detach().float() for linear, z in zip(linears, zeros, strict=True)
    ]
    return torch.cat(parts).contiguous()
