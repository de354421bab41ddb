"""Bias correction (docs/method.md 11.10): the mean error of every layer's output goes into its bias. Free at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from optimum_regcache.layers.linear import shift_bias
from optimum_regcache.methods.base import Method, PipelineState


@dataclass(frozen=True)
class BiasCorrection(Method):
    """``b -= E[W^ x^ - W x]`` layer by layer, ``x^`` behind the corrected earlier layers, ``x`` of the float model.

    The mean is over kept tokens only, where tokens are deleted.

    Attributes:
        max_tokens: tokens of the calibration images that the means use.
    """

    max_tokens: int = 16384
    name: ClassVar[str] = "bias_correction"
    paper: ClassVar[str] = "bias correction (arXiv 1906.04721, 4.2)"

    def correct(self, fit: PipelineState) -> None:
        skipped = []
        walks = zip(fit.walk(fit.result, "bias correction"), fit.walk(fit.model, None), strict=True)
        for (ours, group), (theirs, _) in walks:
            x = fit.inputs(fit.result, group, ours, self.max_tokens)
            wanted = fit.inputs(fit.model, group, theirs, self.max_tokens)
            for name in group.names:
                layer, linear = fit.quant_linear(name), fit.float_linear(name)
                if layer.bias is None or linear.bias is None:
                    skipped.append(name)
                    continue
                with torch.inference_mode():
                    error = layer(x).mean(0) - F.linear(wanted, linear.weight.float(), linear.bias.float()).mean(0)
                shift_bias(layer, -error)
        fit.measured[self.name] = {"layers without bias": skipped}
