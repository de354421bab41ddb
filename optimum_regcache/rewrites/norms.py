"""Exact scaling and shifting of LayerNorm outputs, and scaling of attention values, folded into the layers around them.

Every function changes a float model in place and leaves what it computes as it is. The arithmetic is float64, the result
is stored in the dtype of the parameter. `RegisterCache` objects that a user passes as ``past_key_values`` are not stored in
the model: after :func:`rescale_values` they must be made anew from the changed model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.sharing import replace_value
from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.registers import RegisterCache, get_register_cache, set_registers

BIAS_SETTINGS = ("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "attention_bias")


def rescale_norm(
    tower: Tower, block: int, number: int, factor: torch.Tensor, shift: torch.Tensor | None = None
) -> None:
    """Make the LayerNorm put out x' = x / factor - shift, and its consumers compute the same from x' as they did from x.

    gamma' = gamma / r, beta' = beta / r - b; for every consumer W'_c = W_c r_c (columns) and bias' = bias + W' b
    (the scale reparametrisation of RepQ-ViT, arXiv 2212.08254; with b = 0 that of SmoothQuant, arXiv 2211.10438,
    Eq. 3). Registers stay as they are.

    Args:
        tower: the float tower.
        block: 0-based block.
        number: 0 for the LayerNorm before attention, 1 for the one before the MLP.
        factor: r, [D], positive.
        shift: b, [D]; None is zero. Consumers without a bias get one, see :func:`add_to_bias`.

    Raises:
        ValueError: a factor or shift of another shape, not finite or not positive; a LayerNorm without affine parameters; a
            layer that is quantized already; a result that overflows the model's dtype.
    """
    norm = affine_norm(tower, block, number)
    consumers = [float_linear(module) for module in tower.norm_consumers(block, number)]
    factor = _positive(factor, norm.weight)
    store(norm.weight, exact(norm.weight) / factor)
    scaled = exact(norm.bias) / factor
    store(norm.bias, scaled if shift is None else scaled - _channels("shift", shift, norm.weight))
    for linear in consumers:
        store(linear.weight, exact(linear.weight) * factor)
        if shift is not None:  # what was really subtracted: the rounding of beta is made up for
            add_to_bias(tower, linear, exact(linear.weight) @ (scaled - exact(norm.bias)))


def rescale_values(model: nn.Module, block: int, factor: torch.Tensor) -> None:
    """Divide the channels of the attention values by ``factor``, and multiply the columns of the output projection by it.

    Attention mixes tokens, not channels, so a factor per channel passes through it (docs/method.md 11.7). Stored register
    values are divided too.

    Args:
        model: float model.
        block: 0-based block.
        factor: [D], positive; channel ``h * head_dim + i`` is channel i of head h.

    Raises:
        ValueError: as :func:`rescale_norm`.
    """
    tower = find_tower(model)
    value, out = attention_linears(tower, block, *separate_projections(tower)[2:], tower.family.out)
    factor = _positive(factor, value.weight)
    store(value.weight, exact(value.weight) / factor[:, None])
    if value.bias is not None:
        store(value.bias, exact(value.bias) / factor)
    store(out.weight, exact(out.weight) * factor)
    map_registers(model, lambda index, k, v: (k, v / _per_head(factor, v)) if index == block else (k, v))


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, without gradient."""
    return tensor.detach().to(torch.float64, copy=True)


