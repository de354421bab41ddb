"""Recipes: presets, YAML files, overrides; what is refused and with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_regcache.config import PRESETS, RegCacheConfig
from optimum_regcache.config.recipe import OBJECTIVES, DataConfig, Recipe, SearchConfig


def full_recipe() -> Recipe:
    return Recipe(
        quantization=RegCacheConfig.from_preset("w6a6").replace(activations={"observer": "mse"}),
        search=SearchConfig(
            strategy="single_token", sensitive_block=3, scopes=("single", "onwards"), num_copies=(0.5, 2)
        ),
        data=DataConfig(num_samples=12, batch_size=3),
        model="someone/encoder",
        dataset="someone/images",
        notes="retention 0.98, measured on 512 images — not ImageNet",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_recipe_with_default_settings(name: str) -> None:
    assert Recipe.load(name) == Recipe(quantization=RegCacheConfig.from_preset(name))


def test_defaults_cover_the_papers_range_of_copies() -> None:
    search = SearchConfig()
    assert (min(search.num_copies), max(search.num_copies)) == (1.0, 15.0)
    assert all(isinstance(c, float) for c in search.num_copies)
    assert (search.strategy, search.objective) == ("averaged_tokens", "cosine")


def test_saved_recipes_are_resolved_and_lossless(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    full_recipe().save(path)
    assert Recipe.load(path) == Recipe.load(str(path)) == full_recipe()
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(stored) == {f.name for f in dataclasses.fields(Recipe)}
    assert set(stored["search"]) == {f.name for f in dataclasses.fields(SearchConfig)}
    assert "—" in path.read_text(encoding="utf-8")


@settings(max_examples=30, deadline=None)
@given(
    search=st.builds(
        SearchConfig,
        strategy=st.sampled_from(["single_token", "averaged_tokens"]),
        objective=st.sampled_from(OBJECTIVES),
        sensitivity=st.sampled_from(["linear", "block"]),
        sensitive_block=st.none() | st.integers(0, 50),
        score_site=st.sampled_from(["block_input", "fc2_input"]),
        scopes=st.sampled_from([("onwards",), ("single",), ("single", "onwards")]),
        num_copies=st.lists(st.floats(0.01, 100), min_size=1, max_size=4).map(tuple),
        max_delete=st.integers(0, 30),
        min_gain=st.floats(0, 1),
        seed=st.integers(0, 2**31),
    ),
    data=st.builds(DataConfig, num_samples=st.integers(4, 999), calibration_fraction=st.floats(0.01, 0.99)),
    notes=st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20),
)
def test_every_recipe_survives_its_mapping(search: SearchConfig, data: DataConfig, notes: str) -> None:
    recipe = Recipe(search=search, data=data, notes=notes)
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict(), allow_unicode=True))) == recipe


def test_a_preset_may_be_refined() -> None:
    recipe = Recipe.from_dict({"preset": "w4a4", "quantization": {"activations": {"observer": "mse"}}})
    assert recipe.quantization.label == "w4a4"
    assert recipe.quantization.activations.observer == "mse"


def test_an_empty_section_keeps_the_preset() -> None:
    """`weights:` with nothing below it is None in YAML."""
    recipe = Recipe.from_dict({"preset": "w4a4", "quantization": {"weights": None}, "search": None, "data": None})
    assert recipe == Recipe.load("w4a4")


def test_from_dict_leaves_its_argument_alone() -> None:
    values = {"preset": "w4a4", "quantization": {"weights": {"observer": "mse"}}}
    Recipe.from_dict(values)
    assert values == {"preset": "w4a4", "quantization": {"weights": {"observer": "mse"}}}


def test_a_complete_config_stands_alone() -> None:
    config = RegCacheConfig.from_preset("w6a6")
    assert Recipe.from_dict({"quantization": config}).quantization is config
    with pytest.raises(ValueError, match=r"A recipe has either 'preset' or a complete RegCacheConfig, not both\."):
        Recipe.from_dict({"preset": "w8a8", "quantization": config})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"serach": {}},
            r"Unknown key in the recipe: serach\. Known keys: data, dataset, expect, model, notes, preset, quant",
        ),
        ({"b": 1, "a": 1}, r"Unknown keys in the recipe: a, b\. Known keys: "),
        ({4: "w4a4"}, r"Unknown key in the recipe: 4\. Known keys: "),
        ({"preset": "w3a3"}, r"Unknown preset 'w3a3'; expected one of w8a8"),
        ({"quantization": {"weight": {}}}, r"Unknown part of RegCacheConfig: weight\."),
        ({"quantization": {"weights": {"bitz": 4}}}, r"Unknown key in weights: bitz\. Known keys: bits"),
        ({"search": {"taus": [1]}}, r"Unknown key in search: taus\. Known keys: algorithm, always, "),
        ({"data": {"images": 1}}, r"Unknown key in data: images\. Known keys: batch_size, "),
        ({"quantization": {"version": 99}}, r"format version 99 is not supported"),
        ({"quantization": {"quant_method": "gptq"}}, r"got quant_method 'gptq'"),
    ],
)
def test_bad_mappings_are_named(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_sections_must_be_mappings() -> None:
    with pytest.raises(TypeError, match=r"search must be a mapping or a SearchConfig, got list\."):
        Recipe.from_dict({"search": ["v4"]})
    with pytest.raises(TypeError, match=r"data must be a mapping or a DataConfig, got int\."):
        Recipe.from_dict({"data": 256})
    with pytest.raises((TypeError, ValueError), match=r"quantization must be a mapping"):
        Recipe.from_dict({"quantization": "w4a4"})


def test_load_names_the_presets_when_there_is_no_such_file(tmp_path: Path) -> None:
    presets = r"w8a8, w6a6, w4a4, w8a8-dynamic"
    expected = (
        rf"No recipe .*absent\.yaml': it is neither a preset \({presets}\) nor a file, none of the \d+ packaged ones"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        Recipe.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["", "- w8a8\n", "w8a8\n"])
def test_load_refuses_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"bad\.yaml is not a recipe: expected a mapping with keys such as 'quantization'"
    ):
        Recipe.load(path)


SEARCH_REFUSED = [
    ({"strategy": "v3"}, r"search\.strategy must be one of averaged_tokens, single_token; got 'v3'\."),
    ({"objective": "loss"}, r"search\.objective must be one of cosine, .*, accuracy, knn; got 'loss'\."),
    ({"sensitivity": "tensor"}, r"search\.sensitivity must be one of coarse, linear, block; got 'tensor'\."),
    ({"score_site": "fc1"}, r"search\.score_site must be one of block_input, fc2_input; got 'fc1'\."),
    ({"scopes": ()}, r"search\.scopes must hold 'onwards' and/or 'single', got \[\]\."),
    ({"scopes": ("all",)}, r"search\.scopes must hold 'onwards' and/or 'single', got \['all'\]\."),
    ({"num_copies": ()}, r"search\.num_copies must be a non-empty list of numbers > 0, got \[\]\."),
    ({"num_copies": (1, 0)}, r"search\.num_copies must be a non-empty list of numbers > 0, got \[1\.0, 0\.0\]\."),
    ({"blocks_before": -1}, r"search\.blocks_before must be >= 0, got -1\."),
    ({"max_delete": -1}, r"search\.max_delete must be >= 0, got -1\."),
    ({"min_gain": -0.1}, r"search\.min_gain must be >= 0, got -0\.1\."),
    ({"noise_sigmas": -2}, r"search\.noise_sigmas must be >= 0, got -2\."),
    ({"top_tokens": 0}, r"search\.top_tokens must be at least 1, got 0\."),
    ({"num_candidates": 0}, r"search\.num_candidates must be at least 1, got 0\."),
    ({"sensitive_block": -1}, r"search\.sensitive_block must be >= 0, got -1\."),
]
DATA_REFUSED = [
    ({"num_samples": 3}, r"data\.num_samples must be at least 4, got 3\."),
    ({"num_report": 0}, r"data\.num_report must be at least 1, got 0\."),
    ({"batch_size": 0}, r"data\.batch_size must be at least 1, got 0\."),
    ({"calibration_fraction": 0.0}, r"data\.calibration_fraction must lie between 0 and 1, got 0\.0\."),
    ({"calibration_fraction": 1.0}, r"data\.calibration_fraction must lie between 0 and 1, got 1\.0\."),
    ({"confirm_fraction": 1.5}, r"data\.confirm_fraction must lie between 0 and 1, got 1\.5\."),
]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [(SearchConfig, *row) for row in SEARCH_REFUSED] + [(DataConfig, *row) for row in DATA_REFUSED],
)
def test_refused_settings(part: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(**values)


def test_override_sets_nested_fields_from_yaml() -> None:
    before = full_recipe()
    after = before.override(
        [
            "search.max_delete=4",
            "search.num_copies=[1, 3]",
            "search.sensitive_block=null",
            "quantization.activations.observer=moving_average",
            "quantization.registers={mode: fixed, blocks: [2, 5]}",
            "model=other/model",
            "notes=a=b",
        ]
    )
    assert (after.search.max_delete, after.search.num_copies, after.search.sensitive_block) == (4, (1.0, 3.0), None)
    assert after.quantization.activations.observer == "moving_average"
    assert after.quantization.registers.blocks == (2, 5)
    assert (after.model, after.notes) == ("other/model", "a=b")
    assert after.data == before.data
    assert before == full_recipe()


def test_override_with_nothing_changes_nothing() -> None:
    assert full_recipe().override([]) == full_recipe()


def test_the_last_override_wins() -> None:
    assert Recipe().override(["data.batch_size=1", "data.batch_size=2"]).data.batch_size == 2


@pytest.mark.parametrize("text", ["search.max_delete", "w4a4", ""])
def test_override_without_equals(text: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected section\.field=value, got '{text}'\."):
        Recipe().override([text])


@pytest.mark.parametrize("path", ["serach.max_delete", "search.maxdelete", "model.name", "search.seed.x", "bits", ""])
def test_override_of_an_unknown_field(path: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown recipe field '{path}'\."):
        Recipe().override([f"{path}=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantization.weights.bits=16", r"weights\.bits must be an integer from 2 to 8, got 16"),
        ("quantization.weights=4", r"weights must be a mapping or a WeightsConfig, got int"),
        ("quantization.version=2", r"format version 2 is not supported"),
        ("search.max_delete=-1", r"search\.max_delete must be >= 0"),
        ("search.max_delete=many", r"search\.max_delete"),
        ("search.num_copies=4", r"search\.num_copies"),
        ("search.scopes=single", r"search\.scopes"),
        ("data.num_samples=40.5", r"data\.num_samples"),
    ],
)
def test_override_with_a_bad_value_names_the_field(text: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Recipe().override([text])


def test_with_quantization_changes_only_that() -> None:
    config = RegCacheConfig.from_preset("w4a4")
    assert full_recipe().with_quantization(config) == dataclasses.replace(full_recipe(), quantization=config)
