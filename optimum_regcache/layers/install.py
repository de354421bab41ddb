"""From a float model to the module tree of a quantized checkpoint: the one place that replaces modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import ActivationsConfig, RegCacheConfig
from optimum_regcache.encoders.sites import Site, matches, quantization_sites
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.layers.attention import attention_products, install_products
from optimum_regcache.layers.linear import QuantLinear, quant_linears
from optimum_regcache.layers.patch_embedding import QuantPatchEmbedding
from optimum_regcache.math.nonuniform import activation_minimum
from optimum_regcache.registers.mlp_output import rewire

QParams = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def config_sites(model: nn.Module, config: RegCacheConfig) -> list[Site]:
    """The modules that ``config`` quantizes in ``model``."""
    m = config.modules
    return quantization_sites(model, patch_embedding=m.patch_embedding, head=m.head, ignore=m.ignore)


def site_activations(config: RegCacheConfig, site: Site) -> ActivationsConfig:
    """How the input of one module is quantized: special forms are for the MLP output projections only, and the modules named
    in ``modules.mixed_precision`` get 16 bits."""
    if any(matches(site.path, pattern) for pattern in config.modules.mixed_precision):
        return ActivationsConfig(bits=16)
    if site.role == "activation":
        return config.activations
    return replace(config.activations, post_activation="uniform", mlp_out_offset=False, mlp_out_hadamard=False)


def negative_scale(model: nn.Module, bits: int) -> torch.Tensor:
    """Step of the negative values after the tower's activation function (docs/method.md 11.4): ``|min act| / 2^(b-1)``, 0-dim.

    Raises:
        ValueError: the MLP multiplies two branches (SwiGLU), or its activation function has no negative minimum.
    """
    tower = find_tower(model)
    if tower.is_gated(0):
        raise ValueError(
            "activations.post_activation='twin' needs an MLP whose output projection reads the activation function; this "
            "encoder multiplies it by a second branch (SwiGLU). Use post_activation='uniform'."
        )
    return torch.tensor(-activation_minimum(tower.config.hidden_act) / 2 ** (bits - 1), dtype=torch.float32)


def _replace(model: nn.Module, site: Site, new: nn.Module) -> None:
    parent = model.get_submodule(site.parent) if site.parent else model
    setattr(parent, site.attribute, new)


def quantize_modules(model: nn.Module, config: RegCacheConfig, *, empty: bool = False) -> None:
    """Replace the float modules by quantized ones, in place.

    Args:
        model: float model; on the meta device if ``empty``.
        config: what to quantize and how (round to nearest).
        empty: leave the new modules without weights, for a checkpoint to be loaded into.

    Raises:
        ValueError: patterns that match nothing, or nothing left to quantize.
    """
    sites = config_sites(model, config)
    unused = [p for p in config.modules.mixed_precision if not any(matches(site.path, p) for site in sites)]
    if unused:
        raise ValueError(
            f"modules.mixed_precision pattern(s) {', '.join(unused)} match no module that would be quantized."
        )
    if not (sites or empty or config.attention.quantize):
        raise ValueError(
            f"Nothing is left to quantize: modules.ignore={list(config.modules.ignore)} takes every module out. Shorten it."
        )
    for site in sites:
        module: Any = model.get_submodule(site.name)
        kind = QuantPatchEmbedding if site.kind == "patch_embedding" else QuantLinear
        build = kind.empty_like if empty else kind.from_float
        new = build(module, config.weights, site_activations(config, site))
        linear: Any = new.linear if isinstance(new, QuantPatchEmbedding) else new
        if linear.input_negative_scale is not None and not empty:
            step = negative_scale(model, config.activations.bits)
            linear.input_negative_scale = step.to(linear.weight.device)
        _replace(model, site, new)
    rewire(find_tower(model))
    install_products(model, config.attention)


def assign_input_qparams(model: nn.Module, qparams: QParams) -> None:
    """Give every static quantized layer its activation scale.

    Args:
        qparams: name of the original float module -> (scale, zero_point).

    Raises:
        ValueError: a layer without qparams.
    """
    for name, products in attention_products(model):
        for role, operand in products.operands():
            if f"{name}.{role}" not in qparams:
                raise ValueError(f"No activation statistics for {name}.{role}: calibration never reached it.")
            operand.set_qparams(*qparams[f"{name}.{role}"])
    for name, module in quant_linears(model):
        if module.input_scale is None:
            continue
        key = name if name in qparams else name.removesuffix(".linear")
        if key not in qparams:
            raise ValueError(
                f"No activation statistics for {name}: the calibration batches never reached it. Check modules.ignore and "
                "the calibration data."
            )
        module.set_input_qparams(*qparams[key])
