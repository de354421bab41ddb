"""Quantizers of probabilities and activations with other steps than one: twin uniform (PTQ4ViT), logarithmic (RepQ-ViT), and
uniform on an interval (AIQViT). Simulated: values in, values out."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from optimum_regcache.math.uniform import gradient_wanted, straight_through

PROBABILITY_FORMS = ("uniform", "twin", "log2", "log_sqrt2", "dfq")


def activation_minimum(name: str) -> float:
    """Smallest value of the activation function called ``name`` in a transformers config, to about 1e-7.

    GELU -0.16997, its tanh form -0.17004, QuickGELU -0.16359: the negative range of the twin quantizer (docs/method.md 11.4).

    Raises:
        ValueError: a function without a negative minimum, for example ReLU.
    """
    from transformers.activations import ACT2FN

    x = torch.linspace(-4.0, 0.0, 400_001, dtype=torch.float64)
    lowest = float(cast("Any", ACT2FN)[name](x).min())
    if not -1.0 < lowest < 0.0:
        raise ValueError(f"Activation {name!r} has no negative minimum; twin quantizers are for GELU-like functions.")
    return lowest


def twin_signed(x: torch.Tensor, scale: torch.Tensor, negative_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Twin uniform quantization after GELU (PTQ4ViT, arXiv 2111.12293; docs/method.md 11.4).

    ``x >= 0``: codes ``[0, 2^(b-1) - 1]`` of step ``scale``; ``x < 0``: codes ``[-2^(b-1), 0]`` of step ``negative_scale``.

    Args:
        x: any shape.
        scale, negative_scale: broadcast against ``x``.
        bits: 2 to 8.

    Returns:
        float32, shape of ``x``.
    """
    x, half = x.float(), 2 ** (bits - 1)
    positive = (x * (1.0 / scale)).round().clamp(0, half - 1) * scale
    negative = (x * (1.0 / negative_scale)).round().clamp(-half, 0) * negative_scale
    value = torch.where(x >= 0, positive, negative)
    return straight_through(x, value, -half * negative_scale, (half - 1) * scale) if gradient_wanted(x) else value


def twin_unit(x: torch.Tensor, split: torch.Tensor, bits: int) -> torch.Tensor:
    """Twin uniform quantization of probabilities (docs/method.md 11.4), in its disjoint form.

    ``x < split``: step ``split / 2^(b-1)``; otherwise step ``1 / 2^(b-1)``; codes ``[0, 2^(b-1) - 1]`` and one flag bit. The
    official code adds the two ranges instead, which shifts every value by about ``split``.

    Args:
        x: values in [0, 1].
        split: power of two, broadcast against ``x``.
        bits: 2 to 8.
    """
    x, half = x.float(), 2 ** (bits - 1)
    step = torch.where(x < split, split / half, torch.full_like(split, 1.0 / half))
    return (x / step).round().clamp(0, half - 1) * step


def log_quantize(x: torch.Tensor, scale: torch.Tensor, bits: int, *, half_steps: bool) -> torch.Tensor:
    """Logarithmic quantization of probabilities (RepQ-ViT, arXiv 2212.08254; docs/method.md 11.5).

    ``q = clip(round(-k log2(x / s)), 0, 2^b - 1)`` with k = 2 (base sqrt 2, ``half_steps``) or 1 (base 2); values whose raw
    code is 2^b or more, and zeros, become 0. ``x = s 2^-ceil(q/2) (1 + (q mod 2)(sqrt 2 - 1))`` for base sqrt 2.

    Args:
        x: values >= 0.
        scale: s, broadcast against ``x``.
        bits: 2 to 8.
        half_steps: base sqrt 2.
    """
    levels, steps = 2**bits, 2 if half_steps else 1
    raw = torch.round(-steps * torch.log2(x.float().clamp(min=0) / scale))
    code = raw.clamp(0, levels - 1)
    if half_steps:
        value = torch.exp2(-torch.ceil(code / 2)) * (1 + (code % 2) * (math.sqrt(2) - 1)) * scale
    else:
        value = torch.exp2(-code) * scale
    return torch.where(raw >= levels, torch.zeros_like(value), value)


def uniform_unit(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Uniform quantization of probabilities, codes ``[0, 2^b - 1]`` of step ``scale / (2^b - 1)``; ``scale`` is the largest
    value that is not clipped."""
    step = scale / (2**bits - 1)
    return (x.float() / step).round().clamp(0, 2**bits - 1) * step


def focused_unit(x: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Uniform quantization of probabilities on an interval, the dynamic focusing quantizer (AIQViT, arXiv 2502.04628;
    docs/method.md 11.14).

    Codes ``[0, 2^b - 1]`` of step ``(high - low) / (2^b - 1)``: the first below ``low``, the last above ``high``. With low = 0
    this is :func:`uniform_unit`.

    Gradients reach all three: with ``u = (x - low) / (high - low)`` and ``q`` its rounded value, ``x`` has 1 inside, 0 outside;
    ``low`` has ``u - q`` inside and 1 below; ``high`` has ``q - u`` inside and 1 above (rounding passed straight through).

    Args:
        x: values in [0, 1].
        low, high: the ends, ``low < high``, broadcast against ``x``.
        bits: 2 to 8.

    Returns:
        float32, shape of ``x``.
    """
    x, last = x.float(), 2**bits - 1
    step = (high - low) / last
    code = ((x - low) / step).round().clamp(0, last)
    value = code * step + low
    if not value.requires_grad:
        return value
    place = ((x - low) / (high - low)).clamp(0, 1)
    smooth = low + (high - low) * (place + (code / last - place).detach())
    return value.detach() + (smooth - smooth.detach()).nan_to_num(0.0)


def focus_ends() -> torch.Tensor:
    """Candidates for ``high``: 2^(-i/8), i = 0 .. 63, float32 [64]."""
    return torch.exp2(-torch.arange(64.0) / 8)


def quantize_probabilities(
    x: torch.Tensor, scale: torch.Tensor, bits: int, form: str, lower: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Apply the form called ``form``; ``scale`` is its parameter (``twin``: the split; ``dfq``: the upper end, ``lower`` being
    the lower one). Gradients pass straight through up to the largest value of the form; of ``dfq`` the ends have some too."""
    if form == "dfq":
        return focused_unit(x, lower, scale, bits)
    if form == "twin":
        value = twin_unit(x, scale, bits)
    elif form == "uniform":
        value = uniform_unit(x, scale, bits)
    else:
        value = log_quantize(x, scale, bits, half_steps=form == "log_sqrt2")
    highest = 1.0 if form == "twin" else scale
    return straight_through(x, value, 0.0, highest) if gradient_wanted(x) else value
