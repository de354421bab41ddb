"""Per-image deletion of outlier tokens, and the fill that restores the patch grid. Static shapes throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.tower import PatchSpan

Grid = torch.Tensor | tuple[int, int] | None


@dataclass
class Selection:
    """Which tokens are gone in the forward pass under way.

    Attributes:
        dropped: bool [B, N], true where a token was deleted.
        kept: int64 [B, N - count] positions kept, ascending; None when the tokens stay in place and are masked as keys.
        count: most tokens deleted in one image.
        grid: patch rows and columns, (h, w) or int64 [B, 2].
        patches: which tokens are patches.
    """

    dropped: torch.Tensor
    kept: torch.Tensor | None
    count: int
    grid: Grid
    patches: PatchSpan


def valid_tokens(attention_mask: torch.Tensor | None, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """bool [B, N]: tokens that some query may attend to, i.e. that are not padding.

    Args:
        attention_mask: None, bool or additive float [B or 1, 1, N, N], or [B, N].
    """
    if attention_mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if attention_mask.dtype.is_floating_point:
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    attention_mask = attention_mask.bool()
    if attention_mask.ndim == 4:
        attention_mask = attention_mask.any(2).any(1)
    return attention_mask.expand(batch, tokens)


def outlier_scores(hidden: torch.Tensor, candidates: torch.Tensor, score: str = "linf") -> torch.Tensor:
    """``linf`` or ``l2`` norm of every token [B, N] in float32, inf for tokens that are not a number, -inf where ``candidates``
    is false."""
    states = hidden.detach()
    norms = states.abs().amax(-1).float() if score == "linf" else _l2_norms(states)
    norms = norms.masked_fill(norms.isnan(), float("inf"))  # nan would rank differently from step to step
    return norms.masked_fill(~candidates, float("-inf"))


def _l2_norms(states: torch.Tensor) -> torch.Tensor:
    return states.float().norm(dim=-1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def choose_dropped(scores: torch.Tensor, valid: torch.Tensor, config: DeletionConfig) -> torch.Tensor:
    """bool [B, N]: the tokens to delete in each image, independent of the other images of the batch.

    ``topk`` takes the ``count`` largest norms; where an image has fewer than 2 x ``count`` real tokens, padding is taken
    for the rest, so that no image loses more than half of its content. ``threshold`` takes those of the ``count`` largest
    whose norm exceeds ``kappa`` times the median norm of the image's candidates.
    """
    candidates = scores > float("-inf")
    allowed = candidates.sum(1, keepdim=True) // 2
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    dropped = candidates & (rank < config.count) & (rank < allowed)
    if config.rule == "threshold":
        finite = torch.where(candidates, scores, torch.full_like(scores, float("nan")))
        median = finite.nanmedian(1, keepdim=True).values
        return dropped & (scores > config.kappa * median)
    missing = config.count - dropped.sum(1, keepdim=True)
    padding_rank = (~valid).long().cumsum(1)  # 1-based among padding
    return dropped | (~valid & (padding_rank <= missing))


def kept_positions(dropped: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [B, N - count]: positions that were not dropped, ascending."""
    tokens = dropped.shape[1]
    order = torch.where(dropped, -1, tokens - torch.arange(tokens, device=dropped.device))
    return order.topk(tokens - count, dim=1).indices


