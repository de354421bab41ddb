"""SmoothQuant (arXiv 2211.10438) at every site of an encoder where the factors fold: both norms, and v to output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.math.uniform import choose_qparams, dynamic_qparams, fake_quantize, weight_qparams
from optimum_regcache.methods.base import Group, Method, PipelineState
from optimum_regcache.rewrites import rescale_norm, rescale_values


@dataclass(frozen=True)
class SmoothQuant(Method):
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` moves range from activations to weights (Eq. 4).

    The factor of each site is chosen by the error of the quantized layers' outputs; "no smoothing" is always a candidate.
    The MLP output projection cannot be reached: GELU does not let a factor pass.

    Attributes:
        alphas: candidates.
        values: smooth the attention output through the value projection too.
        max_tokens: tokens that the search uses.
    """

    alphas: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    values: bool = True
    max_tokens: int = 1024
    name: ClassVar[str] = "smoothquant"
    paper: ClassVar[str] = "SmoothQuant (arXiv 2211.10438)"
    cache_effect: ClassVar[str] = "register values are divided by the factors of the value projection"

    def smooth(self, fit: PipelineState) -> None:
        chosen = {}
        for known, group in fit.walk(fit.model, "SmoothQuant"):
            number = fit.norm_of(group)
            if number is None and not (group.role == "attention" and self.values):
                continue
            alpha, factor = self._best(fit, group, fit.inputs(fit.model, group, known, self.max_tokens))
            chosen[f"{group.block}.{group.role}"] = alpha
            if factor is None:
                continue
            if number is None:
                rescale_values(fit.model, group.block, factor)
            else:
                rescale_norm(fit.tower, group.block, number, factor)
        fit.measured[self.name] = {"alpha": chosen}

    def _best(self, fit: PipelineState, group: Group, x: torch.Tensor) -> tuple[float | None, torch.Tensor | None]:
        weight = torch.cat([fit.float_linear(name).weight.detach().float() for name in group.names])
        best: tuple[float | None, torch.Tensor | None] = (None, None)
        least = _error(x, weight, fit.config)
        for alpha in self.alphas:
            factor = smoothing_factors(x, weight, alpha)
            error = _error(x / factor, weight * factor, fit.config)
            if error < least:
                best, least = (alpha, factor), error
        return best


def smoothing_factors(x: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``, clamped to at least 1e-5.

    Args:
        x: [tokens, in].
        weight: [out, in], all layers that read ``x``.
        alpha: 0 to 1.

    Returns:
        float32 [in].
    """
    peak, size = x.abs().amax(0).clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
    return (peak.pow(alpha) / size.pow(1 - alpha)).clamp(min=1e-5)


def _error(x: torch.Tensor, weight: torch.Tensor, config: RegCacheConfig) -> float:
    """Squared error of the output, with round-to-nearest quantization as in ``config``."""
    w, a = config.weights, config.activations
    scale, zero = weight_qparams(weight, w.bits, w.granularity, w.observer, w.symmetric)
    rebuilt = fake_quantize(weight, scale.reshape(-1, 1), zero.reshape(-1, 1), w.bits, True)
    if a.mode == "dynamic":
        qparams = dynamic_qparams(x, a.bits, a.symmetric, a.granularity)
    else:
        qparams = choose_qparams(x.amin(), x.amax(), a.bits, a.symmetric)
    rounded = fake_quantize(x, *qparams, a.bits, a.symmetric)
    return float((F.linear(rounded, rebuilt) - F.linear(x, weight)).pow(2).sum())
