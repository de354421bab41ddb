"""No setting is ignored in silence: a changed value changes the result, or is refused with the reason.

The table has a row for every field of every config part and every parameter of every method; a new field without one fails
the first test. What counts as result: tensors and outputs of the model, what the methods measured, everything the search
recorded. The config itself does not count.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from models import MODELS
from setting_cases import PARAMETERS, QUICK, TABLE, Case, rows

from optimum_regcache import Recipe, SearchConfig
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config.model import PARTS
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.methods import METHODS
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages, split_inputs
from optimum_regcache.search.run import run_plan


def test_every_field_and_parameter_has_a_row() -> None:
    parts = {**PARTS, "search": SearchConfig, "data": DataConfig}
    assert set(TABLE) == {f"{part}.{f.name}" for part, cls in parts.items() for f in fields(cls)}
    parameters = {name: {f.name for f in fields(cls)} for name, cls in METHODS.items()}
    assert {name: set(row) for name, row in PARAMETERS.items()} == {n: p for n, p in parameters.items() if p}


def recipe_of(name: str, method: str | None, case: Case, changed: bool) -> Recipe:
    """The context, and the changed value if ``changed``."""
    settings = {path: json.loads(text) for path, text in case.context}
    part, _, field_name = name.partition(".")
    fixed = settings.pop("parameters", {})
    if method is not None:
        parameters = {**QUICK.get(method, {}), **fixed, **({field_name: case.value} if changed else {})}
        settings["quantization.methods"] = [{"name": method, **parameters}]
    elif changed:
        settings[name if part in ("search", "data") else f"quantization.{name}"] = case.value
    data = Recipe(data=DataConfig(num_samples=8, batch_size=4)).to_dict()
    for path, value in settings.items():
        *parents, leaf = path.split(".")
        node: Any = data
        for parent in parents:
            node = node[parent]
        node[leaf] = {**node[leaf], **value} if isinstance(value, dict) else value
    return Recipe.from_dict(data)


def model_and_pixels(name: str) -> tuple[Any, torch.Tensor]:
    """A float model, and eight images for it."""
    if name == "planted":  # has register neurons
        inputs = ImageInputs(planted.load_dataset("calibration", 8), planted.build_processor())
        return planted.build_planted_model(), next(inputs.batches(8))["pixel_values"]
    size = {"num_hidden_layers": 2} if name != "clip_dual" else {}
    return MODELS[name].build(**size), MODELS[name].inputs(seed=3, batch=8)["pixel_values"]


@cache
def outcome(model_name: str, recipe_text: str, folder: Path) -> str:
    """Fingerprint of everything that a recipe gives, but the config."""
    recipe = Recipe.from_dict(json.loads(recipe_text))
    model, pixels = model_and_pixels(model_name)
    items = [{"pixel_values": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(pixels)]
    work = folder / hashlib.sha256((model_name + recipe_text).encode()).hexdigest()[:16]
    run = run_plan(model, ReferenceImages(items), QuantizationPlan.of(recipe), work_dir=work, progress=False)
    measured = re.sub(r'"seconds": [\d.]+', "", json.dumps(run.quantized.measured, sort_keys=True))
    digest = hashlib.sha256(measured.encode())
    for name, tensor in run.quantized.model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    with torch.no_grad():
        output = find_tower(run.quantized.model).module(pixels[:3] * 1.1).last_hidden_state
    digest.update(output.contiguous().numpy().tobytes())
    if run.fit is not None:
        record = {
            **run.fit.to_dict(),
            "seconds": None,
            "journal": [path.read_text() for path in work.glob("*.jsonl")],
        }
        digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.mark.parametrize(("name", "method", "case"), rows())
def test_a_changed_setting_changes_the_result_or_is_refused(
    name: str, method: str | None, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.refused is not None:
        with pytest.raises(ValueError, match=case.refused) as error:
            outcome(case.model, json.dumps(recipe_of(name, method, case, True).to_dict()), folder)
        if case.refused == "has no effect":
            assert str(error.value).startswith(name)
        return
    before, after = (recipe_of(name, method, case, changed) for changed in (False, True))
    assert before != after, "the table must change the value"
    if name == "data.num_report":
        counts = [len(open_source("planted-outlier", None, recipe).report_images) for recipe in (before, after)]
        assert counts == [2, 3]
        return
    if name == "data.streaming":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        planted.load_dataset("calibration", 24).to_parquet(folder / "images.parquet")
        found = [open_source("planted-outlier", str(folder / "images.parquet"), recipe) for recipe in (before, after)]
        assert [image.tobytes() for image in found[0].search_images["image"]] != [
            image.tobytes() for image in found[1].search_images["image"]
        ]
        with pytest.raises(ValueError, match=r"data\.streaming has no effect on embedded images"):
            open_source("planted-outlier", None, after)
        return
    if name == "data.skip_broken":
        images = [*planted.load_dataset("calibration", 7)["image"], None]
        inputs = ImageInputs(Dataset.from_dict({"image": images}), planted.build_processor())
        counts = [len(split_inputs(inputs, recipe.data, 0).everything) for recipe in (before, after)]
        assert counts == [8, 7]
        return
    first, second = (outcome(case.model, json.dumps(recipe.to_dict()), folder) for recipe in (before, after))
    if name in ("data.memory_budget", "data.workers"):  # how, not what
        assert first == second
        return
    assert first != second, f"{name}={case.value!r} changed nothing"
