"""The published methods against plain loops in float64 written from the papers' formulas; the loops use nothing of the
package. Stored values are in `test_method_golden.py`, the comparison with the authors' code in
docs/results/method-agreement.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from method_problems import GELU_MINIMUM, correlated, heavy_tailed, products_problem, rand, randn
from torch.nn import functional as F

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.math.nonuniform import log_quantize, twin_signed, twin_unit
from optimum_regcache.methods._search.product import search_products
from optimum_regcache.methods._search.scale import LayerGroup, SearchSpace, search_scales
from optimum_regcache.methods.gptq import Curvature, WeightGrid, gptq_codes
from optimum_regcache.methods.noisyquant import expected_error, predicted_gain
from optimum_regcache.methods.repq_vit import reparametrise

Array = np.ndarray
Rounding = Callable[[float], float]


# ---- the papers' formulas, one value at a time ----------------------------------------------------------------------------


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def uniform(value: float, step: float, bits: int) -> float:
    """Signed codes; `round` of Python goes to the even neighbour, like torch."""
    return step * clip(round(value / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def gelu_twin(value: float, step: float, negative_step: float, bits: int) -> float:
    if value >= 0:
        return step * clip(round(value / step), 0, 2 ** (bits - 1) - 1)
    return negative_step * clip(round(value / negative_step), -(2 ** (bits - 1)), 0)


def softmax_twin(value: float, split: float, bits: int) -> float:
    """docs/method.md 11.4: R1 = [0, 2^(k-1) D1) with step D1, else R2 with step D2 = 1 / 2^(k-1)."""
    levels = 2 ** (bits - 1)
    fine, coarse = split / levels, 1 / levels
    step = fine if value < levels * fine else coarse
    return step * clip(round(value / step), 0, levels - 1)


def logarithmic(value: float, scale: float, bits: int, base: float) -> float:
    """docs/method.md 11.5: s base^-q; what needs more than 2^b codes, and zero, become 0."""
    if value == 0:
        return 0.0
    code = round(-math.log(value / scale) / math.log(base))
    return 0.0 if code >= 2**bits else scale * base ** -clip(code, 0, 2**bits - 1)


def asymmetric(values: Array, step: float, zero: float, bits: int) -> Array:
    return step * (np.clip(np.round(values / step) + zero, 0, 2**bits - 1) - zero)


def each(x: torch.Tensor, function: Rounding) -> torch.Tensor:
    return torch.tensor([function(v) for v in x.double().flatten().tolist()], dtype=torch.float64).reshape(x.shape)


def factors(space: SearchSpace) -> list[float]:
    return [space.low + i * (space.high - space.low) / space.count for i in range(space.count)]


# ---- quantizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_gelu_twin_follows_the_formula(bits: int) -> None:
    x = F.gelu(3 * randn(bits, 500))
    scale, negative = 0.9 * x.amax() / 2 ** (bits - 1), torch.tensor(GELU_MINIMUM / 2 ** (bits - 1))
    expected = each(x, lambda v: gelu_twin(v, float(scale), float(negative), bits))
    torch.testing.assert_close(twin_signed(x, scale, negative, bits).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0, 1, 4, 9])
def test_softmax_twin_follows_the_formula(bits: int, exponent: int) -> None:
    x = (4 * randn(bits, 40, 25)).softmax(-1).flatten()
    split = 2.0**-exponent
    rebuilt = twin_unit(x, torch.tensor(split), bits).double()
    torch.testing.assert_close(rebuilt, each(x, lambda v: softmax_twin(v, split, bits)), rtol=1e-6, atol=1e-7)
    levels = 2 ** (bits - 1)
    inside = (x >= split) & (x < 1 - 1 / levels)
    assert ((rebuilt - x).abs()[inside] <= 0.5 / levels + 1e-6).all()
    assert ((rebuilt - x).abs()[x < split * (1 - 1 / levels)] <= 0.5 * split / levels + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("half_steps", [True, False])
def test_logarithmic_codes_follow_the_formula(bits: int, half_steps: bool) -> None:
    base, scale = math.sqrt(2) if half_steps else 2.0, 0.83
    x = torch.cat([torch.zeros(1), torch.tensor([0.83, 0.99]), torch.exp2(-12 * rand(bits, 400))])
    place = (torch.log2(x.double() / scale) / math.log2(base)).abs() % 1
    x = x[~((place - 0.5).abs() < 1e-4)]  # halfway between two codes float32 may go either way
    expected = each(x, lambda v: logarithmic(v, scale, bits, base))
    rebuilt = log_quantize(x, torch.tensor(scale), bits, half_steps=half_steps).double()
    torch.testing.assert_close(rebuilt, expected, rtol=1e-6, atol=0.0)


# ---- RepQ-ViT -------------------------------------------------------------------------------------------------------------


def percentile_qparams(values: Array, bits: int) -> tuple[float, float]:
    """docs/method.md 11.5: step and zero point of the best of three percentile ranges."""
    best = (math.inf, 0.0, 0.0)
    for p in (0.999, 0.9999, 0.99999):
        low, high = np.quantile(values, 1 - p), np.quantile(values, p)
        step = float(high - low) / (2**bits - 1)
        zero = float(np.round(-low / step))
        error = float(((asymmetric(values, step, zero, bits) - values) ** 2).mean())
        best = min(best, (error, step, zero))
    return best[1], best[2]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_reparametrisation_follows_the_formulas(bits: int) -> None:
    x = randn(bits, 1500, 9) * torch.exp(randn(bits + 1, 9)) + randn(bits + 2, 9)
    qparams = [percentile_qparams(column, bits) for column in x.double().numpy().T]
    steps, zeros = np.array([q[0] for q in qparams]), np.array([q[1] for q in qparams])
    step, zero = steps.mean(), zeros.mean()
    factor = steps / step
    shift = (-zeros * steps) / factor - (-zero * step)  # b = m / r - m_common
    found = reparametrise(x, bits, round_zero_point=False)
    np.testing.assert_allclose(found.factor.double().numpy(), factor, rtol=2e-5)
    np.testing.assert_allclose(found.shift.double().numpy(), shift, atol=1e-4 * step * 2**bits)
    assert float(found.scale) == pytest.approx(step, rel=1e-5)
    assert float(found.zero_point) == pytest.approx(zero, abs=1e-4)

    rounded = reparametrise(x, bits)
    assert float(rounded.zero_point) == round(zero)
    moved = found.shift + (rounded.zero_point - found.zero_point) * found.scale
    torch.testing.assert_close(rounded.shift, moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("round_zero_point", [True, False])
def test_reparametrisation_is_exact_and_makes_the_channels_alike(round_zero_point: bool) -> None:
    bits, x = 6, randn(3, 1500, 9) * torch.exp(randn(4, 9)) + randn(5, 9)
    weight, bias = randn(6, 5, 9).double(), randn(7, 5).double()
    found = reparametrise(x, bits, round_zero_point)
    factor, shift = found.factor.double(), found.shift.double()
    new_x, new_weight = x.double() / factor - shift, weight * factor
    new_bias = bias + new_weight @ shift
    torch.testing.assert_close(
        F.linear(new_x, new_weight, new_bias), F.linear(x.double(), weight, bias), rtol=1e-12, atol=1e-11
    )
    # one common quantizer of x' does to every channel what its own quantizer did to x
    for c in range(x.shape[1]):
        step, zero = percentile_qparams(x[:, c].double().numpy(), bits)
        own = asymmetric(x[:, c].double().numpy(), step, zero, bits)
        common = asymmetric(new_x[:, c].numpy(), float(found.scale), float(found.zero_point), bits)
        back = (common + float(shift[c])) * float(factor[c])
        inside = np.abs(np.round(x[:, c].numpy() / step) + zero - 2 ** (bits - 1)) < 2 ** (bits - 1) - 2
        assert (np.abs(back - own)[inside] > 1e-3 * step).mean() < 0.002  # only values halfway between two codes
        assert inside.mean() > 0.8


# ---- NoisyQuant -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "noise"), [(0.0, 0.5), (0.2, 0.4), (0.3, 0.7), (0.45, 0.1), (0.5, 0.9)])
def test_expected_error_by_simulation(distance: float, noise: float) -> None:
    half_step = 0.5
    assert half_step - distance <= noise <= half_step + distance  # where the formula holds
    draws = np.random.default_rng(0).uniform(-noise, noise, 400_000)
    simulated = ((np.round(distance + draws) - draws - distance) ** 2).mean()
    got = float(expected_error(torch.tensor(distance, dtype=torch.float64), half_step, noise))
    assert got == pytest.approx(simulated, rel=0.01)


def test_predicted_gain_by_simulation() -> None:
    x, scale = 0.3 * randn(0, 2000).double().numpy(), 0.8
    plain = ((scale * np.round(x / scale) - x) ** 2).mean()
    draws = np.random.default_rng(0).uniform(-scale / 2, scale / 2, (200, x.size))
    noisy = ((scale * np.round((x + draws) / scale) - draws - x) ** 2).mean()
    got = predicted_gain(torch.from_numpy(x), torch.tensor(scale, dtype=torch.float64))
    assert got == pytest.approx(plain - noisy, abs=1e-3 * scale**2)


# ---- PTQ4ViT --------------------------------------------------------------------------------------------------------------


def layer_error(
    x: Array, weights: list[Array], importance: list[Array], quantized: list[Array], x_hat: Array, layer: int, row: int
) -> float:
    """Sum over tokens of the weighted squared error of one output."""
    total = 0.0
    for token in range(len(x)):
        exact = sum(x[token, i] * weights[layer][row, i] for i in range(x.shape[1]))
        rounded = sum(x_hat[token, i] * quantized[layer][row, i] for i in range(x.shape[1]))
        total += importance[layer][token, row] * (rounded - exact) ** 2
    return total


def brute_force(
    group: LayerGroup, bits: int, per_channel: bool, negative_step: float | None, space: SearchSpace
) -> tuple[list[list[float]], float]:
    """The alternating search with loops over candidates, layers, rows and tokens."""
    x, weights = group.x.double().numpy(), [w.double().numpy() for w in group.weights]
    importance = [i.double().numpy() for i in group.importance or []]

    def rounded_input(step: float) -> Array:
        def value(v: float) -> float:
            return uniform(v, step, bits) if negative_step is None else gelu_twin(v, step, negative_step, bits)

        return np.vectorize(value)(x)

    def rounded_rows(weight: Array, steps: Sequence[float]) -> Array:
        return np.array([[uniform(v, s, bits) for v in row] for row, s in zip(weight, steps, strict=True)])

    divisor = 2 ** (bits - 1) - 0.5
    first_input = (np.abs(x).max() if negative_step is None else x.max()) / divisor
    step, steps = first_input, [[0.0] * len(w) for w in weights]
    for _ in range(space.rounds):
        x_hat = rounded_input(step)
        for layer, weight in enumerate(weights):
            rows = [[r] for r in range(len(weight))] if per_channel else [list(range(len(weight)))]
            for members in rows:
                first, best = np.abs(weight[members]).max() / divisor, math.inf
                for factor in factors(space):
                    quantized = [*weights]
                    quantized[layer] = rounded_rows(weight, [first * factor] * len(weight))
                    error = sum(layer_error(x, weights, importance, quantized, x_hat, layer, r) for r in members)
                    if error < best:
                        best = error
                        for r in members:
                            steps[layer][r] = first * factor
        quantized, best = [rounded_rows(w, s) for w, s in zip(weights, steps, strict=True)], math.inf
        for factor in factors(space):
            x_hat = rounded_input(first_input * factor)
            error = sum(
                layer_error(x, weights, importance, quantized, x_hat, layer, r)
                for layer, w in enumerate(weights)
                for r in range(len(w))
            )
            if error < best:
                best, step = error, first_input * factor
    return steps, step


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_scale_search_against_brute_force(per_channel: bool, twin: bool) -> None:
    bits, space = 4, SearchSpace(low=0.1, count=16, rounds=2)
    x = F.gelu(2 * randn(0, 10, 4)) if twin else heavy_tailed(0, 10, 4)
    group = LayerGroup(x, [randn(1, 3, 4), 2 * randn(2, 2, 4)], [randn(3, 10, 3) ** 2, randn(4, 10, 2) ** 2])
    negative = GELU_MINIMUM / 2 ** (bits - 1) if twin else None
    found = search_scales(
        group,
        WeightsConfig(bits=bits, granularity="per_channel" if per_channel else "per_tensor"),
        ActivationsConfig(bits=bits, post_activation="twin" if twin else "uniform"),
        space,
        negative_scale=None if negative is None else torch.tensor(negative),
    )
    steps, step = brute_force(group, bits, per_channel, negative, space)
    assert float(found.input_scale) == pytest.approx(step, rel=1e-5)
    assert found.weight_scales is not None
    for scale, expected in zip(found.weight_scales, steps, strict=True):
        assert scale.expand(len(expected)).tolist() == pytest.approx(expected, rel=1e-5)


def test_product_search_against_brute_force() -> None:
    bits, space = 4, SearchSpace(low=0.1, count=20, rounds=2)
    products, watched = products_problem(bits, 10)
    search_products(products, watched, space)
    q, k, p, v = (watched[n].x.double().numpy() for n in ("query", "key", "probabilities", "value"))
    logits, output = (watched[n].importance.double().numpy() for n in ("logits", "output"))

    def head(x: Array, number: int, rounding: Rounding) -> Array:
        return np.vectorize(rounding)(x[:, number])

    def steps_of(x: Array, number: int) -> list[float]:
        return [f * np.abs(x[:, number]).max() / (2 ** (bits - 1) - 0.5) for f in factors(space)]

    def splitting(split: float) -> Rounding:
        return lambda value: softmax_twin(value, split, bits)

    def even(step: float) -> Rounding:
        return lambda value: uniform(value, step, bits)

    splits = [2.0**-i for i in range(20)]
    totals = [
        sum(((head(p, h, splitting(s)) @ v[:, h] - p[:, h] @ v[:, h]) ** 2 * output[:, h]).sum() for h in range(2))
        for s in splits
    ]
    split = splits[int(np.argmin(totals))]
    assert products.probabilities.scale.tolist() == [split]
    for h in range(2):
        exact = q[:, h] @ k[:, h].swapaxes(-1, -2)
        first = 1 / (2 ** (bits - 1) - 0.5)
        sq, sk = np.abs(q[:, h]).max() * first, np.abs(k[:, h]).max() * first
        for _ in range(space.rounds):
            fixed = head(k, h, even(sk)).swapaxes(-1, -2)
            sq = min(steps_of(q, h), key=lambda s: ((head(q, h, even(s)) @ fixed - exact) ** 2 * logits[:, h]).sum())
            left = head(q, h, even(sq))
            sk = min(
                steps_of(k, h),
                key=lambda s: ((left @ head(k, h, even(s)).swapaxes(-1, -2) - exact) ** 2 * logits[:, h]).sum(),
            )
        rounded, exact = head(p, h, splitting(split)), p[:, h] @ v[:, h]
        sv = min(steps_of(v, h), key=lambda s: ((rounded @ head(v, h, even(s)) - exact) ** 2 * output[:, h]).sum())
        got = [float(getattr(products, part).scale[h]) for part in ("query", "key", "value")]
        assert got == pytest.approx([sq, sk, sv], rel=1e-5)


# ---- GPTQ -----------------------------------------------------------------------------------------------------------------


def obs_codes(weight: Array, hessian: Array, steps: Array, bits: int, damping: float, order: list[int]) -> Array:
    """Optimal brain surgeon, column by column: the inverse of the Hessian of the columns that are left, made anew each time."""
    w, codes = weight.copy(), np.zeros_like(weight)
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    for position, column in enumerate(order):
        left = order[position:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        codes[:, column] = np.clip(np.round(w[:, column] / steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = w[:, column] - codes[:, column] * steps
        w[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("by_hessian", [True, False])
def test_gptq_is_optimal_brain_surgery_column_by_column(bits: int, by_hessian: bool) -> None:
    x, weight = correlated(bits, 40, 10).double(), randn(bits + 2, 6, 10).double()
    hessian = x.T @ x
    steps = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    order = sorted(range(10), key=lambda c: -float(hessian[c, c])) if by_hessian else list(range(10))
    expected = obs_codes(weight.numpy(), hessian.numpy(), steps.numpy(), bits, 0.01, order)
    curvature = Curvature.of(hessian, 0.01, by_hessian)
    found, _ = gptq_codes(weight, curvature, WeightGrid(steps, torch.zeros(6), bits), block=4)
    np.testing.assert_array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding_on_correlated_inputs(seed: int, bits: int) -> None:
    x, weight = correlated(seed, 200, 24), randn(seed + 50, 16, 24)
    step = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    codes, _ = gptq_codes(weight, Curvature.of(x.T.double() @ x.double()), WeightGrid(step, torch.zeros(16), bits))
    plain = (weight / step[:, None]).round() * step[:, None]

    def error(w: torch.Tensor) -> float:
        return float(F.linear(x, w - weight).pow(2).sum())

    assert error(codes * step[:, None]) <= 0.8 * error(plain)
