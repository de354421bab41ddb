"""`RegCacheQuantizer` and the command line write the same bits for the same recipe, images and seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from optimum.commands.optimum_cli import main

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer, SearchConfig
from optimum_regcache.commands.sources import open_source

SEARCH = ("search.num_copies=[4]", "search.max_delete=2", "search.sensitive_block=3", "search.blocks_before=0")
CASES = {
    "search": SEARCH,
    "fixed": ("quantization.registers={mode: fixed, blocks: [3, 4, 5], num_copies: 4}",),
    "none": ("quantization.registers.mode=none", "quantization.activations.observer=moving_average"),
    "method": ("quantization.registers.mode=none", "quantization.methods=[gptq]", "quantization.weights.bits=4"),
}


def written(folder: Path) -> tuple[bytes, Any]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return (folder / "model.safetensors").read_bytes(), config


@pytest.mark.parametrize("case", CASES)
def test_python_and_the_command_line_write_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignments = [*CASES[case], "data.num_samples=24", "data.num_report=4", "data.batch_size=4"]
    options = [option for text in assignments for option in ("--set", text)]
    arguments = ["quantize", "--model", "planted-outlier", "--output", str(tmp_path / "cli"), *options]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", *arguments])
    main()
    recipe = Recipe().override(assignments)
    source = open_source("planted-outlier", None, recipe)
    data: dict[str, Any] = {"calibration_dataset": source.search_images, "progress": False}
    quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
    quantizer.quantize(tmp_path / "recipe", recipe=recipe, **data)
    assert written(tmp_path / "recipe") == written(tmp_path / "cli")
    search = recipe.search if case == "search" else None
    quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
    quantizer.quantize(
        tmp_path / "arguments", quantization_config=recipe.quantization, search=search, batch_size=4, **data
    )
    assert written(tmp_path / "arguments") == written(tmp_path / "cli")
    ours, theirs = (Recipe.load(tmp_path / name / "recipe.yaml") for name in ("recipe", "cli"))
    assert (ours.quantization, ours.search, ours.data) == (theirs.quantization, theirs.search, theirs.data)


def test_a_recipe_stands_alone() -> None:
    quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
    with pytest.raises(
        ValueError, match=r"got a recipe and quantization_config, search, batch_size, which a recipe holds"
    ):
        quantizer.quantize(quantization_config=RegCacheConfig(), search=SearchConfig(), batch_size=4, recipe=Recipe())


def test_search_settings_where_nothing_is_searched_are_refused() -> None:
    quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
    config = RegCacheConfig(registers={"mode": "none"})
    with pytest.raises(ValueError, match=r"search\.max_delete=3 has no effect: nothing is searched with"):
        quantizer.quantize(quantization_config=config, search=SearchConfig(max_delete=3), calibration_dataset=[])


def test_a_saved_recipe_makes_the_same_kind_of_model_again(tmp_path: Path) -> None:
    """It holds resolved registers and the settings of the search that found them."""
    recipe = Recipe().override([*SEARCH, "data.num_samples=40", "quantization.methods=[percentile]"])
    images = open_source("planted-outlier", None, recipe).search_images
    quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
    quantizer.quantize(tmp_path / "first", recipe=recipe, calibration_dataset=images, progress=False)
    saved = Recipe.load(tmp_path / "first" / "recipe.yaml")
    assert saved.quantization.registers.mode == "fixed"
    quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
    model = quantizer.quantize(recipe=saved, calibration_dataset=images, progress=False)
    assert model.config.quantization_config == saved.quantization
