"""Token norms: where outlier tokens appear, and whether registers made them smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.visiting import patch_span, visit_tokens
from optimum_regcache.registers.replay import Recorded, replaying


@dataclass(frozen=True)
class TokenNorms:
    """l_inf norms of patch tokens, per block, over a set of images. A token that a block deletes is not among them.

    Attributes:
        max_block_input, median_block_input, mean_block_input: float [blocks]: largest token norm, median and mean over all
            tokens that each block computes on.
        max_fc2_input, median_fc2_input: the same at the input of each block's MLP output projection.
        max_any_fc2_input: float [blocks], CLS included: what a static per-tensor scale has to cover.
        tokens: float [blocks], mean number of tokens that each block computes on, CLS, padding and masked ones included.
    """

    max_block_input: torch.Tensor
    median_block_input: torch.Tensor
    mean_block_input: torch.Tensor
    max_fc2_input: torch.Tensor
    median_fc2_input: torch.Tensor
    max_any_fc2_input: torch.Tensor
    tokens: torch.Tensor

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-compatible."""
        return {name: [round(float(v), 5) for v in getattr(self, name)] for name in self.__dataclass_fields__}


def measure_token_norms(
    model: nn.Module, batches: Iterable[Batch], known: Recorded | None = None, before: TokenNorms | None = None
) -> TokenNorms:
    """Measure on ``batches`` with whatever registers and deletion are installed. Only patches count, without padding.

    Args:
        model: model or tower.
        batches: images.
        known: inputs of a block for these batches. Earlier blocks are skipped then, and are those of ``before``.
        before: norms on these batches, of the model before that block.
    """
    tower = find_tower(model)
    depth = len(tower.blocks)
    collected: dict[tuple[str, int], list[torch.Tensor]] = {}
    any_max, tokens, images = torch.zeros(depth), torch.zeros(depth), torch.zeros(depth)

    def record(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        norms = x.abs().amax(-1).float()
        if site == "fc2":
            any_max[block] = max(float(any_max[block]), float(norms[valid].amax()))
        else:
            tokens[block] += norms.numel()
            images[block] += len(norms)
        patches = valid & patch_span(tower, block).mask(valid.shape[1], valid.device)
        collected.setdefault((site, block), []).append(norms[patches].cpu())

    first = 0 if known is None or before is None else known.block
    with nullcontext() if known is None else replaying(model, known.block, known.states):
        visit_tokens(model, batches, record)

    def reduce(site: str, how: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        found = [how(torch.cat(collected[(site, i)])) for i in range(first, depth)]
        return torch.stack([torch.zeros(()).to(found[0])] * first + found)

    found = TokenNorms(
        reduce("block", torch.max),
        reduce("block", torch.median),
        reduce("block", torch.mean),
        reduce("fc2", torch.max),
        reduce("fc2", torch.median),
        any_max,
        tokens / images,
    )
    if before is None:
        return found
    names = TokenNorms.__dataclass_fields__
    return TokenNorms(*(torch.cat((getattr(before, n)[:first], getattr(found, n)[first:])) for n in names))


def block_flops(model: nn.Module, tokens: torch.Tensor) -> float | None:
    """FLOPs of the matrix products of all blocks for one image, registers and deletion included.

    Args:
        model: model or tower, with what is installed.
        tokens: [blocks], `TokenNorms.tokens`.

    Returns:
        Two for every multiplication; None where patches are packed, whose attention is windowed.
    """
    tower, total = find_tower(model), 0.0
    if tower.family.packed:
        return None
    for index, number in enumerate(tokens.tolist()):
        rows = getattr(tower.attention(index), "register_key", None)
        columns = number + (0 if rows is None else rows.shape[1])
        weights = sum(m.in_features * m.out_features for m in tower.block_linears(index).values())  # type: ignore[operator]
        total += 2 * number * (weights + 2 * columns * tower.num_heads * tower.head_dim)
    return total
