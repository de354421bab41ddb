"""RegCacheConfig and its parts: what is refused, with which words, and that every way of storing it is lossless."""
# pyright: reportCallIssue=false

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from optimum_regcache.config import (
    FORMAT_VERSION,
    PRESETS,
    ActivationsConfig,
    DeletionConfig,
    ModulesConfig,
    RegCacheConfig,
    RegistersConfig,
    WeightsConfig,
)
from optimum_regcache.config.validation import build_part, require

PARTS = ("weights", "activations", "attention", "registers", "deletion", "modules", "rewrites")


def unusual_config() -> RegCacheConfig:
    """No field that has a default worth comparing keeps it."""
    return RegCacheConfig(
        weights=WeightsConfig(bits=3, granularity="per_tensor", observer="mse"),
        activations=ActivationsConfig(bits=5, symmetric=False, observer="percentile", percentile=99.5, momentum=0.5),
        registers=RegistersConfig("fixed", (2, 3, 7), num_registers=2, num_copies=3.5, kv_mode="isolated"),
        deletion=DeletionConfig(block=4, count=3, rule="threshold", kappa=2.5),
        modules=ModulesConfig(patch_embedding=True, head=True, ignore=("mlp.fc2", "*.0.*")),
    )


@st.composite
def configs(draw: st.DrawFn) -> RegCacheConfig:
    """Any valid config."""
    dynamic = draw(st.booleans())
    fixed = draw(st.booleans())
    blocks = sorted(draw(st.sets(st.integers(0, 40), min_size=1))) if fixed else []
    rule = draw(st.sampled_from(["topk", "threshold"]))
    return RegCacheConfig(
        weights=WeightsConfig(
            draw(st.integers(2, 8)),
            draw(st.sampled_from(["per_channel", "per_tensor"])),
            draw(st.sampled_from(["minmax", "mse"])),
        ),
        activations=ActivationsConfig(
            bits=draw(st.integers(2, 8)),
            mode="dynamic" if dynamic else "static",
            granularity=draw(st.sampled_from(["per_tensor", "per_token"])) if dynamic else "per_tensor",
            symmetric=draw(st.booleans()),
            observer=draw(st.sampled_from(["minmax", "moving_average", "percentile", "mse"])),
            percentile=draw(st.floats(50.0, 100.0, exclude_min=True)),
            momentum=draw(st.floats(0.0, 1.0, exclude_max=True)),
        ),
        registers=RegistersConfig(
            "fixed" if fixed else "none",
            tuple(blocks),
            draw(st.integers(1, 9)),
            draw(st.floats(1e-3, 1e3)),
            draw(st.sampled_from(["in_context", "isolated"])),
        ),
        deletion=DeletionConfig(
            block=draw(st.integers(0, 40)),
            count=draw(st.integers(0, 20)),
            rule=rule,
            kappa=draw(st.floats(1.0, 50.0, exclude_min=True)),
            fill="neighbour_mean" if rule == "threshold" else draw(st.sampled_from(["neighbour_mean", "none"])),
        ),
        modules=ModulesConfig(draw(st.booleans()), draw(st.booleans()), tuple(draw(st.lists(st.text(max_size=8))))),
    )


@pytest.mark.parametrize(
    ("name", "bits", "mode", "granularity"),
    [
        ("w8a8", 8, "static", "per_tensor"),
        ("w6a6", 6, "static", "per_tensor"),
        ("w4a4", 4, "static", "per_tensor"),
        ("w8a8-dynamic", 8, "dynamic", "per_token"),
    ],
)
def test_presets_follow_the_paper_protocol_and_are_named_by_their_label(
    name: str, bits: int, mode: str, granularity: str
) -> None:
    config = RegCacheConfig.from_preset(name)
    assert config.weights == WeightsConfig(bits=bits, granularity="per_channel", observer="minmax")
    assert config.activations == ActivationsConfig(bits=bits, mode=mode, granularity=granularity, symmetric=True)
    assert config.registers.mode == "search"
    assert not config.deletion.active
    assert config.label == name


def test_every_preset_is_covered_above_and_is_valid() -> None:
    assert [RegCacheConfig.from_preset(name).label for name in PRESETS] == list(PRESETS)


def test_unknown_preset() -> None:
    expected = r"Unknown preset 'w2a2'; expected one of w8a8, w6a6, w4a4, w8a8-dynamic\."
    with pytest.raises(ValueError, match=expected):
        RegCacheConfig.from_preset("w2a2")


