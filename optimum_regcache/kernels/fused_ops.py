"""Fused operations of the int8 runtime: C++ operators where they are available, else the same in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.kernels.base import LinearState

Rows = tuple[torch.Tensor | None, torch.Tensor | None]  # keys and values of register rows


@dataclass(frozen=True)
class Codes:
    """How a tensor becomes u8 codes: ``clamp(round(x * inverse) + zero_point, 0, highest)``, ties to even.

    Attributes:
        inverse: 1 / scale, a float32 number.
        scale: step.
        zero_point: code of zero, 0 to 255.
        highest: 2^bits - 1.
    """

    inverse: float
    scale: float
    zero_point: int
    highest: int

    @classmethod
    def of(cls, state: LinearState) -> Codes | None:
        """The static quantizer of a layer's input; None where its scale depends on the input."""
        a, scale, zero = state.activations, state.input_scale, state.input_zero_point
        if scale is None or zero is None or a.outlier_tokens != "clip":
            return None
        shift = 2 ** (a.bits - 1) if a.symmetric else 0
        inverse = 1.0 / scale  # float32, the same number that the other backends multiply by
        return cls(float(inverse), float(scale), int(zero) + shift, 2**a.bits - 1)

    @property
    def is_byte(self) -> bool:
        """Whether saturation of u8 is the clamp (8 bits)."""
        return self.highest == 255


def quantize(x: torch.Tensor, codes: Codes, native: bool) -> torch.Tensor:
    """float32 [...] -> u8 codes [...]; in plain PyTorch by passes over one buffer: rounded before the shift, as everywhere."""
    if native:
        return torch.ops.regcache.quantize(x, codes.inverse, codes.zero_point, codes.highest)
    shifted = x.mul(codes.inverse).round_().add_(codes.zero_point)
    return shifted.clamp_(0, codes.highest).to(torch.uint8)


def layer_norm_quantize(x: torch.Tensor, norm: nn.LayerNorm, codes: Codes, native: bool) -> torch.Tensor:
    """LayerNorm of float32 [..., D], then u8 codes. Natively in one pass; codes at ties may differ by one."""
    if native and norm.weight is not None and norm.bias is not None:
        return torch.ops.regcache.layer_norm_quantize(
            x, norm.weight, norm.bias, norm.eps, codes.inverse, codes.zero_point, codes.highest
        )
    return quantize(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), codes, native)


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    registers: Rows,
    logit_bias: float,
    heads: int,
    scaling: float,
    codes: Codes | None,
) -> torch.Tensor:
    """``softmax(scaling q k^T) v`` with both products in int8; needs the C++ operators.

    Scales are computed from the tensors at hand: one per token for queries and keys, one per channel for values. The
    probabilities of image tokens are u8 relative to the largest of their row, and are renormalised by the sum of their
    codes. Register rows are computed in float32 and stay outside the range of the codes (docs/method.md 5): the output is
    ``(1 - p) o + p v_r`` exactly as if they stood among the keys.

    Args:
        q, k, v: float32 [B, N, H * d], last stride 1, all with the same strides (views of one tensor may be passed).
        registers: keys and values [H, n, d] of the rows before the image tokens, n <= 16; both None without registers.
        logit_bias: ln(tau) of the rows.
        heads: H; d <= 128.
        scaling: of the logits.
        codes: quantizer of the output; None for float32.

    Returns:
        [B, N, H * d], u8 codes or float32.
    """
    key, value = registers
    inverse, zero, highest = (0.0, 0, 255) if codes is None else (codes.inverse, codes.zero_point, codes.highest)
    return torch.ops.regcache.attention(q, k, v, key, value, heads, scaling, logit_bias, inverse, zero, highest)


def int8_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    registers: Rows,
    logit_bias: float,
    heads: int,
    scaling: float,
) -> torch.Tensor:
    """What :func:`int8_attention` computes, in plain PyTorch and float32: for tests. Arguments and result as there."""

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
        scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-30) / 127
        return (x / scale).round() * scale

    query, key, value = split(q), split(k), split(v)
    logits = rounded(query, -1) @ rounded(key, -1).transpose(-1, -2) * scaling
    top = logits.amax(-1, keepdim=True)
    weights = ((logits - top).exp() * 255).round()
    total, output = weights.sum(-1, keepdim=True), weights @ rounded(value, 2)
    register_key, register_value = registers
    if register_key is not None and register_value is not None:
        row = query @ register_key.transpose(-1, -2) * scaling + logit_bias
        mass = 255 * (row - top).clamp(max=100 * math.log(2)).exp()
        total, output = total + mass.sum(-1, keepdim=True), output + mass @ register_value
    return (output / total).transpose(1, 2).flatten(2)
