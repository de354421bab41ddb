"""Input scales that minimise the error of the layer's output (H.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqdm.auto import tqdm

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.methods.base import Fit, Method, groups_by_block
from optimum_regcache.methods.scale_search import LayerGroup, SearchSpace, search_scales
from optimum_regcache.replay import capture_inputs, walk_blocks


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

    def scales(self, fit: Fit) -> None:
        search_input_scales(fit, self.candidates, self.max_tokens)


def search_input_scales(fit: Fit, candidates: int, max_tokens: int) -> None:
    """Set the input scale of every quantized layer of the blocks by the error of its output; weights stay as they are."""
    space = SearchSpace(1 / candidates, 1 + 1 / candidates, candidates, rounds=1, weights=False)
    groups = groups_by_block(fit.model, fit.config)
    bar = tqdm(total=len(groups), desc="scales by output error", disable=not fit.progress)
    for known in walk_blocks(fit.model, fit.batches):
        for group in groups.get(known.block, []):
            x = capture_inputs(fit.model, group.names[:1], fit.batches, known, max_tokens)[group.names[0]]
            layers = [fit.quant_linear(name) for name in group.names]
            x = layers[0].prepare_input(x)
            a = layers[0].activations
            if a.mode != "static" or a.bits > 8:
                continue
            weights = [layer.dequantized_weight() for layer in layers]
            data = LayerGroup(
                x,
                [
                    layer.rotated_weight(fit.float_linear(n).weight)
                    for layer, n in zip(layers, group.names, strict=True)
                ],
            )
            found = search_scales(
                data,
                layers[0].weights,
                a,
                space,
                quantized_weights=weights,
                negative_scale=layers[0].input_negative_scale,
            )
            for layer in layers:
                layer.set_input_qparams(found.input_scale, found.input_zero_point)
        bar.update()
    bar.close()
