"""NoisyQuant (arXiv 2211.16056): a fixed noise vector before rounding, taken out again by the bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.layers.linear import QuantLinear, shift_bias
from optimum_regcache.methods.base import Group, Method, PipelineState
from optimum_regcache.methods.output_mse import search_input_scales
from optimum_regcache.rewrites.norms import map_registers, separate_projections


def expected_error(distance: torch.Tensor, half_step: float, noise: float) -> torch.Tensor:
    """Expected squared rounding error under uniform noise on ``(-n, n)``, against ``distance^2`` without (docs/method.md 11.6).

    ``[b^3 - (x - n)^3 + b^3 - (2b - x - n)^3] / (6n)``, valid for ``b - x <= n <= b + x``.

    Args:
        distance: x >= 0, distance to the nearest grid point.
        half_step: b, half of the quantizer's step.
        noise: n.
    """
    b, n, x = half_step, noise, distance
    return (b**3 - (x - n) ** 3 + b**3 - (2 * b - x - n) ** 3) / (6 * n)


def predicted_gain(x: torch.Tensor, scale: torch.Tensor) -> float:
    """How much mean squared rounding error noise over the full step saves (docs/method.md 11.6).

    With n = b `expected_error` is ``b^2 / 3`` for every value, so only values further than ``b / sqrt 3`` from the grid
    gain.

    Args:
        x: any shape.
        scale: step of the quantizer, 0-dim.
    """
    distance = (x / scale - torch.round(x / scale)).abs()  # in steps
    return float(scale**2 * (distance.pow(2) - expected_error(distance, 0.5, 0.5)).mean())


@dataclass(frozen=True)
class NoisyQuant(Method):
    """Per linear input: a mean shift and a noise vector ``N``; ``y = W^ (Q(x + N)) + b - W^ N`` (Eq. 5 to 7).

    Folded into the LayerNorm before (one vector for query, key and value), or into the value projection and its registers;
    only the MLP output projection adds it at run time. A vector is kept only if it lowers the output error on tokens that did
    not choose it. Without another method that chooses scales, the paper's clip search by output error comes first.

    Attributes:
        shifts: candidates of the mean shift, within one step to both sides (the error is a rugged function of it).
        draws: noise vectors tried, uniform on (-1, 1).
        ranges: amplitudes tried for each, up to two steps.
        skip_by_prediction: leave out the noise where the histogram predicts no gain; the mean shift is still tried.
        max_tokens: tokens that the search uses.
        seed: of the draws.
    """

    shifts: int = 200
    draws: int = 8
    ranges: int = 50
    skip_by_prediction: bool = True
    max_tokens: int = 512
    seed: int = 0
    name: ClassVar[str] = "noisyquant"
    paper: ClassVar[str] = "NoisyQuant (arXiv 2211.16056)"
    cache_effect: ClassVar[str] = "the vector of the value projection is added to the register values"
    needs_static: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "oracle": "tokens with a scale of their own have another grid than the one the noise is fitted to.",
    }

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        return config.replace(activations={"mlp_out_offset": True})

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        if self.draws > 0 and self.ranges > 0:
            return {}
        names = ("skip_by_prediction", "seed", "ranges" if self.draws <= 0 else "draws")
        return dict.fromkeys(names, f"draws={self.draws} and ranges={self.ranges} try no noise, only the mean shift")

    def scales(self, fit: PipelineState) -> None:
        if not any(method.provides == "input scales" for method in fit.methods):
            search_input_scales(fit, 100, self.max_tokens)

    def noise(self, fit: PipelineState) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        gains = {}
        for known, group in fit.walk(fit.model, "NoisyQuant"):
            layers = [fit.quant_linear(name) for name in group.names]
            if layers[0].activations.bits > 8 or not _foldable(fit, group, layers):
                continue
            offset, gain = self._search(layers, fit.inputs(fit.model, group, known, self.max_tokens), generator)
            gains[f"{group.block}.{group.role}"] = gain
            if offset is not None:
                _install(fit, group, layers, offset)
        fit.measured[self.name] = {"relative gain of output error": gains}

    def _search(
        self, layers: list[QuantLinear], x: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor | None, float]:
        """(vector [in] or None, relative gain on held-out tokens)."""
        error = _OutputError(layers[0], torch.cat([layer.dequantized_weight() for layer in layers]))
        chooser, judge = x[::2], x[1::2]
        scale = layers[0].input_scale
        if scale is None:
            raise ValueError("NoisyQuant needs static activations.")
        zero = torch.zeros(x.shape[1], device=x.device)
        best, least = zero, error(chooser, zero)
        for i in range(-self.shifts // 2, self.shifts // 2):
            trial = zero + scale * (2 * i / self.shifts)
            found = error(chooser, trial)
            if found < least:
                best, least = trial, found
        mean = best
        if not self.skip_by_prediction or predicted_gain(layers[0].prepare_input(chooser), scale) > 0:
            for _ in range(self.draws):
                draw = torch.rand(x.shape[1], generator=generator).to(x.device) * 2 - 1
                for i in range(1, self.ranges + 1):
                    trial = mean + draw * scale * (2 * i / self.ranges)
                    found = error(chooser, trial)
                    if found < least:
                        best, least = trial, found
        plain, noisy = error(judge, zero), error(judge, best)
        gain = (plain - noisy) / plain if plain > 0 else 0.0
        return (best, gain) if gain > 0 else (None, 0.0)


class _OutputError:
    """``||W^ (Q(x + N) - N - x)||^2``: the error of the activations alone, as in the paper; that of the weights is not the
    vector's to repair."""

    def __init__(self, layer: QuantLinear, weight: torch.Tensor) -> None:
        self.layer, self.weight = layer, weight

    def __call__(self, x: torch.Tensor, offset: torch.Tensor) -> float:
        difference = self.layer.rounded_input(x + offset) - self.layer.prepare_input(x + offset)
        return float(F.linear(difference, self.weight).pow(2).mean())


def _value_projection(fit: PipelineState, block: int) -> Any:
    tower = find_tower(fit.result)
    return tower.attention(block).get_submodule(separate_projections(tower)[2])


def _foldable(fit: PipelineState, group: Group, layers: list[QuantLinear]) -> bool:
    """Whether the vector can be added in front of the group and taken out behind it."""
    if any(layer.bias is None for layer in layers):
        return False
    if group.role == "attention":  # exact as long as the rows of probabilities sum to one
        return not fit.config.attention.quantize and _value_projection(fit, group.block).bias is not None
    return layers[0].input_offset is not None or fit.norm_of(group) is not None


def _install(fit: PipelineState, group: Group, layers: list[QuantLinear], offset: torch.Tensor) -> None:
    """Add ``offset`` in front of the group in the quantized model, and take ``W^ offset`` out of the biases."""
    if group.role == "activation":
        layers[0].input_offset = offset.clone()
        # as the weight sees it: through the online Hadamard transform, if there is one
        offset = layers[0].prepare_input(torch.zeros_like(offset))
    elif group.role == "attention":
        offset = shift_bias(_value_projection(fit, group.block), offset)

        def shift(block: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            moved = values + offset.reshape(values.shape[0], 1, values.shape[2]).to(values)
            return keys, moved if block == group.block else values

        map_registers(fit.result, shift)
    else:
        offset = shift_bias(find_tower(fit.result).norm(group.block, int(group.role == "norm2")), offset)
    for layer in layers:
        shift_bias(layer, -F.linear(offset, layer.dequantized_weight()))
