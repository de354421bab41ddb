"""Rebuilding and checking the module tree of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.compat import never_loaded
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.checks import listing, missing_names
from optimum_regcache.hub.stored import AGAIN
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.math import uniform
from optimum_regcache.registers import RegisterCache, prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import set_register_neurons
from optimum_regcache.rewrites.rotation import empty_rotation

_WHOLE = "Give all tensors of state_dict() of the quantized model, or leave state_dict out to open a folder or Hub id."


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


def check_loaded(model: Any, forms: dict[str, tuple[torch.Size, torch.dtype]], names_known: bool) -> None:
    """Compare the tensors of a loaded model with what they were to be, whatever they came from.

    Args:
        model: loaded.
        forms: name -> shape and dtype that the config promises.
        names_known: the files were seen to hold every tensor.

    Raises:
        ValueError: a tensor that was found nowhere, has another shape or integer dtype, or was converted.
    """
    state = model.state_dict()
    missing = [] if names_known else sorted(missing_names(model, state, set(state) - never_loaded(model)))
    require(not missing, f"The state_dict is incomplete: {listing(missing)} missing. {_WHOLE}")
    tower = find_tower(model)
    prefix = f"{tower.name}." if tower.name else ""
    bad = [
        f"{name} is {_word(t)}, not {list(forms[name][0])} {forms[name][1]}"
        for name, t in state.items()
        if name in forms and (name.startswith(prefix) or not forms[name][1].is_floating_point)
        if t.shape != forms[name][0] or (t.dtype != forms[name][1] and not forms[name][1].is_floating_point)
    ]
    what = "checkpoint is damaged" if names_known else "state_dict is of a float model"
    advice = AGAIN if names_known else _WHOLE
    require(not bad, f"The {what} or belongs to another config: {listing(bad)}. {advice}")
    if not names_known:
        _refuse_converted(model)


def _refuse_converted(model: nn.Module) -> None:
    """A ``state_dict`` tells no dtypes; scales were computed in float32, and all fit into 16 bits only if they were put there.

    Raises:
        ValueError: they do.
    """
    scales = [module.weight_scale.flatten() for _, module in quant_linears(model) if not module.weight_scale.is_meta]
    values = torch.cat(scales) if scales else torch.empty(0)
    for dtype in (torch.bfloat16, torch.float16):  # most of the former are the latter too
        require(
            len(values) < 32 or not torch.equal(values, values.to(dtype).float()),
            f"The state_dict was converted: its scales have the precision of {dtype}, not of torch.float32. {_WHOLE}",
        )


def _word(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def check_complete(model: nn.Module, *, ranges: bool = True) -> None:
    """Make sure that a loaded model holds real numbers wherever the config promises them.

    Args:
        model: loaded.
        ranges: look at codes and zero points too; not needed where every tensor is known to be as it was saved.

    Raises:
        ValueError: naming every tensor that is missing, renamed, damaged, or not there at all (meta device).
    """
    fields = ("weight_scale", "input_scale", "input_negative_scale")
    scales = {f"{name}.{field}" for name, _ in quant_linears(model) for field in fields}
    scales |= {
        f"{name}.{role}.scale" for name, products in attention_products(model) for role, _ in products.operands()
    }
    prefix = find_tower(model).name
    bad: list[str] = []
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            require(
                not name.startswith(prefix),
                f"{name} of the quantized encoder is not in memory (offloaded, or on the meta device). The encoder has to stay "
                "on one device: give it one entry in device_map, or raise max_memory.",
            )
            continue
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor)
        if not bool((finite & (tensor > 0)).all() if name in scales else finite.all()):
            bad.append(name)
    require(not bad, f"The checkpoint is incomplete or damaged: {listing(bad)} missing or not finite. {AGAIN}")
    if ranges:
        check_ranges(model)


def check_ranges(model: nn.Module) -> None:
    """Codes and zero points that no quantizer gives.

    Raises:
        ValueError: naming them.
    """
    bad: list[str] = []
    for name, module in quant_linears(model):
        if module.weight.is_meta:
            continue
        w, a = module.weights, module.activations
        codes = module.codes()
        if w.symmetric and codes.numel() and int(codes.min()) == -(2 ** (w.bits - 1)):
            bad.append(f"{name}.weight holds the code {-(2 ** (w.bits - 1))}")
        signed = (-(2 ** (w.bits - 1)), 2 ** (w.bits - 1) - 1)  # weight codes are, whatever their zero point
        for field, low, high in (
            ("weight_zero_point", *((0, 0) if w.symmetric else signed)),
            ("input_zero_point", *((0, 0) if a.symmetric else uniform.code_range(a.bits, a.symmetric))),
        ):
            zero = getattr(module, field)
            if zero is not None and bool(((zero < low) | (zero > high)).any()):
                bad.append(f"{name}.{field} lies outside {low} to {high}")
    for name, products in attention_products(model):
        for role, operand in products.operands():
            c, zero = operand.config, operand.zero_point
            low, high = (0, 0) if c.symmetric else uniform.code_range(c.bits, c.symmetric)
            if zero is not None and not zero.is_meta and bool(((zero < low) | (zero > high)).any()):
                bad.append(f"{name}.{role}.zero_point lies outside {low} to {high}")
            lower = operand.lower
            if lower is not None and not lower.is_meta and not bool(((lower >= 0) & (lower < operand.scale)).all()):
                bad.append(f"{name}.{role}.lower lies outside 0 to the upper end")
    require(not bad, f"The checkpoint is damaged: {listing(bad)}. {AGAIN}")


def freeze(model: nn.Module) -> None:
    """No gradients for the encoder and whatever else is quantized; heads, text towers and language models stay trainable."""
    find_tower(model).module.requires_grad_(False)
    for _, module in quant_linears(model):
        module.requires_grad_(False)
