"""What may happen to outlier tokens instead of deletion at the block's input: `deletion.action` (docs/method.md 6)."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import PACKED, TOWERS, TinyModel, quantized, run_block
from references import neighbour_mean
from transformers import AutoModel

from optimum_regcache import DeletionConfig, RegCacheConfig, RegCacheQuantizer, backend_report, fuse, set_deletion
from optimum_regcache.calibration.calibrate import calibrate
from optimum_regcache.config.migrate import complete_part
from optimum_regcache.config.recipe import DataConfig, SearchConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.kernels import native
from optimum_regcache.methods._search.gradients import squared_gradients
from optimum_regcache.registers import prepare_tower
from optimum_regcache.search import TrialRunner, check_fit, mine_tokens
from optimum_regcache.search.clipping import measure_clipping

BLOCK, COUNT = 2, 3
ACTIONS = ("replace", "late", "per_token")
UNPADDED = [t for t in TOWERS.values() if t.name not in ("siglip2", "dinov3")]
needs_int8 = pytest.mark.skipif(native.unavailable_reason() is not None, reason="fused blocks need an int8 kernel")


def deletion(action: str, **settings: Any) -> DeletionConfig:
    return DeletionConfig(block=BLOCK, count=COUNT, action=action, **settings)


def inputs_of(tiny: TinyModel, name: str) -> torch.Tensor:
    """What arrives at the delete block (``block``) or at its MLP output projection (``fc2``) of the plain model."""
    model, seen = tiny.build(), []
    tower = find_tower(model)
    module = tower.blocks[BLOCK] if name == "block" else tower.mlp_out(BLOCK)
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tiny.run(model)
    return seen[0]


def ranked(states: torch.Tensor, lead: int) -> list[int]:
    """Patches with the largest l_inf norm of one image [N, D]."""
    return sorted(np.argsort(-states.abs().amax(-1).numpy()[lead:], kind="stable")[:COUNT].tolist())


def last_block(tiny: TinyModel, model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs(), output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("tiny", UNPADDED, ids=lambda t: t.name)
def test_replaced_tokens_are_the_mean_of_their_neighbours_and_go_on(tiny: TinyModel) -> None:
    model, expected = tiny.build(), []
    set_deletion(model, deletion("replace"))
    blocks = find_tower(tiny.build()).blocks
    with torch.no_grad():
        for hidden in inputs_of(tiny, "block"):
            filled = neighbour_mean(hidden[tiny.lead :].numpy(), ranked(hidden, tiny.lead), (4, 4))
            state = torch.cat((hidden[: tiny.lead], torch.from_numpy(filled)))[None]
            for block in blocks[BLOCK:]:
                state = run_block(block, state)
            expected.append(state[0])
    torch.testing.assert_close(last_block(tiny, model), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiny", UNPADDED, ids=lambda t: t.name)
def test_late_tokens_take_part_in_the_block_but_not_in_its_fc2_and_later(tiny: TinyModel) -> None:
    model, plain, expected, rows = tiny.build(), tiny.build(), [], []
    set_deletion(model, deletion("late", fill="none"))
    find_tower(model).mlp_out(BLOCK).register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    blocks = find_tower(plain).blocks
    with torch.no_grad():
        for hidden, fc2 in zip(inputs_of(tiny, "block"), inputs_of(tiny, "fc2"), strict=True):
            gone = [tiny.lead + p for p in ranked(fc2, tiny.lead)]
            state = run_block(blocks[BLOCK], hidden[None])[:, [n for n in range(len(hidden)) if n not in gone]]
            for block in blocks[BLOCK + 1 :]:
                state = run_block(block, state)
            expected.append(state[0])
    found = last_block(tiny, model)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert rows == [tiny.lead + 16 - COUNT]  # hooks of others, calibration among them, see what is left
    # masked in place, and filled, the kept tokens are the same
    set_deletion(model, deletion("late"))
    masked = last_block(tiny, model)
    dropped = prepare_tower(model).current.chosen
    assert dropped is not None
    torch.testing.assert_close(masked[~dropped].reshape(found.shape), found, atol=1e-4, rtol=1e-4)
    for image, gone in zip(masked.numpy(), dropped[:, tiny.lead :].numpy(), strict=True):
        patches = image[tiny.lead :]
        np.testing.assert_allclose(patches, neighbour_mean(patches, list(np.flatnonzero(gone)), (4, 4)), atol=1e-4)


def test_fc2_scales_the_tokens_by_rank_and_clips_the_others() -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny, registers={"mode": "none", "blocks": ()}, deletion={"action": "per_token", "count": COUNT})
    layer: Any = find_tower(model).mlp_out(BLOCK)
    seen: dict[str, torch.Tensor] = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad():
        layer.input_scale *= 0.5  # so that tokens outside of the rank are clipped
        layer.reset_runtime()
    tiny.run(model, tiny.inputs(seed=5))
    for x, y in zip(seen["x"], seen["y"], strict=True):
        own = [1 + p for p in ranked(x, 1)]
        scale = layer.input_scale.repeat(len(x), 1)
        scale[own] = torch.maximum(scale[own], x[own].abs().amax(-1, keepdim=True) / 127)
        assert (x.abs() / 127 > scale).any()
        rounded = (x / scale).round().clamp(-127, 127) * scale
        expected = rounded @ layer.dequantized_weight().T + layer.bias
        torch.testing.assert_close(y, expected, atol=float(scale.max()), rtol=0.02)


def test_scales_are_calibrated_on_what_is_left() -> None:
    tiny = TOWERS["clip"]
    model, batch = tiny.build(), tiny.inputs(seed=4)
    name = next(n for n, m in model.named_modules() if m is find_tower(model).mlp_out(BLOCK))
    config = RegCacheConfig(registers={"mode": "none"})
    for action in ("late", "per_token"):
        set_deletion(model, deletion(action))
        scale, _ = calibrate(model, config, [batch])[name]
        set_deletion(model, DeletionConfig())
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        tiny.run(model, batch)
        handle.remove()
        kept = [x[[n for n in range(17) if n - 1 not in ranked(x, 1)]] for x in seen[0]]
        assert float(scale) == pytest.approx(float(torch.stack(kept).abs().max()) / 127)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_full_round_trip(action: str, tmp_path: Path) -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny, deletion={"action": action})
    wanted = tiny.run(model)
    model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path)
    assert prepare_tower(opened).deletion == DeletionConfig(block=2, count=2, action=action)
    again = (opened, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    assert all(torch.equal(tiny.run(other), wanted) for other in again)
    for other in again:  # what one of them takes off, the others keep
        set_deletion(other, DeletionConfig())
    plain = tiny.run(opened)
    assert all(torch.equal(tiny.run(other), plain) for other in again)
    assert torch.equal(tiny.run(model), wanted)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_int8)])
@pytest.mark.parametrize("action", ACTIONS)
def test_images_of_a_batch_and_executions_agree(action: str, fused: bool) -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny, deletion={"action": action, "fill": "neighbour_mean"})
    batch = tiny.inputs(batch=3)
    expected = tiny.run(model, batch)
    alone = torch.cat([tiny.run(model, {"pixel_values": x[None]}) for x in batch["pixel_values"]])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    if fused:
        skipped = fuse(model, attention="float32").skipped
        inside = f"deletion.action={action!r} takes tokens within this block."
        assert skipped == ({} if action == "replace" else {2: inside})
        cosine = torch.nn.functional.cosine_similarity(tiny.run(model, batch), expected, dim=-1)
        assert float(cosine.min()) > 0.99
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.compiler.reset()
    torch.testing.assert_close(tiny.run(compiled, batch), tiny.run(model, batch), atol=1e-5, rtol=1e-5)


@needs_int8
def test_a_fused_block_steps_aside_when_the_deletion_changes() -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny)
    fuse(model, attention="float32")
    for action in ("late", "per_token"):
        set_deletion(model, DeletionConfig(block=2, count=2, action=action))
        unfused = quantized(tiny)
        set_deletion(unfused, DeletionConfig(block=2, count=2, action=action))
        cosine = torch.nn.functional.cosine_similarity(tiny.run(model), tiny.run(unfused), dim=-1)
        assert float(cosine.min()) > 0.99
        layers = {layer.name: layer for layer in backend_report(model).layers}
        assert not any(layer.fused for name, layer in layers.items() if ".2." in name)
        assert all(layer.fused for name, layer in layers.items() if ".3." in name)
    set_deletion(model, DeletionConfig(block=2, count=2))
    assert all(layer.fused for layer in backend_report(model).layers)


@pytest.mark.parametrize("action", ["late", "per_token", "replace"])
def test_a_check_counts_what_is_taken(action: str) -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny, deletion={"action": action})
    batches = [tiny.inputs(seed=2)]
    before = tiny.run(model)
    checked = check_fit(model, batches).deletion
    assert checked.count == 2
    assert torch.equal(tiny.run(model), before)  # what was installed is installed again, hooks included
    clipping = measure_clipping(model, batches)
    assert clipping.unbounded == (1 if action == "per_token" else 0)


@pytest.fixture(scope="module")
def repair() -> tuple[TrialRunner, CosineObjective, Any]:
    def images(split: str, count: int) -> Any:
        return list(ImageInputs(planted.load_dataset(split, count), planted.build_processor()).batches(32))

    runner = TrialRunner(planted.build_planted_model(), RegCacheConfig(), images("calibration", 16))
    batches = images("report", 48)
    tokens = mine_tokens(runner.float_model, images("search", 24), [3], top=24, progress=False)[3]
    return runner, CosineObjective(runner.float_model, batches), tokens.average((3, 4, 5), 6).restricted((3, 4, 5), 15)


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({"action": "replace"}, True),
        ({"action": "late"}, True),
        ({"action": "per_token"}, True),
        ({"action": "late", "count": 4}, False),
        ({"action": "per_token", "count": 4}, False),
        ({"rule": "threshold", "kappa": 1.6, "count": 6}, True),
    ],
    ids=str,
)
def test_the_planted_encoder_is_repaired(changes: dict[str, Any], prefix: bool, repair: Any) -> None:
    runner, objective, cache = repair
    naive, alone, taken = (
        float(runner.score(c, d, objective).mean())
        for c, d in (
            (None, DeletionConfig()),
            (cache, DeletionConfig()),
            (cache if prefix else None, DeletionConfig(**{"block": 3, "count": 4, **changes})),
        )
    )
    assert naive < 0.7
    assert taken > 0.99
    assert taken > alone + 0.1


def test_old_configs_delete() -> None:
    stored = RegCacheConfig(registers={"mode": "none"}, deletion={"block": 1, "count": 2}).to_dict()
    del stored["deletion"]["action"]
    assert RegCacheConfig.from_dict(stored).deletion == DeletionConfig(block=1, count=2)
    assert complete_part("deletion", None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deletion": {"action": "drop"}}, r"deletion\.action must be one of delete, replace, late, per_token; got 'drop'"),
        *(
            ({"deletion": {"action": a, "fill": "none"}}, rf"deletion\.action='{a}' deletes no token, so that fill='none'")
            for a in ("replace", "per_token")
        ),
        *(
            ({"activations": a, "deletion": {"action": "per_token"}}, r"deletion\.action='per_token' gives a few tokens .*use")
            for a in ({"mode": "dynamic"}, {"symmetric": False}, {"outlier_tokens": "per_token"}, {"post_activation": "twin"})
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    config = RegCacheConfig(registers={"mode": "none"}, deletion={"block": 1, "count": 1})
    with pytest.raises(ValueError, match=message):
        config.replace(**changes)
    if changes["deletion"]["action"] == "per_token" and "activations" in changes:
        with pytest.raises(ValueError, match=message):  # a search would come to it
            RegCacheConfig(**changes)
        model = quantized(TOWERS["clip"], registers={"mode": "none", "blocks": ()}, activations=changes["activations"])
        before = prepare_tower(model).deletion
        with pytest.raises(ValueError, match=message):
            set_deletion(model, deletion("per_token"))
        assert prepare_tower(model).deletion == before


def test_a_float_fc2_has_no_scales() -> None:
    parts: Any = {"modules": {"ignore": (f"*.{BLOCK}.mlp.fc2",)}, "registers": {"mode": "none", "blocks": ()}}
    with pytest.raises(ValueError, match=r"deletion\.action='per_token' has no effect: .* of block 2 stays float"):
        quantized(TOWERS["clip"], deletion={"action": "per_token"}, **parts)
    assert quantized(TOWERS["clip"], deletion={"action": "late"}, **parts)
    search = SearchConfig(sensitive_block=BLOCK, always=True, refinements=("per_token",))
    items = [{"pixel_values": x} for x in TOWERS["clip"].inputs(3, 12)["pixel_values"]]
    with pytest.raises(ValueError, match="of block 2 stays float"):
        RegCacheQuantizer(TOWERS["clip"].build()).fit(
            items, RegCacheConfig(modules=parts["modules"]), search, DataConfig(num_samples=12), progress=False
        )


@pytest.mark.parametrize("action", ACTIONS)
def test_packed_towers_and_small_images_refuse_every_action(action: str) -> None:
    for tiny in PACKED.values():
        with pytest.raises(ValueError, match="packs the patches of all images into one sequence"):
            set_deletion(tiny.build(), deletion(action))
    model = TOWERS["vit"].build()
    set_deletion(model, DeletionConfig(block=1, count=9, action=action))
    if action == "per_token":  # fc2 is float: nobody asks for the tokens
        return
    with pytest.raises(ValueError, match=r"deletion\.count=9 would remove more than half of the 16 patch tokens"):
        TOWERS["vit"].run(model)
    set_deletion(model, DeletionConfig())  # the pass that failed left nothing behind
    assert torch.equal(TOWERS["vit"].run(model), TOWERS["vit"].run(TOWERS["vit"].build()))


@pytest.mark.parametrize("action", ["late", "per_token"])
def test_gradients_and_inputs_of_fc2_are_of_the_same_tokens(action: str) -> None:
    tiny = TOWERS["clip"]
    model = tiny.build()
    set_deletion(model, deletion(action))
    name = next(n for n, m in model.named_modules() if m is find_tower(model).mlp_out(BLOCK))
    watched = squared_gradients(model, [name], [tiny.inputs(batch=2)], draws=1)[name]
    assert len(watched.x) == len(watched.importance) == 2 * (17 - COUNT)
