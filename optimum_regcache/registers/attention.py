"""Injection of register rows where an attention module calls transformers' attention interface (docs/method.md).

The module keeps its class and its forward. Only its ``config`` is replaced by a view that names another attention function
while there is something to inject; that function puts the rows before keys and values, widens the mask and delegates to the
implementation that the model's config names at that moment. So every later ``set_attn_implementation`` is followed, nothing
in the config changes, and what a forward does with its projections (rotary positions, norms of query and key, one product
for all three) does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.compat import base_attention, register_attention
from optimum_regcache.registers.cache import RegisterLayer
from optimum_regcache.registers.state import TowerRuntime

INTERFACE = "regcache"


class AttentionConfigView:
    """The config of an attention module as the module sees it; all but the name of the attention function is the native one.

    Args:
        owner: the attention module that holds the registers (buffers ``register_key`` and ``register_value`` [H, n, d], None
            where the block has none) and ``products``, its quantized attention products, if there are any.
        native: the config itself.
    """

    def __init__(self, owner: nn.Module, native: Any) -> None:
        self.owner, self.native = owner, native

    @property
    def _attn_implementation(self) -> str:
        return INTERFACE if _is_active(self.owner) else self.native._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name in ("owner", "native") or name.startswith("__"):  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.native, name)


def attach(attention: Any, caller: Any, runtime: TowerRuntime, block_index: int) -> None:
    """Make ``attention`` ready for registers, in place.

    Args:
        attention: the attention module of a block; holds the buffers, so that checkpoint names do not depend on ``caller``.
        caller: the module that calls the attention interface: ``attention`` itself, or its inner part.
        runtime: of the tower.
        block_index: 0-based.
    """
    attention.regcache, attention.block_index = runtime, block_index
    attention.register_buffer("register_key", None)
    attention.register_buffer("register_value", None)
    attention.register_module("products", None)
    caller.config = AttentionConfigView(attention, caller.config)


def active_registers(attention: Any) -> tuple[RegisterLayer, float]:
    """The rows for the pass under way and their tau: those of the cache that was passed, else the stored ones; an empty layer
    if there are none."""
    cache, index = attention.regcache.current.cache, attention.block_index
    if cache is not None:
        layer = cache.layers[index]
    elif attention.register_key is None:
        layer = RegisterLayer()
    else:
        copies = attention.regcache.num_copies[index]
        layer = RegisterLayer(attention.register_key, attention.register_value, copies)
    return layer, layer.copies


def _is_active(attention: Any) -> bool:
    state = attention.regcache.current
    if attention.products is not None or state.mask is not None:
        return True
    if state.cache is not None:
        return state.cache.layers[attention.block_index].keys is not None
    return attention.register_key is not None


def attention_with_registers(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention whose keys and values start with register rows (arXiv 2510.04547).

    Args:
        module: calls; its config is an `AttentionConfigView`.
        query, key, value: [B, H, N, d], as the base implementation would get them.
        attention_mask: None, bool, or additive float, [B or 1, 1, N or 1, N].
        scaling: of the logits.
        dropout: probability.
        kwargs: passed on.

    Returns:
        (output [B, N, H, d], probabilities [B, H, N, n + N] or None).

    Raises:
        ValueError: the base implementation takes no additive masks, which a logit bias needs.
    """
    attention = module.config.owner
    state = attention.regcache.current
    layer, copies = active_registers(attention)
    mask = state.mask if attention_mask is None else attention_mask
    bias = math.log(copies) if layer.bias is None else layer.bias
    mask = widen_mask(mask, layer.get_seq_length(), bias, query)
    if attention.products is not None:
        rows = None if layer.keys is None else (layer.keys, layer.values)
        return attention.products(query, key, value, rows, mask, scaling)
    base = base_attention(module.config.native, type(module))  # pyright: ignore[reportUnknownArgumentType]
    key, value = layer.update(key, value)
    return base(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def widen_mask(
    attention_mask: torch.Tensor | None, rows: int, bias: float | torch.Tensor, query: torch.Tensor
) -> torch.Tensor | None:
    """Add ``rows`` leading columns with logit bias ``bias`` (ln(tau); 0-dim if a tensor) to the mask of queries [B, H, N, d].

    Returns:
        None if no mask is needed, else additive float [B or 1, 1, N, rows + N].
    """
    tokens = query.shape[2]
    if attention_mask is None:
        if not isinstance(bias, torch.Tensor) and bias == 0.0:
            return None
        attention_mask = query.new_zeros(1, 1, 1, tokens)
    elif not attention_mask.dtype.is_floating_point:
        attention_mask = query.new_zeros(attention_mask.shape).masked_fill(
            ~attention_mask.bool(), torch.finfo(query.dtype).min
        )
    attention_mask = attention_mask.to(query.dtype)
    shape = (*attention_mask.shape[:-1], rows)
    column = (
        bias.to(attention_mask).expand(shape)
        if isinstance(bias, torch.Tensor)
        else attention_mask.new_full(shape, bias)
    )
    return torch.cat((column, attention_mask), -1).expand(-1, -1, tokens, -1)


register_attention(INTERFACE, attention_with_registers)
