"""Rotations (docs/method.md 11.9): residual stream and heads offline, the MLP output projection's input online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods.base import Method, PipelineState
from optimum_regcache.rewrites.rotation import rotate_heads, rotate_residual


@dataclass(frozen=True)
class Rotation(Method):
    """Spreads outlier channels over all channels; outlier tokens stay outlier tokens.

    Attributes:
        residual: rotate the residual stream inside the blocks.
        heads: rotate query/key and value/output per head.
        mlp: block Hadamard transform of the MLP output projection's input, at run time.
        seed: of the random signs.
    """

    residual: bool = True
    heads: bool = True
    mlp: bool = True
    seed: int = 0
    name: ClassVar[str] = "rotation"
    paper: ClassVar[str] = "QuaRot (arXiv 2404.00456), for pre-LN encoders"
    needs_images: ClassVar[bool] = False
    cache_effect: ClassVar[str] = "head rotations turn K and V; tokens are ranked in the original basis"
    excludes: ClassVar[dict[str, str]] = {
        "ptq4vit": "the Hadamard transform mixes the channels after GELU, so that there is no negative side of fixed range "
        "left for the twin quantizer.",
        "test_time_registers": "register neurons are columns of the MLP, which the Hadamard transform mixes.",
    }

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        return config.replace(rewrites={"rotation": self.residual}, activations={"mlp_out_hadamard": self.mlp})

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        return {} if self.residual or self.heads else {"seed": "the Hadamard transform alone draws no random signs"}

    def rewrite(self, fit: PipelineState) -> None:
        if self.residual:
            rotate_residual(fit.model, self.seed)
        if self.heads:
            rotate_heads(fit.model, self.seed)
