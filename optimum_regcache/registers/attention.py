"""Injection of register rows into attention (docs/method.md 4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.compat import attention_interface
from optimum_regcache.registers.cache import RegisterCache, RegisterLayer
from optimum_regcache.registers.swap import _Swapped


class AttentionMixin(_Swapped):
    """Self-attention whose keys and values start with register rows (docs/method.md 4).

    Buffers ``register_key`` and ``register_value`` [H, n, d] hold the stored registers; None where the block has none.
    A `RegisterCache` passed as ``past_key_values`` takes their place. ``products`` computes the attention if it is there
    (`optimum_regcache.layers.attention`: quantized operands).
    """

    block_index: int
    products: nn.Module | None
    tower_names: tuple[str, str, str, str, str, str]
    register_key: torch.Tensor | None
    register_value: torch.Tensor | None

    def registers(self, past_key_values: RegisterCache | None) -> tuple[RegisterLayer, float] | None:
        """The rows for this call and tau, or None."""
        if past_key_values is not None:
            layer = past_key_values.layers[self.block_index]
            return (layer, past_key_values.num_copies) if layer.get_seq_length() else None
        if self.register_key is None:
            return None
        return RegisterLayer(self.register_key, self.register_value), self.regcache.num_copies

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RegisterCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        registers = self.registers(past_key_values)
        if registers is None and self.products is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        layer, copies = registers or (RegisterLayer(), 1.0)
        module: Any = self
        query, key, value, out, scaling, dropout = self.tower_names
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q, k, v = (getattr(module, name)(hidden_states).view(shape).transpose(1, 2) for name in (query, key, value))
        mask, factor = widen_mask(attention_mask, layer.get_seq_length(), copies, q), getattr(module, scaling)
        if self.products is not None:
            rows = None if layer.keys is None else (layer.keys, layer.values)
            output, weights = self.products(q, k, v, rows, mask, factor)
        else:
            k, v = layer.update(k, v)
            attention = attention_interface(module, self._native)
            rate = getattr(module, dropout) if module.training else 0.0
            output, weights = attention(module, q, k, v, mask, scaling=factor, dropout=rate, **kwargs)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return getattr(module, out)(output), weights


def widen_mask(
    attention_mask: torch.Tensor | None, rows: int, num_copies: float, query: torch.Tensor
) -> torch.Tensor | None:
    """Add ``rows`` leading columns with logit bias ln(num_copies) to the mask of queries [B, H, N, d].

    Returns:
        None if no mask is needed, else additive float [B or 1, 1, N, rows + N].
    """
    bias = math.log(num_copies)
    tokens = query.shape[2]
    if attention_mask is None:
        if bias == 0.0:
            return None
        attention_mask = query.new_zeros(1, 1, 1, tokens)
    elif not attention_mask.dtype.is_floating_point:
        attention_mask = query.new_zeros(attention_mask.shape).masked_fill(
            ~attention_mask.bool(), torch.finfo(query.dtype).min
        )
    attention_mask = attention_mask.to(query.dtype)
    column = attention_mask.new_full((*attention_mask.shape[:-1], rows), bias)
    return torch.cat((column, attention_mask), -1).expand(-1, -1, tokens, -1)
