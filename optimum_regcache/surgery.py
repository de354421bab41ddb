"""From a float model to the module tree of a quantized checkpoint: the one place that replaces modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_regcache.architectures import Site, find_tower, matches, quantization_sites
from optimum_regcache.config import ActivationsConfig, RegCacheConfig
from optimum_regcache.modules import QuantLinear, QuantPatchEmbedding, quant_linears
from optimum_regcache.nonuniform import activation_minimum
from optimum_regcache.products import attention_products, install_products
from optimum_regcache.registers import RegisterCache, prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import set_register_neurons
from optimum_regcache.rewrites.rotation import empty_rotation

QParams = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def config_sites(model: nn.Module, config: RegCacheConfig) -> list[Site]:
    """The modules that ``config`` quantizes in ``model``."""
    m = config.modules
    return quantization_sites(model, patch_embedding=m.patch_embedding, head=m.head, ignore=m.ignore)


def site_activations(config: RegCacheConfig, site: Site) -> ActivationsConfig:
    """How the input of one module is quantized: special forms are for the MLP output projections only, and the modules named
    in ``modules.sixteen_bit`` get 16 bits."""
    if any(matches(site.path, pattern) for pattern in config.modules.sixteen_bit):
        return ActivationsConfig(bits=16)
    if site.role == "activation":
        return config.activations
    return replace(config.activations, post_activation="uniform", mlp_out_offset=False, mlp_out_hadamard=False)


def negative_scale(model: nn.Module, bits: int) -> torch.Tensor:
    """Step of the negative values after the tower's activation function (PTQ4ViT, B.6): ``|min act| / 2^(b-1)``, 0-dim.

    Raises:
        ValueError: the MLP multiplies two branches (SwiGLU), or its activation function has no negative minimum.
    """
    tower = find_tower(model)
    if not tower.mlp_out_name(0).endswith("fc2"):
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
    """
    sites = config_sites(model, config)
    unused = [p for p in config.modules.sixteen_bit if not any(matches(site.path, p) for site in sites)]
    if unused:
        raise ValueError(f"modules.sixteen_bit pattern(s) {', '.join(unused)} match no module that would be quantized.")
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


def validate_positions(model: nn.Module, config: RegCacheConfig) -> None:
    """Check registers and deletion against the encoder's number of blocks.

    Raises:
        ValueError: a block that does not exist, or a config whose search was never run.
    """
    blocks = len(find_tower(model).blocks)
    if config.registers.mode == "search":
        raise ValueError(
            "registers.mode='search' describes a model that is still to be searched. Run RegCacheQuantizer.quantize with "
            "a calibration dataset, or set registers.mode to 'fixed' or 'none'."
        )
    if config.registers.blocks and config.registers.blocks[-1] >= blocks:
        raise ValueError(
            f"registers.blocks={list(config.registers.blocks)}, but the encoder has blocks 0 to {blocks - 1}."
        )


def install_structure(model: nn.Module, config: RegCacheConfig) -> None:
    """Registers (empty, of the right shape), deletion and run-time rewrites of ``config``, in place: what a checkpoint is
    loaded into."""
    validate_positions(model, config)
    prepare_tower(model)
    if config.rewrites.rotation:
        empty_rotation(model)
    set_register_neurons(model, config.rewrites.neurons())
    r = config.registers
    if r.mode == "fixed":
        tower = find_tower(model)
        heads = tower.config.num_attention_heads
        width: Any = tower.attention(0).head_dim
        like = next(tower.module.parameters())
        rows = {b: like.new_full((heads, r.num_registers, width), float("nan")) for b in r.blocks}
        set_registers(model, RegisterCache(rows, rows, len(tower.blocks), r.num_copies))
    else:
        set_registers(model, None)
    set_deletion(model, config.deletion)


def check_complete(model: nn.Module) -> None:
    """Make sure that a loaded model holds real numbers wherever the config promises them.

    Raises:
        ValueError: naming every tensor that is missing, renamed or damaged.
    """
    fields = ("weight_scale", "input_scale", "input_negative_scale")
    scales = {f"{name}.{field}" for name, _ in quant_linears(model) for field in fields}
    scales |= {
        f"{name}.{role}.scale" for name, products in attention_products(model) for role, _ in products.operands()
    }
    bad = []
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor)
        if not bool((finite & (tensor > 0)).all() if name in scales else finite.all()):
            bad.append(name)
    if bad:
        raise ValueError(
            f"The checkpoint is incomplete or damaged: {', '.join(bad[:8])}"
            f"{f' and {len(bad) - 8} more' if len(bad) > 8 else ''} missing or not finite. Download it again, or quantize "
            "the model again."
        )
