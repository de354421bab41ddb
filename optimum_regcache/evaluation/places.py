"""Where the large tokens of an image lie, block by block."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.encoders.visiting import patch_span, visit_tokens
from optimum_regcache.evaluation.outliers import REPORTED_RATIO


def patch_norms(model: nn.Module, batch: Batch) -> torch.Tensor:
    """l_inf norm of every patch token, with whatever registers and deletion are installed.

    Args:
        model: model or tower.
        batch: images.

    Returns:
        float32 [blocks, B, patches] on the CPU, of what each block computes on; nan where it does not compute on the patch: a
        deleted token, or padding.
    """
    tower = find_tower(model)
    norms = dict[int, torch.Tensor]()

    def record(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        if site == "block":
            norms[block] = (
                x.abs().amax(-1).float().masked_fill(~valid, torch.nan)[:, patch_span(tower, block).positions].cpu()
            )

    with _in_place(tower):
        visit_tokens(model, [batch], record)
    return torch.stack([norms[block] for block in range(len(tower.blocks))])


def are_outliers(norms: torch.Tensor) -> torch.Tensor:
    """bool of the shape of ``norms`` [..., patches]: at least :data:`REPORTED_RATIO` times the median patch of the image."""
    return norms >= REPORTED_RATIO * norms.nanmedian(-1, keepdim=True).values


@contextmanager
def _in_place(tower: Tower) -> Generator[None, None, None]:
    """Deleted tokens are masked and stay where they are, so that positions are those of the patches."""
    runtime: Any = getattr(tower.blocks[0], "regcache", None)
    before = runtime is not None and runtime.keep_positions
    if runtime is not None:
        runtime.keep_positions = True
    try:
        yield
    finally:
        if runtime is not None:
            runtime.keep_positions = before