def store(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Let ``parameter`` hold float64 ``value``, rounded to its dtype; a model that shares its storage does not change.

    Raises:
        ValueError: the dtype cannot hold it.
    """
    rounded = value.to(parameter.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(
            f"A rewritten parameter overflows {parameter.dtype}. Rewrite the model in float32, and cast it afterwards."
        )
    replace_value(parameter, rounded)


def add_to_bias(tower: Tower, linear: nn.Linear, delta: torch.Tensor) -> None:
    """Add ``delta`` [out] to the bias of ``linear``.

    If it has none and ``delta`` is not zero, all linear layers of all blocks that lack a bias get one of zeros first, and
    the config's settings (:data:`BIAS_SETTINGS`) become true, so that the state dict still fits the config.

    Raises:
        ValueError: the bias overflows the model's dtype.
    """
    if linear.bias is None:
        if not bool(delta.any()):
            return
        for index in range(len(tower.blocks)):
            for module in tower.block_linears(index).values():
                if isinstance(module, nn.Linear) and module.bias is None:
                    zeros = module.weight.new_zeros(module.out_features)
                    module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
        for name in BIAS_SETTINGS:
            if hasattr(tower.config, name):
                setattr(tower.config, name, True)
    store(linear.bias, exact(linear.bias) + delta)


def affine_norm(tower: Tower, block: int, number: int) -> nn.LayerNorm:
    """The LayerNorm of a block.

    Raises:
        ValueError: no such block, or a norm without weight and bias to fold into.
    """
    blocks = len(tower.blocks)
    if not 0 <= block < blocks or number not in (0, 1):
        raise ValueError(
            f"There is no norm {number} of block {block}; blocks are 0 to {blocks - 1}, norms are 0 and 1."
        )
    norm = tower.norm(block, number)
    if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
        raise ValueError(
            f"Norm {number} of block {block} ({type(norm).__name__}) has no weight and bias that could hold a scale and a "
            "shift. Build the model with elementwise affine LayerNorms (weight 1, bias 0)."
        )
    return norm


def float_linear(module: nn.Module) -> nn.Linear:
    """``module`` itself.

    Raises:
        ValueError: it is not a float linear layer.
    """
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ValueError(
            f"Rewrites change float linear layers, got {type(module).__name__}. Rewrite the model before it is quantized."
        )
    return module


def separate_projections(tower: Tower) -> tuple[str, ...]:
    """Names of query, key and value projection.

    Raises:
        ValueError: one layer computes all three.
    """
    if tower.family.fused_projections:
        raise ValueError(
            f"{tower.family.name} computes query, key and value in one layer; this rewrite needs them apart. Use a method "
            "that does not change attention values."
        )
    return tower.family.projections


def attention_linears(tower: Tower, block: int, *names: str) -> list[nn.Linear]:
    """Projections of a block's attention by their names in the family.

    Raises:
        ValueError: no such block, or a layer that is quantized already.
    """
    if not 0 <= block < len(tower.blocks):
        raise ValueError(f"There is no block {block}; blocks are 0 to {len(tower.blocks) - 1}.")
    return [float_linear(tower.attention(block).get_submodule(name)) for name in names]


def map_registers(model: nn.Module, change: Callable[[int, torch.Tensor, torch.Tensor], Any]) -> None:
    """Replace the stored registers of every block by ``change(block, keys, values)``, float64 [H, n, d] each."""
    cache = get_register_cache(model)
    if cache is None:
        return
    rows = {b: change(b, *(exact(t) for t in cache.rows(b))) for b in cache.blocks}
    keys, values = ({b: r[i] for b, r in rows.items()} for i in (0, 1))
    set_registers(model, RegisterCache(keys, values, len(cache.layers), cache.num_copies))


def _per_head(channels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[D] -> [H, 1, d], to go with register rows [H, n, d]."""
    return channels.to(rows.device).view(rows.shape[0], 1, rows.shape[2])


def _channels(name: str, tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``tensor`` as float64 [D] on the device of ``weight`` [D, ...]."""
    if tensor.shape != weight.shape[:1]:
        raise ValueError(f"{name} needs one value per channel, [{weight.shape[0]}], got {list(tensor.shape)}.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite; channels {_where(~torch.isfinite(tensor))} are not.")
    return exact(tensor).to(weight.device)


def _positive(factor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    factor = _channels("factor", factor, weight)
    if not bool((factor > 0).all()):
        raise ValueError(
            f"factor must be positive; channels {_where(factor <= 0)} are not. Clamp the statistics, for example to 1e-5."
        )
    return factor


def _where(bad: torch.Tensor) -> str:
    found = bad.nonzero().flatten().tolist()
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
