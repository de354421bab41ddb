"""`RegisterCache`: what it accepts, reports and returns."""

from __future__ import annotations

import math

import pytest
import torch
from models import BLOCKS, HEAD_DIM, HEADS, random_cache
from transformers import Cache

from optimum_regcache import RegisterCache
from optimum_regcache.registers.cache import RegisterLayer


def row(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (HEADS, 1, HEAD_DIM)), generator=torch.Generator().manual_seed(0))


def test_properties() -> None:
    cache = random_cache((0, 2), registers=3, num_copies=2.5)
    assert isinstance(cache, Cache)
    assert cache.blocks == (0, 2)
    assert cache.num_registers == 3
    assert cache.logit_bias == pytest.approx(math.log(2.5))
    assert len(cache.layers) == BLOCKS
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 0, 3, 0]
    assert [t.shape for t in cache.rows(2)] == [(HEADS, 3, HEAD_DIM)] * 2


def test_an_empty_cache() -> None:
    empty = RegisterCache({}, {}, BLOCKS)
    assert (empty.blocks, empty.num_registers, empty.logit_bias) == ((), 0, 0.0)
    assert RegisterCache({}, {}, 0).num_registers == 0


def test_restricted_keeps_the_rows() -> None:
    cache = random_cache((0, 1, 3), num_copies=2.0)
    fewer = cache.restricted((1, 3))
    assert (fewer.blocks, fewer.num_copies, len(fewer.layers)) == ((1, 3), 2.0, BLOCKS)
    assert fewer.rows(3)[0] is cache.rows(3)[0]
    assert cache.restricted((0,), num_copies=7.0).num_copies == 7.0
    assert cache.blocks == (0, 1, 3)
    with pytest.raises(KeyError, match=r"Block 2 has no registers; blocks with registers: \[0, 1, 3\]"):
        cache.restricted((1, 2))


def test_layers_prepend_their_rows_and_store_nothing() -> None:
    keys, values = row(2, 3, 4), row(2, 3, 4) + 1
    layer = RegisterLayer(keys, values)
    new_k, new_v = row(5, 2, 6, 4), row(5, 2, 6, 4) + 2
    for _ in range(2):
        k, v = layer.update(new_k, new_v)
        assert k.shape == v.shape == (5, 2, 9, 4)
        for i in range(5):
            assert torch.equal(k[i, :, :3], keys)
            assert torch.equal(v[i, :, :3], values)
        assert torch.equal(k[:, :, 3:], new_k)
        assert torch.equal(v[:, :, 3:], new_v)
    assert layer.keys is keys
    assert layer.get_seq_length() == layer.get_max_length() == 3
    assert layer.get_mask_sizes(6) == (9, 0)
    assert layer.update(new_k.bfloat16(), new_v.bfloat16())[0].dtype == torch.bfloat16


def test_layers_without_rows_pass_everything_through() -> None:
    layer, new = RegisterLayer(), row(5, 2, 6, 4)
    layer.lazy_initialization(new, new)
    assert layer.update(new, new) == (new, new)
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(6) == (6, 0)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"keys are given for blocks \[1, 2\], values for blocks \[1\]"):
        RegisterCache({2: row(), 1: row()}, {1: row()}, BLOCKS)
    for block in (BLOCKS, -1):
        with pytest.raises(ValueError, match=rf"Register blocks \[{block}\] lie outside the 4 blocks of the encoder"):
            RegisterCache({block: row()}, {block: row()}, BLOCKS)
    shapes = r"All register rows must share one shape \[heads, registers, head_dim\], got "
    with pytest.raises(ValueError, match=shapes + r"\[\(4, 1, 16\), \(4, 2, 16\)\]"):
        RegisterCache({0: row(), 1: row(4, 2, 16)}, {0: row(), 1: row(4, 2, 16)}, BLOCKS)
    with pytest.raises(ValueError, match=shapes + r"\[\(4, 1, 8\), \(4, 1, 16\)\]"):
        RegisterCache({0: row()}, {0: row(4, 1, 8)}, BLOCKS)
    with pytest.raises(ValueError, match=shapes + r"\[\(1, 4, 1, 16\)\]"):
        RegisterCache({0: row(1, 4, 1, 16)}, {0: row(1, 4, 1, 16)}, BLOCKS)
    with pytest.raises(KeyError, match=r"Block 1 has no registers; blocks with registers: \[0\]"):
        RegisterCache({0: row()}, {0: row()}, BLOCKS).rows(1)


@pytest.mark.parametrize("num_copies", [0, -1.0, float("nan"), float("inf")])
def test_copies_must_have_a_logarithm(num_copies: float) -> None:
    with pytest.raises(ValueError, match=f"num_copies must be > 0 and finite, got {num_copies}"):
        RegisterCache({0: row()}, {0: row()}, BLOCKS, num_copies)
