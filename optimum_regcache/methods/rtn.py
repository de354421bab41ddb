"""Round to nearest with the whole observed range (docs/method.md 11.1): the paper's "naive" rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods.base import Method


@dataclass(frozen=True)
class RTN(Method):
    """Min-max scales, static, per tensor for activations."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = "round to nearest, min-max"
    provides: ClassVar[str] = "input scales"
    observer: ClassVar[str] = "minmax"

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        observers = {"observer": self.observer}
        return config.replace(
            activations={"mode": "static", "granularity": "per_tensor", **observers},
            weights=observers,
            attention=observers,
        )
