"""Test-time registers: the planted neurons as ground truth, the two variants, and what is refused."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import BLOCKS, DINOV2_BACKBONE, HEADS, TOWERS, TinyModel, quantized, random_cache
from torch.nn import functional as F

from optimum_regcache.config import DeletionConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import load, planted
from optimum_regcache.encoders.passes import encode
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.visiting import visit_tokens
from optimum_regcache.evaluation import AccuracyObjective
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import (
    RegisterNeuronActivation,
    _outlier_threshold,
    find_register_neurons,
    register_cache_from_neurons,
    set_register_neurons,
    zero_register_neurons,
)

NEURONS = {1: [3, 7], 2: [0]}
PLANTED = {(planted.PLANTED_BLOCK, 0), (planted.PLANTED_BLOCK, 1)}
PLAIN = [t for t in TOWERS.values() if t.name not in ("dinov2_swiglu", "siglip2")]
plain = pytest.mark.parametrize("tiny", PLAIN, ids=lambda t: t.name)


def images_of(name: str, count: int, split: str = "search") -> tuple[Any, list[Any], ImageInputs]:
    reference = load(name)
    inputs = ImageInputs(reference.dataset(split, count, 0), reference.processor)
    return reference.model.eval(), list(inputs.batches(16)), inputs


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, list[Any]]:
    """The embedded CLIP whose one register neuron was induced by training, with 32 of its scenes."""
    return images_of("clip-scenes-induced", 32)[:2]


@pytest.fixture(scope="module")
def truth() -> tuple[Any, list[Any]]:
    """The model with two planted register neurons, with 32 images."""
    return images_of("planted-outlier", 32)[:2]


def install(model: Any, batches: list[Any], variant: str, top_k: int = 10) -> None:
    neurons = find_register_neurons(model, batches, top_k=top_k, progress=False).by_block()
    if variant == "token":
        set_register_neurons(model, neurons)
    else:
        cache = register_cache_from_neurons(model, batches, neurons, progress=False)
        assert cache.blocks == (4, 5)
        assert cache.num_copies == 1.0
        zero_register_neurons(model, neurons)
        set_registers(model, cache)


def activations(tiny: TinyModel, model: Any, block: int, inputs: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(activation function's own output, fc2 input) of a block."""
    seen: dict[str, torch.Tensor] = {}
    tower = find_tower(model)
    inner = next(m for m in tower.blocks[block].modules() if isinstance(m, RegisterNeuronActivation)).inner
    handles = [
        inner.register_forward_hook(lambda module, args, output: seen.update(raw=output.clone())),
        tower.mlp_out(block).register_forward_pre_hook(lambda module, args: seen.update(moved=args[0].clone())),
    ]
    tiny.run(model, inputs)
    for handle in handles:
        handle.remove()
    return seen["raw"], seen["moved"]


def moved_slowly(raw: torch.Tensor, units: list[int], lead: int) -> torch.Tensor:
    """docs/method.md 11.12, one number at a time."""
    z = raw.clone()
    for image in range(z.shape[0]):
        for unit in units:
            values = raw[image, :, unit].tolist()
            z[image, lead, unit] = max(values, key=abs)
            for token in range(lead + 1, len(values)):
                z[image, token, unit] = 0.0
    return z


def test_the_planted_neurons_are_found_and_no_others(truth: Any) -> None:
    """Ten are asked for; units that work on all tokens are not among them."""
    found = find_register_neurons(truth[0], truth[1], top_k=10, progress=False)
    assert set(found.neurons) == PLANTED
    assert found.detection_block == found.highest_block == planted.PLANTED_BLOCK
    assert min(found.scores) > 100
    black = sum(len(planted.black_patches("search", i)) for i in range(32))
    assert 0.8 * black < found.outliers <= black
    assert found.reason == ""


def test_the_induced_neuron_is_found_and_stands_alone(encoder: Any) -> None:
    found = find_register_neurons(encoder[0], encoder[1], top_k=5, progress=False)
    (block, _), *others = found.neurons
    assert block == 3
    assert found.scores[0] > 100 * found.scores[1]
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert len(others) == 4
    assert found.images == 32


