"""Registers at run time: exact equivalences, independence, bookkeeping (docs/method.md 4 and 5)."""
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from models import (
    BLOCKS,
    HEAD_DIM,
    HEADS,
    INNER,
    MODELS,
    TOWER_INSIDE,
    TOWER_PREFIX,
    TOWERS,
    TinyModel,
    random_cache,
)
from references import epilogue_attention, part
from torch import nn

from optimum_regcache import DeletionConfig, RegisterCache
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.registers import get_register_cache, prepare_tower, set_deletion, set_registers

every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=lambda t: t.name)
every_tower = pytest.mark.parametrize("tiny", [*TOWERS.values(), *INNER.values()], ids=lambda t: t.name)
CLIP = TOWERS["clip"]


def with_registers(tiny: TinyModel, cache: RegisterCache) -> Any:
    model = tiny.build()
    set_registers(model, cache)
    return model


def everything(tiny: TinyModel, model: Any) -> list[torch.Tensor]:
    """Every tensor of the output, hidden states and attentions included, with eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**tiny.inputs(), output_hidden_states=True, output_attentions=True)
    output = output.get("vision_model_output", output)
    if not (TOWER_INSIDE and tiny.name == "siglip_dual"):  # releases before 5.6 collect nothing there
        assert len(output.hidden_states) == BLOCKS + 1
        assert len(output.attentions) == BLOCKS
    return [t for v in output.values() for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, torch.Tensor)]


def first(output: Any) -> torch.Tensor:
    """The attention module's result; before the weights, if it returns those too."""
    return output[0] if isinstance(output, tuple) else output


def content(tiny: TinyModel, output: torch.Tensor) -> torch.Tensor:
    """[tokens, D]: the rows of ``output`` that are not padding."""
    mask = tiny.inputs().get("pixel_attention_mask")
    return output.flatten(0, 1) if mask is None else output[mask.bool()]


# nothing installed


@every_model
def test_nothing_installed_is_bit_identical(tiny: TinyModel) -> None:
    native, wired = tiny.build(), tiny.build()
    runtime = prepare_tower(wired)
    assert prepare_tower(wired) is runtime
    assert torch.equal(tiny.run(wired), tiny.run(native))
    assert get_register_cache(wired) is None
    assert list(wired.state_dict()) == list(native.state_dict())
    for a, b in zip(wired.modules(), native.modules(), strict=True):
        assert isinstance(a, type(b))
        assert type(a).__name__ == type(b).__name__
    for a, b in zip(everything(tiny, wired), everything(tiny, native), strict=True):
        assert torch.equal(a, b)


@every_model
def test_removed_registers_leave_no_trace(tiny: TinyModel) -> None:
    native, model = tiny.build(), tiny.build()
    set_registers(model, random_cache(num_copies=2.0))
    set_deletion(model, DeletionConfig(block=2, count=2))
    expected = tiny.run(native)
    assert (tiny.run(model) - expected).abs().max() > 1e-3
    set_registers(model, None)
    set_deletion(model, DeletionConfig())
    assert torch.equal(tiny.run(model), expected)
    assert list(model.state_dict()) == list(native.state_dict())