def test_label_names_both_widths() -> None:
    assert RegCacheConfig(weights={"bits": 4}, activations={"bits": 6, "mode": "dynamic"}).label == "w4a6-dynamic"


REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (WeightsConfig, {"bits": 1}, r"weights\.bits must be an integer from 2 to 8, got 1\."),
    (WeightsConfig, {"bits": 9}, r"weights\.bits must be an integer from 2 to 8, got 9\."),
    (WeightsConfig, {"bits": "8"}, r"weights\.bits must be an integer from 2 to 8, got '8'\."),
    (WeightsConfig, {"granularity": "per_group"}, r"weights\.granularity must be one of per_channel, per_tensor; got"),
    (
        WeightsConfig,
        {"observer": "percentile"},
        r"weights\.observer must be one of minmax, mse, percentile_mse; got",
    ),
    (ActivationsConfig, {"bits": 8.0}, r"activations\.bits must be an integer from 2 to 8 or 16, got 8\.0\."),
    (ActivationsConfig, {"mode": "fast"}, r"activations\.mode must be one of static, dynamic; got 'fast'\."),
    (
        ActivationsConfig,
        {"granularity": "per_row"},
        r"activations\.granularity must be one of per_tensor, per_token; got",
    ),
    (
        ActivationsConfig,
        {"observer": "kl"},
        r"activations\.observer must be one of minmax, moving_average, percentile, mse, percentile_mse; got 'kl'\.",
    ),
    (
        ActivationsConfig,
        {"granularity": "per_token"},
        r"'per_token' needs activations\.mode='dynamic'.*Use mode='dynamic', or granularity='per_tensor'\.",
    ),
    (ActivationsConfig, {"percentile": 50.0}, r"activations\.percentile must be in \(50, 100\], got 50\.0\."),
    (ActivationsConfig, {"percentile": 100.1}, r"activations\.percentile must be in \(50, 100\], got 100\.1\."),
    (ActivationsConfig, {"percentile": float("nan")}, r"activations\.percentile must be in \(50, 100\], got nan\."),
    (ActivationsConfig, {"momentum": 1.0}, r"activations\.momentum must be in \[0, 1\), got 1\.0\."),
    (ActivationsConfig, {"momentum": -0.1}, r"activations\.momentum must be in \[0, 1\), got -0\.1\."),
    (RegistersConfig, {"mode": "on"}, r"registers\.mode must be one of search, fixed, none; got 'on'\."),
    (RegistersConfig, {"kv_mode": "x"}, r"registers\.kv_mode must be one of in_context, isolated; got 'x'\."),
    (
        RegistersConfig,
        {"mode": "fixed", "blocks": [3, 2]},
        r"registers\.blocks must be distinct, ascending and >= 0, got \[3, 2\]\.",
    ),
    (RegistersConfig, {"mode": "fixed", "blocks": [2, 2]}, r"registers\.blocks must be distinct.* got \[2, 2\]\."),
    (RegistersConfig, {"mode": "fixed", "blocks": [-1]}, r"registers\.blocks must be distinct.* got \[-1\]\."),
    (RegistersConfig, {"num_registers": 0}, r"registers\.num_registers must be at least 1, got 0\."),
    (
        RegistersConfig,
        {"num_copies": 0.0},
        r"registers\.num_copies must be > 0 .*got 0\.0\. To use no register set registers\.mode='none'\.",
    ),
    (
        RegistersConfig,
        {"mode": "fixed"},
        r"registers\.mode='fixed' needs registers\.blocks\. Give the blocks, or use mode='search' or mode='none'\.",
    ),
    (
        RegistersConfig,
        {"blocks": [1]},
        r"registers\.blocks=\[1\] contradicts registers\.mode='search'\. Use mode='fixed'\.",
    ),
    (RegistersConfig, {"mode": "none", "blocks": [1]}, r"registers\.blocks=\[1\] contradicts registers\.mode='none'\."),
    (DeletionConfig, {"rule": "all"}, r"deletion\.rule must be one of topk, threshold; got 'all'\."),
    (DeletionConfig, {"fill": "zero"}, r"deletion\.fill must be one of neighbour_mean, none; got 'zero'\."),
    (
        DeletionConfig,
        {"action": "drop"},
        r"deletion\.action must be one of delete, replace, late, per_token; got 'drop'\.",
    ),
    (DeletionConfig, {"count": -1, "block": 0}, r"deletion\.count must be >= 0, got -1\."),
    (DeletionConfig, {"count": 2}, r"deletion\.count=2 needs deletion\.block, the block at whose input"),
    (DeletionConfig, {"block": -1}, r"deletion\.block must be >= 0, got -1\."),
    (DeletionConfig, {"kappa": 1.0}, r"deletion\.kappa must be > 1 \(a ratio to the median norm\), got 1\.0\."),
    (
        DeletionConfig,
        {"rule": "threshold", "fill": "none"},
        r"deletion\.rule='threshold' removes a different number.*='neighbour_mean'\. Use that fill, or rule='topk'\.",
    ),
]


