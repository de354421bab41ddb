"""QuantLinear: what it computes, what it stores, and what must not change it."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels import BACKENDS, onednn
from optimum_regcache.layers.linear import QuantLinear, quant_linears, set_backend
from optimum_regcache.math import uniform

IN, OUT = 37, 11
STATIC, DYNAMIC = ActivationsConfig(), ActivationsConfig(mode="dynamic", granularity="per_token")
REASON = onednn.machine_reason()
needs_int8 = pytest.mark.skipif(REASON is not None, reason=f"no int8 kernel on this machine: {REASON}")
backends = pytest.mark.parametrize(
    "backend", ["auto", "simulated", "reference", "int_mm", pytest.param("onednn", marks=needs_int8)]
)
CONFIGS = [
    (
        WeightsConfig(bits=bits, granularity=granularity, observer=observer),
        ActivationsConfig(bits=bits, mode=mode, granularity=tokens, symmetric=symmetric),
    )
    for (bits, granularity, observer), (mode, tokens), symmetric in itertools.product(
        [(8, "per_channel", "minmax"), (6, "per_tensor", "mse"), (4, "per_channel", "mse")],
        [("static", "per_tensor"), ("dynamic", "per_tensor"), ("dynamic", "per_token")],
        [True, False],
    )
]


def float_linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 2 + 0.5).to(dtype)


def calibrated(module: QuantLinear, x: torch.Tensor) -> QuantLinear:
    if module.activations.mode == "static":
        a = module.activations
        module.set_input_qparams(*uniform.choose_qparams(x.amin(), x.amax(), a.bits, a.symmetric))
    return module


def quantized(
    weights: WeightsConfig | None = None,
    activations: ActivationsConfig = STATIC,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> QuantLinear:
    module = QuantLinear.from_float(float_linear(bias, dtype), weights or WeightsConfig(), activations)
    return calibrated(module, sample(2, 5, IN))


def fake_input(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    a = module.activations
    if a.mode == "static":
        assert module.input_scale is not None
        assert module.input_zero_point is not None
        scale, zero = module.input_scale, module.input_zero_point
    else:
        scale, zero = uniform.dynamic_qparams(x, a.bits, a.symmetric, a.granularity)
    return uniform.fake_quantize(x, scale, zero, a.bits, a.symmetric)


@backends
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_the_float_layer_on_fake_quantized_operands(backend: str, bias: bool, dtype: torch.dtype) -> None:
    x = sample(2, 5, IN, dtype=dtype)
    for weights, activations in CONFIGS:
        if backend == "onednn" and activations.granularity == "per_token" and not activations.symmetric:
            continue
        module = calibrated(QuantLinear.from_float(float_linear(bias, dtype), weights, activations), x)
        set_backend(module, backend)
        y = module(x)
        assert y.dtype == dtype
        b = None if module.bias is None else module.bias.float()
        expected = F.linear(fake_input(module, x), module.dequantized_weight(), b)
        rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.float(), expected, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [8, 6, 4, 3])
def test_dequantized_weight_is_torchs_fake_quantization(bits: int, granularity: str, observer: str) -> None:
    linear = float_linear()
    module = QuantLinear.from_float(linear, WeightsConfig(bits, granularity, observer), DYNAMIC)
    scale = module.weight_scale.expand(OUT)
    assert module.weight_scale.shape == ((OUT,) if granularity == "per_channel" else (1,))
    lowest, highest = uniform.code_range(bits, True)
    zero = torch.zeros(OUT, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(linear.weight.detach(), scale, zero, 0, lowest, highest)
    assert torch.equal(module.dequantized_weight(), expected)
    codes = module.codes()
    assert codes.dtype == torch.int8
    assert bool(((codes >= lowest) & (codes <= highest)).all())


def test_more_bits_come_closer_to_the_float_layer() -> None:
    linear, x = float_linear(), sample(2, 5, IN)
    errors = []
    for bits in (2, 3, 4, 6, 8):
        module = QuantLinear.from_float(linear, WeightsConfig(bits), ActivationsConfig(bits, "dynamic", "per_token"))
        errors.append(float((module(x) - linear(x)).detach().pow(2).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_quantizing_the_dequantized_weight_changes_nothing() -> None:
    first = quantized()
    linear = float_linear()
    linear.weight.data = first.dequantized_weight()
    second = QuantLinear.from_float(linear, WeightsConfig(), STATIC)
    assert torch.equal(second.codes(), first.codes())
    assert torch.equal(second.dequantized_weight(), first.dequantized_weight())


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_state_dict_is_the_documented_checkpoint(activations: ActivationsConfig, bias: bool) -> None:
    module = quantized(WeightsConfig(bits=6), activations, bias, torch.bfloat16)
    module(sample(1, IN))  # derived data must not appear in it
    expected = {"weight": (torch.int32, (OUT, 8)), "weight_scale": (torch.float32, (OUT,))}  # 5 codes a word
    if bias:
        expected["bias"] = (torch.bfloat16, (OUT,))
    if activations.mode == "static":
        expected |= {"input_scale": (torch.float32, ()), "input_zero_point": (torch.int32, ())}
    assert {k: (v.dtype, tuple(v.shape)) for k, v in module.state_dict().items()} == expected
    assert not [name for name, p in module.named_parameters() if p.requires_grad]


def through_pickle(module: QuantLinear) -> QuantLinear:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: QuantLinear) -> QuantLinear:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(module: QuantLinear) -> QuantLinear:
    new = QuantLinear.empty_like(float_linear(module.bias is not None), module.weights, module.activations)
    assert new.load_state_dict(module.state_dict(), strict=True).missing_keys == []
    new.backend = module.backend
    return new


@backends
@pytest.mark.parametrize("travel", [copy.deepcopy, through_pickle, through_torch_save, through_state_dict])
@pytest.mark.parametrize("activations", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_copies_compute_the_same(
    travel: Callable[[QuantLinear], QuantLinear], activations: ActivationsConfig, backend: str
) -> None:
    module, x = quantized(activations=activations), sample(3, IN)
    set_backend(module, backend)
    expected = module(x)  # builds packed weights, which can be neither copied nor pickled
    twin = travel(module)
    assert twin.backend == backend
    assert torch.equal(twin(x), expected)
    twin.set_float_weight(torch.zeros(OUT, IN))
    twin.bias = None
    assert not bool(twin(x).any())
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half().float(), torch.float32),
    ],
    ids=["half", "bfloat16", "double", "half-float"],
)
def test_casts_keep_the_scales_exactly(cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    before = quantized()
    parent = nn.Sequential(copy.deepcopy(before))
    parent(sample(3, IN))
    after = cast(parent)[0]  # type: ignore[index]
    for name in ("weight", "weight_scale", "input_scale", "input_zero_point"):
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    assert after.bias.dtype == dtype
    assert after(sample(3, IN, dtype=dtype)).dtype == dtype


@backends
def test_changes_of_state_are_effective_at_once(backend: str) -> None:
    module, x = quantized(), sample(3, IN)
    set_backend(module, backend)
    outputs = [module(x)]
    other = quantized(WeightsConfig(observer="mse"))
    for change in (
        lambda: module.set_input_qparams(torch.tensor(0.5), torch.tensor(0)),
        lambda: module.set_float_weight(torch.ones(OUT, IN)),
        lambda: module.load_state_dict(other.state_dict()),
        lambda: module.to(torch.bfloat16),  # rounds the bias
    ):
        change()
        outputs.append(module(x))
        assert torch.equal(outputs[-1], copy.deepcopy(module)(x))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("bits", [4, 6])
def test_another_bit_width_or_a_float_layer_cannot_load_it(bits: int) -> None:
    state = quantized(WeightsConfig(bits=8)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        quantized(WeightsConfig(bits=bits)).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        float_linear().load_state_dict(state, strict=False)


def test_static_activations_must_be_calibrated() -> None:
    module = QuantLinear.from_float(float_linear(), WeightsConfig(), STATIC)
    expected = r"static activations but was never calibrated\. Quantize through RegCacheQuantizer\.quantize\("
    with pytest.raises(ValueError, match=expected):
        module(sample(1, IN))
    with pytest.raises(ValueError, match=expected):
        set_backend(module, "simulated")


def test_weights_must_be_set() -> None:
    module = QuantLinear(IN, OUT, True, WeightsConfig(), DYNAMIC)
    with pytest.raises(ValueError, match=r"This QuantLinear has no weights yet: weight_scale is not finite\."):
        module(sample(1, IN))


def test_weights_that_are_no_numbers_are_not_quantized_silently() -> None:
    linear = float_linear()
    linear.weight.data[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"not finite"):
        QuantLinear.from_float(linear, WeightsConfig(), DYNAMIC)(sample(1, IN))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_input_scale_must_be_positive_and_finite(scale: float) -> None:
    module = quantized()
    before = module.input_scale
    with pytest.raises(ValueError, match=rf"An activation scale must be positive and finite, got {scale}\."):
        module.set_input_qparams(torch.tensor(scale), torch.tensor(0))
    assert module.input_scale is before


def test_dynamic_layers_take_no_input_scale() -> None:
    expected = r"This layer computes its activation scale from each input \(mode='dynamic'\)\."
    with pytest.raises(ValueError, match=expected):
        quantized(activations=DYNAMIC).set_input_qparams(torch.tensor(1.0), torch.tensor(0))


def test_input_qparams_are_copied_into_the_stored_dtypes() -> None:
    module, scale = quantized(), torch.tensor(0.25, dtype=torch.float64)
    module.set_input_qparams(scale, torch.tensor(3))
    scale.fill_(9.0)
    assert module.input_scale is not None
    assert module.input_zero_point is not None
    assert (float(module.input_scale), module.input_scale.dtype) == (0.25, torch.float32)
    assert (int(module.input_zero_point), module.input_zero_point.dtype) == (3, torch.int32)


def test_from_float_leaves_the_float_layer_alone() -> None:
    linear = float_linear(dtype=torch.bfloat16)
    module = QuantLinear.from_float(linear, WeightsConfig(), DYNAMIC)
    assert module.bias is not None
    assert module.bias.dtype == torch.bfloat16
    module.bias.data.fill_(7.0)
    assert torch.equal(linear.weight, float_linear(dtype=torch.bfloat16).weight)
    assert torch.equal(linear.bias, float_linear(dtype=torch.bfloat16).bias)


def test_repr_says_how_it_is_quantized() -> None:
    text = repr(quantized(WeightsConfig(bits=4), DYNAMIC, bias=False))
    expected = (
        "in_features=37, out_features=11, bias=False, weights=int4 per_channel, activations=int8 dynamic per_token"
    )
    assert expected in text
    assert "backend=auto" in text


def test_quant_linears_and_set_backend_reach_every_layer() -> None:
    model = nn.ModuleDict({"a": quantized(), "b": nn.Sequential(float_linear(), quantized(activations=DYNAMIC))})
    assert [name for name, _ in quant_linears(model)] == ["a", "b.1"]
    for name, kind in BACKENDS.items():
        if name == "onednn" and REASON is not None:
            continue
        set_backend(model, name)
        assert {type(module.runtime()) for _, module in quant_linears(model)} == {kind}


def test_set_backend_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(quantized())
    expected = r"Unknown execution backend 'cuda'; expected one of auto, int_mm, onednn, reference, simulated\."
    with pytest.raises(ValueError, match=expected):
        set_backend(model, "cuda")
    monkeypatch.setattr(onednn, "machine_reason", lambda: "the CPU is too old.")
    expected = r"Execution backend 'onednn' cannot run this layer: the CPU is too old\. Use backend 'auto'\."
    with pytest.raises(ValueError, match=expected):
        set_backend(model, "onednn")
    assert model[0].backend == "auto"
    assert model(sample(2, IN)).shape == (2, OUT)


def test_set_backend_on_the_meta_device_waits_for_the_weights() -> None:
    module = QuantLinear(IN, OUT, True, WeightsConfig(), STATIC, device="meta")
    set_backend(module, "reference")
    assert module.backend == "reference"
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
