"""A quantized model with float activations: its own weights, rewrites and registers, and nothing rounded on the way.

This is the float network that registers and activation scales of a checkpoint belong to, without the float original.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from optimum_regcache.encoders.passes import unfused
from optimum_regcache.kernels.simulated import SimulatedLinear
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import running_as
from optimum_regcache.math.linear import linear


class FloatInputLinear(SimulatedLinear):
    """``linear(x, dequantize(codes))`` in float32: the input stays as it is."""

    rounds_input = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self._bias is None else self._bias.float()
        return linear(x.float(), self._weight, bias).to(x.dtype)


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block no activation of ``model`` is quantized, attention products included; needs the memory of the
    float weights. A model without quantized layers stays as it is."""
    operands = [operand for _, products in attention_products(model) for _, operand in products.operands()]
    before = [operand.bypass for operand in operands]
    try:
        for operand in operands:
            operand.bypass = True
        with unfused(model), running_as(model, FloatInputLinear):
            yield
    finally:
        for operand, bypass in zip(operands, before, strict=True):
            operand.bypass = bypass