@pytest.mark.parametrize(("part", "values", "message"), REFUSED)
def test_refused_values_say_what_to_do(part: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(**values)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"registers": {"mode": "fixed", "blocks": "12"}}, r"registers\.blocks"),
        ({"registers": {"mode": "fixed", "blocks": 3}}, r"registers\.blocks"),
        ({"registers": {"mode": "fixed", "blocks": [1.5]}}, r"registers\.blocks"),
        ({"registers": {"num_registers": 1.5}}, r"registers\.num_registers"),
        ({"registers": {"mode": "none"}, "deletion": {"block": 1, "count": "2"}}, r"deletion\.count"),
        ({"registers": {"mode": "none"}, "deletion": {"block": 1, "count": 1.5}}, r"deletion\.count"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises((TypeError, ValueError), match=field):
        RegCacheConfig(**values)


def test_deletion_is_active_only_with_a_count() -> None:
    assert not DeletionConfig(block=3).active
    assert DeletionConfig(block=3, count=1).active


def test_ignore_must_not_be_one_string() -> None:
    with pytest.raises(TypeError, match=r"modules\.ignore must be a list of patterns, got the string '\*\.fc2'\."):
        ModulesConfig(ignore="*.fc2")  # type: ignore[arg-type]


def test_parts_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RegCacheConfig().weights.bits = 4  # type: ignore[misc]


def test_a_config_does_not_change() -> None:
    config = RegCacheConfig()
    with pytest.raises(
        FrozenInstanceError, match=r"weights cannot be set\. Make another one with config\.replace\(weights="
    ):
        config.weights = WeightsConfig(bits=4)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match=r"methods cannot be set"):
        config.update(methods=["gptq"])
    with pytest.raises(FrozenInstanceError, match=r"bits cannot be set"):
        config.bits = 4  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError, match=r"weights cannot be deleted"):
        del config.weights
    assert config == RegCacheConfig()


def test_parts_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        RegCacheConfig({"bits": 4})  # type: ignore[misc]


def test_require_raises_only_when_the_condition_fails() -> None:
    require(True, "unused")
    with pytest.raises(ValueError, match=r"^because$"):
        require(False, "because")


def test_build_part_takes_nothing_a_mapping_or_the_part_itself() -> None:
    part = WeightsConfig(bits=5)
    assert build_part(WeightsConfig, None, "weights") == WeightsConfig()
    assert build_part(WeightsConfig, {"bits": 5}, "weights") == part
    assert build_part(WeightsConfig, part, "weights") is part


@pytest.mark.parametrize("name", PARTS)
def test_unknown_keys_of_a_part_are_named_with_the_known_ones(name: str) -> None:
    known = ", ".join(sorted(RegCacheConfig().to_dict()[name]))
    one: dict[str, Any] = {name: {"bitz": 8}}
    two: dict[str, Any] = {name: {"b": 1, "a": 2}}
    number: dict[str, Any] = {name: 8}
    with pytest.raises(ValueError, match=rf"Unknown key in {name}: bitz\. Known keys: {known}\."):
        RegCacheConfig(**one)
    with pytest.raises(ValueError, match=rf"Unknown keys in {name}: a, b\. Known keys: {known}\."):
        RegCacheConfig(**two)
    with pytest.raises(TypeError, match=rf"{name} must be a mapping or a {name.capitalize()}Config, got int\."):
        RegCacheConfig(**number)


def test_unknown_keys_of_the_config() -> None:
    known = "activations, attention, deletion, methods, modules, registers, rewrites, weights"
    expected = r"in RegCacheConfig: {}\. Known keys: " + known + r"\."
    with pytest.raises(ValueError, match="Unknown key " + expected.format("weight")):
        RegCacheConfig(weight={})  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="Unknown keys " + expected.format("bits, group_size")):
        RegCacheConfig(group_size=128, bits=8)  # pyright: ignore[reportCallIssue]


