"""A checkpoint that was damaged, edited or written by another release must be refused with a message that says why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOWER_PREFIX, TOWERS, quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from optimum_regcache.encoders.tower import find_tower

State = dict[str, torch.Tensor]


def here(family: str, stored: str, name: str) -> tuple[str, str]:
    """The two names in the release at hand."""
    if family == "clip":
        return TOWER_PREFIX + stored, TOWER_PREFIX + name
    row = find_tower(TOWERS[family].build()).family
    return (stored, name) if row is row.newest_layout else (stored, stored)


# (file name, name in the model) of one tensor per kind; ViT and DINOv2 store modules under older names
TENSORS = {
    "clip": {
        "register_key": ("encoder.layers.2.self_attn.register_key",) * 2,
        "register_value": ("encoder.layers.3.self_attn.register_value",) * 2,
        "weight_scale": ("encoder.layers.1.mlp.fc2.weight_scale",) * 2,
        "input_scale": ("encoder.layers.0.self_attn.out_proj.input_scale",) * 2,
        "input_zero_point": ("encoder.layers.0.mlp.fc1.input_zero_point",) * 2,
        "weight": ("encoder.layers.3.self_attn.q_proj.weight",) * 2,
        "bias": ("encoder.layers.3.mlp.fc1.bias",) * 2,
        "norm": ("encoder.layers.1.layer_norm2.weight",) * 2,
    },
    "vit": {
        "register_key": ("encoder.layer.2.attention.register_key", "layers.2.attention.register_key"),
        "weight_scale": (
            "encoder.layer.0.attention.attention.key.weight_scale",
            "layers.0.attention.k_proj.weight_scale",
        ),
        "weight": ("encoder.layer.3.output.dense.weight", "layers.3.mlp.fc2.weight"),
    },
    # gate and up projection are stored as one tensor
    "dinov2_swiglu": {
        "weight": ("encoder.layer.1.mlp.weights_in.weight", "encoder.layer.1.mlp.gate_proj.weight"),
        "weight_scale": ("encoder.layer.1.mlp.weights_out.weight_scale", "encoder.layer.1.mlp.down_proj.weight_scale"),
    },
}
TENSORS = {family: {kind: here(family, *names) for kind, names in kinds.items()} for family, kinds in TENSORS.items()}
CASES = [(name, kind) for name, kinds in TENSORS.items() for kind in kinds]
FLOATS = [case for case in CASES if case[1] not in ("weight", "input_zero_point")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An intact quantized checkpoint of each family."""
    folders = {name: tmp_path_factory.mktemp(name) for name in TENSORS}
    for name, folder in folders.items():
        quantized(TOWERS[name]).save_pretrained(folder)
    return folders


def merge(settings: dict[str, Any], change: dict[str, Any]) -> None:
    """Change single fields of the parts; what is not named stays."""
    for name, value in change.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value


