"""Token norms: where outlier tokens appear, and whether registers made them smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimum_regcache.architectures import Tower, find_tower
from optimum_regcache.data import Batch
from optimum_regcache.evaluation.features import move
from optimum_regcache.registers.runtime import unfused


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


class PaddingMask:
    """Hands the current batch's padding mask to hooks, which only see one module's input."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def start(self, batch: Batch) -> None:
        """Note the mask of the batch about to run."""
        mask = batch.get("pixel_attention_mask")
        self.mask = None if mask is None else mask.bool()

    def valid(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """bool [B, N]; all true where no mask of this length is known."""
        if self.mask is not None and self.mask.shape == (batch, tokens):
            return self.mask.to(device)
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)

    def content(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``x`` [B, N, ...] that are not padding, [rows, ...]; other shapes pass unchanged."""
        if self.mask is None or x.ndim < 3 or self.mask.shape != x.shape[:2]:
            return x
        return x[self.mask.to(x.device)]


def leading_tokens(tower: Tower) -> int:
    """Tokens before the patches inside the blocks, a test-time register among them; works for unprepared towers too."""
    runtime = getattr(tower.blocks[0], "regcache", None)
    return tower.num_prefix_tokens if runtime is None else runtime.num_prefix_tokens


Visitor = Callable[[str, int, torch.Tensor, torch.Tensor], None]


@torch.inference_mode()
def visit_tokens(model: nn.Module, batches: Iterable[Batch], visit: Visitor) -> None:
    """Run ``batches`` through the vision tower, with whatever registers and deletion are installed.

    Args:
        model: model or tower.
        batches: images.
        visit: called with (site, block, states [B, N, D], valid bool [B, N], false at padding) for every block, site
            ``block`` being its input and ``fc2`` the input of its MLP output projection. CLS and registers come first.

    """
    tower, padding = find_tower(model), PaddingMask()

    def hook(site: str, block: int) -> Any:
        def seen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            visit(site, block, x, padding.valid(x.shape[0], x.shape[1], x.device).clone())

        return seen

    handles = []
    for index, block in enumerate(tower.blocks):
        handles.append(block.register_forward_pre_hook(hook("block", index)))
        handles.append(tower.mlp_out(index).register_forward_pre_hook(hook("fc2", index)))
    try:
        with unfused(tower.module):
            for batch in batches:
                padding.start(batch)
                tower.module(**move(batch, model))
    finally:
        for handle in handles:
            handle.remove()


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
