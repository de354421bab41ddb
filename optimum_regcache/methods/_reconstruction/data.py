"""The images of a reconstruction: which train and which judge, and the states of any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, num_images
from optimum_regcache.registers.deletion import Selection, gather_tokens, moved_on
from optimum_regcache.registers.state import BlockInput

_JUDGES = 8  # one image in so many judges and does not train


class Images:
    """Calibration images by number, so that any of them can be run together, whatever batch they came in.

    Where patches are packed into one sequence, an item is a whole batch instead of an image, and runs alone.

    Args:
        batches: images.

    Attributes:
        training: lists of items that can be run together, being of one shape.
        judging: likewise; one item in `_JUDGES`, at least one.

    Raises:
        ValueError: fewer than two items.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.packed = len(batches) > 0 and "image_grid_thw" in batches[0]
        self._places: list[tuple[int, int]] = []
        shapes: dict[object, list[int]] = {}
        for number, batch in enumerate(batches):
            count, images = 1 if self.packed else num_images(batch), num_images(batch)
            shape = tuple((name, tuple(v.shape[1:])) for name, v in sorted(batch.items()) if len(v) == images)
            first = len(self._places)
            self._places += [(number, row) for row in range(count)]
            shapes.setdefault(number if self.packed else shape, []).extend(range(first, first + count))
        total = len(self._places)
        require(
            total >= 2,
            f"Reconstruction trains on some calibration images and judges on others, so it needs at least 2 of them (batches "
            f"of them, where patches are packed), got {total}. Use more images, or a smaller data.batch_size.",
        )
        judges = set(range(min(_JUDGES, total) - 1, total, _JUDGES))
        self.training = [kept for group in shapes.values() if (kept := [i for i in group if i not in judges])]
        self.judging = [kept for group in shapes.values() if (kept := [i for i in group if i in judges])]

    def batch(self, items: Sequence[int]) -> Batch:
        """The model inputs of some items of one list."""
        parts = [_rows(self.batches[number], rows) for number, rows in self._by_batch(items)]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def states(self, recorded: Sequence[BlockInput], items: Sequence[int]) -> BlockInput:
        """Their states out of ``recorded``, one for each batch; plain tensors that autograd takes."""
        if self.packed:
            state = recorded[self._places[items[0]][0]]
            return BlockInput(state.hidden.clone(), state.selection, state.valid)
        parts = [_state_rows(recorded[number], rows) for number, rows in self._by_batch(items)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def features(self, rows: torch.Tensor, items: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Their rows out of [images, D]; ``sizes``: images of each batch."""
        if self.packed:
            return torch.split(rows, list(sizes))[self._places[items[0]][0]]
        return rows[torch.tensor(sorted(items))]

    def _by_batch(self, items: Sequence[int]) -> list[tuple[int, list[int]]]:
        found: dict[int, list[int]] = {}
        for number, row in (self._places[item] for item in sorted(items)):
            found.setdefault(number, []).append(row)
        return list(found.items())


class Sampler:
    """Draws training items: all of them in random order, then again.

    Args:
        groups: lists of items that can be run together.
        size: items of a draw.
        seed: of the order.
    """

    def __init__(self, groups: Sequence[Sequence[int]], size: int, seed: int) -> None:
        self.groups, self.size = groups, size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            draws: list[list[int]] = []
            for group in self.groups:
                order = [group[i] for i in torch.randperm(len(group), generator=self._generator).tolist()]
                whole = max(len(order) - len(order) % self.size, min(self.size, len(order)))
                draws += [order[i : min(i + self.size, whole)] for i in range(0, whole, self.size)]
            yield from (draws[i] for i in torch.randperm(len(draws), generator=self._generator).tolist())


def common_tokens(
    ours: BlockInput, theirs: BlockInput, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states of ``theirs`` at the tokens of ``ours``, [B, K, D], and which of these count: bool [B, K], None for all.

    A token counts if both kept it and it is no padding: what one of them deleted has no state on the other side.

    Args:
        ours, theirs: behind the same block.
        padding: bool [B, N], true where a token is an image's own; None where there is no padding.
    """
    hidden, selection, other = theirs.hidden, _behind_joined(ours), _behind_joined(theirs)
    if padding is not None and (hidden.ndim != 3 or padding.shape[0] != len(hidden)):
        padding = None
    if selection is None or other is None:
        return hidden, padding if padding is None or padding.shape[1] == hidden.shape[1] else None
    there = ~other.dropped
    counts = there if padding is None or padding.shape != there.shape else there & padding
    if selection.kept is None:
        return hidden, counts & ~selection.dropped
    places = there.long().cumsum(1).sub(1).clamp(min=0).gather(1, selection.kept)
    return gather_tokens(hidden, places), counts.gather(1, selection.kept)


def _behind_joined(state: BlockInput) -> Selection | None:
    """The selection of ``state``, moved on by the queries that have joined before the tokens it was made of."""
    selection = state.selection
    if selection is None:
        return None
    places = selection.dropped if selection.kept is None else selection.kept
    joined = state.hidden.shape[1] - places.shape[1]
    span = selection.patches
    return selection if joined == 0 else moved_on(selection, joined, replace(span, lead=span.lead + joined))


def _rows(batch: Batch, rows: list[int]) -> Batch:
    if "image_grid_thw" in batch:
        return batch
    index, images = torch.tensor(rows), num_images(batch)
    return {name: v[index.to(v.device)] for name, v in batch.items() if len(v) == images}  # texts stay behind


def _state_rows(state: BlockInput, rows: list[int]) -> BlockInput:
    index = torch.tensor(rows, device=state.hidden.device)
    s, selection = state.selection, None
    if s is not None:
        kept = None if s.kept is None else s.kept[index]
        grid = s.grid[index.to(s.grid.device)] if isinstance(s.grid, torch.Tensor) else s.grid
        selection = Selection(s.dropped[index], kept, s.count, grid, s.patches)
    return BlockInput(state.hidden[index], selection, None if state.valid is None else state.valid[index])


def _joined(states: Sequence[BlockInput]) -> BlockInput:
    first, selection = states[0], None
    if first.selection is not None:
        several = [s.selection for s in states if s.selection is not None]
        one = several[0]
        kept = None if one.kept is None else torch.cat([s.kept for s in several if s.kept is not None])
        grid = one.grid
        if isinstance(grid, torch.Tensor):
            grid = torch.cat([s.grid for s in several if isinstance(s.grid, torch.Tensor)])
        selection = Selection(torch.cat([s.dropped for s in several]), kept, one.count, grid, one.patches)
    valid = None if first.valid is None else torch.cat([s.valid for s in states if s.valid is not None])
    return BlockInput(torch.cat([s.hidden for s in states]), selection, valid)
