"""Hadamard matrices and rotations: orthogonal, spreading outliers, the same for ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_regcache.math.hadamard import (
    block_hadamard,
    block_order,
    hadamard_matrix,
    orthogonal_matrix,
    rotate_mlp_input_weight,
    rotation_matrix,
)


@pytest.mark.parametrize(
    "order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 44, 60, 64, 72, 80, 96, 256, 384, 512, 768, 1408]
)
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_hadamard_entries_never_change() -> None:
    """Checkpoints hold weights that were multiplied by them."""
    weights = torch.arange(1, 385, dtype=torch.float64)
    for order, golden in ((12, -22.51666049839541), (64, 5972.0), (384, -481246.3507851252)):
        w = weights[:order]
        assert float(block_hadamard(w, order) @ w.flip(0)) == pytest.approx(golden)


def test_block_order() -> None:
    orders = {1: 1, 2: 2, 3: 1, 64: 64, 128: 128, 384: 384, 512: 512, 768: 384, 1152: 384, 1536: 512, 3072: 512}
    orders |= {4096: 512, 4304: 16, 4305: 1}
    assert {channels: block_order(channels) for channels in orders} == orders


@pytest.mark.parametrize("order", [1, 2, 12, 16, 64, 80, 128, 384, 512])
def test_block_hadamard_is_orthonormal_and_undone_by_the_weight(order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    x = torch.randn(2, 3, 2 * order, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 2 * order, generator=generator, dtype=torch.float64)
    y = block_hadamard(x, order)
    torch.testing.assert_close(y @ rotate_mlp_input_weight(weight, order).T, x @ weight.T)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[..., :order].norm(dim=-1), x[..., :order].norm(dim=-1))
    torch.testing.assert_close(block_hadamard(x.float(), order).double(), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [16, 64, 80, 256, 384, 512])
def test_block_hadamard_spreads_a_constant_offset(order: int) -> None:
    """Without the signs a constant would end up in one channel, sqrt(order) times as large."""
    y = block_hadamard(torch.ones(order, dtype=torch.float64), order)
    assert torch.isfinite(block_hadamard(torch.full((order,), 2000.0, dtype=torch.float16), order)).all()
    assert y.abs().max() < (1 + 1e-9 if order in (16, 64, 256) else 3.5)


def test_block_hadamard_traces_and_has_gradients_after_inference_mode() -> None:
    x = torch.randn(2, 80, requires_grad=True, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = block_hadamard(x, 40).clone()
    block_hadamard(x, 40).sum().backward()
    compiled = torch.compile(lambda t: block_hadamard(t, 40), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.detach()), expected.clone())


@pytest.mark.parametrize("channels", [1, 2, 3, 10, 16, 52, 64, 384, 768, 1152])
def test_rotations_are_orthogonal_and_fix_ones(channels: int) -> None:
    for seed in range(3):
        rotation, ones = rotation_matrix(channels, seed), torch.ones(channels, dtype=torch.float64)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels, dtype=torch.float64))
        torch.testing.assert_close(rotation @ ones, ones)
        torch.testing.assert_close(ones @ rotation, ones)
        if channels >= 16:
            assert rotation.abs().max() < 6 / channels**0.5
    assert torch.equal(rotation_matrix(channels, 1), rotation_matrix(channels, 1))


@pytest.mark.parametrize("channels", [64, 100, 768])
def test_layer_norm_without_affine_part_commutes_with_a_rotation(channels: int) -> None:
    x = torch.randn(7, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 2
    rotation, norm = rotation_matrix(channels), nn.LayerNorm(channels, elementwise_affine=False)
    torch.testing.assert_close(norm(x @ rotation), norm(x) @ rotation)
    other = orthogonal_matrix(channels)
    assert float((norm(x @ other) - norm(x) @ other).abs().max()) > 0.1


@pytest.mark.parametrize("channels", [64, 100, 768])
def test_an_outlier_channel_is_spread(channels: int) -> None:
    x = torch.randn(50, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 7] = 100.0
    assert (x @ rotation_matrix(channels)).abs().max() < 100 * 6 / channels**0.5
    assert block_hadamard(x, block_order(channels)).abs().max() < 100 / block_order(channels) ** 0.5 + 6


def test_orders_that_cannot_be_built_are_named() -> None:
    for order in (0, 3, 6, 52, 92):
        with pytest.raises(ValueError, match=f"order {order} can be built"):
            hadamard_matrix(order)
    with pytest.raises(ValueError, match=r"Blocks of 48 do not divide 64 channels; block_order\(64\)"):
        block_hadamard(torch.ones(64), 48)
    for build_matrix in (block_order, orthogonal_matrix, rotation_matrix):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            build_matrix(0)
