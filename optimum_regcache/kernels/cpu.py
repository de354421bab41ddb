"""Which integer instructions this CPU has, and what follows for products of u8 inputs and s8 weights.

x86 processors without VNNI multiply with ``vpmaddubsw``, which adds two neighbouring products in 16 bits and saturates:
255 * 127 * 2 does not fit. oneDNN, ONNX Runtime and OpenVINO all use it, and none of them says when it happens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

_INT16 = 32767


@lru_cache(maxsize=1)
def capabilities() -> dict[str, Any]:
    """What PyTorch knows of this CPU; empty where it cannot tell."""
    probe = getattr(torch.cpu, "get_capabilities", dict)
    return dict(probe())


def has_vnni() -> bool:
    """Whether sums of u8 x s8 products are kept in 32 bits (AVX512-VNNI or AVX-VNNI)."""
    return any(capabilities().get(name, False) for name in ("avx512_vnni", "avx_vnni"))


def sums_saturate() -> bool:
    """Whether 8-bit codes can be multiplied wrongly here: an x86 CPU without VNNI."""
    return capabilities().get("architecture", "") == "x86_64" and not has_vnni()


def needs_vnni(highest: int, codes: torch.Tensor) -> bool:
    """Whether two neighbouring products can leave 16 bits.

    Args:
        highest: largest u8 input code, 2^bits - 1.
        codes: int8 weight codes of any shape.
    """
    if codes.numel() == 0:
        return False
    low, high = (int(value) for value in torch.aminmax(codes))
    return 2 * highest * max(high, -low) > _INT16
