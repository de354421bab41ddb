"""Quantization arithmetic against PyTorch's own fake-quantization operators, NumPy and Python integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optimum_regcache.math import uniform

BITS = st.integers(2, 8)
SYMMETRIC = st.booleans()
FINITE = st.floats(-(2.0**40), 2.0**40, width=32)
fast = settings(max_examples=60, deadline=None)


def matrices(elements: st.SearchStrategy[float] = FINITE) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=elements)


def own_qparams(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return uniform.choose_qparams(x.amin(), x.amax(), bits, symmetric)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges_hold_two_to_the_bits_codes(bits: int) -> None:
    assert uniform.code_range(bits, True) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert uniform.code_range(bits, False) == (0, 2**bits - 1)


@pytest.mark.parametrize(
    ("low", "high", "bits", "symmetric", "scale", "zero"),
    [
        (-1.27, 0.5, 8, True, 0.01, 0),
        (-0.5, 1.27, 8, True, 0.01, 0),
        (-0.7, 0.7, 4, True, 0.1, 0),
        (-1.0, 1.55, 8, False, 0.01, 100),
        (-3.0, 12.0, 4, False, 1.0, 3),
        (2.0, 5.1, 8, False, 0.02, 0),  # widened to [0, 5.1]
        (-5.1, -2.0, 8, False, 0.02, 255),  # widened to [-5.1, 0]
        (2.0, 5.08, 8, True, 0.04, 0),
        (0.0, 0.0, 8, True, 1.0, 0),
        (0.0, 0.0, 8, False, 1.0, 0),
    ],
)
def test_choose_qparams_by_hand(low: float, high: float, bits: int, symmetric: bool, scale: float, zero: int) -> None:
    got_scale, got_zero = uniform.choose_qparams(torch.tensor(low), torch.tensor(high), bits, symmetric)
    assert float(got_scale) == pytest.approx(scale, rel=1e-6)
    assert int(got_zero) == zero
    assert (got_scale.dtype, got_zero.dtype) == (torch.float32, torch.int32)


@fast
@given(matrices(), BITS, SYMMETRIC)
def test_choose_qparams_is_elementwise(x: np.ndarray, bits: int, symmetric: bool) -> None:
    low, high = torch.from_numpy(x), torch.from_numpy(x).flip(0).abs()
    low = torch.minimum(low, high)
    scale, zero = uniform.choose_qparams(low, high, bits, symmetric)
    assert scale.shape == zero.shape == low.shape
    assert bool((scale > 0).all())
    for index in np.ndindex(x.shape):
        one = uniform.choose_qparams(low[index], high[index], bits, symmetric)
        assert (scale[index], zero[index]) == one


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (-1.0, float("nan"))])
def test_a_range_that_is_no_number_gives_a_scale_that_is_no_number(low: float, high: float, symmetric: bool) -> None:
    """A scale of 1 would hide broken activations or weights; nan is refused by whoever stores it."""
    scale, _ = uniform.choose_qparams(torch.tensor(low), torch.tensor(high), 8, symmetric)
    assert math.isnan(scale)


@fast
@given(matrices(), BITS, SYMMETRIC)
def test_round_trip_is_within_half_a_step_inside_the_range(x: np.ndarray, bits: int, symmetric: bool) -> None:
    values = torch.from_numpy(x)
    scale, zero = own_qparams(values, bits, symmetric)
    rebuilt = uniform.fake_quantize(values, scale, zero, bits, symmetric)
    error = (rebuilt.double() - values.double()).abs()
    slack = values.double().abs() * 2**-22  # rounding of x * (1 / scale) and of code * scale in float32
    assert bool((error <= scale.double() / 2 + slack).all())


@fast
@given(matrices(), BITS, SYMMETRIC)
def test_fake_quantize_is_idempotent_and_keeps_zero(x: np.ndarray, bits: int, symmetric: bool) -> None:
    values = torch.from_numpy(x)
    scale, zero = own_qparams(values, bits, symmetric)
    once = uniform.fake_quantize(values, scale, zero, bits, symmetric)
    assert torch.equal(uniform.fake_quantize(once, scale, zero, bits, symmetric), once)
    assert torch.equal(
        uniform.quantize(once, scale, zero, bits, symmetric), uniform.quantize(values, scale, zero, bits, symmetric)
    )
    assert float(uniform.fake_quantize(torch.zeros(()), scale, zero, bits, symmetric)) == 0.0


@fast
@given(
    matrices(st.floats(allow_nan=False, width=32)),
    st.floats(2.0**-40, 2.0**40, width=32),
    st.integers(0, 255),
    BITS,
    SYMMETRIC,
)
def test_codes_are_whole_numbers_in_range(x: np.ndarray, scale: float, zero: int, bits: int, symmetric: bool) -> None:
    lowest, highest = uniform.code_range(bits, symmetric)
    zero_point = torch.tensor(0 if symmetric else zero % 2**bits)
    codes = uniform.quantize(torch.from_numpy(x), torch.tensor(scale), zero_point, bits, symmetric)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= lowest) & (codes <= highest)).all())


@fast
@given(matrices(st.floats(-300, 300, width=32)), st.floats(2.0**-10, 8, width=32), BITS, SYMMETRIC, st.data())
def test_per_tensor_equals_torch(x: np.ndarray, scale: float, bits: int, symmetric: bool, data: st.DataObject) -> None:
    lowest, highest = uniform.code_range(bits, symmetric)
    zero = 0 if symmetric else data.draw(st.integers(lowest, highest))
    values = torch.from_numpy(x)
    got = uniform.fake_quantize(values, torch.tensor(scale), torch.tensor(zero), bits, symmetric)
    assert torch.equal(got, torch.fake_quantize_per_tensor_affine(values, scale, zero, lowest, highest))


@fast
@given(matrices(st.floats(-300, 300, width=32)), BITS, SYMMETRIC)
def test_per_row_equals_torch(x: np.ndarray, bits: int, symmetric: bool) -> None:
    values = torch.from_numpy(x)
    scale, zero = uniform.choose_qparams(values.amin(1), values.amax(1), bits, symmetric)
    got = uniform.fake_quantize(values, scale[:, None], zero[:, None], bits, symmetric)
    expected = torch.fake_quantize_per_channel_affine(values, scale, zero, 0, *uniform.code_range(bits, symmetric))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scale", [0.0237, 0.1, 1 / 3, 0.7, 1.3])
def test_values_next_to_a_rounding_boundary_get_torchs_codes(scale: float) -> None:
    """Here multiplying by the inverse scale, as integer kernels do, differs from dividing by the scale."""
    boundaries = (torch.arange(-127, 127) + 0.5) * scale
    infinity = torch.tensor(float("inf"))
    values = torch.cat([boundaries, boundaries.nextafter(infinity), boundaries.nextafter(-infinity)])
    got = uniform.fake_quantize(values, torch.tensor(scale), torch.tensor(0), 8, True)
    assert torch.equal(got, torch.fake_quantize_per_tensor_affine(values, scale, 0, -128, 127))


def test_ties_round_to_even_before_the_zero_point_is_added() -> None:
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    codes = uniform.quantize(ties, torch.tensor(1.0), torch.tensor(11), 8, False)
    assert codes.tolist() == [9, 9, 11, 11, 13, 13]
    assert uniform.dequantize(codes, torch.tensor(0.5), torch.tensor(11)).tolist() == [-1, -1, 0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype)
    scale, zero = torch.tensor(0.0237), torch.tensor(0)
    got = uniform.fake_quantize(x, scale, zero, 8, True)
    assert got.dtype == torch.float32
    assert torch.equal(got, uniform.fake_quantize(x.float(), scale, zero, 8, True))


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_qparams_shapes_and_values(symmetric: bool) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    scale, zero = uniform.dynamic_qparams(x, 8, symmetric, "per_token")
    assert scale.shape == zero.shape == (2, 5, 1)
    for image in range(2):
        for token in range(5):
            assert (scale[image, token, 0], zero[image, token, 0]) == own_qparams(x[image, token], 8, symmetric)
    scale, zero = uniform.dynamic_qparams(x, 8, symmetric, "per_tensor")
    assert scale.shape == zero.shape == ()
    assert (scale, zero) == own_qparams(x, 8, symmetric)


@fast
@given(matrices(), BITS, SYMMETRIC, st.randoms(use_true_random=False))
def test_dynamic_qparams_ignore_the_order_of_features_and_follow_that_of_tokens(
    x: np.ndarray, bits: int, symmetric: bool, random: object
) -> None:
    rows, columns = list(range(x.shape[0])), list(range(x.shape[1]))
    random.shuffle(rows)  # type: ignore[attr-defined]
    random.shuffle(columns)  # type: ignore[attr-defined]
    values = torch.from_numpy(x)
    shuffled = values[rows][:, columns]
    for got, expected in zip(
        uniform.dynamic_qparams(shuffled, bits, symmetric, "per_token"),
        uniform.dynamic_qparams(values, bits, symmetric, "per_token"),
        strict=True,
    ):
        assert torch.equal(got, expected[rows])
    assert uniform.dynamic_qparams(shuffled, bits, symmetric, "per_tensor") == uniform.dynamic_qparams(
        values, bits, symmetric, "per_tensor"
    )


@fast
@given(matrices(), BITS, st.sampled_from(["per_channel", "per_tensor"]), st.randoms(use_true_random=False))
def test_minmax_weight_scales(x: np.ndarray, bits: int, granularity: str, random: object) -> None:
    weight = torch.from_numpy(x)
    scale = uniform.weight_qparams(weight, bits, granularity, "minmax")[0]
    peak = np.abs(x).max(1) if granularity == "per_channel" else np.abs(x).max(keepdims=True).reshape(1)
    expected = peak / np.float32(2 ** (bits - 1) - 1)
    expected[expected <= np.finfo(np.float32).tiny] = 1
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy(), expected)
    columns = list(range(x.shape[1]))
    random.shuffle(columns)  # type: ignore[attr-defined]
    assert torch.equal(uniform.weight_qparams(weight[:, columns], bits, granularity, "minmax")[0], scale)


def brute_force_error(row: np.ndarray, scale: float, bits: int) -> float:
    codes = np.clip(np.rint(row / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(((codes * scale - row) ** 2).sum())


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_weight_scales_against_brute_force(bits: int, granularity: str) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits)) ** 3  # heavy tails
    got = uniform.weight_qparams(weight, bits, granularity, "mse")[0]
    minmax = uniform.weight_qparams(weight, bits, granularity, "minmax")[0]
    rows = weight.double().numpy() if granularity == "per_channel" else weight.double().numpy().reshape(1, -1)
    assert got.shape == (len(rows),)
    for row, scale, start in zip(rows, got.double(), minmax.double(), strict=True):
        errors = [brute_force_error(row, float(start) * step / 100, bits) for step in range(21, 101)]
        assert brute_force_error(row, float(scale), bits) == pytest.approx(min(errors), rel=1e-4)
        assert 0.209 < float(scale / start) <= 1.0
    if bits < 8:
        assert bool((got < minmax).any())  # clipping tails pays off at few bits


def test_mse_treats_each_row_on_its_own_and_leaves_exact_rows_alone() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) ** 3
    scale = uniform.weight_qparams(weight, 4, "per_channel", "mse")[0]
    order = [3, 0, 4, 1, 2]
    assert torch.equal(uniform.weight_qparams(weight[order], 4, "per_channel", "mse")[0], scale[order])
    exact = torch.arange(-7, 8).float().reshape(1, -1) * 0.25
    assert uniform.weight_qparams(exact, 4, "per_channel", "mse")[0].tolist() == [0.25]


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_weight_row_of_zeros_gets_a_usable_scale(observer: str) -> None:
    weight = torch.zeros(2, 3)
    weight[1] = 1.0
    scale = uniform.weight_qparams(weight, 8, "per_channel", observer)[0]
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert torch.equal(uniform.fake_quantize(weight, scale[:, None], torch.zeros(2, 1), 8, True)[0], weight[0])


def python_pack(row: list[int], bits: int) -> list[int]:
    """Lowest bits first, ``32 // bits`` codes per word, as signed 32-bit numbers."""
    per_word, words = 32 // bits, []
    for start in range(0, len(row), per_word):
        word = sum((code % 2**bits) << (bits * i) for i, code in enumerate(row[start : start + per_word]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(BITS)
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    lowest, highest = uniform.code_range(bits, True)
    return bits, torch.from_numpy(draw(arrays(np.int8, shape, elements=st.integers(lowest, highest))))


@fast
@given(code_matrices(), st.sampled_from([torch.int8, torch.float32, torch.int64]))
def test_packing_is_lossless_and_has_the_documented_layout(case: tuple[int, torch.Tensor], dtype: torch.dtype) -> None:
    bits, codes = case
    words = uniform.pack_codes(codes.to(dtype), bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [python_pack(row, bits) for row in codes.tolist()]
    unpacked = uniform.unpack_codes(words, bits, codes.shape[1])
    assert unpacked.dtype == torch.int8
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


def test_packed_bytes_by_hand() -> None:
    assert [uniform.codes_per_word(bits) for bits in range(2, 9)] == [16, 10, 8, 6, 5, 4, 4]
    assert uniform.pack_codes(torch.tensor([[1, -1, 0, 2]]), 8).tolist() == [[0x0200FF01]]
    assert uniform.pack_codes(torch.tensor([[1, -1, -8, 7]]), 4).tolist() == [[0x78F1]]
    assert uniform.pack_codes(torch.full((1, 16), -1), 2).tolist() == [[-1]]


@pytest.mark.parametrize("columns", [8, 17])
def test_unpacking_the_wrong_number_of_words(columns: int) -> None:
    words = uniform.pack_codes(torch.zeros(2, 9), 4)
    expected = (
        rf"Packed weight has 2 words per row, but {columns} columns of 4-bit codes need {-(-columns // 8)}\. "
        r"The checkpoint does not belong to this model or bit width\."
    )
    with pytest.raises(ValueError, match=expected):
        uniform.unpack_codes(words, 4, columns)
