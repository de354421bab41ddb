"""RepQ-ViT (arXiv 2212.08254): scale reparametrisation of LayerNorm outputs, logarithmic attention probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.math.uniform import percentile_mse_range
from optimum_regcache.methods.base import Method, PipelineState
from optimum_regcache.rewrites import rescale_norm


@dataclass(frozen=True)
class Reparametrisation:
    """How the channels of a LayerNorm output are brought to one range (docs/method.md 11.5).

    Attributes:
        factor: r [D], float32: the step of each channel over the common step.
        shift: b [D], float32: ``x' = x / r - b``.
        scale, zero_point: the common step and zero point, 0-dim.
    """

    factor: torch.Tensor
    shift: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor


def reparametrise(x: torch.Tensor, bits: int, round_zero_point: bool = True) -> Reparametrisation:
    """From per-channel to per-tensor quantization without a change of function (docs/method.md 11.5).

    Per channel: step ``d_c`` and zero point ``z_c`` by percentiles and squared error; common ``d = mean d_c``,
    ``z = mean z_c``; ``r_c = d_c / d``, ``b_c = -z_c d_c / r_c + z d = (z - z_c) d``.

    Args:
        x: float [tokens, D], outputs of the LayerNorm.
        bits: of the input quantizer.
        round_zero_point: make ``z`` an integer in ``[0, 2^b - 1]``, as a kernel needs it. The official code does not: its
            interior values are multiples of the same step, only its clip limits lie between two codes.
    """
    low, high = percentile_mse_range(x.T.contiguous(), bits, False, widen=False)
    step = (high - low) / (2**bits - 1)
    floor = 1e-4 * step.mean()  # a constant channel has no step of its own
    step = torch.where(step > floor, step, floor)
    zero = torch.round(-low / step)
    common, middle = step.mean(), zero.mean()
    if round_zero_point:
        middle = middle.round().clamp(0, 2**bits - 1)
    return Reparametrisation(step / common, (middle - zero) * common, common, middle)


@dataclass(frozen=True)
class RepQViT(Method):
    """Percentile candidates by squared error for everything, LayerNorm outputs reparametrised for all their consumers.

    Statistics come from the float model with registers and deletion active (the official code initialises each quantizer
    behind quantized earlier layers).

    Attributes:
        max_tokens: tokens of the calibration images that the statistics use.
    """

    max_tokens: int = 16384
    name: ClassVar[str] = "repq_vit"
    paper: ClassVar[str] = "RepQ-ViT (arXiv 2212.08254)"
    provides: ClassVar[str] = "input scales"
    cache_effect: ClassVar[str] = "none: K and V do not change"
    needs_static: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "smoothquant": "both rescale the LayerNorm outputs, and the second would undo what the first was fitted to.",
    }

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        free = {"symmetric": False, "observer": "percentile_mse"}
        return config.replace(
            weights={"granularity": "per_channel", **free},
            activations=free,
            attention={"granularity": "per_tensor", "probabilities": "log_sqrt2", **free},
        )

    def smooth(self, fit: PipelineState) -> None:
        bits, found = fit.config.activations.bits, {}
        for known, group in fit.walk(fit.model, "RepQ-ViT norms"):
            number = fit.norm_of(group)
            if number is None:
                continue
            new = reparametrise(fit.inputs(fit.model, group, known, self.max_tokens), bits)
            rescale_norm(fit.tower, group.block, number, new.factor, new.shift)
            for name in group.names:
                fit.input_qparams[name] = (new.scale, new.zero_point.to(torch.int32))
            found[f"{group.block}.{group.role}"] = float(new.factor.max() / new.factor.min())
        fit.measured[self.name] = {"largest over smallest channel step": found}
