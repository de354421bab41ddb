"""Backends of a quantized linear layer against each other and against exact integer arithmetic in NumPy.

All backends must produce the same codes. Their outputs may differ only by float32 rounding after the integer sum (the
epilogue), or, for the simulated backend, inside the float32 sum; the bounds below state how much.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from optimum_regcache.config import ActivationsConfig
from optimum_regcache.kernels import BACKENDS, LinearBackend, LinearState, onednn, select_backend
from optimum_regcache.kernels.reference import ReferenceLinear
from optimum_regcache.kernels.simulated import SimulatedLinear
from optimum_regcache.math import uniform

EPS = 2.0**-23  # distance of float32 numbers just above 1
IN, OUT = 37, 11
ACTIVATIONS = [
    ActivationsConfig(bits=bits, symmetric=symmetric, mode=mode, granularity=granularity)
    for bits, symmetric, (mode, granularity) in itertools.product(
        (8, 6, 4), (True, False), (("static", "per_tensor"), ("dynamic", "per_tensor"), ("dynamic", "per_token"))
    )
]


def describe(a: ActivationsConfig) -> str:
    return f"a{a.bits}-{'sym' if a.symmetric else 'asym'}-{a.mode}-{a.granularity}"


REASON = onednn.machine_reason()
needs_int8 = pytest.mark.skipif(REASON is not None, reason=f"no int8 kernel on this machine: {REASON}")
MARKS = {"onednn": [needs_int8]}
backends = pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in BACKENDS])
runnable = pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(name, config, id=f"{name}-{describe(config)}", marks=MARKS.get(name, []))
        for name, config in itertools.product(BACKENDS, ACTIVATIONS)
        if name != "onednn" or config.symmetric or config.granularity == "per_tensor"  # its documented limit
    ],
)


def make_input(dtype: torch.dtype = torch.float32, features: int = IN) -> torch.Tensor:
    x = torch.randn(2, 5, features, generator=torch.Generator().manual_seed(1)) * 3 + 0.7
    x[0, 2] *= 20  # an outlier token
    return x.to(dtype)


def static_qparams(config: ActivationsConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A range narrower than the data, so that codes saturate at both ends."""
    if config.mode == "dynamic":
        return None, None
    return uniform.choose_qparams(torch.tensor(-9.3), torch.tensor(14.1), config.bits, config.symmetric)


def make_state(config: ActivationsConfig, *, bias: bool = True, per_channel: bool = True) -> LinearState:
    generator = torch.Generator().manual_seed(2)
    lowest, highest = uniform.code_range(config.bits, True)
    codes = torch.randint(lowest, highest + 1, (OUT, IN), generator=generator, dtype=torch.int8)
    scale = torch.rand(OUT if per_channel else 1, generator=generator) * 0.01 + 0.001
    offset = torch.randn(OUT, generator=generator) if bias else None
    return LinearState(codes, scale, offset, config, *static_qparams(config))


def identity_state(config: ActivationsConfig) -> LinearState:
    """A layer whose output is ``scale * (code - zero_point)``, from which the codes can be read back."""
    codes = torch.eye(IN, dtype=torch.int8)
    return LinearState(codes, torch.ones(IN), None, config, *static_qparams(config))


