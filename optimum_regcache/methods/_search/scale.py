"""Scales of linear layers by their (weighted) output error, for `output_mse` and `ptq4vit` (docs/method.md 11.1, 11.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.math.nonuniform import twin_signed
from optimum_regcache.math.uniform import choose_qparams, fake_quantize
from optimum_regcache.methods.base import Group, PipelineState


@dataclass(frozen=True)
class SearchSpace:
    """Candidates ``(low + i (high - low) / n) Delta_0``, i = 0 .. n - 1, of the first scale ``Delta_0``.

    Attributes:
        low, high: alpha and beta of PTQ4ViT.
        count: n.
        rounds: how often weights and input are searched in turn; fewer if nothing changes any more.
        weights: search weight scales too, not only the input's.
    """

    low: float = 0.01
    high: float = 1.2
    count: int = 100
    rounds: int = 3
    weights: bool = True

    def factors(self) -> torch.Tensor:
        """float32 [n]."""
        return torch.tensor([self.low + i * (self.high - self.low) / self.count for i in range(self.count)])


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers that read one tensor, with what their error is measured against.

    Attributes:
        x: float32 [tokens, in], the input.
        weights: float32 [out, in] of each layer.
        importance: weight of every output's squared error, [tokens, out] of each layer; None for 1.
    """

    x: torch.Tensor
    weights: Sequence[torch.Tensor]
    importance: Sequence[torch.Tensor] | None = None

    def errors(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Mean over tokens of the weighted squared error of each output channel, [out] for each layer.

        Args:
            outputs: what each layer's float output minus its quantized output is, [tokens, out].
        """
        squares = [d.pow(2) for d in outputs]
        if self.importance is not None:
            squares = [s * i for s, i in zip(squares, self.importance, strict=True)]
        return [s.mean(0) for s in squares]


@dataclass(frozen=True)
class FoundScales:
    """Result of a search.

    Attributes:
        weight_scales: [out] or [1] of each layer; None where weights were not searched.
        input_scale, input_zero_point: 0-dim.
        error: total weighted error at the end.
    """

    weight_scales: list[torch.Tensor] | None
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    error: float


def input_candidates(x: torch.Tensor, a: ActivationsConfig, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate scales and zero points of the input, each [n].

    Symmetric: ``Delta_0 = max|x| / (2^(b-1) - 0.5)`` (signed maximum for a twin quantizer), as in the official code; otherwise
    both ends of the range shrink together.
    """
    if a.symmetric:
        peak = x.amax() if a.post_activation == "twin" else x.abs().amax()
        scale = (peak / (2 ** (a.bits - 1) - 0.5)).clamp(min=1e-12) * factors
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return choose_qparams(x.amin() * factors, x.amax() * factors, a.bits, False)


def search_scales(
    group: LayerGroup,
    w: WeightsConfig,
    a: ActivationsConfig,
    space: SearchSpace,
    quantized_weights: Sequence[torch.Tensor] | None = None,
    negative_scale: torch.Tensor | None = None,
) -> FoundScales:
    """Alternate between the weight scales for a fixed input scale and the input scale for fixed weights (docs/method.md 11.4).

    Args:
        group: layers and data. Weight scales are found per row, or per layer if ``w.granularity`` is ``per_tensor``; the
            layers share one input scale.
        w, a: bits and forms; weights are symmetric here.
        space: candidates.
        quantized_weights: weights to use instead of searching them (``space.weights`` false).
        negative_scale: step of negative inputs of a twin quantizer.

    Returns:
        The scales with the smallest error of the last round.
    """
    factors = space.factors().to(group.x.device)
    scales, zeros = input_candidates(group.x, a, factors)
    first, first_zero = input_candidates(group.x, a, torch.ones_like(factors[:1]))

    def quantize_input(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        if negative_scale is not None:
            return twin_signed(group.x, scale, negative_scale, a.bits)
        return fake_quantize(group.x, scale, zero, a.bits, a.symmetric)

    chosen, chosen_zero, picked = first[0], first_zero[0], -1
    weight_scales: list[torch.Tensor] | None = None
    weights = list(quantized_weights if quantized_weights is not None else group.weights)
    error = float("inf")
    targets = [F.linear(group.x, weight) for weight in group.weights]
    for _ in range(space.rounds):
        before = (picked, weight_scales)
        if space.weights:
            weight_scales = _weight_scales(group, targets, quantize_input(chosen, chosen_zero), w, factors)
            weights = [_quantized(v, s, w.bits) for v, s in zip(group.weights, weight_scales, strict=True)]
        errors = torch.stack(
            [_total(group, targets, quantize_input(s, z), weights) for s, z in zip(scales, zeros, strict=True)]
        )
        picked = first_best(errors)
        chosen, chosen_zero, error = scales[picked], zeros[picked], float(errors[picked])
        same = before[1] is not None and weight_scales is not None and picked == before[0]
        if same and all(torch.equal(p, q) for p, q in zip(before[1] or [], weight_scales or [], strict=True)):
            break  # a fixed point: every further round repeats this one
    return FoundScales(weight_scales, chosen, chosen_zero, error)


def _total(
    group: LayerGroup, targets: list[torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Weighted error summed over layers and channels, 0-dim."""
    found = group.errors([F.linear(x, w) - t for w, t in zip(weights, targets, strict=True)])
    return torch.stack([e.sum() for e in found]).sum()


def _quantized(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    column = scale.reshape(-1, 1)
    return fake_quantize(weight, column, torch.zeros_like(column), bits, True)


def _weight_scales(
    group: LayerGroup, targets: list[torch.Tensor], x: torch.Tensor, w: WeightsConfig, factors: torch.Tensor
) -> list[torch.Tensor]:
    """Best weight scales of each layer for a given quantized input."""
    rows = w.granularity == "per_channel"
    peaks = [v.abs().amax(1) if rows else v.abs().amax().reshape(1) for v in group.weights]
    first = [(p / (2 ** (w.bits - 1) - 0.5)).clamp(min=1e-12) for p in peaks]
    best = [torch.full_like(f, float("inf")) for f in first]
    found = [f.clone() for f in first]
    for factor in factors:
        trial = [f * factor for f in first]
        outputs = [
            F.linear(x, _quantized(v, s, w.bits)) - t for v, s, t in zip(group.weights, trial, targets, strict=True)
        ]
        for number, error in enumerate(group.errors(outputs)):
            total = error if rows else error.sum().reshape(1)
            better = total < best[number]
            best[number] = torch.where(better, total, best[number])
            found[number] = torch.where(better, trial[number], found[number])
    # no error at all, for lack of importance: nothing was learned, keep the whole range
    return [torch.where(b > 0, s, f) for b, s, f in zip(best, found, first, strict=True)]


def first_best(errors: torch.Tensor) -> int:
    """Index of the smallest error along axis 0; the last candidate (the least clipping) if all are equal."""
    return len(errors) - 1 if bool((errors == errors[0]).all()) else int(errors.argmin())


def search_group(
    fit: PipelineState,
    group: Group,
    x: torch.Tensor,
    space: SearchSpace,
    importance: Sequence[torch.Tensor] | None = None,
) -> None:
    """`search_scales` for the layers of ``group``; stores what it finds in the quantized model.

    Args:
        fit: with the modules replaced.
        group: layers that share one input scale.
        x: float32 [tokens, in], their input.
        space: candidates; weights stay as they are if it leaves them out.
        importance: see `LayerGroup`.
    """
    layers = [fit.quant_linear(name) for name in group.names]
    first = layers[0]
    weights = [y.rotated_weight(fit.float_linear(n).weight) for y, n in zip(layers, group.names, strict=True)]
    found = search_scales(
        LayerGroup(first.prepare_input(x), weights, importance),
        first.weights,
        first.activations,
        space,
        quantized_weights=None if space.weights else [layer.dequantized_weight() for layer in layers],
        negative_scale=first.input_negative_scale,
    )
    for number, layer in enumerate(layers):
        if found.weight_scales is not None:
            layer.set_weight(weights[number], found.weight_scales[number])
        layer.set_input_qparams(found.input_scale, found.input_zero_point)
