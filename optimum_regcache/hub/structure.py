"""Rebuilding and checking the module tree of a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.registers import RegisterCache, prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import set_register_neurons
from optimum_regcache.rewrites.rotation import empty_rotation


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
        like = tower.norm(0, 0).weight
        rows = {b: like.new_full((tower.num_heads, r.num_registers, tower.head_dim), float("nan")) for b in r.blocks}
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
    bad: list[str] = []
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