def test_an_encoder_without_outliers_has_no_register_neurons() -> None:
    model, batches, _ = images_of("clip-scenes", 16)
    found = find_register_neurons(model, batches, progress=False)
    assert not found.neurons
    assert not found.by_block()
    assert found.outliers == found.images == 0
    assert found.reason.startswith("no outlier tokens: the largest l2 norm at the output of block")


def test_threshold_and_blocks_can_be_given(truth: Any) -> None:
    model, batches = truth
    found = find_register_neurons(model, batches, detection_block=5, threshold=200.0, highest_block=2, progress=False)
    assert (found.detection_block, found.threshold, found.highest_block) == (5, 200.0, 2)
    assert not found.neurons  # the planted units come later
    assert found.reason == "no unit is 3 times as active on the outlier tokens as on the other patches"


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_many_outliers_do_not_hide_each_other(share: float) -> None:
    norms = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1
    norms[: int(1000 * share)] = 50.0
    assert (norms > _outlier_threshold(norms)).sum() == int(1000 * share)


def test_scores_do_not_depend_on_the_batches_or_the_padding() -> None:
    tiny = TOWERS["siglip2"]
    model, inputs = tiny.build(), tiny.inputs(batch=4)
    kwargs: dict[str, Any] = {"detection_block": 2, "threshold": 1.0, "highest_block": 3, "top_k": 4, "progress": False}
    kwargs["threshold"] = find_register_neurons(model, [inputs], **kwargs).threshold
    whole = find_register_neurons(model, [inputs], **kwargs)
    noisy = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    noisy["pixel_values"][inputs["pixel_attention_mask"] == 0] = 100.0
    single = [{k: v[i : i + 1] for k, v in noisy.items()} for i in range(4)]
    other = find_register_neurons(model, single, **kwargs)
    assert whole.outliers == other.outliers == int(inputs["pixel_attention_mask"].sum())
    assert whole.images == other.images == 4


@pytest.mark.parametrize("variant", ["token", "kv"])
def test_both_variants_take_the_induced_outliers_away(encoder: Any, variant: str) -> None:
    model, batches = copy.deepcopy(encoder[0]), encoder[1]
    before, features = measure_token_norms(model, batches), encode(model, batches)
    install(model, batches, variant, top_k=1)
    after = measure_token_norms(model, batches)
    assert before.max_fc2_input[3] > 500
    assert after.max_fc2_input[3] < 20
    assert after.max_block_input[4] < before.max_block_input[4] / 4
    similarity = F.cosine_similarity(encode(model, batches), features).mean()
    assert similarity > (0.98 if variant == "token" else 0.999)


@pytest.mark.parametrize("variant", ["token", "kv"])
def test_both_variants_take_the_planted_outliers_away(truth: Any, variant: str) -> None:
    model, batches = copy.deepcopy(truth[0]), truth[1]
    before = measure_token_norms(model, batches)
    install(model, batches, variant)
    after = measure_token_norms(model, batches)
    block = planted.PLANTED_BLOCK
    assert before.max_fc2_input[block] > 1000
    assert after.max_fc2_input[block] < 3 * after.max_fc2_input[block - 1]
    assert after.max_block_input[block + 1] < before.max_block_input[block + 1] / 10
    assert (after.max_any_fc2_input[block] > 1000) == (variant == "token")  # the register token carries it now
    _, report, inputs = images_of("planted-outlier", 64, "report")
    features = encode(truth[0], report)
    assert F.cosine_similarity(encode(model, report), features).mean() > 0.999
    assert AccuracyObjective(report, inputs.labels()).scores(model).mean() > 0.98


def test_the_register_cache_is_the_mean_over_images(encoder: Any) -> None:
    model, batches = encoder[0], encoder[1][:1]
    cache = register_cache_from_neurons(model, batches, {3: [67], 4: []}, progress=False)
    single = [{"pixel_values": batches[0]["pixel_values"][i : i + 1]} for i in range(16)]
    rows = [register_cache_from_neurons(model, [image], {3: [67]}, progress=False) for image in single]
    assert cache.blocks == (4, 5)
    for block in cache.blocks:
        for which in (0, 1):
            mean = torch.stack([row.rows(block)[which] for row in rows]).mean(0)
            torch.testing.assert_close(cache.rows(block)[which], mean, atol=1e-4, rtol=1e-4)
    assert not prepare_tower(model).extra_token  # a copy was run


