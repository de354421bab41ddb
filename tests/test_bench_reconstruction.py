"""`benchmarks/bench_reconstruction.py`: the table, and that the page holds the stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_reconstruction import ABLATION, COMPOSITIONS, table
from optimum_regcache import RegCacheConfig
from optimum_regcache.methods import resolve

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_every_composition_is_one_that_works_together() -> None:
    for methods in (*COMPOSITIONS.values(), *(methods for methods, _ in ABLATION.values())):
        assert resolve(RegCacheConfig(methods=methods, registers={"mode": "none"})).methods


def test_the_table_relates_to_float_where_there_are_labels() -> None:
    given = {
        "encoder": "e",
        "bits": 4,
        "seed": 0,
        "images": 256,
        "composition": "rtn",
        "kept": [2, 3],
        "seconds": 12.3,
        "peak_mib": 512,
    }
    scores = {"cosine": [0.9, 0.01], "patch cosine": [0.8, 0.01]}
    labelled: dict[str, Any] = {"top-1": [0.5, 0.1], "float": [0.8, 0.1]}
    assert table([{**given, **scores, **labelled}, {**given, **scores, "float": None}]).splitlines()[2:] == [
        "| e | W4A4 | 256, 0 | rtn | 0.9000 +- 0.0100 | 0.8000 +- 0.0100 | 50.0 +- 10.0 | 62.5 | 2, 3 | 12 | 512 |",
        "| e | W4A4 | 256, 0 | rtn | 0.9000 +- 0.0100 | 0.8000 +- 0.0100 |  |  | 2, 3 | 12 | 512 |",
    ]


def test_the_page_holds_the_tables_of_the_stored_results() -> None:
    rows = json.loads((RESULTS / "reconstruction.json").read_text(encoding="utf-8"))
    page = (RESULTS / "reconstruction.md").read_text(encoding="utf-8")
    assert rows
    for ablation in (False, True):
        part = [row for row in rows if row["ablation"] == ablation]
        assert not part or table(part) in page
