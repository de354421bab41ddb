"""What a larger model reads between the blocks: every state has all positions, whatever is deleted inside."""
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from models import CLIP_CLASSIFIER, PATCHES, TOWERS, randomize

from optimum_regcache import RegCacheConfig, RegCacheQuantizer, fuse
from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.passes import image_features, states_read
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.kernels import native
from optimum_regcache.registers import prepare_tower, set_deletion
from optimum_regcache.search import TrialRunner

VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
DELETION = DeletionConfig(block=2, count=3)


def llava(**settings: Any) -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=5,
        image_seq_length=PATCHES,
        **settings,
    )
    return randomize(hf.LlavaForConditionalGeneration(config).eval(), 0)


def pixels(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def with_deletion(model: Any, deletion: DeletionConfig = DELETION) -> Any:
    prepare_tower(model)
    set_deletion(model, deletion)
    return model


@pytest.mark.parametrize("settings", [{}, {"vision_feature_layer": -1}, {"vision_feature_layer": 3}])
def test_llava_runs_with_deletion_in_its_tower(settings: dict[str, Any]) -> None:
    model = llava(**settings)
    ids = torch.tensor([[1] + [5] * PATCHES + [7]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels(1)).logits
        found = with_deletion(model)(input_ids=ids, pixel_values=pixels(1)).logits
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2_registers", "vit", "dinov3"])
def test_states_that_are_asked_for_have_all_positions(name: str) -> None:
    tiny = TOWERS[name]
    model = with_deletion(tiny.build())
    with torch.no_grad():
        plain = model(**tiny.inputs())
        asked = model(**tiny.inputs(), output_hidden_states=True)
    tokens = tiny.lead + PATCHES
    assert {state.shape[1] for state in asked.hidden_states} == {tokens}
    assert all(state.isfinite().all() for state in asked.hidden_states)
    torch.testing.assert_close(asked.last_hidden_state, plain.last_hidden_state, atol=2e-4, rtol=1e-4)
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert {state.shape[1] for state in model(**tiny.inputs()).hidden_states} == {tokens}


def test_attention_weights_have_all_positions() -> None:
    tiny = TOWERS["clip"]
    model = tiny.build()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = with_deletion(model)(**tiny.inputs(), output_attentions=True).attentions
    assert {m.shape[-1] for m in maps} == {tiny.lead + PATCHES}
    assert (maps[-1].sum(-1) - 1).abs().max() < 1e-5
    assert ((maps[-1] == 0).all(-2).sum(-1) == DELETION.count).all()  # nobody looks at a deleted token


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="fused blocks need an int8 kernel")
def test_fused_models_too() -> None:
    tiny = TOWERS["clip"]
    items = [{"pixel_values": x} for x in tiny.inputs(3, 8)["pixel_values"]]
    config = RegCacheConfig(registers={"mode": "none"}, deletion={"block": 2, "count": 3})
    model = RegCacheQuantizer(tiny.build()).quantize(
        quantization_config=config, calibration_dataset=items, progress=False
    )
    with torch.inference_mode():
        expected = model(**tiny.inputs(), output_hidden_states=True).hidden_states
        fuse(model, attention="float32")
        found = model(**tiny.inputs(), output_hidden_states=True).hidden_states
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.98


def test_compiled_and_exported_calls_that_ask_for_states() -> None:
    tiny = TOWERS["clip"]
    model = with_deletion(tiny.build())
    with torch.no_grad():
        expected = model(**tiny.inputs(), output_hidden_states=True).hidden_states
        found = torch.compile(model, backend="eager")(**tiny.inputs(), output_hidden_states=True).hidden_states
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fewer_tokens_are_refused_where_the_model_reads_patches() -> None:
    with pytest.raises(ValueError, match="needs the whole patch grid after the last block"):
        with_deletion(llava(), DeletionConfig(block=2, count=3, fill="none"))
    with_deletion(CLIP_CLASSIFIER.build(), DeletionConfig(block=2, count=3, fill="none"))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [({}, (3,)), ({"vision_feature_layer": -1}, (4,)), ({"vision_feature_layer": [-2, 1]}, (3, 1))],
)
def test_the_features_are_the_tokens_that_the_language_model_reads(settings: Any, layers: tuple[int, ...]) -> None:
    model = llava(**settings)
    tower = find_tower(model)
    assert states_read(model, tower) == layers
    with torch.no_grad():
        features = image_features(model, {"pixel_values": pixels()})
        states = tower.module(pixels(), output_hidden_states=True).hidden_states
    tokens = torch.cat([torch.nn.functional.normalize(states[i][:, 1:], dim=-1) for i in layers], 1)
    torch.testing.assert_close(features, tokens.flatten(1) / tokens.shape[1] ** 0.5)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("settings", [{}, {"vision_feature_layer": [-2, 1]}])
def test_trials_of_such_a_model_are_the_same_bits_with_and_without_the_record(settings: Any) -> None:
    model, batches = llava(**settings), [{"pixel_values": pixels(3)}]
    runners = [TrialRunner(model, RegCacheConfig(registers={"mode": "none"}), batches, reuse=r) for r in (False, True)]
    objectives = [CosineObjective(r.float_model, batches) for r in runners]
    for deletion in (DeletionConfig(), DELETION, DeletionConfig(block=3, count=2)):
        plain, reused = (r.score(None, deletion, o) for r, o in zip(runners, objectives, strict=True))
        assert torch.equal(plain, reused)