@plain
def test_the_cache_has_rows_behind_the_first_neuron(tiny: TinyModel) -> None:
    model = tiny.build()
    set_registers(model, random_cache((2, 3)))  # neither has a part in it
    set_deletion(model, DeletionConfig(block=1, count=2))
    cache = register_cache_from_neurons(model, [tiny.inputs()], NEURONS, progress=False)
    assert cache.blocks == (2, 3)
    assert cache.rows(2)[0].shape == (HEADS, 1, 16)
    plain_cache = register_cache_from_neurons(tiny.build(), [tiny.inputs()], NEURONS, progress=False)
    assert torch.equal(cache.rows(3)[1], plain_cache.rows(3)[1])


@plain
def test_the_register_takes_over_the_largest_value_and_the_rest_stays(tiny: TinyModel) -> None:
    model, tokens = tiny.build(), tiny.lead + 1 + 16
    set_register_neurons(model, NEURONS)
    for block, units in NEURONS.items():
        raw, moved = activations(tiny, model, block)
        assert raw.shape[1] == tokens
        assert torch.equal(moved, moved_slowly(raw, units, tiny.lead))
        assert not torch.equal(moved, raw)


@plain
def test_the_token_starts_at_zero_behind_the_leading_tokens(tiny: TinyModel) -> None:
    model, seen = tiny.build(), []
    set_register_neurons(model, NEURONS)
    tower = find_tower(model)
    tower.norm(0, 0).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    tiny.run(model)
    assert not seen[0][:, tiny.lead].any()
    assert seen[0].any(-1).sum(1).tolist() == [tiny.lead + 16] * 3  # all others are something


@plain
def test_output_keeps_its_shape_and_removal_is_bit_exact(tiny: TinyModel) -> None:
    model = tiny.build()
    native, names = tiny.run(model), list(model.state_dict())
    set_register_neurons(model, {3: [1]})  # replaced by what comes now
    set_register_neurons(model, NEURONS)
    set_register_neurons(model, NEURONS)  # again: nothing is wrapped twice
    assert list(model.state_dict()) == names
    changed = tiny.run(model)
    assert changed.shape == native.shape
    assert not torch.equal(changed, native)
    single = torch.cat([tiny.run(model, {k: v[i : i + 1] for k, v in tiny.inputs().items()}) for i in range(3)])
    torch.testing.assert_close(single, changed, atol=1e-4, rtol=1e-4)  # images do not see each other
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.run(twin), changed)
    set_register_neurons(twin, None)
    assert torch.equal(tiny.run(twin), native)
    assert torch.equal(tiny.run(model), changed)  # the copy was another model
    set_register_neurons(model, {1: []})
    assert torch.equal(tiny.run(model), native)


@plain
def test_quantized_layers_see_the_moved_activation(tiny: TinyModel) -> None:
    model = quantized(tiny, registers={"mode": "none", "blocks": ()})
    set_register_neurons(model, NEURONS)
    raw, moved = activations(tiny, model, 1)
    assert torch.equal(moved, moved_slowly(raw, NEURONS[1], tiny.lead))
    installed = tiny.run(model)
    set_register_neurons(model, None)
    assert not torch.equal(tiny.run(model), installed)
    set_register_neurons(model, NEURONS)
    assert torch.equal(tiny.run(model), installed)


@plain
def test_the_register_token_is_never_deleted(tiny: TinyModel) -> None:
    model = tiny.build()
    set_register_neurons(model, NEURONS)
    set_registers(model, random_cache((2, 3)))
    set_deletion(model, DeletionConfig(block=2, count=3))
    runtime, seen = prepare_tower(model), []
    note = lambda *_: seen.append(runtime.current.selection.dropped.clone())  # noqa: E731
    find_tower(model).attention(2).register_forward_pre_hook(note)
    assert tiny.run(model).shape == tiny.run(tiny.build()).shape
    assert not seen[0][:, : tiny.lead + 1].any()
    assert seen[0].sum(1).tolist() == [3, 3, 3]


