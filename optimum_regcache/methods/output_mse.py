"""Input scales that minimise the error of the layer's output (docs/method.md 11.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods._search.scale import SearchSpace, search_group
from optimum_regcache.methods.base import Method, PipelineState


@dataclass(frozen=True)
class OutputMSE(Method):
    """``argmin_s ||W x - W^ Q_s(x)||^2`` over shrink factors of the range, with weights quantized by row-wise MSE.

    Attributes:
        candidates: shrink factors, from ``1 / candidates`` to 1.
        max_tokens: tokens of the calibration images that the search uses, taken at equal steps.
    """

    candidates: int = 100
    max_tokens: int = 2048
    name: ClassVar[str] = "output_mse"
    paper: ClassVar[str] = "EasyQuant-style output error search (arXiv 2006.16669)"
    provides: ClassVar[str] = "input scales"
    needs_static: ClassVar[bool] = True

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        return config.replace(
            activations={"observer": "mse"}, weights={"observer": "mse"}, attention={"observer": "mse"}
        )

    def scales(self, fit: PipelineState) -> None:
        search_input_scales(fit, self.candidates, self.max_tokens)


def search_input_scales(fit: PipelineState, candidates: int, max_tokens: int) -> None:
    """Set the input scale of every quantized layer of the blocks by the error of its output; weights stay as they are."""
    space = SearchSpace(1 / candidates, 1 + 1 / candidates, candidates, rounds=1, weights=False)
    for known, group in fit.walk(fit.model, "scales by output error"):
        a = fit.quant_linear(group.names[0]).activations
        if a.mode == "static" and a.bits <= 8:
            search_group(fit, group, fit.inputs(fit.model, group, known, max_tokens), space)
