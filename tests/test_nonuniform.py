"""Property tests of the twin and logarithmic quantizers, asymmetric weights and the percentile range."""
# pyright: reportOptionalOperand=false

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels.onednn import machine_reason
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.math import uniform
from optimum_regcache.math.nonuniform import activation_minimum, log_quantize, twin_signed, twin_unit, uniform_unit

fast = settings(max_examples=60, deadline=None)
BITS = st.integers(2, 8)
UNIT = arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32))
SIGNED = arrays(np.float32, st.integers(1, 40), elements=st.floats(-0.15625, 8, width=32))


@fast
@given(SIGNED, BITS, st.floats(0.001, 0.5))
def test_twin_after_gelu_is_within_half_a_step_on_each_side(x: np.ndarray, bits: int, scale: float) -> None:
    values, half = torch.from_numpy(x), 2 ** (bits - 1)
    step, negative = torch.tensor(scale), torch.tensor(0.17 / half)
    got = twin_signed(values, step, negative, bits)
    inside = values <= scale * (half - 1)
    positive = values >= 0
    assert bool(((got - values).abs()[positive & inside] <= scale / 2 * 1.001).all())
    assert bool((got[positive & ~inside] <= scale * (half - 1) * 1.001).all())  # clipped
    assert bool(((got - values).abs()[~positive] <= float(negative) / 2 * 1.001 + 1e-7).all())
    assert bool((got[positive] >= 0).all() and (got[~positive] <= 0).all())  # disjoint: no side adds to the other
    torch.testing.assert_close(twin_signed(got, step, negative, bits), got)


@fast
@given(UNIT, BITS, st.integers(0, 12))
def test_twin_probabilities_have_no_offset(x: np.ndarray, bits: int, power: int) -> None:
    values, half, split = torch.from_numpy(x), 2 ** (bits - 1), 2.0**-power
    got = twin_unit(values, torch.tensor(split), bits)
    fine, coarse = split / half, 1 / half
    low = values < split
    assert bool(((got - values).abs()[low] <= fine * 1.001).all())  # half a step, one at the upper end of the range
    assert bool(((got - values).abs()[~low] <= coarse * 1.001).all())
    assert float(twin_unit(torch.zeros(1), torch.tensor(split), bits)) == 0.0


@fast
@given(UNIT, BITS, st.booleans())
def test_logarithmic_codes(x: np.ndarray, bits: int, half_steps: bool) -> None:
    values = torch.from_numpy(x)
    got = log_quantize(values, torch.tensor(1.0), bits, half_steps=half_steps)
    base = math.sqrt(2) if half_steps else 2.0
    smallest = base ** -(2**bits - 1)
    for value, rebuilt in zip(values.tolist(), got.tolist(), strict=True):
        if rebuilt == 0.0:
            assert value < smallest * 1.001
            continue
        assert value / rebuilt <= math.sqrt(base) * 1.001
        assert rebuilt / value <= math.sqrt(base) * 1.001
        exponent = -math.log2(rebuilt) * (2 if half_steps else 1)
        assert exponent == pytest.approx(round(exponent), abs=1e-3)
        if round(exponent) % 2 == 0 or not half_steps:
            assert math.frexp(rebuilt)[0] == 0.5  # even codes are exact powers of two
    assert float(log_quantize(torch.zeros(1), torch.tensor(1.0), bits, half_steps=half_steps)) == 0.0


@fast
@given(UNIT, BITS, st.floats(0.05, 1.0))
def test_uniform_probabilities(x: np.ndarray, bits: int, top: float) -> None:
    values = torch.from_numpy(x)
    got = uniform_unit(values, torch.tensor(top), bits)
    step = top / (2**bits - 1)
    assert bool(((got - values.clamp(max=top)).abs() <= step / 2 * 1.01 + 1e-7).all())


def test_minima_of_the_activation_functions() -> None:
    assert activation_minimum("gelu") == pytest.approx(-0.16997124254703522, abs=1e-7)
    assert activation_minimum("quick_gelu") == pytest.approx(-0.1636, abs=1e-4)
    assert activation_minimum("gelu_pytorch_tanh") == pytest.approx(-0.17004, abs=1e-4)
    with pytest.raises(ValueError, match="'relu' has no negative minimum"):
        activation_minimum("relu")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_percentile_range_against_numpy(bits: int, symmetric: bool) -> None:
    rows = torch.randn(5, 4000, generator=torch.Generator().manual_seed(bits)) ** 3 + 0.3
    low, high = uniform.percentile_mse_range(rows, bits, symmetric)
    for row, a, b in zip(rows.double().numpy(), low.tolist(), high.tolist(), strict=True):
        errors = {}
        for p in (0.999, 0.9999, 0.99999):
            lo, hi = np.quantile(row, [1 - p, p])
            if symmetric:
                step = max(-lo, hi) / (2 ** (bits - 1) - 1)
                rebuilt = np.clip(np.rint(row / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
            else:
                step = (hi - lo) / (2**bits - 1)
                zero = np.rint(-lo / step)
                rebuilt = (np.clip(np.rint(row / step) + zero, 0, 2**bits - 1) - zero) * step
            errors[p] = (((rebuilt - row) ** 2).mean(), lo, hi)
        _, lo, hi = min(errors.values())
        assert a == pytest.approx(lo, rel=1e-4)
        assert b == pytest.approx(hi, rel=1e-4)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile_mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_weights_on_every_backend(bits: int, observer: str, granularity: str) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(40, 12)
    with torch.no_grad():
        linear.weight.copy_(torch.rand(12, 40, generator=generator) - 0.2)  # far from symmetric
    x = torch.randn(3, 7, 40, generator=generator)
    weights = WeightsConfig(bits, granularity, observer, symmetric=False)
    outputs = {}
    for mode in (ActivationsConfig(symmetric=False), ActivationsConfig(mode="dynamic", granularity="per_token")):
        layer = QuantLinear.from_float(linear, weights, mode)
        assert layer.weight_zero_point is not None
        assert bool((layer.weight_zero_point != 0).any())
        if mode.mode == "static":
            layer.set_input_qparams(*uniform.choose_qparams(x.amin(), x.amax(), 8, False))
        exact = nn.functional.linear(layer.rounded_input(x).double(), layer.dequantized_weight().double())
        exact = (exact + linear.bias.double()).float()
        for backend in ["simulated", "reference", "int_mm"] + (["onednn"] if machine_reason() is None else []):
            layer.backend = backend
            layer.reset_runtime()
            outputs[backend] = layer(x)
            torch.testing.assert_close(outputs[backend], exact, atol=1e-4, rtol=1e-4)
    symmetric = QuantLinear.from_float(linear, WeightsConfig(bits, granularity, "minmax"), ActivationsConfig())
    error = (layer.dequantized_weight() - linear.weight).norm()
    assert error < (symmetric.dequantized_weight() - linear.weight).norm()


def test_16_bit_inputs_are_simulated_only() -> None:
    linear = nn.Linear(24, 8)
    layer = QuantLinear.from_float(linear, WeightsConfig(8), ActivationsConfig(bits=16))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    layer.set_input_qparams(*uniform.choose_qparams(x.amin(), x.amax(), 16, True))
    assert (layer.rounded_input(x) - x).abs().max() <= layer.input_scale / 2 * 1.01
    layer.backend = "reference"
    with pytest.raises(ValueError, match="16-bit inputs are simulated"):
        layer(x)
