"""Run only the later blocks: record a block's inputs once, replay them for every configuration that leaves them alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_regcache.architectures import find_tower
from optimum_regcache.data import Batch
from optimum_regcache.evaluation.features import move
from optimum_regcache.registers import prepare_tower
from optimum_regcache.registers.state import BlockInput, Replay


@torch.inference_mode()
def record_block_inputs(model: nn.Module, batches: Sequence[Batch], block: int) -> list[BlockInput]:
    """What arrives at ``block``, one per batch."""
    tower, runtime = find_tower(model), prepare_tower(model)
    states: list[BlockInput] = []

    def keep(module: nn.Module, args: Any) -> None:
        states.append(BlockInput(args[0], runtime.current.selection, runtime.current.valid))

    handle = tower.blocks[block].register_forward_pre_hook(keep)
    try:
        for batch in batches:
            tower.module(**move(batch, model))
    finally:
        handle.remove()
    return states


@contextmanager
def replaying(model: nn.Module, block: int, states: Sequence[BlockInput]) -> Iterator[None]:
    """Within the context, the next ``len(states)`` forward passes start at ``block``; earlier blocks are skipped.

    The passes must see the batches that were recorded, in the same order.
    """
    runtime = prepare_tower(model)
    runtime.replay = Replay(block, states)
    try:
        yield
    finally:
        runtime.replay = None
