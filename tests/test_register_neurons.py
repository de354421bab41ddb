"""Test-time registers: the planted neurons as ground truth, the two variants, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import DINOV2_BACKBONE, TOWERS, TinyModel, random_cache
from torch.nn import functional as F

from optimum_regcache.architectures import find_tower
from optimum_regcache.config import DeletionConfig
from optimum_regcache.evaluation.features import encode
from optimum_regcache.evaluation.norms import measure_token_norms, visit_tokens
from optimum_regcache.reference import load
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import (
    find_register_neurons,
    register_cache_from_neurons,
    set_register_neurons,
    zero_register_neurons,
)

NEURONS = {1: [3, 7], 2: [0]}
PLAIN = [t for t in TOWERS.values() if t.name not in ("dinov2_swiglu", "siglip2")]
plain = pytest.mark.parametrize("tiny", PLAIN, ids=lambda t: t.name)


def induced() -> tuple[Any, list[Any]]:
    """The embedded CLIP whose one register neuron was induced by training, with 32 of its scenes."""
    reference = load("clip-scenes-induced")
    images = reference.dataset("search", 32, 0)
    pixels = reference.processor(images=list(images["image"]), return_tensors="pt")["pixel_values"]
    return reference.model.eval(), [{"pixel_values": p} for p in pixels.split(16)]


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, list[Any]]:
    return induced()


def test_the_induced_neuron_is_found_and_stands_alone(encoder: Any) -> None:
    found = find_register_neurons(encoder[0], encoder[1], top_k=5, progress=False)
    (block, _), *others = found.neurons
    assert block == 3
    assert found.scores[0] > 100 * found.scores[1]
    assert len(others) == 4
    assert found.images == 32


def test_an_encoder_without_outliers_has_no_register_neurons() -> None:
    reference = load("clip-scenes")
    images = reference.dataset("search", 16, 0)
    pixels = reference.processor(images=list(images["image"]), return_tensors="pt")["pixel_values"]
    found = find_register_neurons(reference.model.eval(), [{"pixel_values": pixels}], progress=False)
    assert not found.neurons
    assert found.reason


@pytest.mark.parametrize("variant", ["token", "kv"])
def test_both_variants_take_the_outliers_away(encoder: Any, variant: str) -> None:
    model, batches = copy.deepcopy(encoder[0]), encoder[1]
    neurons = find_register_neurons(model, batches, top_k=1, progress=False).by_block()
    before, features = measure_token_norms(model, batches), encode(model, batches)
    if variant == "token":
        set_register_neurons(model, neurons)
    else:
        cache = register_cache_from_neurons(model, batches, neurons, progress=False)
        assert cache.blocks == (4, 5)
        zero_register_neurons(model, neurons)
        set_registers(model, cache)
    after = measure_token_norms(model, batches)
    assert before.max_fc2_input[3] > 500
    assert after.max_fc2_input[3] < 20
    assert after.max_block_input[4] < before.max_block_input[4] / 4
    similarity = F.cosine_similarity(encode(model, batches), features).mean()
    assert similarity > (0.98 if variant == "token" else 0.999)


@plain
def test_the_register_takes_over_the_largest_value_and_the_rest_stays(tiny: TinyModel) -> None:
    model, lead = tiny.build(), tiny.lead
    native = tiny.run(tiny.build())
    inputs: dict[tuple[bool, int], torch.Tensor] = {}

    def note(installed: bool) -> Any:
        def visit(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
            if site == "fc2" and block == 1:
                inputs[installed, block] = x.clone()

        return visit

    set_register_neurons(model, {1: NEURONS[1]})
    visit_tokens(model, [tiny.inputs()], note(True))
    z = inputs[True, 1]
    with torch.no_grad():
        tower = find_tower(model)
        seen: list[torch.Tensor] = []
        handle = tower.norm_consumers(1, 1)[0].register_forward_hook(lambda m, i, o: seen.append(o))
        tiny.run(model)
        handle.remove()
        activation = torch.nn.functional.gelu if tower.config.hidden_act == "gelu" else None
        raw = seen[0]
    assert z.shape[1] == native.shape[1] + 1 if tiny.name != "siglip" else z.shape[1] == 17
    for neuron in NEURONS[1]:
        assert torch.equal(z[:, lead + 1 :, neuron], torch.zeros_like(z[:, lead + 1 :, neuron]))
        if activation is not None:
            column = activation(raw)[..., neuron]
            largest = column.gather(1, column.abs().argmax(1, keepdim=True))[:, 0]
            torch.testing.assert_close(z[:, lead, neuron], largest)
            torch.testing.assert_close(z[:, :lead, neuron], column[:, :lead])
    untouched = [n for n in range(z.shape[-1]) if n not in NEURONS[1]]
    if activation is not None:
        torch.testing.assert_close(z[..., untouched], activation(raw)[..., untouched])


@plain
def test_output_keeps_its_shape_and_removal_is_bit_exact(tiny: TinyModel) -> None:
    model = tiny.build()
    native, names = tiny.run(model), list(model.state_dict())
    set_register_neurons(model, NEURONS)
    set_register_neurons(model, NEURONS)  # again: nothing is wrapped twice
    assert list(model.state_dict()) == names
    changed = tiny.run(model)
    assert changed.shape == native.shape
    assert not torch.equal(changed, native)
    assert torch.equal(tiny.run(copy.deepcopy(model)), changed)
    single = torch.cat([tiny.run(model, {k: v[i : i + 1] for k, v in tiny.inputs().items()}) for i in range(3)])
    torch.testing.assert_close(single, changed, atol=1e-4, rtol=1e-4)  # images do not see each other
    set_register_neurons(model, None)
    assert torch.equal(tiny.run(model), native)


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
    model = tiny.build()
    zero_register_neurons(model, NEURONS)

    def check(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        if site == "fc2" and block in NEURONS:
            assert not x[..., NEURONS[block]].any()

    visit_tokens(model, [tiny.inputs()], check)


def test_refusals_say_why() -> None:
    clip = TOWERS["clip"].build()
    with pytest.raises(ValueError, match="block"):
        set_register_neurons(clip, {9: [0]})
    with pytest.raises(ValueError, match=r"128|127"):
        set_register_neurons(clip, {1: [500]})
    for tiny in (TOWERS["dinov2_swiglu"], TOWERS["siglip2"], DINOV2_BACKBONE):
        with pytest.raises(ValueError, match=r"SwiGLU|gate|mask|grid|hidden state|padding"):
            set_register_neurons(tiny.build(), {1: [0]})