def gather_tokens(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[B, N, D] -> [B, K, D]; whole rows are copied, which is faster than a gather with an index for every channel."""
    first = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1) * hidden.shape[1]
    rows = hidden.flatten(0, 1).index_select(0, (first + kept).flatten())
    return rows.unflatten(0, kept.shape)  # pyright: ignore[reportUnknownVariableType]


def spread_tokens(hidden: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Kept tokens [B, K, D] back to their places, [B, N, D]; other kept tokens stand at deleted positions."""
    if selection.kept is None:
        return hidden
    return gather_tokens(hidden, (~selection.dropped).long().cumsum(1).sub(1).clamp(min=0))


def narrow_mask(attention_mask: torch.Tensor | None, selection: Selection, dtype: torch.dtype) -> torch.Tensor | None:
    """The attention mask for the blocks after the deletion."""
    if selection.kept is None:
        bias = torch.zeros(selection.dropped.shape, dtype=dtype, device=selection.dropped.device)
        bias = bias.masked_fill(selection.dropped, torch.finfo(dtype).min)[:, None, None, :]
        if attention_mask is None:
            return bias
        if not attention_mask.dtype.is_floating_point:
            if attention_mask.ndim == 2:
                return attention_mask.bool() & ~selection.dropped
            attention_mask = (
                torch.zeros_like(bias).expand_as(attention_mask).masked_fill(~attention_mask, torch.finfo(dtype).min)
            )
        return torch.minimum(attention_mask, bias)
    if attention_mask is None:
        return None
    kept = selection.kept
    if attention_mask.ndim == 2:
        return attention_mask.gather(1, kept)
    attention_mask = attention_mask.expand(kept.shape[0], -1, -1, -1)
    heads, rows = attention_mask.shape[1], attention_mask.shape[2]
    if rows > 1:
        attention_mask = attention_mask.gather(2, kept[:, None, :, None].expand(-1, heads, -1, attention_mask.shape[3]))
    return attention_mask.gather(3, kept[:, None, None, :].expand(-1, heads, attention_mask.shape[2], -1))


def moved_on(selection: Selection, count: int, patches: PatchSpan) -> Selection:
    """``selection`` after ``count`` tokens have joined before all others; ``patches``: which are patches then."""
    dropped = torch.nn.functional.pad(selection.dropped, (count, 0))
    kept = selection.kept
    if kept is not None:
        joined = torch.arange(count, device=kept.device).expand(kept.shape[0], -1)
        kept = torch.cat((joined, kept + count), 1)
    return Selection(dropped, kept, selection.count, selection.grid, patches)


def narrow_positions(positions: tuple[torch.Tensor, ...], selection: Selection) -> tuple[torch.Tensor, ...]:
    """Rotary angles of the patches that were kept.

    Args:
        positions: cosine and sine, each [patches, d]; other tokens have none.
        selection: what was deleted.

    Returns:
        Each [B, 1, kept patches, d]; the same as ``positions`` where tokens stay in place.
    """
    if selection.kept is None:
        return positions
    patches = selection.kept[:, selection.patches.positions] - selection.patches.lead
    return tuple(angles[patches].unsqueeze(1) for angles in positions)


def fill_deleted(full: torch.Tensor, selection: Selection, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Put the mean of the kept 8-neighbours on the patch grid into every deleted position.

    Args:
        full: [B, N, D], anything at deleted positions.
        selection: what was deleted.
        valid: bool [B, N], false at padding; all true if None.

    Returns:
        [B, N, D]. Where no neighbour is left, or the grid is unknown, the mean of all kept patches of the image.
    """
    batch, tokens, width = full.shape
    lead, dropped = selection.patches.lead, selection.dropped
    usable = ~dropped if valid is None else ~dropped & valid
    usable = usable & selection.patches.mask(tokens, full.device)
    weight = usable.unsqueeze(1).to(full.dtype)
    clean = full.masked_fill(~usable.unsqueeze(-1), 0)  # what is gone may be nan or inf
    overall = weight @ clean / weight.sum(-1, keepdim=True).clamp(min=1)  # [B, 1, D]
    target = dropped.long().topk(selection.count, dim=1).indices  # [B, k]
    size = grid_size(selection.grid, selection.patches.count(tokens), batch, full.device)
    fill = overall.expand(-1, selection.count, -1)
    if size is not None:
        rows, columns = (s.unsqueeze(-1) for s in size)  # [B, 1, 1]
        offsets = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x], device=full.device)
        patch = (target - lead).unsqueeze(-1)
        row, column = patch // columns + offsets[:, 0], patch % columns + offsets[:, 1]  # [B, k, 8]
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        source = torch.where(inside, lead + row * columns + column, 0).clamp(0, tokens - 1).flatten(1)
        good = (inside.flatten(1) & usable.gather(1, source)).reshape(batch, -1, 8, 1).to(full.dtype)
        neighbours = gather_tokens(clean, source).reshape(batch, -1, 8, width)
        number = good.sum(2)
        fill = torch.where(number > 0, (neighbours * good).sum(2) / number.clamp(min=1), fill)
    if selection.kept is None:  # fewer than ``count`` may be gone
        fill = torch.where(dropped.gather(1, target).unsqueeze(-1), fill, gather_tokens(full, target))
    images = torch.arange(batch, device=full.device).unsqueeze(1).expand_as(target)
    return full.index_put((images, target), fill)


def remove_tokens(full: torch.Tensor, selection: Selection, valid: torch.Tensor | None = None) -> torch.Tensor:
    """[B, N, D] without what was deleted, [B, N - count, D]; filled where tokens stay in place (`fill_deleted`)."""
    return fill_deleted(full, selection, valid) if selection.kept is None else gather_tokens(full, selection.kept)


def grid_size(grid: Grid, patches: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Patch rows and columns, each int64 [B, 1]; a square is assumed if unknown, None if it is not one."""
    if isinstance(grid, torch.Tensor):
        return grid[:, :1].to(device), grid[:, 1:2].to(device)
    size = patch_grid(grid, patches)
    if size is None:
        return None
    ones = torch.ones(batch, 1, dtype=torch.int64, device=device)
    return ones * size[0], ones * size[1]


def patch_grid(grid: Grid, patches: int) -> tuple[int, int] | None:
    """Patch rows and columns where they are the same for all images, else None; a square is assumed if unknown."""
    if isinstance(grid, torch.Tensor):
        return None
    if grid is None or grid[0] * grid[1] != patches:
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else None
    return grid
