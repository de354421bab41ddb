"""Attention to the registers: whether the blocks read what was installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.passes import Batch, PaddingMask, num_images, run_tower, unfused
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.registers.attention import active_registers


@torch.inference_mode()
def register_attention(model: nn.Module, batches: Iterable[Batch]) -> torch.Tensor:
    """Share of the attention that the register rows get, mean over queries (padding left out) and images.

    Args:
        model: model or tower, with whatever registers and deletion are installed.
        batches: images; the weights of all blocks, [B, H, N, n + N] each, are in memory at once.

    Returns:
        float32 [blocks, heads], from 0 to 1; 0 in blocks without registers.

    Raises:
        ValueError: no images, no registers, packed patches (whose attention is windowed), or a release of transformers that
            gives no attention weights.
    """
    tower, padding, images = find_tower(model), PaddingMask(), 0
    depth = len(tower.blocks)
    rows = [_rows(tower.attention(block)) for block in range(depth)]
    if not any(rows):
        raise ValueError("No block of this model has registers: there is no attention to them to measure.")
    if tower.family.packed:
        raise ValueError("Attention to registers is not measured where patches are packed: it is windowed.")
    total = torch.zeros(depth, tower.num_heads)
    with unfused(tower.module), _eager(tower.module):
        for batch in batches:
            padding.start(batch)
            weights = run_tower(tower, batch, output_attentions=True).attentions
            if weights is None or len(weights) != depth:
                raise ValueError(
                    "This release of transformers gives no attention weights of the blocks. Install a tested one."
                )
            for block, (count, found) in enumerate(zip(rows, weights, strict=True)):
                share = found[..., :count].float().sum(-1)  # [B, H, N]
                valid = padding.valid(share.shape[0], share.shape[2], share.device)[:, None]
                total[block] += ((share * valid).sum(-1) / valid.sum(-1)).sum(0).cpu()
            images += num_images(batch)
    if not images:
        raise ValueError("No images to measure attention on.")
    return total / images


def _rows(attention: nn.Module) -> int:
    """Number of register rows of an attention module, prepared or not."""
    return active_registers(attention)[0].get_seq_length() if hasattr(attention, "regcache") else 0


@contextmanager
def _eager(tower: Any) -> Iterator[None]:
    """The tower computes its attention in the implementation that gives the weights."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)
