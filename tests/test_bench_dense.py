"""`benchmarks/bench_dense.py`: the table, and that the page holds that of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

from bench_dense import FIGURES, table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_the_rows_of_a_model() -> None:
    score = {"value": 0.25, "standard_error": 0.01, "float_value": 0.5, "difference": -0.25, "difference_error": 0.005}
    tasks: dict[str, dict[str, dict[str, object]]] = {}
    for task, figure in FIGURES:
        tasks.setdefault(task, {})[figure] = {**score, "share": "AbsRel" not in figure}
    tasks["patch_cosine"]["patch tokens"] |= {"share": False, "float_value": None, "difference": None}
    lines = table([{"model": "m", "preset": "w4a4", "variant": "naive", "tasks": tasks}]).splitlines()
    assert lines[2] == "| m | 32 | float | 1 | 50.0 | 50.0 | 0.5000 | 0.5000 | 50.0 |"
    moved, errors = "-25.0 ± 0.5", "-0.2500 ± 0.0050"
    assert lines[3] == (f"| m | w4a4 | naive | 0.2500 ± 0.0100 | {moved} | {moved} | {errors} | {errors} | {moved} |")


def test_the_page_holds_the_table_of_the_stored_results() -> None:
    rows = json.loads((RESULTS / "dense.json").read_text(encoding="utf-8"))
    assert table(rows) in (RESULTS / "dense.md").read_text(encoding="utf-8")
