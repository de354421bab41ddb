"""PTQ4ViT's search for the operands of the attention products (docs/method.md 11.4), and that of an interval (11.14)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from optimum_regcache.layers.attention import AttentionProducts
from optimum_regcache.math.nonuniform import focus_ends, focused_unit, quantize_probabilities
from optimum_regcache.math.uniform import fake_quantize
from optimum_regcache.methods._search.gradients import Watched
from optimum_regcache.methods._search.scale import SearchSpace

SPLITS = 20


def search_products(products: AttentionProducts, watched: dict[str, Watched], space: SearchSpace) -> None:
    """Set the scales of all four operands.

    Query and key in turn, ``space.rounds`` times, by the weighted error of QK^T, one scale per head; for AV the split of the
    probabilities (all heads share it), then the value scales per head by the weighted error of AV.

    Args:
        products: the quantized module.
        watched: of the float model: inputs of ``query``, ``key``, ``probabilities`` and ``value`` (image tokens only) and
            importance of ``logits`` and ``output``, each [images, H, ...].
        space: candidates.
    """
    query, key, value = (watched[part].x for part in ("query", "key", "value"))
    rows = watched["logits"].importance.shape[-1] - key.shape[-2]  # register columns stay float
    importance = watched["logits"].importance[..., rows:]
    bits = products.query.config.bits
    first = {part: _first_scale(x, bits) for part, x in (("query", query), ("key", key), ("value", value))}
    factors = space.factors().to(query.device)
    target = query @ key.transpose(-1, -2)
    scales = dict(first)
    for _ in range(space.rounds):
        for part in ("query", "key"):
            other = _quantize(key, scales["key"], bits) if part == "query" else _quantize(query, scales["query"], bits)

            def difference(s: torch.Tensor, part: str = part, other: torch.Tensor = other) -> torch.Tensor:
                if part == "query":
                    return _quantize(query, s, bits) @ other.transpose(-1, -2) - target
                return other @ _quantize(key, s, bits).transpose(-1, -2) - target

            scales[part] = _best(first[part], factors, difference, importance)
    _search_values(products, watched, scales, first["value"], factors)
    for part, operand in products.operands():
        if part in scales:
            operand.set_qparams(scales[part])


def search_interval(products: AttentionProducts, watched: dict[str, Watched]) -> None:
    """Set the upper end of probabilities on an interval by the weighted error of AV, with float values.

    Args:
        products: the quantized module, its form ``dfq``.
        watched: of the float model: inputs of ``probabilities`` and ``value`` (image tokens only) and importance of
            ``output``, each [images, H, ...].
    """
    probabilities, value = watched["probabilities"].x, watched["value"].x
    importance, bits = watched["output"].importance, products.probabilities.config.bits
    ends = focus_ends().to(value.device)
    errors = [
        (((focused_unit(probabilities, 0.0, end, bits) - probabilities) @ value).pow(2) * importance).mean()
        for end in ends
    ]
    if float(torch.stack(errors).amax()) > 0:
        products.probabilities.set_qparams(ends[int(torch.stack(errors).argmin())])


def _search_values(
    products: AttentionProducts,
    watched: dict[str, Watched],
    scales: dict[str, torch.Tensor],
    first: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """Split of the probabilities with float values, then value scales with quantized probabilities; neither depends on the
    result of the other round, so one round is all there is."""
    value, probabilities = watched["value"].x, watched["probabilities"].x
    importance = watched["output"].importance
    config = products.probabilities.config
    target = probabilities @ value

    def rebuilt(scale: torch.Tensor) -> torch.Tensor:
        return quantize_probabilities(probabilities, scale, config.bits, config.probabilities)

    chosen = products.probabilities.scale
    if config.probabilities == "twin":
        splits = torch.exp2(-torch.arange(float(SPLITS), device=value.device))
        errors = [((rebuilt(s) @ value - target).pow(2) * importance).mean() for s in splits]
        chosen = splits[int(torch.stack(errors).argmin())]
        products.probabilities.set_qparams(chosen)
    fixed = rebuilt(chosen)
    scales["value"] = _best(first, factors, lambda s: fixed @ _quantize(value, s, config.bits) - target, importance)


def _first_scale(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``max|x| / (2^(b-1) - 0.5)`` per head, [H]."""
    return (x.abs().amax((0, 2, 3)) / (2 ** (bits - 1) - 0.5)).clamp(min=1e-12)


def _quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    column = scale.reshape(-1, 1, 1)
    return fake_quantize(x, column, torch.zeros_like(column), bits, True)


def _best(
    first: torch.Tensor,
    factors: torch.Tensor,
    difference: Callable[[torch.Tensor], torch.Tensor],
    importance: torch.Tensor,
) -> torch.Tensor:
    """Scale of each head with the smallest weighted error, [H]."""
    errors = torch.stack([(difference(first * f).pow(2) * importance).mean((0, 2, 3)) for f in factors])
    return torch.where(errors.amax(0) > 0, first * factors[errors.argmin(0)], first)
