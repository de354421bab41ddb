"""The C++ operators against plain PyTorch: attention, LayerNorm, quantization, deletion, fill."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.tower import PatchSpan
from optimum_regcache.kernels import fused_ops as ops
from optimum_regcache.kernels import native
from optimum_regcache.registers import deletion as D

REASON = native.unavailable_reason()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"C++ operators: {REASON}")

SHAPES = [
    (2, 3, 5, 16),
    (1, 12, 197, 64),
    (2, 2, 50, 72),
    (1, 2, 33, 128),
    (3, 2, 17, 20),
    (1, 1, 1, 64),
    (2, 4, 64, 80),
]


def qkv(batch: int, heads: int, tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query, key and value as views of one tensor, as the fused projection gives them."""
    x = torch.randn(batch, tokens, 3 * heads * width, generator=torch.Generator().manual_seed(seed)) * 2
    return x.chunk(3, -1)


NO_ROWS: tuple[ops.Rows, float] = ((None, None), 0.0)


def rows(heads: int, count: int, width: int, bias: float = 0.7) -> tuple[ops.Rows, float]:
    keys, values = torch.randn(2, heads, count, width, generator=torch.Generator().manual_seed(9))
    return (keys, values), bias


def float_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, registers: ops.Rows, bias: float
) -> torch.Tensor:
    """Registers as ordinary keys with a logit bias."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None
    if registers[0] is not None and registers[1] is not None:
        expand = (q.shape[0], -1, -1, -1)
        k, v = torch.cat((registers[0].expand(expand), k), 2), torch.cat((registers[1].expand(expand), v), 2)
        mask = torch.zeros(q.shape[2], k.shape[2])
        mask[:, : registers[0].shape[1]] = bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("registers", [0, 1, 3, 16])
def test_attention_equals_its_plain_form(shape: tuple[int, ...], registers: int) -> None:
    heads, width = shape[1], shape[3]
    q, k, v = qkv(*shape)
    g = rows(heads, registers, width) if registers else NO_ROWS
    found = ops.int8_attention(q, k, v, *g, heads, width**-0.5, None)
    expected = ops.int8_attention_reference(q, k, v, *g, heads, width**-0.5)
    assert found.shape == q.shape
    # a code of a probability at a tie may differ by one: 1/255 of the largest value of its row at most
    assert float((found - expected).abs().max()) <= float(v.abs().max()) / 100
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_close_to_float(shape: tuple[int, ...]) -> None:
    heads = shape[1]
    q, k, v = qkv(*shape)
    for g in (NO_ROWS, rows(heads, 2, shape[3])):
        found = ops.int8_attention(q, k, v, *g, heads, shape[3] ** -0.5, None)
        expected = float_attention(q, k, v, heads, *g)
        assert float((found - expected).norm() / expected.norm()) < 0.03


@needs_native
def test_attention_with_a_register_that_takes_almost_everything() -> None:
    """The error of the image part shrinks with its weight: the registers' part is exact."""
    q, k, v = qkv(1, 2, 40, 32)
    for bias in (30.0, 80.0, 300.0):
        g = rows(2, 1, 32, bias)
        found = ops.int8_attention(q, k, v, *g, 2, 32**-0.5, None)
        expected = float_attention(q, k, v, 2, *g)
        assert bool(torch.isfinite(found).all())
        assert float((found - expected).abs().max()) < 5e-3


@needs_native
def test_attention_of_extreme_tensors_is_finite() -> None:
    zero = torch.zeros(1, 7, 96)
    q, k, v = zero.chunk(3, -1)
    assert not ops.int8_attention(q, k, v, *NO_ROWS, 2, 0.25, None).any()
    x = torch.full((1, 7, 96), 1e4)
    x[:, 3] = -1e4
    q, k, v = x.chunk(3, -1)
    found = ops.int8_attention(q, k, v, *NO_ROWS, 2, 0.25, None)
    torch.testing.assert_close(found, float_attention(q, k, v, 2, *NO_ROWS), rtol=0.01, atol=1.0)


