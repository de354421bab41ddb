"""The dynamic focusing quantizer of attention probabilities: its function, gradients, calibration and checkpoints."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import TOWERS, fit, random_cache
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from optimum_regcache import RegCacheConfig
from optimum_regcache.calibration.calibrate import calibrate
from optimum_regcache.calibration.observers import FocusObserver
from optimum_regcache.config import AttentionConfig
from optimum_regcache.encoders.tower import PatchSpan
from optimum_regcache.hub.structure import check_ranges
from optimum_regcache.layers.attention import AttentionProducts, Operand, attention_products
from optimum_regcache.math.nonuniform import focused_unit, uniform_unit
from optimum_regcache.registers import prepare_tower, set_registers
from optimum_regcache.search.clipping import operand_range

fast = settings(max_examples=60, deadline=None)
UNIT = arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32))
DFQ = AttentionConfig(quantize=True, bits=4, probabilities="dfq")
CLIP = TOWERS["clip"]


@fast
@given(UNIT, st.integers(2, 8), st.floats(0, 0.4), st.floats(0.05, 0.6))
def test_values_are_levels_of_the_interval_and_the_nearest_ones(
    x: np.ndarray, bits: int, low: float, width: float
) -> None:
    values, last, high = torch.from_numpy(x), 2**bits - 1, low + width
    got = focused_unit(values, torch.tensor(low), torch.tensor(high), bits)
    codes = (got - low) / (width / last)
    torch.testing.assert_close(codes, codes.round(), atol=2e-3, rtol=0)
    assert bool(((codes >= -2e-3) & (codes <= last + 2e-3)).all())
    assert bool(((got - values.clamp(low, high)).abs() <= width / last / 2 * 1.001 + 1e-6).all())
    assert bool((got[values < low] == got.new_tensor(low)).all())
    torch.testing.assert_close(got[values > high], torch.full_like(got[values > high], high))
    order = values.argsort()
    assert bool((got[order].diff() >= 0).all())
    torch.testing.assert_close(focused_unit(got, torch.tensor(low), torch.tensor(high), bits), got)


@fast
@given(UNIT, st.integers(2, 8), st.floats(0.01, 1.0))
def test_from_zero_it_is_the_uniform_quantizer_bit_for_bit(x: np.ndarray, bits: int, high: float) -> None:
    values, end = torch.from_numpy(x), torch.tensor(high)
    assert torch.equal(focused_unit(values, torch.zeros(()), end, bits), uniform_unit(values, end, bits))
    one = torch.ones(())
    assert torch.equal(focused_unit(values, 0.0, one, bits), uniform_unit(values, one, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_the_numeric_ones_of_what_rounding_leaves(bits: int) -> None:
    """Rounding passed straight through means: the distance to the chosen code is a constant."""
    x = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = (0.2, 0.7)
    weights = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    place = ((x - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)
    rest = (place * (2**bits - 1)).round() / (2**bits - 1) - place

    def smooth(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * (((x - low) / (high - low)).clamp(0, 1) + rest)

    leaf = x.float().requires_grad_()
    low, high = (torch.tensor(e, requires_grad=True) for e in ends)
    value = focused_unit(leaf, low, high, bits)
    assert torch.equal(value.detach(), focused_unit(x.float(), low.detach(), high.detach(), bits))
    (value * weights.float()).sum().backward()

    def slope(low: float, high: float) -> float:
        change = smooth(x, ends[0] + low, ends[1] + high) - smooth(x, ends[0] - low, ends[1] - high)
        return float((change * weights).sum()) / 2e-6

    assert [float(low.grad), float(high.grad)] == pytest.approx([slope(1e-6, 0), slope(0, 1e-6)], abs=1e-3)
    inside = (x > ends[0]) & (x < ends[1])
    torch.testing.assert_close(leaf.grad, torch.where(inside, weights, 0.0).float(), atol=1e-5, rtol=1e-5)


def test_gradients_of_the_squared_error_point_where_the_error_falls() -> None:
    """Where values are dense and steps fine, clipping decides, and finite differences through real rounding agree."""
    x = torch.linspace(0, 1, 200_001)

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (focused_unit(x, low, high, 7) - x).pow(2).mean()

    for ends in ((0.1, 0.6), (0.05, 0.9)):
        low, high = (torch.tensor(e, requires_grad=True) for e in ends)
        error(low, high).backward()
        step = 0.01
        a, b = (torch.tensor(e) for e in ends)
        numeric = [float(error(a + step, b) - error(a - step, b)), float(error(a, b + step) - error(a, b - step))]
        assert [float(low.grad), float(high.grad)] == pytest.approx(
            [n / (2 * step) for n in numeric], rel=0.05, abs=1e-4
        )
        assert float(low.grad) > 0 > float(high.grad)


def test_outside_the_interval_each_end_has_the_whole_gradient() -> None:
    x = torch.tensor([0.0, 0.1, 0.95, 1.0], requires_grad=True)
    low, high = torch.tensor(0.2, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    value = focused_unit(x, low, high, 4)
    torch.testing.assert_close(value, torch.tensor([0.2, 0.2, 0.8, 0.8]))
    gradients = torch.autograd.grad(value @ torch.tensor([1.0, 2.0, 4.0, 8.0]), (x, low, high))
    assert [g.tolist() for g in gradients] == [[0.0] * 4, 3.0, 12.0]


def test_calibration_takes_the_least_error_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(20, 2, 33, 33, generator=generator) / 2 + 4 * torch.eye(33)).softmax(-1)
    v = torch.randn(20, 2, 33, 5, generator=generator)
    v[..., 0] += 4.0  # of what all values share, the many small probabilities carry most
    observer, halves = FocusObserver(DFQ, PatchSpan(0)), FocusObserver(DFQ, PatchSpan(0))
    valid = torch.ones(20, 33, dtype=torch.bool)
    valid[:, -2:] = False
    observer.update(a, v, valid)
    for part in (slice(0, 7), slice(7, 20)):
        halves.update(a[part], v[part], valid[part])
    ends = [2.0 ** (-i / 8) for i in range(64)]

    def loss(end: float) -> float:
        return float((((uniform_unit(a, torch.tensor(end), 4) - a) @ v)[:16, :, :-2] ** 2).sum())

    high, low = observer.qparams()
    assert float(high) == pytest.approx(min(ends, key=loss))
    assert 1.1 * float(high) < min(
        ends, key=lambda end: float((uniform_unit(a, torch.tensor(end), 4) - a).pow(2).sum())
    )
    assert float(low) == 0.0
    assert torch.equal(halves.qparams()[0], high)
    with pytest.raises(ValueError, match="The observer has seen no activation"):
        FocusObserver(DFQ, PatchSpan(0)).qparams()
    observer = FocusObserver(DFQ, PatchSpan(0))
    observer.update(a, torch.full_like(v, float("nan")), valid)
    with pytest.raises(ValueError, match="An activation is not finite"):
        observer.qparams()


def test_leading_tokens_count_as_much_as_all_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 33, 33, generator=generator) / 4
    logits[:, :, 0, 5] += 5.0  # the first token looks at one patch, the others look around
    a, v = logits.softmax(-1), torch.randn(4, 2, 33, 5, generator=generator) + 1.0
    found = []
    for lead in (0, 1):
        observer = FocusObserver(DFQ, PatchSpan(lead))
        observer.update(a, v, torch.ones(4, 33, dtype=torch.bool))
        found.append(float(observer.qparams()[0]))

    def loss(end: float) -> float:
        rows = ((uniform_unit(a, torch.tensor(end), 4) - a) @ v).pow(2).sum((0, 1, 3))
        return float(rows[0] + rows[1:].mean())

    assert found[1] == pytest.approx(min((2.0 ** (-i / 8) for i in range(64)), key=loss))
    assert found[1] > 1.5 * found[0]


def test_calibration_watches_image_tokens_and_leaves_nothing_behind() -> None:
    model = CLIP.build()
    prepare_tower(model)
    set_registers(model, random_cache((2, 3), registers=2, num_copies=3.0))
    before = CLIP.run(model)
    config = RegCacheConfig().replace(
        registers={"mode": "fixed", "blocks": (2, 3), "num_registers": 2}, attention=vars(DFQ)
    )
    found = calibrate(model, config, [CLIP.inputs(seed=2, batch=3), CLIP.inputs(seed=3, batch=3)])
    ends = [qparams for name, qparams in found.items() if name.endswith("products.probabilities")]
    assert len(ends) == 4
    assert all(0 == float(low) < float(high) <= 1 for high, low in ends)
    assert torch.equal(CLIP.run(model), before)
    assert not list(attention_products(model))


def test_padding_has_no_part_in_calibration() -> None:
    tiny = TOWERS["siglip2"]
    model = tiny.build()
    prepare_tower(model)
    config = RegCacheConfig().replace(attention=vars(DFQ))
    batch = tiny.inputs(seed=2, batch=4)
    noisy = dict(batch, pixel_values=batch["pixel_values"].clone())
    noisy["pixel_values"][~batch["pixel_attention_mask"].bool()] = 50.0
    first, second = (calibrate(model, config, [b]) for b in (batch, noisy))
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)


def fitted(**attention: Any) -> Any:
    config = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"}, attention=vars(DFQ) | attention)
    return fit(CLIP.build(), config, [CLIP.inputs(seed=2)])


def test_registers_stay_outside_of_the_interval() -> None:
    products = AttentionProducts(4, DFQ)
    for _, operand in products.operands():
        operand.bypass = operand.role != "probabilities"
    products.probabilities.set_qparams(torch.tensor(1e-3))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    rows = (torch.randn(4, 2, 8, generator=generator), torch.randn(4, 2, 8, generator=generator))
    _, weights = products(q, k, v, rows, None, 0.3)
    keys = torch.cat((rows[0].expand(2, -1, -1, -1), k), 2)
    exact = (q @ keys.transpose(-1, -2) * 0.3).softmax(-1)
    torch.testing.assert_close(weights[..., :2], exact[..., :2])
    assert float(weights[..., 2:].max()) == pytest.approx(1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = fitted()
    first = next(p for _, p in attention_products(model)).probabilities
    first.set_qparams(first.scale, torch.full((1,), 0.00123456))
    model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    other = next(p for _, p in attention_products(opened)).probabilities
    assert (other.scale.dtype, other.lower.dtype) == (torch.float32, torch.float32)
    assert torch.equal(first.lower, other.lower)
    assert torch.equal(first.scale, other.scale)
    if dtype == torch.float32:
        assert torch.equal(CLIP.run(opened), CLIP.run(model))
    assert other.to(torch.float16).lower.dtype == torch.float32


def test_a_checkpoint_without_an_end_is_refused(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("probabilities.lower"))]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds 3 'lower' tensors, its quantization config needs 4"):
        AutoModel.from_pretrained(tmp_path)


def test_a_damaged_interval_is_refused() -> None:
    model = fitted()
    name, products = next(iter(attention_products(model)))
    check_ranges(model)
    for bad in (-0.1, float(products.probabilities.scale), float("nan")):
        products.probabilities.lower.fill_(bad)
        with pytest.raises(ValueError, match=rf"{name}.probabilities.lower lies outside 0 to the upper end"):
            check_ranges(model)


def test_an_interval_that_is_none_is_refused() -> None:
    operand = Operand("probabilities", 1, DFQ)
    for low in (0.5, 0.7, -0.1, float("nan")):
        with pytest.raises(
            ValueError, match="The lower end of probabilities must be at least 0 and below the upper one"
        ):
            operand.set_qparams(torch.tensor(0.5), torch.tensor(low))
    operand.set_qparams(torch.tensor(0.5), torch.tensor(0.25))
    low, high = operand_range(operand)
    assert (float(low), float(high)) == pytest.approx((0.25 - 0.25 / 30, 0.5 * (1 + 0.5 / 16)))
    operand.set_qparams(torch.tensor(0.5))
    assert [float(end) for end in operand_range(operand)] == pytest.approx([0.0, 0.5 * (1 + 0.5 / 16)])
    uniform = Operand("probabilities", 1, AttentionConfig(quantize=True, bits=4))
    assert uniform.lower is None
    uniform.set_qparams(torch.tensor(0.5))
    x = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(operand(x), uniform(x))
