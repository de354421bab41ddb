"""Detectors whose detection tokens stand behind the patches: these are no patches, and what their heads read."""
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from detectors import DETECTOR, YOLOS, YOLOS_POSITIONS
from models import BLOCKS, PATCHES, TinyModel, quantized, random_cache, run_block
from references import neighbour_mean
from torch.nn import functional as F

from optimum_regcache import DeletionConfig, fuse, unfuse
from optimum_regcache.encoders.passes import image_features, patch_tokens
from optimum_regcache.encoders.tower import PatchSpan, find_tower, reads_patches
from optimum_regcache.encoders.visiting import visit_tokens
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.outliers import measure_outliers
from optimum_regcache.evaluation.places import patch_norms
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neuron_activation import RegisterNeuronActivation
from optimum_regcache.registers.neurons import set_register_neurons
from optimum_regcache.registers.replay import TokenSample
from optimum_regcache.rewrites.rotation import rotate_residual
from optimum_regcache.search.mining import mine_tokens

TRAIL, BLOCK = 3, 2
TOKENS = 1 + PATCHES + TRAIL
both = pytest.mark.parametrize("tiny", [YOLOS, YOLOS_POSITIONS, DETECTOR], ids=lambda t: t.name)


def swell(model: Any, scale: float = 1e3) -> None:
    """CLS and detection tokens far larger than any patch, in every block but the first."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0, 5] = output[:, -TRAIL:, 7] = scale
        return output

    for block in find_tower(model).blocks[:-1]:
        block.register_forward_hook(hook)


def test_span() -> None:
    span, row = PatchSpan(2, 3), torch.arange(10)
    assert row[span.positions].tolist() == row[span.mask(10, row.device)].tolist() == [2, 3, 4, 5, 6]
    assert (span.count(10), span.protected) == (5, 5)
    assert row[PatchSpan(1).positions].tolist() == row[PatchSpan(1).mask(10, row.device)].tolist() == list(range(1, 10))


@both
def test_nothing_takes_detection_tokens_for_patches(tiny: TinyModel) -> None:
    """Everything that looks for large patches is blind to larger tokens before and behind them."""
    model, batches = tiny.build(), [tiny.inputs(2)]
    swell(model)
    assert patch_norms(model, batches[0]).shape == (BLOCKS, 3, PATCHES)
    assert not (patch_norms(model, batches[0]) >= 1e3).any()
    assert measure_token_norms(model, batches).max_block_input.max() < 1e3
    assert measure_outliers(model, batches).ratio.max() < 20
    mined = mine_tokens(model, batches, [BLOCK], top=4, progress=False)[BLOCK]
    assert mined.norms.max() < 1e3
    assert set(mined.position.tolist()) <= set(range(1, 1 + PATCHES))
    assert patch_tokens(model, batches[0])[1] == [PATCHES] * 3
    assert not reads_patches(model, find_tower(model))


@both
def test_features_are_the_detection_tokens(tiny: TinyModel) -> None:
    model, inputs = tiny.build(), tiny.inputs()
    with torch.no_grad():
        last = tiny.tower_of(model)(**inputs).last_hidden_state[:, -TRAIL:]
    features = image_features(model, inputs)
    torch.testing.assert_close(features, F.normalize(last, dim=-1).flatten(1) / TRAIL**0.5)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_a_sample_of_tokens_holds_all_detection_tokens() -> None:
    model, inputs = YOLOS.build(), YOLOS.inputs()
    sample = TokenSample(model, [inputs], 3 * 8, 0)
    sample.start(inputs, 0)
    rows = sample.rows(torch.arange(TOKENS).repeat(3, 1)[..., None].float()).reshape(3, 8)
    assert rows[:, 0].tolist() == [0] * 3
    assert rows[:, -TRAIL:].tolist() == [[TOKENS - 3, TOKENS - 2, TOKENS - 1]] * 3
    assert all(len(set(row[1:-TRAIL])) == 4 for row in rows.tolist())


def test_positions_between_the_blocks_keep_every_token_in_place() -> None:
    """Deletion with position embeddings between the blocks, against one image and one block at a time, tokens taken out."""
    tiny, inputs = YOLOS_POSITIONS, YOLOS_POSITIONS.inputs()
    model = tiny.build()
    set_deletion(model, DeletionConfig(block=BLOCK, count=3))
    set_registers(model, random_cache((1,)))
    seen: list[torch.Tensor] = []
    tower = find_tower(model)
    handle = tower.blocks[BLOCK].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        last = model(**inputs, output_hidden_states=True).hidden_states[-1]
        handle.remove()
        plain: Any = find_tower(tiny.build())
        added = plain.module.encoder.interpolation
        stored = getattr(added, "mid_position_embeddings", None)
        places = (
            added((32, 32)) if stored is not None else added(plain.module.encoder.mid_position_embeddings, (32, 32))
        )
        for image, hidden in zip(last, seen[0], strict=True):
            gone = sorted(np.argsort(-hidden[1 : 1 + PATCHES].abs().amax(-1).numpy(), kind="stable")[:3].tolist())
            kept = [p for p in range(TOKENS) if p - 1 not in gone]
            state = run_block(plain.blocks[BLOCK], hidden[None, kept]) + places[BLOCK][:, kept]
            state = run_block(plain.blocks[BLOCK + 1], state)[0]
            full = torch.zeros(TOKENS, hidden.shape[1]).index_copy(0, torch.tensor(kept), state).numpy()
            full[1 : 1 + PATCHES] = neighbour_mean(full[1 : 1 + PATCHES], gone, (4, 4))
            np.testing.assert_allclose(image.numpy(), full, rtol=1e-5, atol=2e-5)


def test_what_cannot_work_with_positions_between_the_blocks() -> None:
    with pytest.raises(ValueError, match="adds position embeddings between its blocks"):
        rotate_residual(YOLOS_POSITIONS.build())
    with pytest.raises(ValueError, match="adds position embeddings of all tokens between its blocks"):
        set_register_neurons(YOLOS_POSITIONS.build(), {1: [2]})
    with pytest.raises(ValueError, match="needs the whole patch grid"):
        set_deletion(YOLOS_POSITIONS.build(), DeletionConfig(block=1, count=2, fill="none"))


def test_register_neurons_leave_detection_tokens_alone() -> None:
    z = torch.arange(8.0)[None, :, None].repeat(1, 1, 2)
    moved = RegisterNeuronActivation(torch.nn.Identity(), [1], PatchSpan(1, 2))(z)
    assert moved[0, :, 0].tolist() == z[0, :, 0].tolist()
    assert moved[0, :, 1].tolist() == [0, 7, 0, 0, 0, 0, 6, 7]


def test_rotation_changes_nothing() -> None:
    model, inputs = DETECTOR.build(), DETECTOR.inputs()
    rotate_residual(model)
    torch.testing.assert_close(
        DETECTOR.run(model, inputs), DETECTOR.run(DETECTOR.build(), inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("fill", ["none", "neighbour_mean"])
def test_a_detector_keeps_its_outputs(fill: str) -> None:
    """Registers and deletion change values and no shapes; what is not quantized is as before."""
    model, inputs = DETECTOR.build(), DETECTOR.inputs()
    with torch.no_grad():
        before = model(**inputs)
        prepare_tower(model)
        assert torch.equal(model(**inputs).logits, before.logits)
        set_deletion(model, DeletionConfig(block=BLOCK, count=4, fill=fill))
        after = model(**inputs)
    assert (
        (after.logits.shape, after.pred_boxes.shape)
        == (before.logits.shape, before.pred_boxes.shape)
        == ((3, 3, 6), (3, 3, 4))
    )
    assert not torch.equal(after.logits, before.logits)


def test_saved_and_opened(tmp_path: Any) -> None:
    model = quantized(DETECTOR)
    model.save_pretrained(tmp_path)
    opened = hf.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(opened) is type(model)
    with torch.no_grad():
        a, b = (m(**DETECTOR.inputs()) for m in (model, opened))
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    for field in ("logits", "pred_boxes"):  # the float heads round by where their tensors begin
        torch.testing.assert_close(a[field], b[field], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiny", [DETECTOR, YOLOS_POSITIONS], ids=lambda t: t.name)
def test_fused(tiny: TinyModel) -> None:
    model, inputs = quantized(tiny), tiny.inputs()
    expected = tiny.run(model, inputs)
    assert not fuse(model, attention="float32").skipped
    torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-3, atol=1e-3)
    unfuse(model)
    assert torch.equal(tiny.run(model, inputs), expected)


def test_visited_tokens_are_all_there() -> None:
    seen: list[int] = []
    visit_tokens(YOLOS.build(), [YOLOS.inputs()], lambda site, block, x, valid: seen.append(x.shape[1]))
    assert set(seen) == {TOKENS}
