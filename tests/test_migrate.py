"""What version 0.1.0 wrote opens with the same meaning under today's names."""

from __future__ import annotations

from typing import Any

import pytest

from optimum_regcache import Recipe, RegCacheConfig
from optimum_regcache.config.migrate import FIELDS

OLD_CONFIG = {
    "quant_method": "regcache",
    "version": 1,
    "registers": {"mode": "none", "blocks": [], "num_registers": 1, "num_copies": 1.0, "kv_mode": "in_context"},
    "modules": {"patch_embedding": False, "head": False, "ignore": [], "sixteen_bit": ["mlp.fc2"]},
    "methods": [{"name": "sixteen_bit", "layers": 3}],
}


def test_an_old_checkpoint_config_opens_with_the_same_meaning() -> None:
    config = RegCacheConfig(**OLD_CONFIG)
    assert config.modules.mixed_precision == ("mlp.fc2",)
    assert config.methods == ({"name": "mixed_precision", "layers": 3},)
    stored = {**config.to_dict(), "modules": {**config.to_dict()["modules"], **OLD_CONFIG["modules"]}}
    del stored["modules"]["mixed_precision"]  # the old name alone
    assert RegCacheConfig.from_dict(stored) == config
    assert "sixteen_bit" not in config.to_json_string()
    assert RegCacheConfig(**config.to_dict()) == config


def test_both_names_of_a_field_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"modules holds both sixteen_bit and mixed_precision.*keep mixed_precision"):
        RegCacheConfig(modules={"sixteen_bit": [], "mixed_precision": ["mlp.fc2"]})


@pytest.mark.parametrize(("old", "new"), [("v2", "single_token"), ("v4", "averaged_tokens")])
def test_an_old_recipe_keeps_its_strategy_and_its_modules(old: str, new: str) -> None:
    values = {"quantization": OLD_CONFIG, "search": {"strategy": old, "num_copies": [1.0]}}
    recipe = Recipe.from_dict(values)
    assert recipe.search.strategy == new
    assert recipe.quantization.modules.mixed_precision == ("mlp.fc2",)
    assert values["search"] == {"strategy": old, "num_copies": [1.0]}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("registers", "search", "meant"),
    [
        ({}, "isolated", "isolated"),
        ({"mode": "search", "kv_mode": "isolated"}, "in_context", "in_context"),  # the old search read its own field
        ({"mode": "fixed", "blocks": [1], "kv_mode": "isolated"}, "in_context", "isolated"),
        ({"mode": "none"}, "isolated", "in_context"),
    ],
)
def test_the_old_search_kv_mode_moves_to_the_registers(registers: dict[str, Any], search: str, meant: str) -> None:
    values = {"quantization": {"registers": registers}, "search": {"kv_mode": search}}
    assert Recipe.from_dict(values).quantization.registers.kv_mode == meant
    config = RegCacheConfig(registers=registers)
    whole = {"quantization": config, "search": {"kv_mode": search}}
    assert Recipe.from_dict(whole).quantization.registers.kv_mode == meant
    assert Recipe.from_dict({"search": {"kv_mode": "isolated"}}).quantization.registers.kv_mode == "isolated"


def test_old_fields_may_be_overridden_by_name() -> None:
    recipe = Recipe().override(
        ["search.kv_mode=isolated", "quantization.modules.sixteen_bit=[mlp.fc2]", "search.strategy=v2"]
    )
    assert recipe.quantization.registers.kv_mode == "isolated"
    assert recipe.quantization.modules.mixed_precision == ("mlp.fc2",)
    assert recipe.search.strategy == "single_token"
    assert set(FIELDS) == {"search.kv_mode", "quantization.modules.sixteen_bit"}


def test_moved_modules_are_found_under_their_old_names() -> None:
    from optimum_regcache.sources import Source, accuracy_data  # pyright: ignore[reportMissingImports]

    from optimum_regcache.commands import sources

    assert Source is sources.Source
    assert accuracy_data is sources.accuracy_data