@needs_native
@pytest.mark.parametrize("highest", [255, 63, 15])
def test_attention_can_leave_as_codes(highest: int) -> None:
    q, k, v = qkv(2, 4, 30, 24)
    codes = ops.Codes(20.0 * highest / 255, 255 / 20.0 / highest, highest // 2, highest)
    found = ops.int8_attention(q, k, v, *NO_ROWS, 4, 24**-0.5, codes)
    real = ops.int8_attention(q, k, v, *NO_ROWS, 4, 24**-0.5, None)
    assert found.dtype == torch.uint8
    assert torch.equal(found, ops.quantize(real, codes, native=False))


@needs_native
def test_attention_refuses_what_it_cannot_hold() -> None:
    q, k, v = qkv(1, 1, 4, 144)
    with pytest.raises(RuntimeError, match="head_dim must be at most 128, got 144"):
        ops.int8_attention(q, k, v, *NO_ROWS, 1, 0.1, None)
    q, k, v = qkv(1, 1, 4, 16)
    with pytest.raises(RuntimeError, match="at most 16 register rows, got 17"):
        ops.int8_attention(q, k, v, *rows(1, 17, 16), 1, 0.1, None)


@needs_native
@pytest.mark.parametrize("width", [1, 15, 16, 100, 768])
@pytest.mark.parametrize("highest", [255, 63])
def test_quantize_equals_plain(width: int, highest: int) -> None:
    x = torch.randn(37, width, generator=torch.Generator().manual_seed(0)) * 5
    x[0, 0], x[1, 0], x[2, 0] = 1e30, -1e30, float("inf")
    x[3:6, 0] = torch.tensor([0.5, 1.5, 2.5]) / 13.0  # ties go to even
    codes = ops.Codes(13.0, 1 / 13.0, 31, highest)
    assert torch.equal(ops.quantize(x, codes, native=True), ops.quantize(x, codes, native=False))
    assert ops.quantize(x[:0], codes, native=True).shape == (0, width)


@needs_native
@pytest.mark.parametrize("width", [16, 100, 384, 768])
def test_layer_norm_quantize_equals_plain_up_to_ties(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.2, generator=generator)
        norm.bias.normal_(0.0, 0.2, generator=generator)
    x = torch.randn(3, 41, width, generator=generator) * 4 + 1
    x[0, 0] = 7.0  # no variance
    codes = ops.Codes(25.0, 1 / 25.0, 120, 255)
    found, expected = (ops.layer_norm_quantize(x, norm, codes, native=n).int() for n in (True, False))
    assert int((found - expected).abs().max()) <= 1
    assert float((found != expected).float().mean()) < 1e-3


@needs_native
@pytest.mark.parametrize(("tokens", "lead", "count"), [(17, 1, 3), (16, 0, 8), (22, 5, 1)])
def test_deletion_and_fill_equal_plain(tokens: int, lead: int, count: int) -> None:
    hidden = torch.randn(3, tokens, 24, generator=torch.Generator().manual_seed(count))
    hidden[1] = hidden[1, :1]  # all norms equal: the earliest go
    out, kept, dropped = torch.ops.regcache.delete_tokens(hidden, lead, count)
    patch = torch.arange(tokens) >= lead
    every = torch.ones(3, tokens, dtype=torch.bool)
    config = DeletionConfig(block=0, count=count)
    expected = D.choose_dropped(D.outlier_scores(hidden, every & patch), every | ~patch, config)
    assert torch.equal(dropped, expected)
    assert torch.equal(kept, D.kept_positions(expected, count))
    assert torch.equal(out, D.gather_tokens(hidden, kept))
    size = D.patch_grid(None, tokens - lead) or (1, tokens - lead)
    selection = D.Selection(dropped, kept, count, size, PatchSpan(lead))
    filled = torch.ops.regcache.restore_tokens(out, kept, dropped, lead, *size)
    torch.testing.assert_close(filled, D.fill_deleted(D.spread_tokens(out, selection), selection))
    assert torch.equal(filled[~dropped], hidden[~dropped])


def test_the_reference_of_attention_is_exact_for_exact_codes() -> None:
    """Values on the grid of the quantizers and one dominant key: the reference must return that key's value."""
    key = torch.zeros(1, 4, 8)
    key[0, 2] = 127.0
    value = torch.arange(32.0).view(1, 4, 8) * 127 / 31
    found = ops.int8_attention_reference(torch.full((1, 4, 8), 127.0), key, value, *NO_ROWS, 1, 1.0)
    torch.testing.assert_close(found, value[:, 2:3].expand(-1, 4, -1), rtol=0.01, atol=0.6)
    g = (torch.zeros(1, 1, 8), torch.ones(1, 1, 8)), math.log(4.0)
    even = ops.int8_attention_reference(torch.zeros(1, 4, 8), key, torch.zeros(1, 4, 8), *g, 1, 1.0)
    torch.testing.assert_close(even, torch.full((1, 4, 8), 0.5))  # tau = 4 copies against 4 tokens


def test_reasons_why_the_operators_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe = native.unavailable_reason.__wrapped__
    monkeypatch.setenv(native.SWITCH, "0")
    assert probe() == "the environment variable OPTIMUM_REGCACHE_NATIVE is 0."
    monkeypatch.delenv(native.SWITCH)
    monkeypatch.setattr(native.sys, "platform", "darwin")
    assert probe() == "the operators are built on Linux only, this is darwin."
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setattr(native.cpu, "capabilities", lambda: {"avx2": False})
    assert probe() == "the CPU has no AVX2 instructions."
    monkeypatch.setattr(native.cpu, "capabilities", lambda: {"avx2": True, "fma3": True})
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # one that was built before needs no compiler
    monkeypatch.setattr(native.compiler, "machine", lambda: "x86_64")
    assert probe() == "no C++ compiler was found (install g++, or set CXX)."
    monkeypatch.setattr(native.compiler, "machine", lambda: "aarch64")
    assert probe() == "the operators are for x86-64 processors, this is aarch64."


def test_which_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"avx2": True, "fma3": True, "avx512_vnni": True}
    monkeypatch.setattr(native.cpu, "capabilities", lambda: found)
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert native.library() is native.VNNI
    monkeypatch.setenv(native.SWITCH, "avx2")
    assert native.library() is native.AVX2
    monkeypatch.delenv(native.SWITCH)
    found["avx512_vnni"] = False  # Skylake-X
    assert native.library() is native.AVX2
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native.library() is native.AVX2
    found["fma3"] = False
    assert native.library() is None