@pytest.fixture
def load_edited(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """Load a copy of a checkpoint after changing its tensors or its quantization config."""

    def load(
        name: str, tensors: Callable[[State], object] | None = None, config: Callable[[dict], object] | None = None
    ) -> Any:
        source = checkpoints[name]
        state, settings = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
        if tensors is not None:
            tensors(state)
        if config is not None:
            config(settings["quantization_config"])
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return AutoModel.from_pretrained(tmp_path)

    return load


def test_the_copy_itself_loads(load_edited: Callable[..., Any]) -> None:
    for name, kinds in TENSORS.items():
        expected = quantized(TOWERS[name])
        loaded = load_edited(name).eval()
        assert torch.equal(TOWERS[name].run(loaded), TOWERS[name].run(expected))
        assert {model_name for _, model_name in kinds.values()} <= set(loaded.state_dict())


# tensors


def move(state: State, old: str, new: str) -> None:
    state[new] = state.pop(old)


EDITS: dict[str, Callable[[State, str], object]] = {
    "missing": lambda state, name: state.pop(name),
    "renamed": lambda state, name: move(state, name, f"{name}_old"),
    "moved": lambda state, name: move(state, name, f"other.{name}"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_absent_tensors(name: str, kind: str, edit: str, load_edited: Callable[..., Any]) -> None:
    """Without the tensor the model would compute with whatever was in memory."""
    stored, model_name = TENSORS[name][kind]
    with pytest.raises(ValueError, match=r"The checkpoint (is incomplete|holds \d+)") as error:
        load_edited(name, lambda state: EDITS[edit](state, stored))
    assert kind in str(error.value) or model_name in str(error.value)
    assert re.search("Download it again, or quantize the model again", str(error.value))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_truncated_tensors(name: str, kind: str, load_edited: Callable[..., Any], caplog: Any) -> None:
    stored, model_name = TENSORS[name][kind]

    def truncate(state: State) -> None:
        tensor = state[stored]
        state[stored] = tensor[..., :-1].contiguous() if tensor.ndim else tensor.repeat(2)

    with pytest.raises((ValueError, RuntimeError)) as error:
        load_edited(name, truncate)
    assert any(n in f"{error.value}\n{caplog.text}" for n in (stored, model_name)), "the tensor must be named"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "kind"), FLOATS)
def test_numbers_that_are_not_finite(name: str, kind: str, value: float, load_edited: Callable[..., Any]) -> None:
    stored, model_name = TENSORS[name][kind]
    message = rf"The checkpoint is incomplete or damaged: {re.escape(model_name)} missing or not finite\. Download it"
    with pytest.raises(ValueError, match=message):
        load_edited(name, lambda state: state[stored].view(-1)[-1:].fill_(value))


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("kind", ["weight_scale", "input_scale"])
def test_scales_must_be_positive(kind: str, value: float, load_edited: Callable[..., Any]) -> None:
    stored, model_name = TENSORS["clip"][kind]
    with pytest.raises(ValueError, match=rf"incomplete or damaged: {re.escape(model_name)} "):
        load_edited("clip", lambda state: state[stored].view(-1)[:1].fill_(value))


def test_many_damaged_tensors_are_counted(load_edited: Callable[..., Any]) -> None:
    def spoil(state: State) -> None:
        for name in state:
            if name.endswith("input_scale"):
                state[name].fill_(float("nan"))

    with pytest.raises(ValueError, match=r"incomplete or damaged: (\S+input_scale,? ){8}and 16 more missing or not"):
        load_edited("clip", spoil)


def test_many_missing_tensors_are_counted(load_edited: Callable[..., Any]) -> None:
    def strip(state: State) -> None:
        for name in [n for n in state if n.endswith(".bias")]:
            del state[name]

    message = r"The checkpoint is incomplete: (\S*encoder\S+bias,? ){8}and \d+ more missing\. Download it again"
    with pytest.raises(ValueError, match=message):
        load_edited("clip", strip)


def test_registers_that_the_config_does_not_know(load_edited: Callable[..., Any]) -> None:
    """They would be left out without a word."""

    def add(state: State) -> None:
        for kind in ("key", "value"):
            names = [f"{TOWER_PREFIX}encoder.layers.{block}.self_attn.register_{kind}" for block in (1, 2)]
            state[names[0]] = state[names[1]].clone()

    with pytest.raises(ValueError, match="'register_key' tensors"):
        load_edited("clip", add)


# settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"RegCacheConfig format version 2 is not supported \(this release reads version 1\)\. Upgrade"),
        ({"bogus": 1}, r"Unknown key in RegCacheConfig: bogus"),
        ({"weights": {"bits": 8, "scheme": "x"}}, r"Unknown key in weights: scheme"),
        ({"weights": {"bits": 9}}, r"weights\.bits must be an integer from 2 to 8, got 9"),
        (
            {"registers": {"mode": "search", "blocks": []}, "deletion": {"block": None, "count": 0}},
            r"registers\.mode='search' describes a model that is still",
        ),
        ({"registers": {"mode": "fixed", "blocks": [3, 4]}}, r"registers\.blocks=\[3, 4\], but the encoder has blocks 0 to 3"),
        ({"deletion": {"block": 4, "count": 1}}, r"deletion\.block=4, but the encoder has blocks 0 to 3"),
        ({"modules": {"patch_embedding": True}}, r"holds 24 'weight_scale' tensors, its quantization config needs 25 \(for "),
        ({"modules": {"ignore": ["nothing"]}}, r"modules\.ignore pattern nothing match no module"),
        ({"registers": {"mode": "fixed", "blocks": [1, 2, 3]}}, r"holds 2 'register_key' tensors, .* needs 3"),
        # fewer than stored: the rest would be dropped in silence
        ({"registers": {"mode": "none", "blocks": []}}, r"'register_key' tensors"),
        ({"registers": {"mode": "fixed", "blocks": [3]}}, r"'register_key' tensors"),
        ({"activations": {"mode": "dynamic"}}, r"'input_scale' tensors"),
    ],
)  # fmt: skip
def test_configs_that_do_not_describe_the_tensors(
    change: dict[str, Any], message: str, load_edited: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_edited("clip", config=lambda settings: merge(settings, change))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"bits": 4}},
        {"weights": {"granularity": "per_tensor"}},
        {"registers": {"mode": "fixed", "blocks": [2, 3], "num_registers": 2}},
        {"modules": {"ignore": ["layers.0.mlp.fc1"]}},
    ],
)
def test_configs_of_other_shapes(change: dict[str, Any], load_edited: Callable[..., Any]) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"ignore_mismatched_sizes|The checkpoint"):
        load_edited("clip", config=lambda settings: merge(settings, change))
