"""The comparison with other projects: rows, what is measured again, and a peer that fails."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench_peers as bench
from cpu_job import Skipped

GIVEN = {"encoder": "clip-scenes", "seed": 0}
SCORES = {"cosine": 0.9, "cosine_error": 0.01, "patch_cosine": 0.8, "patch_cosine_error": 0.02}


def _bench(build: Any) -> Any:
    made = object.__new__(bench.Bench)
    made.amounts = {"calibration": 8, "images": 16}
    made.fit = SimpleNamespace(search=SimpleNamespace(chosen=SimpleNamespace(describe=lambda: "delete 2")))
    made.replay = SimpleNamespace(scores=lambda runner: dict(SCORES))
    made.build = build
    return made


def _raising(error: Exception) -> Any:
    def build(name: str) -> Any:
        raise error

    return build


def test_a_row_says_what_was_measured_and_what_was_installed() -> None:
    made = _bench(lambda name: None)
    row = made.row("torchao, static")
    assert {k: row[k] for k in SCORES} == SCORES
    assert (row["calibration"], row["images"]) == (8, 16)
    assert "installed" not in row
    assert made.row(f"rotation + mse{bench.REGISTERS}")["installed"] == "delete 2"


def test_a_peer_that_fails_is_a_row_and_our_own_fault_is_not() -> None:
    made = _bench(_raising(KeyError("node | one\nmore")))
    row = made.row("NNCF, defaults")
    assert row["error"] == "KeyError: 'node | one\\nmore'"
    assert bench.cells(row) == "failed: KeyError: 'node / one\\nmore' | - | - | -"
    with pytest.raises(KeyError, match="node"):
        made.row("round to nearest")
    assert _bench(_raising(Skipped("not installed: nncf"))).row("NNCF, defaults")["error"] == "not installed: nncf"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not bench.installed("no_such_package")
    monkeypatch.setattr(bench, "installed", lambda package: package != "torchao")
    with pytest.raises(Skipped, match="not installed: torchao"):
        bench.Bench.build(_bench(None), "torchao, static")


def test_what_is_measured_stays_and_what_failed_is_tried_again() -> None:
    rows = [
        {**GIVEN, "contender": "float32", **SCORES},
        {**GIVEN, "contender": "optimum-quanto", "error": "broken"},
        {**GIVEN, "seed": 1, "contender": "round to nearest", **SCORES},
    ]
    asked = ["float32", "round to nearest", "optimum-quanto"]
    assert bench.missing(rows, GIVEN, asked) == ["round to nearest", "optimum-quanto"]
    merged = bench.merge(rows, {**GIVEN, "contender": "optimum-quanto", **SCORES})
    assert [r["contender"] for r in bench.ordered(merged)] == ["float32", "optimum-quanto", "round to nearest"]
    assert "error" not in bench.ordered(merged)[1]


def test_the_table_has_a_part_for_each_encoder_and_one_over_its_seeds() -> None:
    amounts, top1 = {"calibration": 8, "images": 16}, {"accuracy": 0.75, "accuracy_error": 0.125}
    quanto = {"contender": "optimum-quanto", **amounts, **SCORES, **top1}
    rows = [
        {**GIVEN, **amounts, "contender": "float32", **SCORES, **top1},
        {**GIVEN, **quanto, "accuracy": 0.5},
        {**GIVEN, **amounts, "contender": "NNCF, defaults", **SCORES, **top1},
        {**GIVEN, **amounts, "seed": 1, "contender": "float32", **SCORES, **top1, "accuracy": 1.0},
        {**GIVEN, **quanto, "seed": 1, "cosine": 0.95},
        {**GIVEN, **amounts, "seed": 1, "contender": "NNCF, defaults", "error": "broken"},
        {**GIVEN, **amounts, "encoder": "planted-outlier", "contender": "float32", **SCORES},
    ]
    lines = bench.table(rows).splitlines()
    headings = ["planted-outlier, seed 0", "clip-scenes, seed 0", "clip-scenes over seeds"]
    assert [line[4:] for line in lines if line.startswith("#")] == headings
    assert "| float32 | 0.9000 ± 0.0100 | 0.8000 ± 0.0200 | 75.0 ± 12.5 % | - |" in lines
    assert "| float32 | 0.9000 ± 0.0100 | 0.8000 ± 0.0200 | - | - |" in lines
    assert lines[-2:] == [
        "| float32 | 0, 1 | 0.9000 to 0.9000 | 0.8000 to 0.8000 | +0.0 to +0.0 |",
        "| optimum-quanto | 0, 1 | 0.9000 to 0.9500 | 0.8000 to 0.8000 | -25.0 to -25.0 |",
    ]


def test_the_page_holds_the_tables_of_the_stored_results() -> None:
    results = Path(__file__).parent.parent / "docs" / "results"
    rows = json.loads((results / "peers.json").read_text(encoding="utf-8"))
    assert bench.table(rows) in (results / "peers.md").read_text(encoding="utf-8")


def test_the_converted_encoder_needs_its_folder_and_images() -> None:
    assert bench.open_encoder(bench.CONVERTED, 0, None, "images") is None
    assert bench.open_encoder(bench.CONVERTED, 0, "folder", None) is None
