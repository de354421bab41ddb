"""Recipes that somebody broke, or wrote to break something: one line that names file, field or place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hostile
from optimum_regcache.config.recipe import LOCAL, Recipe, recorded_name

BAD: dict[str, tuple[bytes, str]] = {
    "model": (b"model: 5", r"model must be a string or null, got 5"),
    "empty": (b"model: ' '", r"model must not be empty; leave it out, or write null"),
    "date": (b"dataset: 2001-01-01", r"dataset must be a string or null, got datetime\.date"),
    "binary": (b"model: !!binary aGVsbG8=", r"model must be a string or null, got b'hello'"),
    "notes": (b"notes: 5", r"notes must be a string, got 5"),
    "preset": (b"preset: {a: 1}", r"preset must be a string, got \{'a': 1\}"),
    "open": (b"a: [", r"is not valid YAML in line 1, column 5: expected the node content"),
    "colon": (b"model: x\na: b: c", r"is not valid YAML in line 2, column 5: mapping values are not allowed"),
    "python": (b"!!python/object/apply:os.system [ls]", r"holds 'tag:yaml.org,2002:python/object/apply:os.system'; only plain"),
    "tag": (b"x: !foo 1", r"holds '!foo'; only plain values are read"),
    "deep": (b"[" * 5000 + b"]" * 5000, r"is nested too deeply"),
    "bomb": (b"a: &x [1]\nb: [*x, *x]", r"in line 2, column 5: aliases are not read; write the value again"),
    "twice": (b"search: {seed: 1, seed: 2}", r"the key 'seed' is given twice"),
    "key": (b"? [1, 2]\n: 3", r"is not valid YAML: found unhashable key"),
    "bytes": (b"\xff\xfe\x00", r"is not UTF-8 text \(byte 0\)\. Save it as UTF-8"),
    "nul": (b"\x00", r"is not valid YAML: unacceptable character"),
    "large": (b"#" * (1 << 21), r"is no recipe: it is larger than 1 MB"),
    "negative": (b"search: {seed: -1}", r"search\.seed must lie between 0 and 2\*\*32 - 1, got -1"),
    "huge": (b"search: {seed: 4294967296}", r"search\.seed must lie between 0 and 2\*\*32 - 1, got 4294967296"),
    "methods": (b"quantization: {methods: 5}", r"methods must be a list of names or of mappings with 'name', got 5"),
    "strategy": (b"search: {strategy: [1]}", r"search\.strategy must be a string, got \[1\]"),
    "number": (b"quantization: {1: 2, a: 3}", r"Unknown parts of RegCacheConfig: 1, a"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_broken_recipe_is_one_line_with_the_file(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search.seed=[", r"^search\.seed=\[ is not valid YAML in line 1, column 2"),
        ("quantization.methods=5", r"^methods must be a list of names"),
        ("search.seed=-3", r"^search\.seed must lie between 0"),
        ("model=5", r"^model must be a string or null, got 5"),
        ("model=''", r"^model must not be empty"),
    ],
)
def test_a_broken_assignment_is_named(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe().override([text])


def test_no_path_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    names: dict[Any, str] = {
        "openai/clip-vit-base-patch16": "openai/clip-vit-base-patch16",
        "planted-outlier": "planted-outlier",
        str(tmp_path / "home" / "vit"): f"{LOCAL}vit",
        "./vit": f"{LOCAL}vit",
        "vit": f"{LOCAL}vit",
        "../home/vit/": f"{LOCAL}vit",
        ".": f"{LOCAL}home",
        "/": f"{LOCAL}folder",
        "/gone/secret/data": f"{LOCAL}data",
        "~/images": f"{LOCAL}images",
    }
    assert {name: recorded_name(name) for name in names} == names


def test_mutants_of_a_recipe_are_named(tmp_path: Path) -> None:
    """The short form of a part of `make campaign`."""
    counts, bad = hostile.recipes(150, tmp_path)
    assert not bad
    assert counts["named error"] > 100
