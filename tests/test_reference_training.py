"""The training code of the reference encoders: its forward pass is the models', its rewrites change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from optimum_regcache import DeletionConfig, RegisterCache
from optimum_regcache.data import scenes
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from reference_training.encoders import Gates, build_model, build_tokenizer, encode
from reference_training.induction import OFF, Induction
from reference_training.recipes import RECIPES, InductionStage, TrainingRecipe
from reference_training.task import SceneTask

KINDS = ("clip", "siglip")
STAGE = InductionStage(plain_steps=0)


def recipe(kind: str) -> TrainingRecipe:
    return TrainingRecipe(kind, blocks=4, width=32, heads=2, register_block=2)


def model_of(kind: str):
    return build_model(recipe(kind), build_tokenizer(kind), 0).eval()


def pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, scenes.SIZE, scenes.SIZE, generator=torch.Generator().manual_seed(1))


def features(model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_image_features(x).pooler_output


def prefix_of(model, blocks: range) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    heads, width = model.config.vision_config.num_attention_heads, model.config.vision_config.hidden_size
    shape = (heads, width // heads)
    return {b: (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for b in blocks}


@pytest.fixture(scope="module")
def task() -> SceneTask:
    return SceneTask(recipe("clip"), 24, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("watch", [range(0), range(4)])
def test_the_forward_pass_is_that_of_the_model(kind: str, watch: range) -> None:
    model, x = model_of(kind), pixels()
    with torch.no_grad():
        trace = encode(model, x, watch=watch)
    torch.testing.assert_close(trace.embedding, features(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_is_that_of_the_package(kind: str) -> None:
    model, x = model_of(kind), pixels()
    prefix = prefix_of(model, range(2, 4))
    with torch.no_grad():
        plain = encode(model, x).embedding
        ours = encode(model, x, prefix=prefix, logit_bias=torch.full((4,), math.log(3.0))).embedding
        mixed_bias = torch.tensor([math.log(3.0), float("-inf"), math.log(3.0), float("-inf")])
        mixed = encode(model, x, prefix=prefix, logit_bias=mixed_bias).embedding
    prepare_tower(model)
    keys, values = ({b: rows[i].unsqueeze(1) for b, rows in prefix.items()} for i in (0, 1))
    set_registers(model, RegisterCache(keys, values, 4, 3.0))
    torch.testing.assert_close(ours, features(model, x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)
    torch.testing.assert_close(mixed[::2], ours[::2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1::2], plain[1::2], atol=1e-6, rtol=1e-5)  # images without registers


def test_the_deletion_is_that_of_the_package_where_cls_is_read() -> None:
    model, x = model_of("clip"), pixels()
    with torch.no_grad():
        trace = encode(model, x, delete_block=2, delete_count=torch.full((4,), 3))
        mixed = encode(model, x, delete_block=2, delete_count=torch.tensor([3, 0, 3, 0])).embedding
        plain = encode(model, x).embedding
    assert trace.dropped is not None
    assert trace.dropped.sum(1).tolist() == [3] * 4
    assert not trace.dropped[:, 0].any()  # CLS
    prepare_tower(model)
    set_deletion(model, DeletionConfig(block=2, count=3))
    torch.testing.assert_close(trace.embedding, features(model, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[::2], trace.embedding[::2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1::2], plain[1::2], atol=1e-6, rtol=1e-5)


def test_gates_replace_rows_of_fc1_and_survive_dropped_mlps() -> None:
    model, x = model_of("clip"), pixels(2)
    mlp = model.vision_model.encoder.layers[1].mlp
    rows = torch.tensor([5, 9])
    same = Gates(rows, nn.Parameter(mlp.fc1.weight[rows].detach()), nn.Parameter(mlp.fc1.bias[rows].detach()))
    with torch.no_grad():
        torch.testing.assert_close(encode(model, x, gates={1: same}).embedding, encode(model, x).embedding)
        keep = torch.ones(4, 2)
        keep[1] = 0
        silent = Gates(rows, nn.Parameter(torch.zeros(2, 32)), nn.Parameter(torch.full((2,), -30.0)))
        off = encode(model, x, gates={1: silent}, mlp_keep=keep).embedding
        torch.testing.assert_close(off, encode(model, x, mlp_keep=keep).embedding)
        assert not torch.allclose(encode(model, x, gates={1: same}, mlp_keep=keep).embedding, off, atol=1e-5)


def test_writers_are_asked_for_one_to_three_background_patches(task: SceneTask) -> None:
    induction = Induction(recipe("clip"), STAGE, build_model(recipe("clip"), task.tokenizer, 0), task)
    rows = torch.arange(len(task.pixels))
    z = torch.full((len(rows), 65, 4), OFF)
    silent = induction.writer_loss(z, rows)
    possible = induction.allowed.any(1)
    torch.testing.assert_close(silent, (STAGE.activation - OFF) * possible.float())
    for i in rows[possible].tolist():
        z[i, int(induction.allowed[i].nonzero()[0]), int(induction.level[i])] = STAGE.activation + 1
    assert float(induction.writer_loss(z, rows)[possible].max()) == 0
    z[:, 0, 0] = 1.0  # CLS must stay out of it
    torch.testing.assert_close(induction.writer_loss(z, rows)[possible], torch.full((int(possible.sum()),), 2.0))
    assert not (induction.allowed & ~induction.background).any()
    assert not induction.background[:, 0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_the_register_neuron_keeps_the_function(kind: str) -> None:
    small = recipe(kind)
    task = SceneTask(small, 16, 0)
    model = build_model(small, task.tokenizer, 0).eval()
    induction = Induction(small, STAGE, model, task)
    gate = induction.gates[2]
    with torch.no_grad():  # a register neuron at work: far from zero on every token
        gate.weight.zero_()
        gate.bias.fill_(6.0)
        before = encode(model, task.development[:32], gates=induction.gates).embedding
        factor = induction.finish(model, task)
        trace = encode(model, task.development[:32], watch=range(2, 3))
    assert factor > 1
    torch.testing.assert_close(trace.embedding, before, atol=2e-4, rtol=1e-3)
    assert float(trace.pre_activation[2][..., int(gate.neurons)].mean()) == pytest.approx(6.0 * factor, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_induction_trains_gates_and_collects_registers(kind: str) -> None:
    small = recipe(kind)
    task = SceneTask(small, 16, 0)
    model = build_model(small, task.tokenizer, 0)
    induction = Induction(small, STAGE, model, task)
    induction.gates[1].bias.data.fill_(3.0)  # every patch is a sink
    value, log = induction.loss(model, task, torch.arange(16), 0)
    value.backward()
    assert induction.registers is not None
    assert sorted(induction.registers) == [2, 3]
    assert all(t.shape == (2, 16) and not t.requires_grad for pair in induction.registers.values() for t in pair)
    assert all(g.weight.grad is not None and g.weight.grad.abs().sum() > 0 for g in induction.gates.values())
    assert {"captions", "writers", "plain", "deletion", "both", "attention"} == set(log)
    again = Induction(small, STAGE, model, task)
    again.load_state_dict(induction.state_dict())
    assert torch.equal(again.gates[1].bias, induction.gates[1].bias)
    assert again.registers is not None
    assert torch.equal(again.registers[2][0], induction.registers[2][0])


def test_recipes_name_what_is_shipped() -> None:
    assert set(RECIPES) == {"clip-scenes", "clip-scenes-induced", "siglip-scenes-induced"}
    control, induced = RECIPES["clip-scenes"], RECIPES["clip-scenes-induced"]
    assert replace(induced, induction=None) == control  # the control is the same encoder before the induction