def test_another_quantization_method_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"This is a RegCacheConfig \(quant_method 'regcache'\); got quant_method 'gptq'"
    ):
        RegCacheConfig(quant_method="gptq")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0])
def test_another_format_version_is_refused(version: int) -> None:
    expected = rf"format version {version} is not supported \(this release reads version {FORMAT_VERSION}\)\. Upgrade"
    with pytest.raises(ValueError, match=expected):
        RegCacheConfig(version=version)


def test_the_search_and_an_own_deletion_exclude_each_other() -> None:
    deletion = {"block": 3, "count": 2}
    with pytest.raises(
        ValueError, match=r"deletion\.count is found by the search.*Set registers\.mode to 'fixed' or 'none'"
    ):
        RegCacheConfig(deletion=deletion)
    assert RegCacheConfig(registers={"mode": "none"}, deletion=deletion).deletion.count == 2


def test_replace_changes_only_the_given_fields() -> None:
    before = unusual_config()
    after = before.replace(activations={"bits": 7}, weights=WeightsConfig(bits=2))
    assert after.activations == ActivationsConfig(
        bits=7, symmetric=False, observer="percentile", percentile=99.5, momentum=0.5
    )
    assert after.weights == WeightsConfig(bits=2)
    assert (after.registers, after.deletion, after.modules) == (before.registers, before.deletion, before.modules)
    assert before == unusual_config()


def test_replace_validates_and_names_what_it_does_not_know() -> None:
    config = RegCacheConfig()
    with pytest.raises(ValueError, match=r"Unknown part of RegCacheConfig: bits\."):
        config.replace(bits=8)
    with pytest.raises(ValueError, match=r"Unknown parts of RegCacheConfig: bits, mode\."):
        config.replace(mode="static", bits=8)
    with pytest.raises(
        ValueError, match=r"Unknown key in weights: bitz\. Known keys: bits, granularity, observer, symmetric\."
    ):
        config.replace(weights={"bitz": 8})
    with pytest.raises(ValueError, match=r"activations\.bits must be an integer"):
        config.replace(activations={"bits": 9})
    with pytest.raises(ValueError, match=r"deletion\.count is found by the search"):
        config.replace(deletion={"block": 1, "count": 1})


@settings(max_examples=40, deadline=None)
@given(configs())
def test_dict_json_yaml_and_copies_are_lossless(config: RegCacheConfig) -> None:
    assert RegCacheConfig(**config.to_dict()) == config
    assert RegCacheConfig(**json.loads(config.to_json_string())) == config
    assert RegCacheConfig(**yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert RegCacheConfig.from_dict(config.to_dict()) == config
    assert copy.deepcopy(config) == config == copy.copy(config)


def test_a_deep_copy_shares_nothing_mutable() -> None:
    config = RegCacheConfig()
    twin = copy.deepcopy(config)
    assert twin == config
    assert twin is not config
    mapping = config.to_dict()
    mapping["modules"]["ignore"].append("fc2")
    assert config.modules.ignore == ()


@pytest.mark.parametrize("as_json", [False, True])
def test_stored_forms_hold_every_field_defaults_included(as_json: bool) -> None:
    config = RegCacheConfig()
    data = json.loads(config.to_json_string(use_diff=True)) if as_json else config.to_diff_dict()
    assert set(data) == {*PARTS, "methods", "version", "quant_method"}
    for name in PARTS:
        assert set(data[name]) == set(getattr(config, name).__dataclass_fields__)


@pytest.mark.parametrize("config", [RegCacheConfig(), unusual_config()], ids=["default", "unusual"])
def test_travels_in_a_transformers_config(config: RegCacheConfig, tmp_path: Path) -> None:
    CLIPVisionConfig(quantization_config=config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == config.to_dict()
    loaded = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert RegCacheConfig(**loaded) == config
    restored = AutoQuantizationConfig.from_dict(loaded)
    assert isinstance(restored, RegCacheConfig)
    assert restored == config


def test_travels_in_the_vision_part_of_a_composite_config(tmp_path: Path) -> None:
    config = unusual_config()
    CLIPConfig(vision_config={"quantization_config": config.to_dict()}).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path).vision_config.quantization_config
    assert RegCacheConfig(**loaded) == config
