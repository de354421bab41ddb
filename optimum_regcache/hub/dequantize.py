"""From a quantized model back to a float one with the values that its weight codes stand for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import AttentionConfig, DeletionConfig, RegCacheConfig
from optimum_regcache.encoders.tower import named_modules
from optimum_regcache.fusion import unfuse
from optimum_regcache.layers.attention import install_products
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.layers.patch_embedding import QuantPatchEmbedding
from optimum_regcache.registers import set_deletion, set_registers


def dequantize_modules(model: nn.Module, config: RegCacheConfig, dtype: torch.dtype) -> None:
    """Replace the quantized modules of ``model`` by float ones, in place. Activations are float from then on.

    Registers and deletion go: they are there for quantized activations, and a float checkpoint cannot describe them. Read
    them before (`optimum_regcache.get_registers`) to put them back.

    Args:
        model: quantized.
        config: what it was quantized with.
        dtype: of the new weights.

    Raises:
        ValueError: something of the model cannot be undone, with the reason; it then stays as it is.
    """
    reason = lasting_change(config)
    if reason is not None:
        raise ValueError(f"This model cannot be dequantized: {reason}. Open the float original instead.")
    unfuse(model)
    set_registers(model, None)
    set_deletion(model, DeletionConfig())
    install_products(model, AttentionConfig())
    quantized = [(n, m) for n, m in named_modules(model) if isinstance(m, (QuantLinear, QuantPatchEmbedding))]
    inner = {f"{name}.linear" for name, module in quantized if isinstance(module, QuantPatchEmbedding)}
    for name, module in quantized:
        if name in inner:
            continue
        new = _linear(module, dtype) if isinstance(module, QuantLinear) else _patch_embedding(module, dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)


def lasting_change(config: RegCacheConfig) -> str | None:
    """What the float classes cannot compute, or None."""
    if config.rewrites.rotation:
        return "its residual stream is rotated (method rotation)"
    if config.activations.mlp_out_hadamard:
        return "its MLP output projections read a Hadamard transform (method rotation)"
    if config.rewrites.register_neurons or any(m["name"] == "test_time_registers" for m in config.methods):
        return "registers took over what silenced MLP units did (method test_time_registers)"
    return None


def _linear(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    weight, bias = layer.dequantized_weight(), layer.bias
    if bias is not None and layer.input_offset is not None:  # the bias takes out what the offset adds
        bias = bias.float() + F.linear(layer.input_offset, weight)
    new = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta", dtype=dtype)
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    return new


def _patch_embedding(module: QuantPatchEmbedding, dtype: torch.dtype) -> nn.Module:
    flat, kernel = _linear(module.linear, dtype), module.kernel_size
    if kernel is None:
        return flat
    channels = flat.in_features // (kernel[0] * kernel[1])
    bias = cast("nn.Parameter | None", flat.bias)
    new: Any = nn.Conv2d(
        channels, flat.out_features, kernel, stride=kernel, bias=bias is not None, device="meta", dtype=dtype
    )
    new.weight = nn.Parameter(flat.weight.reshape(flat.out_features, channels, *kernel), requires_grad=False)
    new.bias = bias
    return new
