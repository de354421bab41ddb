"""Checkpoints and recipes that version 0.1.0 wrote open to the same bits and the same outputs (see
``scripts/write_golden_checkpoints.py``)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from optimum_regcache.config.recipe import Recipe
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.layers.linear import quant_linears, set_backend

FOLDER = Path(__file__).parent / "golden" / "checkpoints"
CHECKPOINTS = sorted(path.name for path in FOLDER.iterdir())


def test_all_of_them_are_there() -> None:
    assert len(CHECKPOINTS) == 15


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_survives_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(FOLDER / name)
    expected = json.loads((FOLDER / name / "expected_weights.json").read_text())
    tower = find_tower(model)
    found = {  # by the names that the newest release of transformers uses
        tower.family.current_name(n.removeprefix(f"{tower.name}.")): hashlib.sha256(
            m.dequantized_weight().numpy().tobytes()
        ).hexdigest()
        for n, m in quant_linears(model)
    }
    assert found == expected
    model.save_pretrained(tmp_path)
    before = load_file(FOLDER / name / "model.safetensors")
    after = {n.removeprefix("vision_model."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("backend", ["simulated", "auto"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_outputs(name: str, backend: str) -> None:
    """Float sums may differ between processors, and then a value on a tie may take the neighbouring code: rare, small."""
    model = AutoModel.from_pretrained(FOLDER / name)
    set_backend(model, backend)
    expected = load_file(FOLDER / name / "expected.safetensors")
    with torch.no_grad():
        output = model(expected["pixel_values"].float()).last_hidden_state
    error = (output - expected["output"]).abs() / expected["output"].abs().max()
    assert float(error.mean()) < 1e-4
    assert float(error.max()) < 0.02


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_recipes(name: str) -> None:
    """The recipe beside a checkpoint means what the checkpoint's config says."""
    model = AutoModel.from_pretrained(FOLDER / name)
    recipe = Recipe.load(FOLDER / name / "recipe.yaml")
    assert recipe.quantization == model.config.quantization_config
    assert recipe.notes == "golden"
