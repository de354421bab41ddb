"""`benchmarks/bench_transfer.py`: the table, and that the page holds that of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

from bench_transfer import table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_a_row_of_the_table() -> None:
    row = {"preset": "w4a4", "searched": "a", "measured": "b", "images": 8, "installed": "delete 2", "naive": 0.5}
    row |= {"naive_error": 0.01, "regcache": 0.75, "regcache_error": 0.02, "gain": 0.25, "gain_error": 0.005}
    assert table([row]).splitlines()[-1] == (
        "| w4a4 | a | delete 2 | b | 0.5000 ± 0.0100 | 0.7500 ± 0.0200 | +0.2500 ± 0.0050 |"
    )


def test_the_page_holds_the_table_of_the_stored_results() -> None:
    rows = json.loads((RESULTS / "transfer.json").read_text(encoding="utf-8"))
    page = (RESULTS / "transfer.md").read_text(encoding="utf-8")
    assert len({row["measured"] for row in rows}) * len({row["searched"] for row in rows}) * 2 == len(rows)
    assert table(rows) in page
