"""Run part of an encoder: record what arrives at a block once, start later passes there, and watch the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from optimum_regcache.encoders.passes import Batch, PaddingMask, count_images, num_images, run_tower
from optimum_regcache.encoders.store import MappedSequence, StoredBatches, TensorSpace
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.registers import prepare_tower
from optimum_regcache.registers.cache import RegisterCache
from optimum_regcache.registers.deletion import Selection, kept_positions
from optimum_regcache.registers.mlp_output import own_scale_tokens
from optimum_regcache.registers.state import BlockInput, Replay, TowerRuntime


class _StopPass(Exception):  # noqa: N818 (no error)
    """Ends a pass whose rest nobody needs."""


@dataclass(frozen=True)
class Recorded:
    """What arrives at ``block``, one state per batch."""

    block: int
    states: Sequence[BlockInput]


@torch.inference_mode()
def record_block_inputs(
    model: nn.Module,
    batches: Sequence[Batch],
    block: int,
    known: Recorded | None = None,
    space: TensorSpace | None = None,
) -> Sequence[BlockInput]:
    """What arrives at ``block``, one per batch; earlier blocks are skipped as far as ``known`` goes.

    Args:
        model: wired for registers.
        batches: images.
        block: index.
        known: inputs of an earlier block for the same batches.
        space: where the states are kept; in the memory of the model's device by default.
    """
    runtime = prepare_tower(model)
    states: list[BlockInput] = []
    stored = None if space is None else StoredBatches(space)

    def keep(module: nn.Module, args: Any) -> None:
        hidden, selection, valid = args[0], runtime.current.selection, runtime.current.valid
        if stored is None or selection is not None:
            states.append(BlockInput(hidden, selection, valid))
        else:
            found = {"hidden": hidden, "valid": valid}
            stored.append({name: t.cpu() for name, t in found.items() if t is not None}, 0)
        raise _StopPass

    _run(model, batches, known, [(find_tower(model).blocks[block], keep)])
    if stored is None or states:  # what was deleted before stays in memory
        return states
    device = next(model.parameters()).device

    def opened(found: dict[str, torch.Tensor]) -> BlockInput:
        there = {name: t.to(device, non_blocking=t.is_pinned()) for name, t in found.items()}
        return BlockInput(there["hidden"], None, there.get("valid"))

    return MappedSequence(stored, opened)


def block_output(
    model: nn.Module, batch: Batch, known: Recorded, features: Callable[[], torch.Tensor] | None = None
) -> tuple[BlockInput, torch.Tensor | None]:
    """What block ``known.block`` gives for one batch, as the next block would get it; gradients pass where they are enabled.

    Args:
        model: wired for registers.
        batch: images.
        known: the input of the block for this one batch.
        features: runs ``model`` to its end; without it the pass stops behind the block.

    Returns:
        (states behind the block; those of the last block at the places that its fill restored, what ``features`` gave).
    """
    runtime, tower = prepare_tower(model), find_tower(model)
    found: list[BlockInput] = []

    def keep(hidden: torch.Tensor, selection: Selection | None) -> None:
        found.append(BlockInput(hidden, selection, runtime.current.valid))
        if features is None:
            raise _StopPass

    def before_next(module: nn.Module, args: Any) -> None:
        keep(args[0], runtime.current.selection)

    def behind_last(module: nn.Module, args: Any, output: Any) -> None:
        hidden = cast("torch.Tensor", output[0] if isinstance(output, tuple) else output)
        keep(hidden, _finished_selection(runtime, known, hidden))

    if known.block + 1 < len(tower.blocks):
        handle = tower.blocks[known.block + 1].register_forward_pre_hook(before_next)
    else:
        handle = tower.blocks[known.block].register_forward_hook(behind_last)
    result: torch.Tensor | None = None
    try:
        with replaying(model, known.block, known.states), suppress(_StopPass):
            result = run_tower(tower, batch) if features is None else features()
    finally:
        handle.remove()
    return found[0], result


def _finished_selection(runtime: TowerRuntime, known: Recorded, hidden: torch.Tensor) -> Selection | None:
    """What is gone behind the last block, where the pass has forgotten it: deleted there, or before."""
    deletion, count = runtime.deletion, runtime.deletion.count
    selection, dropped = known.states[0].selection, None if hidden.ndim != 3 else runtime.current.chosen
    if selection is not None:
        dropped = selection.dropped
    elif deletion.block != known.block or deletion.action not in ("delete", "late"):
        return None
    if dropped is None:
        return None
    span = runtime.patches_at(known.block)
    if runtime.extra_token:  # it has left
        span = replace(span, lead=span.lead - 1)
        dropped = torch.cat((dropped[:, : span.lead], dropped[:, span.lead + 1 :]), 1)
    stays = hidden.shape[1] == dropped.shape[1]
    kept = None if stays else kept_positions(dropped, count)
    return Selection(dropped, kept, count, None, span)


def walk_blocks(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Recorded]:
    """The blocks in order, each with its inputs in the model as it is when the block is asked for, so that a loop may change
    one block after the other."""
    known: Recorded | None = None
    for block in range(len(find_tower(model).blocks)):
        known = Recorded(block, record_block_inputs(model, batches, block, known))
        yield known


class TokenSample:
    """Which tokens of the calibration images a fit looks at: the tokens of every image that are no patches (a class token
    may be all that counts in the last block) and patches at equal steps, shifted from image to image.

    Args:
        model: model or tower, prepared.
        batches: images.
        limit: largest number of tokens in all; None for all tokens.
        block: whose tokens they are.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], limit: int | None, block: int) -> None:
        self.span = prepare_tower(model).patches_at(block)
        images = count_images(batches)
        self.per_image = None if limit is None else max(limit // images, self.span.protected + 1)
        self.padding, self._first = PaddingMask(), 0

    def start(self, batch: Batch, first: int) -> None:
        """The batch about to run, and the number of its first image."""
        self.padding.start(batch)
        self._first = first

    def rows(self, x: torch.Tensor, left_out: torch.Tensor | None = None) -> torch.Tensor:
        """The chosen tokens of ``x`` [B, N, D] without padding and without ``left_out`` (bool [B, N]), [rows, D]; other shapes
        are flattened to rows."""
        if x.ndim != 3:
            return x.flatten(0, -2)
        batch, tokens, _ = x.shape
        patches, number = self.span.count(tokens), tokens if self.per_image is None else self.per_image
        chosen = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
        if number < tokens:
            steps = torch.arange(self.span.count(number)) * patches // self.span.count(number)
            image = torch.arange(self._first, self._first + batch)[:, None]
            chosen[:, self.span.positions] = False
            chosen.scatter_(1, (self.span.lead + (steps + 7 * image) % patches).to(x.device), True)
        if left_out is not None:
            chosen &= ~left_out
        return x[chosen & self.padding.valid(batch, tokens, x.device)]


@torch.inference_mode()
def capture_inputs(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], known: Recorded, limit: int | None = None
) -> dict[str, torch.Tensor]:
    """Inputs of layers of one block; padding and tokens with a scale of their own are left out.

    Args:
        model: model or tower.
        names: layers of block ``known.block``, by their names in ``model``.
        batches: images.
        known: inputs of the block for these batches.
        limit: largest number of tokens to keep (`TokenSample`).

    Returns:
        name -> float32 [tokens, in].
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    sample = TokenSample(model, batches, limit, known.block)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name].append(sample.rows(args[0], own_scale_tokens(module, args[0])).float())

        return hook

    def stop(module: nn.Module, args: Any) -> None:
        raise _StopPass

    hooks = [(model.get_submodule(name), keep(name)) for name in names]
    blocks = find_tower(model).blocks
    if known.block + 1 < len(blocks):
        hooks.append((blocks[known.block + 1], stop))
    _run(model, batches, known, hooks, sample)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _run(
    model: nn.Module,
    batches: Sequence[Batch],
    known: Recorded | None,
    hooks: list[tuple[nn.Module, Any]],
    sample: TokenSample | None = None,
) -> None:
    tower = find_tower(model)
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    start = nullcontext() if known is None else replaying(model, known.block, known.states)
    try:
        with start:
            first = 0
            for batch in batches:
                if sample is not None:
                    sample.start(batch, first)
                first += num_images(batch)
                with suppress(_StopPass):
                    run_tower(tower, batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: nn.Module, block: int, states: Sequence[BlockInput]) -> Generator[None, None, None]:
    """Within the context, the next ``len(states)`` forward passes start at ``block``; earlier blocks are skipped.

    The passes must see the batches that were recorded, in the same order.
    """
    runtime = prepare_tower(model)
    runtime.replay = Replay(block, states)
    try:
        yield
    finally:
        runtime.replay = None


@contextmanager
def lending(model: nn.Module, cache: RegisterCache) -> Generator[None, None, None]:
    """Within the context, forward passes of this thread attend to ``cache`` in place of the stored registers, as if it were
    passed to each call. Its rows, and the ``bias`` of its layers, may be leaves that autograd follows.

    Raises:
        ValueError: the cache does not fit the encoder, or is not finite.
    """
    runtime = prepare_tower(model)
    state = runtime.current
    before, state.cache = state.cache, runtime.accept(cache)
    try:
        yield
    finally:
        state.cache = before
