"""GPTQ (arXiv 2210.17323) with quantized activations: column by column, each error compensated by the later columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_regcache.config.validation import require
from optimum_regcache.math.uniform import code_range
from optimum_regcache.methods.base import Method, PipelineState

ROW_FACTORS = tuple(step / 20 for step in range(20, 9, -1))  # of the given scale: 1 down to 0.5
_STACKED_VALUES = 2**20  # candidates of a layer that are rounded at once have at most so many weights


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
        row_scales: ``searched``: each weight row takes the one of `ROW_FACTORS` times its scale that leaves the least error
            after compensation; ``given``: the scales stay as they are.
    """

    damping: float = 0.01
    order_by_hessian: bool = True
    token_weights: str = "none"
    max_tokens: int = 16384
    row_scales: str = "given"
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
        require(
            self.row_scales in ("given", "searched"),
            f"gptq.row_scales must be given or searched, got {self.row_scales!r}.",
        )

    def round(self, fit: PipelineState) -> None:
        for known, group in fit.walk(fit.result, "GPTQ"):
            x = fit.inputs(fit.result, group, known, self.max_tokens)
            rounded = fit.quant_linear(group.names[0]).rounded_input(x)
            if self.token_weights == "inverse_energy":
                rounded = rounded / x.norm(dim=1, keepdim=True).clamp(min=1e-6)
            curvature = Curvature.of(rounded.T.double() @ rounded.double(), self.damping, self.order_by_hessian)
            for name in group.names:
                layer = fit.quant_linear(name)
                weight = layer.rotated_weight(fit.float_linear(name).weight)
                scale, zero = layer.weight_scale, layer.weight_zero_point
                grid = WeightGrid(scale, torch.zeros_like(scale) if zero is None else zero, layer.weights.bits)
                if self.row_scales == "searched":
                    scale, codes = search_row_scales(weight, curvature, grid)
                    layer.set_weight(weight, scale, zero)
                else:
                    codes, _ = gptq_codes(weight, curvature, grid)
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


@dataclass(frozen=True)
class Curvature:
    """``H = X^T X + lambda I`` of the inputs of a layer, as the columns need it one after the other.

    Attributes:
        order: int64 [in], the columns in the order in which they are rounded.
        factor: float64 [in, in], the upper Cholesky factor of ``H^-1`` in that order.
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float = 0.01, order_by_hessian: bool = True) -> Curvature:
        """From ``X^T X``, float64 [in, in].

        Args:
            hessian: without lambda.
            damping: lambda over the mean diagonal.
            order_by_hessian: start with the columns of the largest diagonal.
        """
        diagonal = hessian.diagonal()
        order = (
            diagonal.argsort(descending=True) if order_by_hessian else torch.arange(len(hessian)).to(diagonal.device)
        )
        h = hessian[order][:, order].clone()
        mean = h.diagonal().mean().clamp(min=1e-12)
        h.diagonal().add_(damping * mean)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        return cls(order, torch.linalg.cholesky(inverse, upper=True))


def gptq_codes(
    weight: torch.Tensor, curvature: Curvature, grid: WeightGrid, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed weight codes for fixed scales, and what they cost (docs/method.md 11.8).

    With U the factor of ``curvature``: for column j, ``e_j = (w_j - q_j) / U_jj`` and ``w_k -= e_j U_jk`` for all later k;
    later blocks of columns are updated once per block.

    Args:
        weight: float [out, in].
        curvature: of the inputs.
        grid: fixed scales and zero points.
        block: columns per block.

    Returns:
        ``(codes float32 [out, in], whole numbers; error float64 [out])``, the error being ``sum_j e_j^2``, which is
        ``(w - q)^T H (w - q)`` of each row.
    """
    factor, size = curvature.factor, weight.shape[1]
    w = weight.double().T[curvature.order].contiguous()  # columns lie together: each is read and written once per step
    lowest, highest = code_range(grid.bits, True)
    step, zero = grid.scale.double().expand(len(weight)), grid.zero_point.double().expand(len(weight))
    codes, total = torch.zeros_like(w), torch.zeros_like(w[0])
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = w.new_zeros(end - start, len(weight))
        for j in range(start, end):
            codes[j] = (torch.round(w[j] * (1.0 / step)) + zero).clamp(lowest, highest)
            errors[j - start] = error = (w[j] - (codes[j] - zero) * step) / factor[j, j]
            w[j:end] -= factor[j, j:end, None] * error
        total += errors.square().sum(0)
        w[end:] -= factor[start:end, end:].T @ errors
    found = torch.empty_like(weight, dtype=torch.float32)
    found[:, curvature.order] = codes.T.float()
    return found, total


def search_row_scales(
    weight: torch.Tensor, curvature: Curvature, grid: WeightGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each row that leaves the least error behind :func:`gptq_codes`, among `ROW_FACTORS` times the given one.

    Zero points stay: both ends of a range shrink alike. A scale that all rows share is chosen by the sum of their errors. On a
    tie the larger scale wins, so no row (or sum) is worse than with the given one.

    Args:
        weight: float [out, in].
        curvature: of the inputs.
        grid: the given scales and zero points.

    Returns:
        ``(scale float32 of the shape of grid.scale, codes float32 [out, in])``.
    """
    rows, zero = len(weight), grid.zero_point.expand(len(weight))
    scales = grid.scale.float() * torch.tensor(ROW_FACTORS, device=weight.device)[:, None]
    scale, codes = scales[0].clone(), torch.zeros_like(weight, dtype=torch.float32)
    least = torch.full((rows,), float("inf"), dtype=torch.float64, device=weight.device)
    for part in scales.split(max(1, _STACKED_VALUES // max(weight.numel(), 1))):
        stacked = WeightGrid(part.expand(-1, rows).flatten(), zero.repeat(len(part)), grid.bits)
        found, errors = gptq_codes(weight.repeat(len(part), 1), curvature, stacked)
        for trial, own, error in zip(part, found.split(rows), errors.split(rows), strict=True):
            error = error if len(scale) == rows else error.sum().expand(rows)
            better = error < least
            scale = torch.where(better[: len(scale)], trial, scale)
            codes = torch.where(better[:, None], own, codes)
            least = torch.where(better, error, least)
    return scale, codes
