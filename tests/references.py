"""Independent, slow references for what the package computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def part(attention: torch.nn.Module, role: str) -> torch.nn.Module:
    """A projection of an attention module (``query``, ``key``, ``value``, ``out``), whatever this release calls it."""
    names = {"out": ("out_proj", "o_proj", "output.dense", "projection_layer")}.get(
        role, (f"{role[0]}_proj", f"attention.{role}")
    )
    modules = dict(attention.named_modules())
    return next(modules[name] for name in names if name in modules)


def epilogue_attention(
    attention: Any,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tau: float,
    token_mask: torch.Tensor | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention with tau copies of one register behind ordinary attention (docs/method.md 5): ``o' = (1 - p) o + p v``.

    Args:
        attention: the module whose projections are used.
        hidden: [B, N, D], its input.
        keys, values: [H, 1, d], the register.
        tau: copies.
        token_mask: [B, N], 0 at padding.
        angles: cosine and sine [patches, d] by which query and key of the patches, the last tokens, are rotated.
    """

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (keys.shape[0], keys.shape[2])).transpose(1, 2)

    q, k, v = (heads(part(attention, name)(hidden)) for name in ("query", "key", "value"))
    if angles is not None:
        q, k = (rotated(x, *angles) for x in (q, k))
    scale = 1 / math.sqrt(keys.shape[2])
    logits = q @ k.transpose(-1, -2) * scale
    if token_mask is not None:
        logits = logits.masked_fill(token_mask[:, None, None] == 0, float("-inf"))
    log_sum_exp = logits.logsumexp(-1, keepdim=True)
    p = torch.sigmoid((q * keys).sum(-1, keepdim=True) * scale + math.log(tau) - log_sum_exp)
    output = (1 - p) * (logits.softmax(-1) @ v) + p * values
    return part(attention, "out")(output.transpose(1, 2).flatten(2))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: the halves (a, b) of every patch of ``x`` [B, H, N, d] become (a cos - b sin, b cos + a sin)."""
    lead = x.shape[2] - cos.shape[0]
    a, b = x[:, :, lead:].chunk(2, -1)
    (cos_a, cos_b), (sin_a, sin_b) = cos.chunk(2, -1), sin.chunk(2, -1)
    return torch.cat((x[:, :, :lead], torch.cat((a * cos_a - b * sin_a, b * cos_b + a * sin_b), -1)), 2)


def neighbour_mean(tokens: np.ndarray, dropped: list[int], grid: tuple[int, int]) -> np.ndarray:
    """``tokens`` [patches, D] with every dropped patch replaced by the mean of its kept neighbours."""
    kept = [p for p in range(grid[0] * grid[1]) if p not in dropped]
    filled = tokens.copy()
    for patch in dropped:
        row, column = divmod(patch, grid[1])
        near = [p for p in kept if abs(p // grid[1] - row) <= 1 and abs(p % grid[1] - column) <= 1]
        filled[patch] = tokens[near or kept].mean(0)
    return filled
