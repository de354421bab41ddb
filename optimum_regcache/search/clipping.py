"""Whether static activation scales suit a set of images: how many values lie outside of what their codes stand for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimum_regcache.calibration.calibrate import run_heads
from optimum_regcache.encoders.passes import Batch, PaddingMask, unfused
from optimum_regcache.layers.attention import Operand, attention_products
from optimum_regcache.layers.linear import QuantLinear, quant_linears
from optimum_regcache.math.uniform import code_range
from optimum_regcache.search.traces import require_numbers

Range = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Clipping:
    """Values outside the representable range, for every static activation scale of a model.

    A value is outside if it lies more than half a step beyond the largest or below the smallest value that has a code: then
    it is clipped, not rounded.

    Attributes:
        shares: module -> share of its input values that are outside.
        reach: module -> distance of the farthest value from the middle of the range, over half its width: 1 is the end of
            the range, 2 is twice as far; much less than 1 leaves codes unused.
        unbounded: modules with a static scale that clips nothing: a token beyond it gets a scale of its own (the oracle).
    """

    shares: dict[str, float]
    reach: dict[str, float]
    unbounded: int = 0

    @property
    def mean(self) -> float:
        """Mean share over the scales."""
        return sum(self.shares.values()) / len(self.shares)

    @property
    def worst(self) -> str:
        """Module with the largest share; of equal ones that whose values reach farthest."""
        return max(self.shares, key=lambda name: (self.shares[name], self.reach[name]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "scales": len(self.shares),
            "unbounded": self.unbounded,
            "mean": self.mean,
            "max": self.shares[self.worst],
            "worst": self.worst,
            "worst_reach": self.reach[self.worst],
            "shares": self.shares,
            "reach": self.reach,
        }


class _Counter:
    """Counts for one scale, from a forward pre-hook."""

    def __init__(self, name: str, module: QuantLinear | Operand, padding: PaddingMask) -> None:
        self.name, self.module, self.padding = name, module, padding
        self.outside = self.values = 0
        self.reach = 0.0

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(self.module, Operand):  # [B, H, N, *]: tokens first, then heads
            x = self.padding.content(args[0].detach().transpose(1, 2)).float()
            low, high = operand_range(self.module)
        else:
            x = self.module.prepare_input(self.padding.content(args[0].detach()).float())
            low, high = input_range(self.module)
        require_numbers(x, f"the input of {self.name}")
        self.values += x.numel()
        self.outside += int(((x < low) | (x > high)).sum())
        if x.numel():
            distance = (x - (low + high) / 2).abs() / ((high - low) / 2)
            self.reach = max(self.reach, float(distance.amax()))


def input_range(layer: QuantLinear) -> Range:
    """(lowest, highest) value that is rounded and not clipped, each 0-dim float32, of a layer with a static scale.

    Raises:
        ValueError: the layer has no static scale.
    """
    a, scale, zero = layer.activations, layer.input_scale, layer.input_zero_point
    if scale is None or zero is None:
        raise ValueError("This layer computes its activation scale from each input (mode='dynamic').")
    if layer.input_negative_scale is not None:
        half = 2 ** (a.bits - 1)
        return -(half + 0.5) * layer.input_negative_scale, (half - 0.5) * scale
    lowest, highest = code_range(a.bits, a.symmetric)
    return (lowest - 0.5 - zero) * scale, (highest + 0.5 - zero) * scale


def operand_range(operand: Operand) -> Range:
    """The same of an operand of an attention product, [1, 1] or [H, 1]."""
    scale, c = operand.scale.reshape(-1, 1), operand.config
    if operand.zero_point is None:  # probabilities; small ones are rounded, whatever the form
        highest = torch.ones_like(scale) if c.probabilities == "twin" else scale
        lowest = torch.zeros_like(scale)
        if operand.lower is not None:  # half a step below; there is nothing below 0
            lower = operand.lower.reshape(-1, 1)
            lowest = (lower - 0.5 * (highest - lower) / (2**c.bits - 1)).clamp(min=0)
        return lowest, highest * (1 + 0.5 / 2**c.bits)
    low, high = code_range(c.bits, c.symmetric)
    zero = operand.zero_point.reshape(-1, 1)
    return (low - 0.5 - zero) * scale, (high + 0.5 - zero) * scale


@torch.inference_mode()
def measure_clipping(model: nn.Module, batches: Iterable[Batch]) -> Clipping | None:
    """Run a quantized model as it is, registers and deletion included, and count. Padding is left out.

    Args:
        model: quantized; it is run as it would be used, but not fused.
        batches: images.

    Returns:
        None where no activation scale is static.

    Raises:
        ValueError: no images.
    """
    padding = PaddingMask()
    static = {name: layer for name, layer in quant_linears(model) if layer.input_scale is not None}
    bounded = {n: m for n, m in static.items() if m.activations.outlier_tokens == "clip" and m.own_scales is None}
    watched: dict[str, QuantLinear | Operand] = {**bounded}
    for name, products in attention_products(model):
        watched |= {f"{name}.{role}": operand for role, operand in products.operands()}
    if not watched:
        return None
    counters = {name: _Counter(name, module, padding) for name, module in watched.items()}
    handles = [watched[name].register_forward_pre_hook(counter) for name, counter in counters.items()]
    try:
        with unfused(model):
            for batch in batches:
                padding.start(batch)
                run_heads(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    counters = {name: counter for name, counter in counters.items() if counter.values}  # heads may not take part
    if not counters:
        raise ValueError("No images to check the activation scales with.")
    return Clipping(
        {name: c.outside / c.values for name, c in counters.items()},
        {name: c.reach for name, c in counters.items()},
        len(static) - len(bounded),
    )
