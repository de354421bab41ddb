"""Quantized inputs in a float model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.math import uniform


@contextmanager
def quantized_inputs(
    model: nn.Module, names: list[str], qparams: dict[str, tuple[torch.Tensor, torch.Tensor]], config: RegCacheConfig
) -> Iterator[None]:
    """Fake-quantize the inputs of the named modules of a float model, weights untouched."""
    a = config.activations

    def hook(name: str) -> Any:
        def quantize(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            scale, zero = qparams.get(name) or uniform.dynamic_qparams(x, a.bits, a.symmetric, a.granularity)
            return (uniform.fake_quantize(x, scale, zero, a.bits, a.symmetric).to(x.dtype), *args[1:])

        return quantize

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
