"""Rewrites of the float weights: Hadamard transforms, rescaled norms and values, rotations. None may change the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import BLOCKS, COMPOSITES, DINOV2_BACKBONE, HEADS, INNER, TOWERS, WIDTH, TinyModel, random_cache
from torch import nn

from optimum_regcache import DeletionConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.math.hadamard import rotation_matrix
from optimum_regcache.registers import get_register_cache, prepare_tower, set_deletion, set_registers
from optimum_regcache.rewrites import rescale_norm, rescale_values
from optimum_regcache.rewrites.rotation import (
    empty_rotation,
    fold_layer_scale,
    fold_norm_affine,
    is_rotated,
    rotate_heads,
    rotate_residual,
)

DELETE_BLOCK = 2
CLIP, DINOV2 = TOWERS["clip"], TOWERS["dinov2"]
every_tower = pytest.mark.parametrize("tiny", [*TOWERS.values(), *INNER.values()], ids=lambda t: t.name)


def build(tiny: TinyModel, dtype: torch.dtype = torch.float64, *, regcache: bool = True, **overrides: Any) -> Any:
    """The model, with two copies of three registers in two blocks and two tokens deleted between them if ``regcache``."""
    model = tiny.build(**overrides).to(dtype)
    if regcache:
        set_registers(model, random_cache(registers=3, num_copies=2.0))
        set_deletion(model, DeletionConfig(block=DELETE_BLOCK, count=2, score="l2"))
    return model


def run(tiny: TinyModel, model: Any) -> torch.Tensor:
    inputs = tiny.inputs()
    return tiny.run(model, {**inputs, "pixel_values": inputs["pixel_values"].to(next(model.parameters()).dtype)})


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error relative to the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


def noise(seed: int, channels: int = WIDTH) -> torch.Tensor:
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed))


def every_norm(change: Callable[..., None]) -> Callable[[Any], None]:
    """``change(tower, block, norm number, seed)`` for all norms of a model."""

    def apply(model: Any) -> None:
        tower = find_tower(model)
        for block in range(BLOCKS):
            for number in (0, 1):
                change(tower, block, number, 2 * block + number)

    return apply


def every_block(change: Callable[[Any, int], None]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for block in range(BLOCKS):
            change(model, block)

    return apply


def shift_norm(tower: Any, block: int, number: int, offset: torch.Tensor) -> None:
    """Add ``offset`` [D] to the output of a norm."""
    rescale_norm(tower, block, number, torch.ones_like(offset), -offset)


rescale_all_norms = every_norm(lambda t, b, n, seed: rescale_norm(t, b, n, noise(seed).exp(), noise(seed + 50)))
rescale_all_values = every_block(lambda model, block: rescale_values(model, block, noise(block).exp()))


def compose(*steps: Callable[[Any], None]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for step in steps:
            step(model)

    return apply


REWRITES: dict[str, Callable[[Any], None]] = {
    "scale_norms": every_norm(lambda t, b, n, seed: rescale_norm(t, b, n, noise(seed).exp())),
    "scale_and_shift_norms": rescale_all_norms,
    "shift_norms": every_norm(lambda t, b, n, seed: shift_norm(t, b, n, noise(seed))),
    "scale_values": rescale_all_values,
    "fold_norms": lambda model: fold_norm_affine(find_tower(model)),
    "fold_layer_scale": lambda model: fold_layer_scale(find_tower(model)),
    "rotate_residual": rotate_residual,
    "rotate_heads": rotate_heads,
    "scale_then_rotate": compose(rescale_all_norms, rescale_all_values, rotate_residual, rotate_heads),
    "rotate_then_scale": compose(rotate_heads, rotate_residual, rescale_all_values, rescale_all_norms),
}


UNBIASED = {"dinov3": ("k_proj.bias",), "internvl": ("q_proj.bias", "k_proj.bias", "v_proj.bias")}  # at first
HEAD_ROTATIONS = [REWRITES[name] for name in ("rotate_heads", "scale_then_rotate", "rotate_then_scale")]


@every_tower
@pytest.mark.parametrize("regcache", [False, True], ids=["plain", "regcache"])
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES.keys())
def test_no_rewrite_changes_the_function(tiny: TinyModel, rewrite: Callable[[Any], None], regcache: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = build(tiny, dtype, regcache=regcache)
        expected = run(tiny, model)
        before = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
        if find_tower(model).family.rotary and rewrite in HEAD_ROTATIONS:
            with pytest.raises(ValueError, match=r"DINOv3 rotates query and key by their position"):
                rewrite(model)
            return
        rewrite(model)
        assert difference(run(tiny, model), expected) < tolerance
        after = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
        new = (".rotation", *UNBIASED.get(tiny.name, ()))
        assert {name: v for name, v in after.items() if not name.endswith(new)} == before


@every_tower
def test_rewrites_change_the_weights_they_name(tiny: TinyModel) -> None:
    """Otherwise the test above would pass for functions that do nothing."""
    for name, rewrite in REWRITES.items():
        model = build(tiny)
        if find_tower(model).family.rotary and rewrite in HEAD_ROTATIONS:
            continue
        before = {k: v.clone() for k, v in model.state_dict().items()}
        rewrite(model)
        same = all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items() if k in before)
        assert same == (name == "fold_layer_scale" and not find_tower(model).family.layer_scales)


def test_a_norm_puts_out_what_was_asked_for() -> None:
    model, seen = build(CLIP), []
    tower, factor, shift = find_tower(model), noise(0).exp(), noise(1)
    tower.norm(1, 1).register_forward_hook(lambda module, args, output: seen.append(output))
    run(CLIP, model)
    rescale_norm(tower, 1, 1, factor, shift)
    run(CLIP, model)
    shift_norm(tower, 1, 1, shift)
    run(CLIP, model)
    torch.testing.assert_close(seen[1], seen[0] / factor - shift)
    torch.testing.assert_close(seen[2], seen[0] / factor)


def test_values_are_rescaled_in_the_registers_too() -> None:
    model, seen, factor = build(CLIP), [], noise(0).exp()
    value: Any = find_tower(model).attention(1).v_proj
    value.register_forward_hook(lambda module, args, output: seen.append(output))
    run(CLIP, model)
    before: Any = get_register_cache(model)
    rescale_values(model, 1, factor)
    run(CLIP, model)
    after: Any = get_register_cache(model)
    torch.testing.assert_close(seen[1], seen[0] / factor)
    torch.testing.assert_close(after.rows(1)[0], before.rows(1)[0])
    torch.testing.assert_close(after.rows(1)[1], before.rows(1)[1] / factor.view(HEADS, 1, -1))
    assert torch.equal(after.rows(3)[1], before.rows(3)[1])
    assert after.num_copies == 2.0


def test_the_shift_makes_up_for_the_rounding_of_beta() -> None:
    """In bfloat16 a shift of 100 is rounded by up to 0.25; the biases take out what was really added."""
    model = build(CLIP, torch.bfloat16)
    tower = find_tower(model)
    norm, linear = tower.norm(1, 0), tower.norm_consumers(1, 0)[2]
    beta, bias = norm.bias.detach().double(), linear.bias.detach().double()
    shift_norm(tower, 1, 0, 100 + noise(3))
    added = norm.bias.detach().double() - beta
    assert 0.1 < (added - 100 - noise(3)).abs().max() < 0.3
    assert torch.equal(linear.bias, (bias - linear.weight.detach().double() @ added).bfloat16())


def test_layers_without_bias_get_one_that_the_config_knows_of() -> None:
    model = build(DINOV2, qkv_bias=False)
    expected, names = run(DINOV2, model), set(model.state_dict())
    rescale_norm(find_tower(model), 1, 0, noise(0).exp())
    assert set(model.state_dict()) == names
    shift_norm(find_tower(model), 1, 0, noise(0))
    assert difference(run(DINOV2, model), expected) < 1e-10
    assert model.config.qkv_bias is True
    fresh = build(DINOV2, qkv_bias=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(DINOV2, fresh), run(DINOV2, model))


def test_composed_models_are_rewritten_in_their_tower() -> None:
    for tiny in COMPOSITES.values():
        model = build(tiny)
        expected = run(tiny, model)
        compose(rescale_all_norms, rescale_all_values, rotate_residual, rotate_heads)(model)
        assert difference(run(tiny, model), expected) < 1e-10


@pytest.mark.parametrize("forgotten", ["key", "value"])
def test_registers_that_stay_behind_a_head_rotation_change_the_output_grossly(forgotten: str) -> None:
    model = build(CLIP)
    expected, name = run(CLIP, model), f"register_{forgotten}"
    old = getattr(find_tower(model).attention(1), name).clone()
    rotate_heads(model)
    setattr(find_tower(model).attention(1), name, old)
    assert difference(run(CLIP, model), expected) > 0.1


@pytest.mark.parametrize("score", ["l2", "linf"])
@every_tower
def test_the_same_tokens_are_deleted_in_a_rotated_model(tiny: TinyModel, score: str) -> None:
    chosen = []
    for rotate in (False, True):
        model = build(tiny, torch.float32)
        set_deletion(model, DeletionConfig(block=DELETE_BLOCK, count=2, score=score))
        if rotate:
            rotate_residual(model)
        runtime: Any = prepare_tower(model)
        note = lambda *_, runtime=runtime: chosen.append(runtime.current.selection.dropped.clone())  # noqa: E731
        find_tower(model).attention(DELETE_BLOCK).register_forward_pre_hook(note)
        run(tiny, model)
    assert torch.equal(*chosen)
    assert chosen[0].sum(1).min() == 2


def test_the_stream_between_the_blocks_is_rotated_and_no_other() -> None:
    model = build(CLIP, regcache=False)
    pixels = CLIP.inputs()["pixel_values"].double()
    with torch.no_grad():
        before = model(pixels, output_hidden_states=True).hidden_states
        rotate_residual(model, seed=3)
        after = model(pixels, output_hidden_states=True).hidden_states
    rotation = rotation_matrix(WIDTH, seed=3)
    for index, (plain, turned) in enumerate(zip(before, after, strict=True)):
        torch.testing.assert_close(turned, plain @ rotation if 0 < index < BLOCKS else plain)
    assert is_rotated(model)


@every_tower
def test_a_rotated_state_dict_loads_into_an_empty_rotation(tiny: TinyModel) -> None:
    settings = {"dinov3": {"key_bias": True}, "internvl": {"attention_bias": True}}
    biased = settings.get(tiny.name, {})  # what the rotation makes of its config
    model, fresh = build(tiny, torch.float32), build(tiny, torch.float32, **biased)
    rotate_residual(model)
    empty_rotation(fresh)
    buffers = [name for name, tensor in fresh.state_dict().items() if not torch.isfinite(tensor).all()]
    blocks = find_tower(fresh).family.blocks
    assert buffers == [f"{blocks}.0.rotation", f"{blocks}.{BLOCKS - 1}.rotation"]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(tiny, fresh), run(tiny, model))


def test_an_encoder_of_one_block_can_be_rotated() -> None:
    model = CLIP.build(num_hidden_layers=1).double()
    expected = run(CLIP, model)
    rotate_residual(model)
    assert difference(run(CLIP, model), expected) < 1e-10


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.ones(3), r"factor needs one value per channel, \[64\], got \[3\]"),
        (torch.full((WIDTH,), float("nan")), "factor must be finite; channels 0, 1, 2, 3, 4, 5, 6, 7, ... are not"),
        (1 - torch.eye(WIDTH)[5], "factor must be positive; channels 5 are not. Clamp"),
    ],
)
def test_bad_factors_are_refused(factor: torch.Tensor, message: str) -> None:
    model = CLIP.build()
    with pytest.raises(ValueError, match=message):
        rescale_norm(find_tower(model), 0, 0, factor)
    with pytest.raises(ValueError, match=message):
        rescale_values(model, 0, factor)


def test_bad_places_are_refused() -> None:
    model, ones = CLIP.build(), torch.ones(WIDTH)
    with pytest.raises(ValueError, match="no norm 0 of block 4; blocks are 0 to 3"):
        rescale_norm(find_tower(model), 4, 0, ones)
    with pytest.raises(ValueError, match="no norm 2 of block 0"):
        shift_norm(find_tower(model), 0, 2, ones)
    with pytest.raises(ValueError, match="no block -1"):
        rescale_values(model, -1, ones)
    with pytest.raises(ValueError, match="shift needs one value per channel"):
        rescale_norm(find_tower(model), 0, 0, ones, ones[:5])
    find_tower(model).blocks[0].layer_norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
    with pytest.raises(ValueError, match="no weight and bias that could hold a scale"):
        rescale_norm(find_tower(model), 0, 0, ones)
    find_tower(model).attention(1).v_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"got Identity\. Rewrite the model before it is quantized"):
        rescale_values(model, 1, ones)


def test_overflow_is_refused() -> None:
    model = CLIP.build().half()
    with pytest.raises(ValueError, match=r"overflows torch\.float16\. Rewrite the model in float32"):
        rescale_norm(find_tower(model), 0, 0, torch.full((WIDTH,), 1e-6))


def test_rotations_that_cannot_be_exact_are_refused() -> None:
    model = build(CLIP)
    rotate_residual(model)
    for again in (rotate_residual, empty_rotation):
        with pytest.raises(ValueError, match="rotated already"):
            again(model)
        with pytest.raises(ValueError, match="Dinov2Backbone returns the hidden states between its blocks"):
            again(DINOV2_BACKBONE.build())