@plain
def test_silenced_units_are_exactly_zero(tiny: TinyModel) -> None:
    model, untouched = tiny.build(), tiny.build()
    zero_register_neurons(model, NEURONS)
    zero_register_neurons(model, {0: []})

    def check(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        if site == "fc2" and block in NEURONS:
            assert not x[..., NEURONS[block]].any()

    visit_tokens(model, [tiny.inputs()], check)
    pairs = zip(model.state_dict().items(), untouched.state_dict().values(), strict=True)
    changed = [name for (name, new), old in pairs if not torch.equal(new, old)]
    assert len(changed) == 4  # fc1's weight and bias, in two blocks


@pytest.mark.parametrize("tiny", [*TOWERS.values(), DINOV2_BACKBONE], ids=lambda t: t.name)
def test_nothing_to_install_changes_nothing(tiny: TinyModel) -> None:
    model, native = tiny.build(), tiny.build()
    set_register_neurons(model, {})
    set_register_neurons(model, None)
    result, expected = tiny.run(model), tiny.run(native)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_refusals_of_the_token_say_why() -> None:
    clip = TOWERS["clip"].build()
    with pytest.raises(ValueError, match="Register neurons of block 9, but the encoder has blocks 0 to 3"):
        set_register_neurons(clip, {9: [0]})
    with pytest.raises(ValueError, match=r"Register neurons \[500\] of block 1, but its MLP has units 0 to 127"):
        set_register_neurons(clip, {1: [0, 500]})
    assert not prepare_tower(clip).extra_token  # nothing half done
    with pytest.raises(ValueError, match="Dinov2Model has an MLP that multiplies two branches"):
        set_register_neurons(TOWERS["dinov2_swiglu"].build(), {1: [0]})
    with pytest.raises(ValueError, match="Siglip2VisionModel pads its images"):
        set_register_neurons(TOWERS["siglip2"].build(), {1: [0]})
    with pytest.raises(ValueError, match=r"Dinov2Backbone reshapes every hidden state .* \(variant 'kv'\)"):
        set_register_neurons(DINOV2_BACKBONE.build(), {1: [0]})


def test_refusals_of_the_search_say_why() -> None:
    tiny = TOWERS["clip"]
    model, batches = tiny.build(), [tiny.inputs()]
    with pytest.raises(ValueError, match="two branches"):
        find_register_neurons(TOWERS["dinov2_swiglu"].build(), batches)
    with pytest.raises(ValueError, match="detection_block=4, but the encoder has blocks 0 to 3"):
        find_register_neurons(model, batches, detection_block=BLOCKS)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        find_register_neurons(model, batches, top_k=0)
    with pytest.raises(ValueError, match="No images"):
        find_register_neurons(model, [])
    set_deletion(model, DeletionConfig(block=1, count=1))
    with pytest.raises(ValueError, match="or deletion are installed"):
        find_register_neurons(model, batches)
    set_deletion(model, DeletionConfig())
    set_register_neurons(model, NEURONS)
    with pytest.raises(ValueError, match=r"Remove them first: set_register_neurons\(model, None\)"):
        find_register_neurons(model, batches)


def test_refusals_of_the_kv_variant_say_why() -> None:
    tiny = TOWERS["clip"]
    model, batches = tiny.build(), [tiny.inputs()]
    with pytest.raises(ValueError, match="No register neurons to make a register cache from"):
        register_cache_from_neurons(model, batches, {1: []})
    with pytest.raises(ValueError, match="No images"):
        register_cache_from_neurons(model, [], NEURONS)
    with pytest.raises(ValueError, match="in block 3, the last one: no attention follows"):
        register_cache_from_neurons(model, batches, {3: [0]})
    with pytest.raises(ValueError, match=r"MLP of block 1 is quantized \(QuantLinear\)"):
        zero_register_neurons(quantized(tiny), NEURONS)
    with pytest.raises(ValueError, match="not zero at zero"):
        zero_register_neurons(TOWERS["vit"].build(hidden_act="sigmoid"), NEURONS)
