"""Dynamic per-token activations (docs/method.md 11.2): the strong simple baseline where a backend supports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods.base import Method


@dataclass(frozen=True)
class Dynamic(Method):
    """Each token gets the scale of its own maximum at run time, so that an outlier token spoils only itself."""

    name: ClassVar[str] = "dynamic"
    paper: ClassVar[str] = "dynamic per-token quantization (for example arXiv 2206.01861)"
    provides: ClassVar[str] = "input scales"
    needs_images: ClassVar[bool] = False

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        return config.replace(activations={"mode": "dynamic", "granularity": "per_token", "observer": "minmax"})
