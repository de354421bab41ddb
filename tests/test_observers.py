"""Observers of static activations against NumPy quantiles and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optimum_regcache.calibration.observers import (
    OBSERVERS,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileMSEObserver,
    PercentileObserver,
    make_observer,
)
from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.math import uniform

ORDER_FREE = ["minmax", "percentile", "mse"]
BINS = 16384
fast = settings(max_examples=40, deadline=None)


def observed(name: str, batches: list[torch.Tensor], **config: object) -> Observer:
    observer = make_observer(ActivationsConfig(observer=name, **config))  # type: ignore[arg-type]
    for batch in batches:
        observer.update(batch)
    return observer


def bin_width(x: np.ndarray) -> float:
    """The histogram spans the next power of two on both sides of zero."""
    return 2 * 2.0 ** np.frexp(np.abs(x).max())[1] / BINS


def heavy_tailed(seed: int, shape: tuple[int, ...] = (64, 50), shift: float = 0.0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x**3 + shift


@st.composite
def batch_lists(draw: st.DrawFn) -> list[torch.Tensor]:
    """Batches whose magnitudes differ by many powers of two; zeros and exact powers of two included."""
    ordinary = st.floats(-4, 4, width=32).map(lambda v: v if abs(v) > 2.0**-60 else 0.0)
    values = ordinary | st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 2.0**-14, -(2.0**-20)])
    batches = []
    for _ in range(draw(st.integers(1, 4))):
        exponent = draw(st.integers(-12, 12))
        batch = draw(arrays(np.float32, st.integers(1, 12), elements=values))
        batches.append(torch.from_numpy(batch) * 2.0**exponent)
    return batches


def test_every_configured_name_has_its_observer() -> None:
    kinds = {"minmax": MinMaxObserver, "moving_average": MovingAverageObserver}
    kinds |= {"percentile": PercentileObserver, "mse": MSEObserver, "percentile_mse": PercentileMSEObserver}
    assert kinds == OBSERVERS
    for name, kind in kinds.items():
        assert type(make_observer(ActivationsConfig(observer=name))) is kind


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_observed_is_an_error_not_a_default(name: str) -> None:
    observer = make_observer(ActivationsConfig(observer=name))
    expected = r"The observer has seen no activation\. Run at least one calibration batch through the model\."
    with pytest.raises(ValueError, match=expected):
        observer.range()
    with pytest.raises(ValueError, match=expected):
        observer.qparams()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", OBSERVERS)
def test_qparams_are_those_of_the_range(name: str, symmetric: bool) -> None:
    observer = observed(name, [heavy_tailed(0), heavy_tailed(1)], bits=6, symmetric=symmetric)
    low, high = observer.range()
    scale, zero = observer.qparams()
    assert low.shape == high.shape == scale.shape == zero.shape == ()
    assert (low.dtype, high.dtype, scale.dtype, zero.dtype) == (torch.float32,) * 3 + (torch.int32,)
    assert (scale, zero) == uniform.choose_qparams(low, high, 6, symmetric)


@pytest.mark.parametrize("name", OBSERVERS)
def test_input_is_neither_changed_nor_kept(name: str) -> None:
    x = heavy_tailed(0)
    before = x.clone()
    observer = observed(name, [x])
    assert torch.equal(x, before)
    expected = observer.qparams()
    x.fill_(1e6)
    assert observer.qparams() == expected


@pytest.mark.parametrize("name", OBSERVERS)
def test_narrow_floats_count_as_their_float32_values(name: str) -> None:
    x = heavy_tailed(0).to(torch.bfloat16)
    assert observed(name, [x]).qparams() == observed(name, [x.float()]).qparams()


@fast
@given(batch_lists(), st.sampled_from(ORDER_FREE), st.booleans(), st.randoms(use_true_random=False))
def test_order_and_size_of_batches_do_not_matter(
    batches: list[torch.Tensor], name: str, symmetric: bool, random: object
) -> None:
    expected = observed(name, batches, symmetric=symmetric, percentile=80.0).qparams()
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert observed(name, shuffled, symmetric=symmetric, percentile=80.0).qparams() == expected
    everything = torch.cat(batches)
    order = list(range(len(everything)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert observed(name, [everything[order]], symmetric=symmetric, percentile=80.0).qparams() == expected


@fast
@given(batch_lists())
def test_the_histogram_that_grew_is_the_one_of_the_final_range(batches: list[torch.Tensor]) -> None:
    assume(any(bool(batch.any()) for batch in batches))
    observer = observed("percentile", batches)
    assert isinstance(observer, PercentileObserver)
    values = torch.cat(batches).double().numpy()
    radius = observer._radius
    assert np.frexp(radius)[0] == 0.5  # a power of two
    assert np.abs(values).max() <= radius <= 2 * np.abs(values).max()
    expected = np.bincount(np.floor(values / (2 * radius / BINS)).astype(int) + BINS // 2, minlength=BINS)
    np.testing.assert_array_equal(observer._counts.numpy(), expected)


@pytest.mark.parametrize("peak", [1.0, 1024.0, 2.0**-30])
@pytest.mark.parametrize("above", [0, 1, 2])
@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_peaks_at_and_just_above_a_power_of_two_are_counted(name: str, peak: float, above: int) -> None:
    value = np.float32(peak)
    for _ in range(above):
        value = np.nextafter(value, np.float32(np.inf))
    observer = observed(name, [torch.tensor([float(value), -float(value)])], percentile=100.0)
    low, high = observer.range()
    assert float(high) == pytest.approx(float(value), rel=0.02)
    assert float(low) == pytest.approx(-float(value), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_site_that_is_always_zero_has_scale_one(name: str, symmetric: bool) -> None:
    scale, zero = observed(name, [torch.zeros(3), torch.zeros(5)], symmetric=symmetric).qparams()
    assert (float(scale), int(zero)) == (1.0, 0)


@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_zeros_seen_before_anything_else_are_counted(name: str) -> None:
    x = heavy_tailed(0, (100,)).abs()
    first = observed(name, [torch.zeros(300), x], percentile=75.0, symmetric=False)
    last = observed(name, [x, torch.zeros(300)], percentile=75.0, symmetric=False)
    assert first.range() == last.range()
    if name == "percentile":  # three quarters of all values are the zeros
        assert float(first.range()[1]) < 0.01


def test_minmax_is_the_exact_range() -> None:
    batches = [heavy_tailed(seed, shift=0.3) for seed in range(3)]
    low, high = observed("minmax", batches).range()
    everything = torch.cat(batches)
    assert (low, high) == (everything.min(), everything.max())


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.9])
def test_moving_average_formula(momentum: float) -> None:
    batches = [heavy_tailed(seed) for seed in range(4)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * float(batch.min())
        high = momentum * high + (1 - momentum) * float(batch.max())
    got_low, got_high = observed("moving_average", batches, momentum=momentum).range()
    assert float(got_low) == pytest.approx(low, rel=1e-6)
    assert float(got_high) == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("shift", [0.0, 1.7, -40.0])
def test_percentile_is_numpys_within_one_bin(percentile: float, shift: float) -> None:
    batches = [heavy_tailed(seed, shift=shift) for seed in range(3)]
    values = torch.cat(batches).double().numpy().ravel()
    width = bin_width(values)
    low, high = observed("percentile", batches, percentile=percentile).range()
    expected = np.percentile(np.abs(values), percentile, method="inverted_cdf")
    assert float(high) == -float(low)
    assert expected <= float(high) <= expected + width * 1.001
    low, high = observed("percentile", batches, percentile=percentile, symmetric=False).range()
    expected_high = np.percentile(values, percentile, method="inverted_cdf")
    expected_low = -np.percentile(-values, percentile, method="inverted_cdf")
    assert expected_high <= float(high) <= expected_high + width * 1.001
    assert expected_low - width * 1.001 <= float(low) <= expected_low


def test_percentile_cuts_the_outlier_token_that_minmax_keeps() -> None:
    x = torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3, 5] = 500.0
    assert float(observed("minmax", [x]).range()[1]) == 500.0
    assert float(observed("percentile", [x], percentile=99.9).range()[1]) < 5.0


def squared_error(values: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Quantization error of the range in float64, written independently of the package."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale, zero = max(-low, high) / (2 ** (bits - 1) - 1), 0
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        scale, lowest, highest = (high - low) / (2**bits - 1), 0, 2**bits - 1
        zero = np.clip(np.rint(-low / scale), lowest, highest)
    codes = np.clip(np.rint(values / scale) + zero, lowest, highest)
    return float((((codes - zero) * scale - values) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_mse_matches_brute_force_over_shrink_factors(bits: int, symmetric: bool) -> None:
    batches = [heavy_tailed(seed, shift=0.5) for seed in range(3)]
    values = torch.cat(batches).double().numpy().ravel()
    full_low, full_high = float(values.min()), float(values.max())
    errors = [squared_error(values, full_low * k / 100, full_high * k / 100, bits, symmetric) for k in range(1, 101)]
    low, high = (float(end) for end in observed("mse", batches, bits=bits, symmetric=symmetric).range())
    chosen = squared_error(values, low, high, bits, symmetric)
    assert chosen <= min(errors) * 1.01
    assert chosen <= errors[-1]
    if bits < 8:
        assert high < 0.9 * full_high  # tails are worth clipping


def test_mse_keeps_the_full_range_of_data_without_tails() -> None:
    x = torch.linspace(-1, 1, 20001)
    low, high = observed("mse", [x]).range()
    assert float(high) == pytest.approx(1.0, abs=0.02)
    assert float(low) == pytest.approx(-1.0, abs=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OBSERVERS)
def test_activations_that_are_not_finite_never_become_a_stored_scale(name: str, bad: float) -> None:
    config = ActivationsConfig(observer=name)
    layer = QuantLinear(2, 2, False, WeightsConfig(), config)
    with pytest.raises((ValueError, RuntimeError), match="finite"):
        layer.set_input_qparams(*observed(name, [torch.tensor([1.0, bad])]).qparams())
