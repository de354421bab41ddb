"""Conversion shares the float tensors, and the float model never notices."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch
from models import COMPOSITES, TOWERS
from test_methods import PIPELINES, config, fitted, label
from torch import nn

from optimum_regcache import RegCacheConfig
from optimum_regcache.encoders.sharing import own_tensors, replace_value, shared_copy
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.registers.neurons import zero_register_neurons
from optimum_regcache.rewrites.norms import rescale_norm, store
from optimum_regcache.rewrites.rotation import rotate_heads, rotate_residual
from optimum_regcache.search.trials import TrialRunner

CLIP, DINOV2, FULL_CLIP = TOWERS["clip"], TOWERS["dinov2"], COMPOSITES["clip_dual"]
PLAIN = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})


def places(model: nn.Module) -> dict[str, int]:
    """Name -> address of the storage, of all parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.untyped_storage().data_ptr() for name, t in tensors if t.numel()}


def fingerprint(model: nn.Module) -> str:
    """Hash of all names, values and gradient flags."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
@pytest.mark.parametrize("pipeline", [[], *PIPELINES], ids=lambda p: label(p) or "none")
def test_no_method_changes_the_float_model(pipeline: Any, attention: bool) -> None:
    model = CLIP.build().requires_grad_(True)
    before, structure, settings = fingerprint(model), repr(model), model.config.to_dict()
    addresses, expected = places(model), CLIP.run(model)
    fitted(CLIP, config(pipeline, attention=attention), model)
    assert fingerprint(model) == before
    assert (places(model), repr(model), model.config.to_dict()) == (addresses, structure, settings)
    assert torch.equal(CLIP.run(model), expected)


def test_the_float_model_of_a_rewritten_encoder_without_biases_stays_as_it_is() -> None:
    model = DINOV2.build(qkv_bias=False)
    before = fingerprint(model)
    fitted(DINOV2, config([{"name": "rotation"}]), model)
    assert (fingerprint(model), model.config.qkv_bias) == (before, False)


def test_plain_conversion_copies_no_weight_and_shares_nothing_of_the_encoder_in_the_end() -> None:
    model = CLIP.build()
    result = quantize_with(model, resolve(PLAIN), None, [CLIP.inputs(seed=2)], progress=False)
    assert places(result.float_model) == places(model)
    assert not set(places(result.model).values()) & set(places(model).values())


def test_what_lies_outside_the_encoder_is_shared() -> None:
    model = FULL_CLIP.build()
    result = quantize_with(model, resolve(PLAIN), None, [CLIP.inputs(seed=2)], progress=False).model
    tower, ours, theirs = find_tower(model).name, places(result), places(model)
    shared = {name for name in ours if ours[name] == theirs.get(name)}
    assert any(name.startswith("text_model.") for name in shared)
    assert shared == {name for name in theirs if not name.startswith(f"{tower}.") and name in ours}
    assert not set(places(copy.deepcopy(result)).values()) & set(theirs.values())  # as the documentation says


def test_only_what_a_method_rewrites_is_copied() -> None:
    model = CLIP.build()
    methods = [{"name": "smoothquant", "alphas": [0.8], "values": False, "max_tokens": 40}]
    result = quantize_with(model, resolve(PLAIN.replace(methods=methods)), None, [CLIP.inputs(seed=2)], progress=False)
    ours, theirs = places(result.float_model), places(model)
    moved = {name for name in theirs if ours[name] != theirs[name]}
    assert moved
    assert all("layer_norm" in n or n.rpartition(".")[0].endswith(("_proj", "fc1")) for n in moved)
    assert not any("out_proj" in n or "fc2" in n or "embeddings" in n for n in moved)


def test_casting_and_changing_the_result_leave_the_float_model_alone() -> None:
    model = CLIP.build().requires_grad_(True)
    before = fingerprint(model)
    result = quantize_with(model, resolve(PLAIN), None, [CLIP.inputs(seed=2)], progress=False).model
    with torch.no_grad():
        for parameter in find_tower(result).module.parameters():
            parameter.zero_()
    nn.Module.half(result)
    assert fingerprint(model) == before


def test_training_the_float_model_afterwards_leaves_the_result_alone() -> None:
    model = CLIP.build()
    result = quantize_with(model, resolve(PLAIN), None, [CLIP.inputs(seed=2)], progress=False).model
    expected = CLIP.run(result)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(CLIP.run(result), expected)


def test_the_search_shares_the_weights_too() -> None:
    model = CLIP.build()
    bench = TrialRunner(model, PLAIN, [CLIP.inputs(seed=2)])
    assert places(bench.float_model) == places(model)


@pytest.mark.parametrize(
    "rewrite",
    [
        rotate_residual,
        rotate_heads,
        lambda model: rescale_norm(find_tower(model), 1, 0, torch.full((64,), 2.0)),
        lambda model: zero_register_neurons(model, {1: [3, 5]}),
    ],
    ids=["residual", "heads", "norm", "neurons"],
)
def test_rewrites_give_new_storage_to_what_they_change(rewrite: Any) -> None:
    model = CLIP.build()
    before, twin = fingerprint(model), shared_copy(model)
    rewrite(twin)
    assert fingerprint(model) == before
    ours, theirs = dict(twin.named_parameters()), dict(model.named_parameters())
    for name, parameter in theirs.items():
        changed = not torch.equal(ours[name], parameter)
        if changed:
            assert ours[name].data_ptr() != parameter.data_ptr()
        assert ours[name].is_contiguous() == parameter.is_contiguous()
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shared_copies_keep_ties_and_gradient_flags_apart() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["a"].register_buffer("steps", torch.arange(3))
    twin = shared_copy(model)
    assert twin["a"].weight is twin["b"].weight
    assert twin["a"].weight is not model["a"].weight
    assert twin["a"].weight.data_ptr() == model["a"].weight.data_ptr()
    assert twin["a"].steps.data_ptr() == model["a"].steps.data_ptr()
    assert (twin["a"].weight.requires_grad, model["a"].weight.requires_grad) == (False, True)
    before = model["a"].weight.detach().clone()
    replace_value(twin["a"].weight, torch.ones(3, 3))
    assert torch.equal(model["a"].weight, before)
    assert torch.equal(twin["b"].weight, torch.ones(3, 3))
    own_tensors(twin, model)
    assert not set(places(twin).values()) & set(places(model).values())


def test_a_rewritten_parameter_keeps_dtype_shape_and_layout() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    store(parameter, torch.arange(6, dtype=torch.float64).reshape(3, 2).T)
    assert (parameter.dtype, parameter.is_contiguous()) == (torch.bfloat16, True)
    assert parameter.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    with pytest.raises(RuntimeError, match=r"expand|match"):
        store(parameter, torch.zeros(3, 2, dtype=torch.float64))
