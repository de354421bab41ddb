"""GPTQ (arXiv 2210.17323) with quantized activations: column by column, each error compensated by the later columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_regcache.config.validation import require
from optimum_regcache.math.uniform import code_range
from optimum_regcache.methods.base import Method, PipelineState


@dataclass(frozen=True)
class GPTQ(Method):
    """Weight codes that minimise ``||W x - W^ x||^2`` over the inputs ``x`` that the layer really gets: behind quantized
    earlier layers and its own activation quantizer, with registers and deletion active.

    Attributes:
        damping: lambda over the mean of the Hessian's diagonal.
        order_by_hessian: columns of large diagonal first ("act-order").
        token_weights: ``none``, or ``inverse_energy``: tokens count by ``1 / ||x||^2``, so that massive ones do not dominate
            (docs/method.md 11.8).
        max_tokens: tokens of the calibration images that the Hessian uses.
    """

    damping: float = 0.01
    order_by_hessian: bool = True
    token_weights: str = "none"
    max_tokens: int = 16384
    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "GPTQ (arXiv 2210.17323)"
    provides: ClassVar[str] = "weight codes"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.damping > 0, f"gptq.damping must be > 0, got {self.damping}.")
        require(
            self.token_weights in ("none", "inverse_energy"),
            f"gptq.token_weights must be none or inverse_energy, got {self.token_weights!r}.",
        )

    def round(self, fit: PipelineState) -> None:
        for known, group in fit.walk(fit.result, "GPTQ"):
            x = fit.inputs(fit.result, group, known, self.max_tokens)
            rounded = fit.quant_linear(group.names[0]).rounded_input(x)
            if self.token_weights == "inverse_energy":
                rounded = rounded / x.norm(dim=1, keepdim=True).clamp(min=1e-6)
            hessian = rounded.T.double() @ rounded.double()
            for name in group.names:
                layer = fit.quant_linear(name)
                zero = layer.weight_zero_point
                codes = gptq_codes(
                    layer.rotated_weight(fit.float_linear(name).weight),
                    hessian,
                    WeightGrid(
                        layer.weight_scale,
                        torch.zeros_like(layer.weight_scale) if zero is None else zero,
                        layer.weights.bits,
                    ),
                    self.damping,
                    self.order_by_hessian,
                )
                layer.set_codes(codes)


@dataclass(frozen=True)
class WeightGrid:
    """The values that a weight may take.

    Attributes:
        scale, zero_point: [out] or [1], for signed codes.
        bits: 2 to 8.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int


def gptq_codes(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: WeightGrid,
    damping: float = 0.01,
    order_by_hessian: bool = True,
    block: int = 128,
) -> torch.Tensor:
    """Signed weight codes for fixed scales (docs/method.md 11.8).

    With ``H = X^T X + lambda I`` and U the upper Cholesky factor of ``H^-1``: for column j, ``e_j = (w_j - q_j) / U_jj`` and
    ``w_k -= e_j U_jk`` for all later k; later blocks of columns are updated once per block.

    Args:
        weight: float [out, in].
        hessian: float64 [in, in], X^T X.
        grid: fixed scales and zero points.
        damping: lambda over the mean diagonal.
        order_by_hessian: start with the columns of the largest diagonal.
        block: columns per block.

    Returns:
        float32 [out, in], whole numbers.
    """
    size = weight.shape[1]
    order = (
        hessian.diagonal().argsort(descending=True) if order_by_hessian else torch.arange(size, device=weight.device)
    )
    w = weight.double()[:, order].clone()
    h = hessian[order][:, order].clone()
    mean = h.diagonal().mean().clamp(min=1e-12)
    h.diagonal().add_(damping * mean)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    lowest, highest = code_range(grid.bits, True)
    step, zero = grid.scale.double().expand(len(w)), grid.zero_point.double().expand(len(w))
    codes = torch.zeros_like(w)
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = w.new_zeros(len(w), end - start)
        for j in range(start, end):
            codes[:, j] = (torch.round(w[:, j] * (1.0 / step)) + zero).clamp(lowest, highest)
            error = (w[:, j] - (codes[:, j] - zero) * step) / factor[j, j]
            w[:, j:end] -= error[:, None] * factor[j, j:end]
            errors[:, j - start] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found.float()
