"""The linear operator for CPUs without VNNI: exact where the instruction that libraries use there saturates."""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from torch.nn import functional as F

import bench_linear
from optimum_regcache import fuse
from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels import cpu, native, onednn
from optimum_regcache.layers.linear import QuantLinear, set_backend

CHOSEN = native.library()
REASON = native.unavailable_reason() or ("those for VNNI are in use" if CHOSEN and CHOSEN.blocks else None)
needs_linear = pytest.mark.skipif(REASON is not None, reason=f"AVX2 operators: {REASON}")
POSTS = {
    ("none", ""): lambda y: y,
    ("relu", ""): torch.relu,
    ("swish", ""): F.silu,
    ("gelu", "none"): F.gelu,
    ("gelu", "tanh"): lambda y: F.gelu(y, approximate="tanh"),
}


@pytest.fixture
def no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without VNNI."""
    monkeypatch.setattr(cpu, "sums_saturate", lambda: True)


def weight(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of the whole range with some at its ends, scales, bias."""
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    codes[0] = 127
    return codes, torch.rand(out, generator=generator) * 1e-3 + 1e-4, torch.randn(out, generator=generator)


@needs_linear
@pytest.mark.parametrize(
    "shape", [(1, 5, 3), (7, 37, 11), (13, 64, 16), (3, 1, 1), (100, 33, 50), (61, 768, 40)], ids=str
)
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_exact(shape: tuple[int, int, int], threads: int, no_vnni: None) -> None:
    rows, width, out = shape
    codes, _, _ = weight(out, width)
    x = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x[0] = 255  # with the first row of weights: every sum of two products is 64770, twice what 16 bits hold
    packed = onednn.PackedWeight.pack(codes, torch.ones(out), None, 255)
    assert packed.own
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = onednn.int8_linear(x, 1.0, 128, packed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, ((x.long() - 128) @ codes.long().T).float())


@needs_linear
@pytest.mark.parametrize("post", POSTS, ids="-".join)
def test_epilogues(post: tuple[str, str], no_vnni: None) -> None:
    codes, scale, bias = weight(37, 50)
    packed = onednn.PackedWeight.pack(codes, scale, bias, 255)
    x = torch.randint(0, 256, (2, 9, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = POSTS[post]((x.double() - 100) @ codes.double().T * scale.double() * 0.05 + bias.double())
    found = onednn.int8_linear(x, 0.05, 100, packed, onednn.Epilogue(*post))
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    leaving = onednn.Epilogue(*post, out_scale=0.01, out_zero_point=30, as_codes=True)
    codes_out = onednn.int8_linear(x, 0.05, 100, packed, leaving)
    assert codes_out.dtype == torch.uint8
    rounded = ((expected / 0.01).round() + 30).clamp(0, 255)
    assert (int(rounded.min()), int(rounded.max()))[1] == 255
    assert int((codes_out.double() - rounded).abs().max()) <= 1  # ties
    assert float((codes_out != rounded).double().mean()) < 0.01
    other = torch.randn(expected.shape)
    added = onednn.int8_linear(x, 0.05, 100, packed, other=other)
    plain = onednn.int8_linear(x, 0.05, 100, packed)
    assert torch.equal(added, plain + other)


@needs_linear
def test_empty_batches_and_wrong_shapes(no_vnni: None) -> None:
    codes, scale, bias = weight(20, 10)
    packed = onednn.PackedWeight.pack(codes, scale, bias, 255)
    assert onednn.int8_linear(torch.empty(0, 4, 10, dtype=torch.uint8), 1.0, 0, packed).shape == (0, 4, 20)
    with pytest.raises(RuntimeError, match="`packed` must have 448 bytes for 13 inputs and 20 outputs, got 320"):
        onednn.int8_linear(torch.zeros(2, 13, dtype=torch.uint8), 1.0, 0, packed)
    with pytest.raises(RuntimeError, match=r"`other` must have shape \[2, 20\], got \[3, 20\]"):
        onednn.int8_linear(torch.zeros(2, 10, dtype=torch.uint8), 1.0, 0, packed, other=torch.zeros(3, 20))


@needs_linear
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_equals_the_reference(symmetric: bool, no_vnni: None) -> None:
    layer = QuantLinear.from_float(
        torch.nn.Linear(40, 30), WeightsConfig(), ActivationsConfig(mode="dynamic", symmetric=symmetric)
    )
    x = torch.randn(3, 7, 40) * 3
    found = layer(x)
    assert isinstance(layer.runtime(), onednn.OneDNNLinear)
    assert layer.runtime()._weight.own
    set_backend(layer, "reference")
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-5)


@needs_linear
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2_swiglu"])
def test_fused_blocks_equal_the_reference(name: str, no_vnni: None) -> None:
    tiny = models.TOWERS[name]
    model = models.quantized(tiny)
    set_backend(model, "reference")
    expected = tiny.run(model)
    set_backend(model, "auto")
    for attention, least in (
        ("float32", 0.9999),
        ("int8", 0.998),
    ):  # codes at ties may differ by one, and change later ones
        assert not fuse(model, attention=attention).skipped
        found = tiny.run(model)
        assert float(F.cosine_similarity(found.flatten(), expected.flatten(), 0)) > least


def test_small_codes_go_to_onednn(no_vnni: None) -> None:
    codes = torch.randint(-63, 64, (8, 8), dtype=torch.int8)
    assert not onednn.PackedWeight.pack(codes, torch.ones(8), None, 255).own


@pytest.mark.skipif(
    CHOSEN is not native.VNNI or native.unavailable_reason() is not None, reason="they are used here anyway"
)
def test_they_work_where_others_are_used() -> None:
    environment = {**os.environ, native.SWITCH: "avx2"}
    files = [__file__, *(str(Path(__file__).with_name(f"test_native{part}.py")) for part in ("", "_arguments"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_benchmark_of_one_layer_finds_the_errors() -> None:
    found = bench_linear.measure(5, 64, 32, repeats=1)
    assert found["error"]["float32"] < 1e-6
    assert found["error"].get("ours", 0.0) == 0.0
    if "oneDNN" in found["error"]:
        assert (found["error"]["oneDNN"] > 0.01) == cpu.sums_saturate()
