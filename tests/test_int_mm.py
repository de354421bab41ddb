"""`torch._int_mm` as a backend: the reference's numbers on the CPU, one graph under the compiler, and its choice on GPUs."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import ACTIVATIONS, EPS, describe, exact_output, make_input, static_qparams
from torch._subclasses.fake_tensor import FakeTensorMode

from optimum_regcache.config import ActivationsConfig
from optimum_regcache.kernels import LinearState, int_mm, select_backend
from optimum_regcache.kernels.int_mm import IntMMLinear, device_reason
from optimum_regcache.kernels.reference import ReferenceLinear
from optimum_regcache.kernels.simulated import SimulatedLinear
from optimum_regcache.math import uniform

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU kernel cannot run here")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)")
every_config = pytest.mark.parametrize("config", ACTIVATIONS, ids=describe)
SIZES = [(37, 11), (40, 16), (8, 24), (5, 8)]  # in, out: with and without filling up


def make_layer(config: ActivationsConfig, features: int, out: int, asymmetric: bool = False) -> LinearState:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (out, features), generator=generator, dtype=torch.int8)
    zero = torch.randint(-100, 100, (out,), generator=generator, dtype=torch.int32) if asymmetric else None
    scale = torch.rand(out, generator=generator) * 0.01 + 0.001
    return LinearState(codes, scale, torch.randn(out, generator=generator), config, *static_qparams(config), zero)


@every_config
@pytest.mark.parametrize("asymmetric", [False, True], ids=["", "weight-zeros"])
def test_sums_and_eager_outputs_are_those_of_the_reference(config: ActivationsConfig, asymmetric: bool) -> None:
    for features, out in SIZES:
        state = make_layer(config, features, out, asymmetric)
        ours, reference = IntMMLinear(state), ReferenceLinear(state)
        for rows in (1, 16, 17, 40):
            x = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows)) * 5 + 1
            scale, zero = state.input_qparams(x)
            codes = uniform.quantize(x, scale, zero, config.bits, config.symmetric) - zero
            weight = state.codes.numpy().astype(np.int64)
            if state.weight_zero_point is not None:
                weight = weight - state.weight_zero_point.numpy()[:, None]
            found = ours.integer_sum(x, scale, zero)
            assert found.dtype == torch.int32
            assert np.array_equal(found.numpy(), codes.numpy().astype(np.int64) @ weight.T)
            assert torch.equal(ours(x), reference(x))


def test_outlier_tokens_with_a_scale_of_their_own() -> None:
    config = ActivationsConfig(outlier_tokens="per_token")
    state = make_layer(config, 40, 16)
    x = make_input(features=40)
    assert state.input_qparams(x)[0].shape == (2, 5, 1)
    assert torch.equal(IntMMLinear(state)(x), ReferenceLinear(state)(x))


def test_the_sum_of_the_largest_codes_is_exact() -> None:
    config = ActivationsConfig(symmetric=False)
    zero = torch.tensor(0, dtype=torch.int32)
    codes = torch.full((8, 4304), 127, dtype=torch.int8)
    codes[0, 0] = 126
    state = LinearState(codes, torch.ones(1), None, config, torch.tensor(1.0), zero)
    found = IntMMLinear(state).integer_sum(torch.full((1, 4304), 255.0), torch.tensor(1.0), zero)
    assert found.tolist() == [[255 * 127 * 4304 - 255] + [255 * 127 * 4304] * 7]


def test_aligned_weights_are_not_copied() -> None:
    aligned, odd = make_layer(ACTIVATIONS[0], 40, 16), make_layer(ACTIVATIONS[0], 37, 16)
    assert IntMMLinear(aligned)._weight.data_ptr() == aligned.codes.data_ptr()
    assert IntMMLinear(odd)._weight.shape == (40, 16)


def within_bound(found: torch.Tensor, state: LinearState, x: torch.Tensor) -> bool:
    """4 float32 roundings of the largest term, the bound of all integer backends."""
    expected, terms, _ = exact_output(state, x)
    return bool(np.all(np.abs(found.double().numpy() - expected) <= 4 * EPS * terms))


@every_config
def test_one_graph_under_the_compiler(config: ActivationsConfig) -> None:
    state = make_layer(config, 37, 16)
    layer = IntMMLinear(state)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="eager")
    for rows in (3, 20, 21):  # the number of rows becomes symbolic; few rows are filled up
        x = torch.randn(rows, 37, generator=torch.Generator().manual_seed(rows)) * 4
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor_gives_the_same_codes_and_sums() -> None:
    config = ActivationsConfig()
    state = make_layer(config, 40, 16)
    layer, x = IntMMLinear(state), make_input(features=40)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x), fullgraph=True)
    assert within_bound(compiled(x), state, x)


# the choice on GPUs, with tensors that only claim to be there


def gpu_state(config: ActivationsConfig) -> LinearState:
    with FakeTensorMode():
        codes = torch.empty(16, 40, dtype=torch.int8, device="cuda")
    return LinearState(codes, torch.ones(1), None, config, *static_qparams(config))


def capability(monkeypatch: pytest.MonkeyPatch, *version: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)


def test_auto_takes_it_on_gpus_with_int8_tensor_cores_compiled_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    state = gpu_state(ACTIVATIONS[0])
    for version in ((7, 5), (8, 0), (12, 0)):
        capability(monkeypatch, *version)
        assert select_backend("auto", state) is IntMMLinear
        assert select_backend("int_mm", state) is IntMMLinear
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert select_backend("auto", state) is IntMMLinear


def test_auto_simulates_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 8, 0)
    assert select_backend("auto", gpu_state(ActivationsConfig(bits=16))) is SimulatedLinear
    capability(monkeypatch, 7, 0)
    state = gpu_state(ACTIVATIONS[0])
    assert select_backend("auto", state) is SimulatedLinear
    expected = r"'int_mm' cannot run this layer: the GPU has compute capability 7\.0; int8 matrix products need 7\.5\."
    with pytest.raises(ValueError, match=expected):
        select_backend("int_mm", state)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_reason(torch.device("cpu")) is None
    expected = "the weights are on meta; torch._int_mm is used on NVIDIA GPUs and the CPU only."
    assert device_reason(torch.device("meta")) == expected
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_reason(torch.device("cuda", 0)) == expected.replace("meta", "cuda:0")
    monkeypatch.delattr(int_mm.torch, "_int_mm")
    assert device_reason(torch.device("cpu")) == "this PyTorch build has no torch._int_mm."


# on a GPU


@needs_gpu
@every_config
def test_a_gpu_gives_the_numbers_of_the_cpu(config: ActivationsConfig) -> None:
    for features, out in SIZES:
        state, x = make_layer(config, features, out), make_input(features=features)
        there = on_gpu(state)
        assert select_backend("auto", there) is IntMMLinear
        assert torch.equal(IntMMLinear(there)(x.cuda()).cpu(), IntMMLinear(state)(x))


@needs_gpu
def test_cuda_graphs_record_the_compiled_layer() -> None:
    config = ActivationsConfig()
    state, x = make_layer(config, 40, 16), make_input(features=40)
    layer = IntMMLinear(on_gpu(state))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert within_bound(compiled(x.cuda()).cpu(), state, x)


def on_gpu(state: LinearState) -> LinearState:
    moved: dict[str, Any] = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in vars(state).items()
    }
    return LinearState(**moved)