def exact_output(state: LinearState, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer sums and float64 epilogue; also the sizes on which the rounding bounds depend.

    Returns:
        output, size of the terms of the epilogue, sum of the absolute products (all [..., out], float64).
    """
    scale, zero = state.input_qparams(x)
    codes = uniform.quantize(x, scale, zero, state.activations.bits, state.activations.symmetric)
    centred = codes.numpy().astype(np.int64) - zero.numpy().astype(np.int64)
    weight = state.codes.numpy().astype(np.int64)
    factor = scale.double().numpy() * state.weight_scale.double().numpy()
    bias = 0.0 if state.bias is None else state.bias.double().numpy()
    product = (centred @ weight.T) * factor
    return product + bias, np.abs(product) + np.abs(bias), (np.abs(centred) @ np.abs(weight.T)) * factor + np.abs(bias)


def tolerance(name: str, terms: np.ndarray, absolute_sum: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Integer backends: 4 float32 roundings. Simulated: one per product and addition. Then the output dtype's own."""
    bound = (IN + 4) * EPS * absolute_sum if name == "simulated" else 4 * EPS * terms
    return bound + (terms * torch.finfo(dtype).eps if dtype != torch.float32 else 0)


@runnable
def test_codes_are_identical(name: str, config: ActivationsConfig) -> None:
    state = identity_state(config)
    x = make_input()
    ties = torch.arange(-IN, IN, 2).float() / 2  # odd multiples of half a step: where rounding could differ
    x[1, 0] = ties * (1.0 if state.input_scale is None else state.input_scale)
    scale, zero = state.input_qparams(x)
    expected = uniform.quantize(x, scale, zero, config.bits, config.symmetric)
    lowest, highest = uniform.code_range(config.bits, config.symmetric)
    if config.mode == "static":
        assert (int(expected.min()), int(expected.max())) == (lowest, highest)
    elif config.symmetric:
        assert int(expected.abs().max()) == highest
    y = BACKENDS[name](state)(x)
    assert torch.equal(torch.round(y / scale) + zero, expected)


@runnable
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_agree_with_exact_arithmetic(
    name: str, config: ActivationsConfig, bias: bool, dtype: torch.dtype
) -> None:
    x = make_input(dtype)
    for per_channel in (True, False):
        state = make_state(config, bias=bias, per_channel=per_channel)
        y = BACKENDS[name](state)(x)
        assert (y.shape, y.dtype) == ((2, 5, OUT), dtype)
        expected, terms, absolute_sum = exact_output(state, x)
        assert np.all(np.abs(y.double().numpy() - expected) <= tolerance(name, terms, absolute_sum, dtype))


@runnable
def test_input_of_any_rank_and_memory_layout(name: str, config: ActivationsConfig) -> None:
    run = BACKENDS[name](make_state(config))
    same: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-5} if name == "simulated" else {"rtol": 0, "atol": 0}
    )  # float sums may regroup
    x = make_input()
    before = x.clone()
    expected = run(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(run(x.transpose(1, 2).contiguous().transpose(1, 2)), expected, **same)
    torch.testing.assert_close(run(x.reshape(1, 10, IN)).reshape(2, 5, OUT), expected, **same)
    if config.mode == "static" or config.granularity == "per_token":
        torch.testing.assert_close(run(x[0, 2]), expected[0, 2], **same)
        assert run(x[:, :0]).shape == (2, 0, OUT)


@backends
def test_bias_of_the_model_dtype_is_added_in_float32(name: str) -> None:
    config = ACTIVATIONS[0]
    state = make_state(config, bias=False)
    bias = torch.linspace(-1, 1, OUT).to(torch.bfloat16)
    with_bias = LinearState(state.codes, state.weight_scale, bias, config, state.input_scale, state.input_zero_point)
    x = make_input()
    difference = BACKENDS[name](with_bias)(x) - BACKENDS[name](state)(x)
    torch.testing.assert_close(difference, bias.float().expand_as(difference), rtol=0, atol=1e-4)


def test_reference_sum_is_exact_where_float32_is_not() -> None:
    """2048 products of 127 * 127 exceed 2^24: one unit in the sum must survive."""
    features = 2048
    codes = torch.full((1, features), 127, dtype=torch.int8)
    codes[0, 0] = 126
    config = ActivationsConfig()
    state = LinearState(codes, torch.ones(1), None, config, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    y = ReferenceLinear(state)(torch.full((1, features), 127.0))
    assert float(y) == np.float32(127 * 127 * features - 127)


def test_an_outlier_token_only_harms_itself_when_scales_are_per_token() -> None:
    per_token = ActivationsConfig(mode="dynamic", granularity="per_token")
    per_tensor = ActivationsConfig(mode="dynamic")
    x = make_input()
    x[0, 2] *= 1000
    errors = {}
    for config in (per_token, per_tensor):
        state = make_state(config, bias=False)
        exact = x @ (state.codes.float() * state.weight_scale[:, None]).T
        errors[config.granularity] = (SimulatedLinear(state)(x) - exact)[1].abs().max()
    assert errors["per_tensor"] > 20 * errors["per_token"]


def test_unknown_backend() -> None:
    expected = r"Unknown execution backend 'cuda'; expected one of auto, int_mm, onednn, reference, simulated\."
    with pytest.raises(ValueError, match=expected):
        select_backend("cuda", make_state(ACTIVATIONS[0]))


@pytest.mark.parametrize("name", ["int_mm", "reference", "simulated"])
@pytest.mark.parametrize("config", ACTIVATIONS, ids=describe)
def test_portable_backends_run_everywhere(name: str, config: ActivationsConfig) -> None:
    state = make_state(config)
    assert BACKENDS[name].unsupported_reason(state) is None
    assert select_backend(name, state) is BACKENDS[name]


def onednn_refuses(state: LinearState, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"'onednn' cannot run this layer: {reason} Use backend 'auto'\."):
        select_backend("onednn", state)
    assert select_backend("auto", state) is SimulatedLinear


def test_onednn_refuses_per_token_zero_points() -> None:
    config = ActivationsConfig(mode="dynamic", granularity="per_token", symmetric=False)
    onednn_refuses(make_state(config), r"per-token zero points are not supported by the kernel\.")


def test_onednn_refuses_other_devices() -> None:
    state = make_state(ACTIVATIONS[0])
    elsewhere = LinearState(state.codes.to("meta"), state.weight_scale, None, ACTIVATIONS[0], None, None)
    onednn_refuses(elsewhere, r"the weights are on meta, the kernel runs on the CPU\.")


def test_onednn_refuses_machines_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "machine_reason", lambda: "the CPU is too old.")
    onednn_refuses(make_state(ACTIVATIONS[0]), r"the CPU is too old\.")


def test_auto_takes_the_int8_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(ACTIVATIONS[0])
    monkeypatch.setattr(onednn, "machine_reason", lambda: None)
    assert select_backend("auto", state) is onednn.OneDNNLinear
    monkeypatch.setattr(onednn, "machine_reason", lambda: "the CPU is too old.")
    assert select_backend("auto", state) is SimulatedLinear


def test_machine_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(onednn.cpu, "capabilities", lambda: found)
    assert (onednn.machine_reason() or "").endswith("cannot tell which instructions the CPU has; 2.13 can.")
    found["architecture"] = "aarch64"
    assert onednn.machine_reason() == "int8 on the CPU needs an x86-64 processor."
    found["architecture"] = "x86_64"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn.machine_reason() == "this PyTorch build has no oneDNN."
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace())
    assert onednn.machine_reason() == "this PyTorch build has no torch.ops.onednn.qlinear_pointwise."
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace(qlinear_pointwise=None))
    monkeypatch.setattr(onednn, "schema_reason", lambda: None)
    monkeypatch.setattr(onednn.native, "unavailable_reason", lambda: "no compiler.")
    expected = "the CPU has no VNNI instructions, and the C++ operators that do without are not available: no compiler."
    assert onednn.machine_reason() == expected
    monkeypatch.setattr(onednn.native, "unavailable_reason", lambda: None)
    assert onednn.machine_reason() is None
    monkeypatch.setattr(onednn.native, "unavailable_reason", lambda: "no compiler.")
    for name in ("avx512_vnni", "avx_vnni"):
        found.update({"avx512_vnni": False, "avx_vnni": False, name: True})
        assert onednn.machine_reason() is None


def test_small_codes_need_no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "machine_reason", lambda: "no VNNI.")
    small = ActivationsConfig(bits=6, mode="dynamic")
    assert select_backend("auto", make_state(small)) is onednn.OneDNNLinear
    assert select_backend("auto", make_state(ACTIVATIONS[0])) is SimulatedLinear


def test_a_new_backend_only_has_to_be_callable() -> None:
    class Zeros(LinearBackend):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], self.state.codes.shape[0])

    state = make_state(ACTIVATIONS[0])
    assert Zeros.unsupported_reason(state) is None
    assert Zeros(state)(make_input()).shape == (2, 5, OUT)
    with pytest.raises(TypeError, match="abstract"):
        LinearBackend(state)  # type: ignore[abstract]
