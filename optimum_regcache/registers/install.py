"""Wiring of registers and deletion into a vision tower: class swap of its blocks and embeddings, and a config view in its
attention modules.

The transformers forward functions stay as they are. Every swapped class is a subclass of the native one (hooks,
``isinstance`` checks and state-dict names keep working); with nothing installed it calls the native code, so outputs are
bit-identical.
"""

from __future__ import annotations

from typing import Any

import torch

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.compat import attention_caller
from optimum_regcache.encoders.tower import Tower, find_tower, reads_patches, takes_mask
from optimum_regcache.registers.attention import attach
from optimum_regcache.registers.block import BlockMixin, EmbeddingsMixin
from optimum_regcache.registers.cache import RegisterCache
from optimum_regcache.registers.mlp_output import wire_mlp_output
from optimum_regcache.registers.state import TowerRuntime
from optimum_regcache.registers.swap import swap


def prepare_tower(model: torch.nn.Module) -> TowerRuntime:
    """Make the vision tower of ``model`` ready for registers and deletion, in place. Repeated calls change nothing.

    Raises:
        ValueError: ``model`` holds no supported encoder, or one that masks its queries by states between its blocks.
    """
    tower = find_tower(model)
    embeddings = tower.module.get_submodule(tower.family.embeddings)
    if isinstance(embeddings, EmbeddingsMixin):
        return embeddings.regcache
    _refuse_masked_queries(tower)
    runtime = TowerRuntime(tower)
    runtime.first_block = tower.blocks[0]
    swap(embeddings, EmbeddingsMixin, runtime)
    tower.module.register_forward_pre_hook(runtime.note_outputs, with_kwargs=True)
    for index, block in enumerate(tower.blocks):
        masked = takes_mask(block)
        swapped = swap(block, BlockMixin, runtime)
        swapped.block_index, swapped.takes_mask = index, masked
        swapped.register_buffer("rotation", None)
        attention = tower.attention(index)
        attach(attention, attention_caller(attention), runtime, index)
    return runtime


def _refuse_masked_queries(tower: Tower) -> None:
    """EoMT masks the attention of its queries by what it predicts between its blocks, until training has annealed that."""
    probabilities: Any = getattr(tower.module, "attn_mask_probs", None)
    if probabilities is not None and not probabilities.is_meta and bool((probabilities > 0).any()):
        raise ValueError(
            f"{type(tower.module).__name__} masks its queries by what it predicts between its blocks (attn_mask_probs above "
            "0), which is not supported. Trained models have annealed it: model.attn_mask_probs.zero_()."
        )


def set_registers(model: torch.nn.Module, cache: RegisterCache | None) -> None:
    """Store ``cache`` in the tower as ordinary buffers (None removes the registers), in the tower's dtype and device.

    Raises:
        ValueError: the cache belongs to an encoder of another shape.
    """
    runtime, tower = prepare_tower(model), find_tower(model)
    if cache is not None:
        cache.check(len(tower.blocks), tower.num_heads, tower.head_dim)
    for index in range(len(tower.blocks)):
        attention: Any = tower.attention(index)
        if cache is None or index not in cache.blocks:
            attention.register_key = attention.register_value = None
            continue
        like = tower.norm(index, 0).weight  # never quantized
        attention.register_key, attention.register_value = (
            rows.detach().to(like, copy=True).contiguous() for rows in cache.rows(index)
        )
    runtime.num_copies = {} if cache is None else {b: cache.copies(b) for b in cache.blocks}


def get_register_cache(model: torch.nn.Module) -> RegisterCache | None:
    """The registers stored in the tower, None if there are none."""
    runtime, tower = prepare_tower(model), find_tower(model)
    keys: dict[int, torch.Tensor] = {}
    values: dict[int, torch.Tensor] = {}
    for index in range(len(tower.blocks)):
        attention: Any = tower.attention(index)
        if attention.register_key is not None:
            keys[index], values[index] = attention.register_key, attention.register_value
    return RegisterCache(keys, values, len(tower.blocks), runtime.num_copies) if keys else None


def set_deletion(model: torch.nn.Module, config: DeletionConfig) -> None:
    """Choose which tokens the tower deletes, and how.

    Raises:
        ValueError: the block does not exist, or the encoder cannot work with ``fill="none"``.
    """
    runtime, tower = prepare_tower(model), find_tower(model)
    if config.block is not None and config.block >= len(tower.blocks):
        raise ValueError(f"deletion.block={config.block}, but the encoder has blocks 0 to {len(tower.blocks) - 1}.")
    if config.active and tower.family.packed:
        raise ValueError(
            f"{type(tower.module).__name__} packs the patches of all images into one sequence and merges neighbours after "
            "its last block; no token of it can be deleted. Use registers alone (deletion.count=0, search.max_delete=0)."
        )
    needs_grid = tower.keeps_places or bool(tower.num_queries) or reads_patches(model, tower)
    if config.active and config.fill == "none" and needs_grid:
        raise ValueError(
            f"{type(tower.module).__name__} needs the whole patch grid after the last block; use "
            "deletion.fill='neighbour_mean'."
        )
    runtime.deletion = config
    wire_mlp_output(runtime, tower)