# equivalent forms of the prefix


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_tower
def test_one_biased_row_equals_tau_rows_equals_epilogue(tiny: TinyModel, implementation: str) -> None:
    tau, blocks = 3, (1, 2, 3)
    one = random_cache(blocks, num_copies=tau)
    rows = {b: one.rows(b) for b in blocks}
    many = RegisterCache(
        {b: k.repeat(1, tau, 1) for b, (k, _) in rows.items()},
        {b: v.repeat(1, tau, 1) for b, (_, v) in rows.items()},
        BLOCKS,
    )
    biased, repeated = with_registers(tiny, one), with_registers(tiny, many)
    seen: dict[int, tuple[Any, ...]] = {}
    for index in blocks:
        attention = find_tower(biased).attention(index)

        def note(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"), first(output)

        attention.register_forward_hook(note, with_kwargs=True)
    for model in (biased, repeated):
        model.set_attn_implementation(implementation)
    plain, padding = tiny.run(tiny.build()), tiny.inputs().get("pixel_attention_mask")
    output = tiny.run(biased)
    assert (content(tiny, output) - content(tiny, plain)).abs().max() > 0.05
    torch.testing.assert_close(output, tiny.run(repeated), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for index, (hidden, angles, actual) in seen.items():
            attention = find_tower(biased).attention(index)
            expected = epilogue_attention(attention, hidden, *rows[index], tau, padding, angles)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert sorted(seen) == list(blocks)


@pytest.mark.parametrize("num_copies", [1e-30, 1e-300])
@every_tower
def test_vanishing_logit_bias_is_the_baseline(tiny: TinyModel, num_copies: float) -> None:
    model = with_registers(tiny, random_cache((0, 1, 2, 3), registers=2, num_copies=num_copies))
    torch.testing.assert_close(tiny.run(model), tiny.run(tiny.build()), rtol=1e-5, atol=1e-5)


@every_tower
def test_large_logit_bias_leaves_only_the_register(tiny: TinyModel) -> None:
    cache = random_cache((3,), num_copies=1e30)
    model = with_registers(tiny, cache)
    attention, seen = find_tower(model).attention(3), []
    attention.register_forward_hook(lambda module, args, output: seen.append(first(output)))
    tiny.run(model)
    out = part(attention, "out")
    with torch.no_grad():
        expected = out(cache.rows(3)[1].flatten())
    torch.testing.assert_close(seen[0], expected.expand_as(seen[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_copies", [1.0, 2.5])
@every_model
def test_eager_equals_sdpa(tiny: TinyModel, num_copies: float) -> None:
    model = with_registers(tiny, random_cache(registers=2, num_copies=num_copies))
    fused = tiny.run(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(tiny.run(model), fused, rtol=1e-5, atol=1e-5)


@every_tower
def test_attentions_include_the_register_columns(tiny: TinyModel) -> None:
    model = with_registers(tiny, random_cache((1, 2), registers=3, num_copies=2.0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**tiny.inputs(), output_attentions=True)
    tokens = output.last_hidden_state.shape[1]
    for index, weights in enumerate(output.attentions):
        extra = 3 if index in (1, 2) else 0
        assert weights.shape == (3, HEADS, tokens, extra + tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, HEADS, tokens), rtol=0, atol=1e-5)
        assert (weights[..., :extra] > 0).all()
    assert torch.equal(output.last_hidden_state, tiny.run(model))


# independence and side effects


@every_tower
def test_the_cache_never_grows_or_changes(tiny: TinyModel) -> None:
    cache = random_cache()
    before = {b: [t.clone() for t in cache.rows(b)] for b in cache.blocks}
    model = with_registers(tiny, cache)
    first = tiny.run(model)
    for seed in (5, 6):
        tiny.run(model, tiny.inputs(seed, batch=2))
    assert torch.equal(tiny.run(model), first)
    stored = get_register_cache(model)
    for held in (cache, stored):
        assert [layer.get_seq_length() for layer in held.layers] == [0, 1, 0, 1]
        for b, rows in before.items():
            assert all(torch.equal(x, y) for x, y in zip(held.rows(b), rows, strict=True))


@every_tower
def test_batch_mates_do_not_matter(tiny: TinyModel) -> None:
    model = with_registers(tiny, random_cache(num_copies=2.0))
    inputs = tiny.inputs()
    together = tiny.run(model, inputs)
    for i in range(3):
        alone = tiny.run(model, {k: v[i : i + 1] for k, v in inputs.items()})
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_padding_is_never_attended_to() -> None:
    tiny = TOWERS["siglip2"]
    model = with_registers(tiny, random_cache(num_copies=2.0))
    inputs = tiny.inputs()
    padded = inputs["pixel_attention_mask"] == 0
    assert padded.any(1).tolist() == [False, True, True]
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][padded] = 1e3
    with torch.no_grad():
        a, b = model(**inputs), model(**changed)
    assert not torch.equal(a.last_hidden_state[padded], b.last_hidden_state[padded])
    assert torch.equal(a.last_hidden_state[~padded], b.last_hidden_state[~padded])
    assert torch.equal(a.pooler_output, b.pooler_output)


@pytest.mark.parametrize("name", ["clip_dual", "siglip_dual"])
def test_text_tower_is_left_alone(name: str) -> None:
    tiny = MODELS[name]
    native, model = tiny.build(), with_registers(tiny, random_cache())
    ids = tiny.inputs()["input_ids"]
    with torch.no_grad():
        a, b = (m.get_text_features(input_ids=ids).pooler_output for m in (native, model))
        image = [m.get_image_features(tiny.inputs()["pixel_values"]).pooler_output for m in (native, model)]
    assert torch.equal(a, b)
    assert not torch.allclose(*image, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "dinov2_registers"])
def test_compiled_equals_eager(name: str) -> None:
    tiny = TOWERS[name]
    model = with_registers(tiny, random_cache(num_copies=2.0))
    set_deletion(model, DeletionConfig(block=2, count=3))
    expected = tiny.run(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tiny.run(compiled), expected)
    other = tiny.inputs(seed=7)
    assert torch.equal(tiny.run(compiled, other), tiny.run(model, other))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@every_model
def test_copies_are_equal_and_independent(tiny: TinyModel, duplicate: Any) -> None:
    model = with_registers(tiny, random_cache(num_copies=2.0))
    set_deletion(model, DeletionConfig(block=2, count=2))
    expected = tiny.run(model)
    twin = duplicate(model)
    assert torch.equal(tiny.run(twin), expected)
    set_registers(twin, None)
    set_deletion(twin, DeletionConfig())
    assert torch.equal(tiny.run(twin), tiny.run(tiny.build()))
    assert torch.equal(tiny.run(model), expected)
    assert prepare_tower(twin) is not prepare_tower(model)


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_two_threads_at_once(name: str) -> None:
    """Two batches of different size go through the same model in lockstep, block by block."""
    tiny = TOWERS[name]
    model = with_registers(tiny, random_cache(num_copies=2.0))
    set_deletion(model, DeletionConfig(block=1, count=2))
    work = [tiny.inputs(seed=1, batch=3), tiny.inputs(seed=2, batch=2)]
    expected = [tiny.run(model, inputs) for inputs in work]
    barrier = threading.Barrier(2)
    tower = find_tower(model)

    def meet(*_: Any) -> None:
        barrier.wait(timeout=60)

    for module in (tower.module.embeddings, *tower.blocks):
        module.register_forward_hook(meet)
    outputs: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: outputs.update({i: tiny.run(model, x)})) for i, x in enumerate(work)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        torch.testing.assert_close(outputs[i], expected[i], rtol=1e-6, atol=1e-6)


# storing registers


def test_registers_are_ordinary_buffers_in_the_model_dtype() -> None:
    cache = random_cache((1, 3), registers=2, num_copies=2.5)
    model = CLIP.build().to(torch.bfloat16)
    set_registers(model, cache)
    names = [n for n in model.state_dict() if "register" in n]
    assert names == [
        f"{TOWER_PREFIX}encoder.layers.{b}.self_attn.register_{kind}" for b in (1, 3) for kind in ("key", "value")
    ]
    stored = get_register_cache(model)
    assert (stored.blocks, stored.num_registers, stored.num_copies) == ((1, 3), 2, 2.5)
    for b in stored.blocks:
        for mine, given in zip(stored.rows(b), cache.rows(b), strict=True):
            assert torch.equal(mine, given.to(torch.bfloat16))
    assert get_register_cache(model.float()).rows(1)[0].dtype == torch.float32
    inputs = {"pixel_values": CLIP.inputs()["pixel_values"]}
    assert CLIP.run(model, inputs).isfinite().all()


def test_stored_registers_are_copies() -> None:
    """Changing the cache later must not change the model, and shared memory cannot be saved as safetensors."""
    rows = {b: torch.randn(HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(b)) for b in (1, 3)}
    model = with_registers(CLIP, RegisterCache(rows, rows, BLOCKS))
    before = CLIP.run(model)
    buffers = [t for n, t in model.state_dict().items() if "register_" in n]
    assert len({t.untyped_storage().data_ptr() for t in buffers}) == len(buffers) == 4
    for row in rows.values():
        row.zero_()
    assert torch.equal(CLIP.run(model), before)


def test_new_registers_replace_old_ones() -> None:
    model = with_registers(CLIP, random_cache((0, 1, 2), num_copies=4.0))
    set_registers(model, random_cache((2, 3), seed=1))
    assert torch.equal(CLIP.run(model), CLIP.run(with_registers(CLIP, random_cache((2, 3), seed=1))))
    assert get_register_cache(model).blocks == (2, 3)


def test_set_registers_errors() -> None:
    model = CLIP.build()
    with pytest.raises(ValueError, match=r"The register cache is for 6 blocks, this encoder has 4"):
        set_registers(model, random_cache(num_blocks=6))
    for heads, width in ((2, HEAD_DIM), (HEADS, 8)):
        rows = {1: torch.zeros(heads, 1, width)}
        message = (
            rf"Register rows of block 1 have shape \({heads}, 1, {width}\); this encoder needs \[4, registers, 16\]"
        )
        with pytest.raises(ValueError, match=message):
            set_registers(model, RegisterCache(rows, rows, BLOCKS))
    with pytest.raises(ValueError, match="Linear contains no supported vision encoder"):
        prepare_tower(nn.Linear(1, 1))


def test_a_refused_cache_changes_nothing() -> None:
    good = random_cache(num_copies=2.0)
    model = with_registers(CLIP, good)
    before = CLIP.run(model)
    rows = {2: torch.zeros(2, 1, HEAD_DIM)}
    with pytest.raises(ValueError, match="Register rows of block 2 have shape"):
        set_registers(model, RegisterCache(rows, rows, BLOCKS))
    assert torch.equal(CLIP.run(model), before)


def test_attention_without_additive_masks_is_refused() -> None:
    model = with_registers(CLIP, random_cache((0,)))
    model.config._attn_implementation = "flash_attention_2"
    message = "supports attn_implementation eager and sdpa, got 'flash_attention_2'. Call model.set_attn_impl"
    with pytest.raises(ValueError, match=message):
        CLIP.run(model)
