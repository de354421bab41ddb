"""The paper's oracle as a method (docs/method.md 11.3): outlier tokens out of the range and quantized per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.parts import CALIBRATION_OUTLIER_RATIO
from optimum_regcache.methods.base import Method


@dataclass(frozen=True)
class Oracle(Method):
    """One static scale for normal tokens; a token beyond its range gets the scale of its own maximum at run time.

    Nothing is clipped and nothing deleted. The paper's upper bound for any treatment of outlier tokens; needs a kernel that
    can switch to a scale per row.

    Attributes:
        outlier_ratio: tokens of more than this many times the median l_inf norm of their image do not set the static scale.
    """

    outlier_ratio: float = CALIBRATION_OUTLIER_RATIO
    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "RegCache (arXiv 2510.04547), oracle rows of its tables"
    provides: ClassVar[str] = "input scales"

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        oracle = {"outlier_tokens": "per_token", "outlier_ratio": self.outlier_ratio}
        return config.replace(
            activations={
                "mode": "static",
                "granularity": "per_tensor",
                "symmetric": True,
                "observer": "minmax",
                **oracle,
            }
        )
