"""Scales that minimise the squared error of the tensor itself (docs/method.md 11.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.methods.rtn import RTN


@dataclass(frozen=True)
class MSE(RTN):
    """The best of 100 shrink factors of the observed range, for activations and, row by row, for weights."""

    name: ClassVar[str] = "mse"
    paper: ClassVar[str] = "MSE range search (for example arXiv 2106.08295, 3.1)"
    observer: ClassVar[str] = "mse"
