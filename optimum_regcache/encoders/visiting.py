"""Hooks that watch the tokens of an encoder, and which of them are patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.passes import Batch, PaddingMask, call_options, run_tower, unfused
from optimum_regcache.encoders.tower import PatchSpan, Tower, find_tower


def patch_span(tower: Tower, block: int) -> PatchSpan:
    """Which tokens are patches in a block, where a test-time register may precede them; works for unprepared towers too."""
    runtime = getattr(tower.blocks[0], "regcache", None)
    return tower.patches_at(block) if runtime is None else runtime.patches_at(block)


Visitor = Callable[[str, int, torch.Tensor, torch.Tensor], None]


@torch.inference_mode()
def visit_tokens(model: nn.Module, batches: Iterable[Batch], visit: Visitor) -> None:
    """Run ``batches`` through the vision tower, with whatever registers and deletion are installed.

    Args:
        model: model or tower.
        batches: images.
        visit: called with (site, block, states [B, N, D], valid bool [B, N], false at padding and where a deleted token is
            masked) for every block, site ``block`` being what it computes on, after its deletion, and ``fc2`` the input of
            its MLP output projection. `patch_span` tells which tokens are patches.

    """
    tower, padding = find_tower(model), PaddingMask()

    def hook(site: str, block: int) -> Any:
        runtime: Any = getattr(tower.blocks[block], "regcache", None)

        def seen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = padding.unpack(args[0])
            valid = padding.valid(x.shape[0], x.shape[1], x.device).clone()
            selection = None if runtime is None else runtime.current.selection
            if selection is not None and selection.kept is None:
                valid &= ~selection.dropped
            visit(site, block, x, valid)

        return seen

    handles: list[Any] = []
    for index in range(len(tower.blocks)):
        handles.append(
            tower.norm(index, 0).register_forward_pre_hook(hook("block", index))
        )  # a block's own input still
        # holds what it deletes, and lacks the token that its first one adds
        handles.append(tower.mlp_out(index).register_forward_pre_hook(hook("fc2", index)))
    options = call_options(model, tower)
    try:
        with unfused(tower.module):
            for batch in batches:
                padding.start(batch)
                run_tower(tower, batch, **options)
    finally:
        for handle in handles:
            handle.remove()
