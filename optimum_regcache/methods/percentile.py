"""Percentile clipping of activations (docs/method.md 11.1): a must-have baseline that clips the outlier tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods.base import Method


@dataclass(frozen=True)
class Percentile(Method):
    """The range leaves ``100 - percentile`` percent of the values outside; 99.9, 99.99 and 99.999 are usual.

    Attributes:
        percentile: in percent.
    """

    percentile: float = 99.99
    name: ClassVar[str] = "percentile"
    paper: ClassVar[str] = "percentile clipping (for example FasterTransformer ViT)"
    provides: ClassVar[str] = "input scales"

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        activations = {
            "mode": "static",
            "granularity": "per_tensor",
            "observer": "percentile",
            "percentile": self.percentile,
        }
        return config.replace(activations=activations, attention={"observer": "percentile"})
