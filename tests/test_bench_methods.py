"""The benchmark of methods: static compositions, searched row scales beside given ones, an interrupted run that goes on."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_methods
from bench_methods import KNOWN, STATIC, main
from optimum_regcache import RegCacheConfig
from optimum_regcache.methods import resolve

PAIR = ["gptq (rows given)", "gptq (rows searched)"]


@pytest.mark.parametrize("name", [name for name in KNOWN if "ptq4vit" not in name])
def test_every_entry_is_a_pipeline(name: str) -> None:
    made = resolve(RegCacheConfig.from_preset("w4a4").replace(registers={"mode": "none"}, methods=tuple(KNOWN[name])))
    assert made.methods


def test_each_searched_composition_follows_the_one_with_given_scales() -> None:
    names = list(STATIC)
    searched = [i for i, name in enumerate(names) if name.endswith(bench_methods.SEARCHED)]
    assert len(searched) == 4
    assert all(names[i - 1] == names[i].replace(bench_methods.SEARCHED, bench_methods.GIVEN) for i in searched)


def test_searched_rows_are_compared_with_given_ones_also_after_an_interruption(
    tmp_path: Path,
) -> None:
    path = tmp_path / "static.json"
    options = ["--static", "--model", "planted-outlier", "--preset", "w4a4", "--variants", "none", "both"]
    options += ["--num-samples", "24", "--num-report", "8", "--batch-size", "8", "--set", "search.sensitive_block=3"]
    options += ["--set", "search.blocks_before=0", "--set", "search.num_copies=[1]", "--set", "search.max_delete=1"]
    options += ["--output", str(path), "--work-dir", str(tmp_path / "work"), "--methods"]
    main([*options, PAIR[0]])
    first = json.loads(path.read_text())
    main([*options, *PAIR])
    cells = json.loads(path.read_text())["cells"]
    given, searched = (cells[f"planted-outlier/w4a4/{name}"] for name in PAIR)
    old = first["cells"][f"planted-outlier/w4a4/{PAIR[0]}"]["variants"]["none"]
    assert given["variants"]["none"]["cosine"] == old["cosine"]
    for kind in ("none", "both"):
        found, base = searched["variants"][kind], given["variants"][kind]
        assert found["over_given"]["mean"] == pytest.approx(found["cosine"] - base["cosine"], abs=1e-6)
        assert base["over_given"] is None
    text = (tmp_path / "static.md").read_text()
    assert text.startswith("# Static compositions")
    assert f"| {PAIR[1]} | {searched['variants']['none']['cosine']:.4f} +- " in text
