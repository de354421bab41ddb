"""Row scales that GPTQ searches: never worse than those given, the best of a brute-force search, zero points kept."""
# pyright: reportMissingImports=false

from __future__ import annotations

import numpy as np
import pytest
import torch
from fits import once
from method_problems import correlated, randn
from models import TOWERS

from optimum_regcache import RegCacheConfig
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.math.uniform import weight_qparams
from optimum_regcache.methods import gptq, quantize_with, resolve
from optimum_regcache.methods.gptq import ROW_FACTORS, Curvature, WeightGrid, gptq_codes, search_row_scales

ROWS, COLUMNS = 12, 20


def problem(
    bits: int, symmetric: bool = True, granularity: str = "per_channel", observer: str = "minmax"
) -> tuple[torch.Tensor, torch.Tensor, WeightGrid]:
    """Weight, damped Hessian and grid."""
    x = correlated(bits, 60, COLUMNS).double()
    weight = randn(bits + 7, ROWS, COLUMNS) ** 3 + (0.0 if symmetric else 0.3)  # heavy tails: shrinking pays
    hessian = x.T @ x
    return weight, hessian, WeightGrid(*weight_qparams(weight, bits, granularity, observer, symmetric), bits)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def left(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, grid: WeightGrid, h: torch.Tensor
) -> torch.Tensor:
    """``e^T H e`` of each row, straight from the definition."""
    e = weight.double() - (codes.double() - grid.zero_point.double()[:, None]) * scale.double()[:, None]
    return torch.einsum("ri,ij,rj->r", e, h, e)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_squared_steps_of_gptq_add_up_to_the_error_of_the_output(bits: int, symmetric: bool) -> None:
    weight, hessian, grid = problem(bits, symmetric)
    for by_hessian in (True, False):
        codes, error = gptq_codes(weight, Curvature.of(hessian, 0.01, by_hessian), grid, block=7)
        expected = left(weight, codes, grid.scale, grid, damped(hessian))
        np.testing.assert_allclose(error.numpy(), expected.numpy(), rtol=1e-8)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_row_is_worse_than_with_its_given_scale(bits: int, symmetric: bool, observer: str) -> None:
    weight, hessian, grid = problem(bits, symmetric, observer=observer)
    curvature, h = Curvature.of(hessian), damped(hessian)
    scale, codes = search_row_scales(weight, curvature, grid)
    given = left(weight, gptq_codes(weight, curvature, grid)[0], grid.scale, grid, h)
    found = left(weight, codes, scale, grid, h)
    assert bool((found <= given * (1 + 1e-9)).all())
    if bits < 8:
        assert found.sum() < 0.95 * given.sum() or observer == "mse"
    assert bool((scale <= grid.scale).all())
    assert scale.dtype == torch.float32
    assert float(codes.min()) >= -(2 ** (bits - 1))
    assert float(codes.max()) <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_row_takes_the_best_of_all_candidates_tried_one_by_one(symmetric: bool) -> None:
    weight, hessian, grid = problem(3, symmetric)
    curvature, h = Curvature.of(hessian), damped(hessian)
    scale, codes = search_row_scales(weight, curvature, grid)
    for row in range(ROWS):
        trials: list[tuple[float, torch.Tensor, torch.Tensor]] = []
        for factor in ROW_FACTORS:
            alone = WeightGrid(grid.scale[row : row + 1] * factor, grid.zero_point[row : row + 1], 3)
            own, _ = gptq_codes(weight[row : row + 1], curvature, alone)
            trials.append((float(left(weight[row : row + 1], own, alone.scale, alone, h)), alone.scale, own[0]))
        _, best_scale, best_codes = min(trials, key=lambda trial: trial[0])
        assert scale[row] == pytest.approx(float(best_scale), rel=1e-6)
        assert torch.equal(codes[row], best_codes)


def test_a_scale_that_all_rows_share_is_chosen_by_the_sum() -> None:
    weight, hessian, grid = problem(3, granularity="per_tensor")
    curvature, h = Curvature.of(hessian), damped(hessian)
    scale, codes = search_row_scales(weight, curvature, grid)
    assert scale.shape == (1,)
    wide = WeightGrid(grid.scale.expand(ROWS), grid.zero_point.expand(ROWS), 3)
    sums: list[float] = []
    for factor in ROW_FACTORS:
        own, _ = gptq_codes(weight, curvature, WeightGrid(wide.scale * factor, wide.zero_point, 3))
        sums.append(float(left(weight, own, wide.scale * factor, wide, h).sum()))
    assert float(left(weight, codes, scale.expand(ROWS), wide, h).sum()) == pytest.approx(min(sums))
    assert float(scale) == pytest.approx(float(grid.scale) * ROW_FACTORS[sums.index(min(sums))])


def test_how_many_candidates_are_rounded_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, grid = problem(4)
    whole = search_row_scales(weight, Curvature.of(hessian), grid)
    monkeypatch.setattr(gptq, "_STACKED_VALUES", 3 * weight.numel())
    for a, b in zip(whole, search_row_scales(weight, Curvature.of(hessian), grid), strict=True):
        assert torch.equal(a, b)


def test_a_weight_of_zeros_keeps_its_scale() -> None:
    _, hessian, grid = problem(4)
    scale, codes = search_row_scales(torch.zeros(ROWS, COLUMNS), Curvature.of(hessian), grid)
    assert torch.equal(scale, grid.scale)
    assert not codes.any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_keeps_the_scales_that_were_found(symmetric: bool) -> None:
    tiny = TOWERS["clip"]
    made = {}
    for row_scales in ("given", "searched"):
        config = RegCacheConfig.from_preset("w4a4").replace(
            registers={"mode": "none"},
            weights={"symmetric": symmetric},
            methods=[{"name": "gptq", "row_scales": row_scales}],
        )
        made[row_scales] = once(
            ("gptq rows", symmetric, row_scales),
            lambda config=config: quantize_with(
                tiny.build(), resolve(config), None, [tiny.inputs(batch=8)], progress=False
            ),
        )
    shrunk = 0
    pairs = zip(quant_linears(made["given"].model), quant_linears(made["searched"].model), strict=True)
    for (name, given), (_, found) in pairs:
        ratio = found.weight_scale / given.weight_scale
        assert any(torch.isclose(ratio[0], torch.tensor(factor)) for factor in ROW_FACTORS), name
        shrunk += int((ratio < 0.99).sum())
        if not symmetric:
            assert found.weight_zero_point is not None
            assert given.weight_zero_point is not None
            assert torch.equal(found.weight_zero_point, given.weight_zero_point), name
    assert shrunk > 0
    target = tiny.run(made["given"].float_model)
    errors = {key: float((tiny.run(result.model) - target).norm()) for key, result in made.items()}
    assert errors["searched"] < errors["given"]


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gptq\.row_scales must be given or searched, got 'best'\."):
        gptq.GPTQ(row_scales="best")
