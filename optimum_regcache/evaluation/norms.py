"""Token norms: where outlier tokens appear, and whether registers made them smaller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from optimum_regcache.encoders.passes import Batch, leading_tokens, visit_tokens
from optimum_regcache.encoders.tower import find_tower


@dataclass(frozen=True)
class TokenNorms:
    """l_inf norms of patch tokens, per block, over a set of images.

    Attributes:
        max_block_input, median_block_input: float [blocks]: largest token norm, and median over all tokens, at the input
            of each block.
        max_fc2_input, median_fc2_input: the same at the input of each block's MLP output projection.
        max_any_fc2_input: float [blocks], CLS included: what a static per-tensor scale has to cover.
    """

    max_block_input: torch.Tensor
    median_block_input: torch.Tensor
    max_fc2_input: torch.Tensor
    median_fc2_input: torch.Tensor
    max_any_fc2_input: torch.Tensor

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-compatible."""
        return {name: [round(float(v), 5) for v in getattr(self, name)] for name in self.__dataclass_fields__}


def measure_token_norms(model: nn.Module, batches: Iterable[Batch]) -> TokenNorms:
    """Measure on ``batches`` with whatever registers and deletion are installed. Padding and prefix tokens are left out."""
    tower = find_tower(model)
    lead, depth = leading_tokens(tower), len(tower.blocks)
    collected: dict[tuple[str, int], list[torch.Tensor]] = {}
    any_max = torch.zeros(depth)

    def record(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        norms = x.abs().amax(-1).float()
        if site == "fc2":
            any_max[block] = max(float(any_max[block]), float(norms[valid].amax()))
        valid[:, :lead] = False
        collected.setdefault((site, block), []).append(norms[valid].cpu())

    visit_tokens(model, batches, record)

    def reduce(site: str, how: str) -> torch.Tensor:
        rows = [torch.cat(collected[(site, i)]) for i in range(depth)]
        return torch.stack([r.amax() if how == "max" else r.median() for r in rows])

    return TokenNorms(
        reduce("block", "max"), reduce("block", "median"), reduce("fc2", "max"), reduce("fc2", "median"), any_max
    )
