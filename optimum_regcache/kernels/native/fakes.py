"""Shapes of the operators' results, for `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch


def register_fakes(blocks: bool) -> None:
    """Once in a process, after the library was loaded.

    Args:
        blocks: the library with whole blocks; else the one with the linear layer.
    """

    def codes_of(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)

    def attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        inverse = rest[7]  # 0: real numbers leave
        return q.new_empty(q.shape, dtype=torch.uint8 if inverse > 0 else torch.float32)

    def block(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def delete_tokens(x: torch.Tensor, lead: int, count: int) -> tuple[torch.Tensor, ...]:
        (batch, tokens, width), left = x.shape, x.shape[1] - count
        positions, dropped = ((batch, left), torch.int64), ((batch, tokens), torch.bool)
        return x.new_empty(batch, left, width), *(x.new_empty(size, dtype=kind) for size, kind in (positions, dropped))

    def restore_tokens(x: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, *rest: Any) -> torch.Tensor:
        return x.new_empty(x.shape[0], dropped.shape[1], x.shape[2])

    def linear(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
        out, as_codes = rest[3].shape[0], rest[8]
        return codes.new_empty(*codes.shape[:-1], out, dtype=torch.uint8 if as_codes else torch.float32)

    shapes = {"quantize": codes_of, "layer_norm_quantize": codes_of}
    own = block if blocks else linear
    shapes |= {f.__name__: f for f in (own, attention, delete_tokens, restore_tokens)}
    for name, function in shapes.items():
        torch.library.register_fake(f"regcache::{name}", function)
