"""Token deletion in the models: which tokens go, what the others compute, what fills the gaps (docs/method.md 6 and 7)."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    BLOCKS,
    CLIP_CLASSIFIER,
    COMPOSITES,
    DINOV2_BACKBONE,
    INNER,
    PATCHES,
    SIGLIP2_GRIDS,
    TOWERS,
    Inputs,
    TinyModel,
    pixels,
    random_cache,
    run_block,
)
from references import neighbour_mean

from optimum_regcache import DeletionConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers

DELETE_BLOCK = 2
EVERY = [*TOWERS.values(), *INNER.values()]
every_tower = pytest.mark.parametrize("tiny", EVERY, ids=lambda t: t.name)
gathering = pytest.mark.parametrize("tiny", [t for t in EVERY if t.name != "siglip2"], ids=lambda t: t.name)
CLIP, SIGLIP2, DINOV2 = TOWERS["clip"], TOWERS["siglip2"], TOWERS["dinov2"]

Positions = list[list[int]]  # per image, patch numbers (tokens before the patches not counted)


def patches_of(grid: tuple[int, int], *cells: tuple[int, int]) -> list[int]:
    return [row * grid[1] + column for row, column in cells]


def plant(tiny: TinyModel, model: Any, tokens: list[list[int]], size: float = 1e3) -> None:
    """Give tokens (per image, counted from the start of the sequence) a huge norm at the input of the delete block.

    One feature only: the l_2 norm or the mean would rank other tokens first.
    """

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for image, chosen in enumerate(tokens):
            for order, token in enumerate(chosen):
                output[image, token, (7 * token) % output.shape[-1]] = (-1) ** order * (size + order)
        return output

    find_tower(model).blocks[DELETE_BLOCK - 1].register_forward_hook(hook)


def dropped_by(model: Any) -> Callable[[], torch.Tensor]:
    """Afterwards: bool [B, N], what the latest pass deleted."""
    runtime, seen = prepare_tower(model), {}

    def note(*_: Any) -> None:
        seen["dropped"] = runtime.current.selection.dropped.clone()

    find_tower(model).attention(DELETE_BLOCK).register_forward_pre_hook(note)
    return lambda: seen["dropped"]


def with_deletion(tiny: TinyModel, count: int, **settings: Any) -> Any:
    model = tiny.build()
    set_deletion(model, DeletionConfig(block=DELETE_BLOCK, count=count, **settings))
    return model


def grids_of(inputs: Inputs) -> list[tuple[int, int]]:
    if "spatial_shapes" in inputs:
        return [tuple(g) for g in inputs["spatial_shapes"].tolist()]
    images = inputs["pixel_values"]
    return [(images.shape[2] // 8, images.shape[3] // 8)] * len(images)


def reference(
    tiny: TinyModel, inputs: Inputs, count: int, planted: list[list[int]] | None = None, **kwargs: Any
) -> tuple[list[np.ndarray], Positions]:
    """The transformers model, one image and one block at a time, with the tokens really taken out.

    Returns:
        Per image the kept tokens after the last block [lead + kept patches + trail, D], and the dropped patches.
    """
    model, seen = tiny.build(), []
    plant(tiny, model, planted or [])
    tower = find_tower(model)
    angles: Any = None

    def note(module: Any, args: Any, given: Any) -> None:
        nonlocal angles
        seen.append(args[0])
        angles = given.get("position_embeddings")

    handle = tower.blocks[DELETE_BLOCK].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, **kwargs)
        handle.remove()
        outputs, dropped = [], []
        for hidden, (rows, columns) in zip(seen[0], grids_of(inputs), strict=True):
            norms = hidden.abs().amax(-1).numpy()[tiny.lead : tiny.lead + rows * columns]
            gone = sorted(np.argsort(-norms, kind="stable")[:count].tolist())
            keep = [*range(tiny.lead), *(tiny.lead + p for p in range(rows * columns) if p not in gone)]
            patches = [p - tiny.lead for p in keep[tiny.lead :]]
            state = hidden[None, [*keep, *range(len(hidden) - tiny.trail, len(hidden))]]
            positions = {} if angles is None else {"position_embeddings": tuple(a[patches] for a in angles)}
            for block in tower.blocks[DELETE_BLOCK:]:
                state = run_block(block, state, **positions)
            outputs.append(state[0].numpy())
            dropped.append(gone)
    return outputs, dropped


def after_last_block(tiny: TinyModel, model: Any, inputs: Inputs, **kwargs: Any) -> torch.Tensor:
    """Output of the last block, before any final norm."""
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, **kwargs).hidden_states[-1]


def assert_filled(
    tiny: TinyModel, actual: torch.Tensor, inputs: Inputs, expected: tuple[list[np.ndarray], Positions]
) -> None:
    """Compare with the reference and the numpy fill; padding is not looked at."""
    for image, grid, tokens, gone in zip(actual.numpy(), grids_of(inputs), *expected, strict=True):
        size = grid[0] * grid[1]
        full = np.zeros((size, tokens.shape[1]))
        full[[p for p in range(size) if p not in gone]] = tokens[tiny.lead : len(tokens) - tiny.trail]
        around = [*range(tiny.lead), *range(-tiny.trail, 0)]
        np.testing.assert_allclose(image[around], tokens[around], rtol=1e-5, atol=2e-5)
        filled = neighbour_mean(full, gone, grid)
        np.testing.assert_allclose(image[tiny.lead : tiny.lead + size], filled, rtol=1e-5, atol=2e-5)


# what is deleted


@gathering
def test_gather_returns_the_kept_tokens_in_order(tiny: TinyModel) -> None:
    inputs, model = tiny.inputs(), with_deletion(tiny, 3, fill="none")
    last = after_last_block(tiny, model, inputs)
    expected, gone = reference(tiny, inputs, 3)
    assert last.shape == (3, tiny.lead + PATCHES - 3 + tiny.trail, 64)
    assert tiny.run(model).shape == last.shape
    assert len({tuple(g) for g in gone}) > 1, "the images should lose different tokens"
    for image, tokens in zip(last.numpy(), expected, strict=True):
        np.testing.assert_allclose(image, tokens, rtol=1e-5, atol=2e-5)  # CLS first, kept patches ascending


@gathering
def test_hidden_states_and_attentions_shrink_after_the_deletion(tiny: TinyModel) -> None:
    model = with_deletion(tiny, 3, fill="none")
    set_registers(model, random_cache((2,)))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**tiny.inputs(), output_hidden_states=True, output_attentions=True)
    n = tiny.lead + PATCHES + tiny.trail
    assert [h.shape[1] for h in output.hidden_states] == [n, n, n, n - 3, n - 3]
    sizes = [tuple(a.shape[2:]) for a in output.attentions]
    assert sizes == [(n, n), (n, n), (n - 3, n - 3 + 1), (n - 3, n - 3)]


@every_tower
def test_planted_outliers_go_and_nothing_else(tiny: TinyModel) -> None:
    """Huge norms on patches, on every token around them and on padding: only the patches are deleted."""
    inputs, model = tiny.inputs(), with_deletion(tiny, 2)
    grids = grids_of(inputs)
    patches = [[0, r * c - 1] if i % 2 else [r * c - 2, c] for i, (r, c) in enumerate(grids)]
    protected = [[*range(tiny.lead), *range(tiny.lead + r * c, tiny.lead + PATCHES + tiny.trail)] for r, c in grids]
    planted = [[tiny.lead + p for p in mine] + extra for mine, extra in zip(patches, protected, strict=True)]
    plant(tiny, model, planted)
    dropped = dropped_by(model)
    tiny.run(model, inputs)
    assert [d.nonzero().flatten().tolist() for d in dropped()] == [
        sorted(tiny.lead + p for p in mine) for mine in patches
    ]


@every_tower
def test_deletion_is_per_image(tiny: TinyModel) -> None:
    inputs, model = tiny.inputs(), with_deletion(tiny, 3)
    dropped = dropped_by(model)
    together = tiny.run(model, inputs)
    gone = dropped()
    for mates in ([0], [1], [2], [2, 0], [1, 1]):
        output = tiny.run(model, {k: v[mates] for k, v in inputs.items()})
        assert torch.equal(dropped(), gone[mates])
        torch.testing.assert_close(output, together[mates], rtol=1e-5, atol=1e-5)
    twins = tiny.run(model, {k: v[[1, 1]] for k, v in inputs.items()})
    torch.testing.assert_close(twins[0], twins[1], rtol=1e-5, atol=1e-5)


@every_tower
def test_threshold_rule(tiny: TinyModel) -> None:
    """At most ``count`` tokens, only above kappa x median: 3, 2 and 0 of 5, 2 and 0 planted ones."""
    inputs, model = tiny.inputs(), with_deletion(tiny, 3, rule="threshold", kappa=20.0)
    planted = [[0, 1, 2, 3, 5], [4, 1], []]
    plant(tiny, model, [[tiny.lead + p for p in mine] for mine in planted])
    dropped = dropped_by(model)
    output = tiny.run(model, inputs)
    # `plant` makes later ones larger
    assert [d.nonzero().flatten().tolist() for d in dropped()] == [
        [tiny.lead + p for p in mine] for mine in ([2, 3, 5], [1, 4], [])
    ]
    torch.testing.assert_close(output[2], tiny.run(tiny.build(), inputs)[2], rtol=1e-5, atol=1e-5)
    tokens, gone = reference(tiny, inputs, 2, [[tiny.lead + p for p in mine] for mine in planted])
    chosen = {k: v[1:2] for k, v in inputs.items()}
    assert_filled(tiny, after_last_block(tiny, model, inputs)[1:2], chosen, (tokens[1:2], gone[1:2]))


# what fills the gaps

SHAPES = {
    "corners": [(0, 0), (0, 3), (3, 0), (3, 3)],
    "adjacent": [(1, 1), (1, 2), (2, 1), (2, 2)],
    "buried": [(0, 0), (0, 1), (1, 0), (1, 1)],  # (0, 0) has no neighbour left: mean of all kept patches
    "edge": [(0, 1), (1, 0), (2, 3), (3, 2)],
}


@pytest.mark.parametrize("cells", SHAPES.values(), ids=SHAPES)
@gathering
def test_fill_is_the_mean_of_the_kept_neighbours(tiny: TinyModel, cells: list[tuple[int, int]]) -> None:
    inputs, model = tiny.inputs(batch=2), with_deletion(tiny, 4)
    planted = [[tiny.lead + p for p in patches_of((4, 4), *cells)]] * 2
    plant(tiny, model, planted)
    expected = reference(tiny, inputs, 4, planted)
    assert expected[1] == [sorted(patches_of((4, 4), *cells))] * 2
    assert_filled(tiny, after_last_block(tiny, model, inputs), inputs, expected)
    assert tiny.run(model, inputs).shape == (2, tiny.lead + PATCHES + tiny.trail, 64)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2_registers", "vit", "deit"])
@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_fill_on_other_image_shapes(name: str, size: tuple[int, int]) -> None:
    tiny, grid = TOWERS[name], (size[0] // 8, size[1] // 8)
    inputs = {"pixel_values": pixels(3, 2, *size)}
    extra = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    model = with_deletion(tiny, 3)
    planted = [[tiny.lead + p for p in patches_of(grid, (0, grid[1] - 1), (1, 0), (2, 3))]] * 2
    plant(tiny, model, planted)
    expected = reference(tiny, inputs, 3, planted, **extra)
    assert expected[1][0] == sorted(patches_of(grid, (0, grid[1] - 1), (1, 0), (2, 3)))
    assert_filled(tiny, after_last_block(tiny, model, inputs, **extra), inputs, expected)


def test_siglip2_fills_on_the_grid_of_each_image() -> None:
    inputs, model = SIGLIP2.inputs(), with_deletion(SIGLIP2, 2)
    planted = [patches_of(g, (0, 0), (1, g[1] - 1)) for g in SIGLIP2_GRIDS]
    plant(SIGLIP2, model, planted)
    expected = reference(SIGLIP2, inputs, 2, planted)
    assert expected[1] == planted
    assert_filled(SIGLIP2, after_last_block(SIGLIP2, model, inputs), inputs, expected)


def test_siglip2_padding_changes_nothing() -> None:
    inputs, model = SIGLIP2.inputs(), with_deletion(SIGLIP2, 3)
    set_registers(model, random_cache(num_copies=2.0))
    padded = inputs["pixel_attention_mask"] == 0
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][padded] = 1e3
    with torch.no_grad():
        a, b = model(**inputs), model(**changed)
    assert torch.equal(a.last_hidden_state[~padded], b.last_hidden_state[~padded])
    assert torch.equal(a.pooler_output, b.pooler_output)


def test_registers_act_with_deletion() -> None:
    """Deletion with registers equals deletion of the same tokens without, up to what the registers change."""
    inputs, model = CLIP.inputs(), with_deletion(CLIP, 3, fill="none")
    plain = CLIP.run(model, inputs)
    set_registers(model, random_cache((2, 3), num_copies=1e-30))
    torch.testing.assert_close(CLIP.run(model, inputs), plain, rtol=1e-5, atol=1e-5)
    set_registers(model, random_cache((2, 3)))
    assert (CLIP.run(model, inputs) - plain).abs().max() > 0.05


@pytest.mark.skipif(
    "attention_mask" not in inspect.signature(DINOV2.model_class.forward).parameters,
    reason="DINOv2 takes no mask before transformers 5.18",
)
def test_attention_masks_survive_the_deletion() -> None:
    """DINOv2 takes a mask of tokens: rows and columns of deleted ones go, masked patches stay masked and unranked."""
    inputs = DINOV2.inputs()
    mask = torch.ones(3, 1 + PATCHES, dtype=torch.bool)
    mask[:, 5:8] = False
    model = with_deletion(DINOV2, 3, fill="none")
    plant(DINOV2, model, [[5, 6, 9, 10, 11]] * 3)
    dropped = dropped_by(model)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        output = DINOV2.run(model, inputs, attention_mask=mask)
        assert [d.nonzero().flatten().tolist() for d in dropped()] == [[9, 10, 11]] * 3
        # the masked patches are removed by hand instead
        other = with_deletion(DINOV2, 3, fill="none")
        plant(DINOV2, other, [[9, 10, 11]] * 3)
        changed = {"pixel_values": inputs["pixel_values"].clone()}
        changed["pixel_values"][:, :, 8:16, :24] = 9.0
        again = DINOV2.run(other, changed, attention_mask=mask)
        rows = [i for i in range(14) if i not in (5, 6, 7)]
        torch.testing.assert_close(output[:, rows], again[:, rows], rtol=1e-5, atol=1e-5)


def test_leading_tokens_stay_even_if_masked() -> None:
    """Where padding makes up for real tokens, a masked CLS is still not padding."""
    mask = torch.ones(3, 1 + PATCHES, dtype=torch.bool)
    mask[:, :11] = False
    model = with_deletion(DINOV2, 8, fill="none")
    dropped = dropped_by(model)
    DINOV2.run(model, attention_mask=mask)
    assert dropped().sum(1).tolist() == [8, 8, 8]
    assert not dropped()[:, 0].any()


@pytest.mark.parametrize("case", ["siglip2", "backbone", "threshold"])
def test_masked_outliers_leave_the_stream(case: str) -> None:
    """Where deleted tokens stay in place, their norm must not: quantizers would see it."""
    tiny = {"siglip2": SIGLIP2, "backbone": DINOV2_BACKBONE, "threshold": CLIP}[case]
    settings = {"rule": "threshold", "kappa": 20.0} if case == "threshold" else {}
    model, inputs = with_deletion(tiny, 2, **settings), tiny.inputs()
    plant(tiny, model, [[tiny.lead + 1, tiny.lead + 4]] * 3)
    states: list[torch.Tensor] = []
    for block in find_tower(model).blocks:
        block.register_forward_hook(lambda module, args, output: states.append(output))
        norm = next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm))
        norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    tiny.run(model, inputs)
    assert {state.shape[1] for state in states} == {tiny.lead + PATCHES}
    real = inputs.get("pixel_attention_mask", torch.ones(3, tiny.lead + PATCHES)).bool()
    peaks = [float(state[real].abs().max()) for state in states]  # input and output of every block
    assert len(peaks) == 2 * BLOCKS
    assert peaks[2 * DELETE_BLOCK - 1] >= 1000
    assert max(peaks[2 * DELETE_BLOCK :]) < 100


# backbones and composites


def test_masking_equals_gathering_for_the_kept_tokens() -> None:
    inputs = DINOV2.inputs()
    gather, mask = with_deletion(DINOV2, 3), with_deletion(DINOV2_BACKBONE, 3)
    mask.load_state_dict(gather.state_dict())
    assert not prepare_tower(gather).keep_positions
    assert prepare_tower(mask).keep_positions
    dropped = dropped_by(gather), dropped_by(mask)
    a, b = after_last_block(DINOV2, gather, inputs), after_last_block(DINOV2_BACKBONE, mask, inputs)
    assert torch.equal(dropped[0](), dropped[1]())
    assert dropped[0]().sum(1).tolist() == [3, 3, 3]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    untouched = after_last_block(DINOV2, DINOV2.build(), inputs)
    assert (a - untouched).abs().max() > 0.05


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_backbone_feature_maps_keep_their_shape(size: tuple[int, int]) -> None:
    images = {"pixel_values": pixels(1, 2, *size)}
    model, native = with_deletion(DINOV2_BACKBONE, 3), DINOV2_BACKBONE.build()
    early, late = DINOV2_BACKBONE.run(model, images)
    assert early.shape == late.shape == (2, 64, size[0] // 8, size[1] // 8)
    early_native, late_native = DINOV2_BACKBONE.run(native, images)
    assert torch.equal(early, early_native)  # stage2 is the input of the delete block
    assert (late - late_native).abs().max() > 0.05


@pytest.mark.parametrize("tiny", [CLIP_CLASSIFIER, *COMPOSITES.values()], ids=lambda t: t.name)
def test_composites_work_on_the_filled_grid(tiny: TinyModel) -> None:
    model, native = with_deletion(tiny, 3), tiny.build()
    seen: dict[str, Any] = {}
    tiny.tower_of(model).register_forward_hook(lambda module, args, output: seen.update(output))
    output = tiny.run(model)
    expected = tiny.run(native)
    assert output.shape == expected.shape
    assert (output - expected).abs().max() > 1e-3
    assert seen["last_hidden_state"].shape == (3, tiny.lead + PATCHES, 64)
    if tiny is CLIP_CLASSIFIER:
        # its head averages the patches: it must see the filled ones
        with torch.no_grad():
            logits = model.classifier(seen["last_hidden_state"][:, 1:].mean(1))
        torch.testing.assert_close(output, logits)


# errors


def test_too_many_tokens_to_delete() -> None:
    model = with_deletion(DINOV2, 8, fill="none")
    assert DINOV2.run(model).shape[1] == 1 + 8
    message = "deletion.count=8 would remove more than half of the 12 patch tokens of this input. Use larger images"
    with pytest.raises(ValueError, match=message):
        model(pixel_values=pixels(0, 1, 32, 24))
    assert DINOV2.run(model).shape[1] == 1 + 8, "a failed pass leaves nothing behind"
