"""Bias correction (H.10): the mean error of every layer's output goes into its bias. Free at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from optimum_regcache.methods.base import Fit, Method, groups_by_block
from optimum_regcache.replay import capture_inputs, walk_blocks


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

    def correct(self, fit: Fit) -> None:
        groups, skipped = groups_by_block(fit.result, fit.config), []
        bar = tqdm(total=len(groups), desc="bias correction", disable=not fit.progress)
        walks = zip(walk_blocks(fit.result, fit.batches), walk_blocks(fit.model, fit.batches), strict=True)
        for ours, theirs in walks:
            for group in groups.get(ours.block, []):
                first = group.names[:1]
                x = capture_inputs(fit.result, first, fit.batches, ours, self.max_tokens)[first[0]]
                wanted = capture_inputs(fit.model, first, fit.batches, theirs, self.max_tokens)[first[0]]
                for name in group.names:
                    layer, linear = fit.quant_linear(name), fit.float_linear(name)
                    if layer.bias is None or linear.bias is None:
                        skipped.append(name)
                        continue
                    with torch.inference_mode():
                        error = layer(x).mean(0) - F.linear(wanted, linear.weight.float(), linear.bias.float()).mean(0)
                    layer.bias = torch.nn.Parameter(layer.bias.detach() - error.to(layer.bias), requires_grad=False)
                    layer.reset_runtime()
            bar.update()
        bar.close()
        fit.measured[self.name] = {"layers without bias": skipped}
