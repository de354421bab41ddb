"""Scales that minimise the squared error of the tensor itself (H.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods.base import Method


@dataclass(frozen=True)
class MSE(Method):
    """The best of 100 shrink factors of the observed range, for activations and, row by row, for weights."""

    name: ClassVar[str] = "mse"
    paper: ClassVar[str] = "MSE range search (for example arXiv 2106.08295, 3.1)"
    provides: ClassVar[str] = "input scales"

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        observers = {"observer": "mse"}
        return config.replace(
            activations={"mode": "static", "granularity": "per_tensor", **observers},
            weights=observers,
            attention=observers,
        )
