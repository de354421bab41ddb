"""`benchmarks/bench_registers.py`: the table, and that the stored results are of its form."""

from __future__ import annotations

import json
from pathlib import Path

from bench_registers import table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_the_table_tells_how_much_of_the_gap_is_closed() -> None:
    given = {"encoder": "e", "preset": "w4a4", "seed": 0, "deletion": 2}
    rows = [
        {**given, "deletion": 0, "row": "float", "cosine": 1.0, "accuracy": None},
        {**given, "row": "averaged, scalar tau", "blocks": [3], "tau": 2.0, "cosine": 0.9, "accuracy": 0.5},
        {**given, "row": "gradient-tuned", "blocks": [3, 4], "tau": [2.0, 0.5], "cosine": 0.96, "accuracy": 0.75},
    ]
    assert table(rows).splitlines()[2:] == [
        "| e | w4a4 | 0 | 0 | float | - | - | 1.0000 | - | - |",
        "| e | w4a4 | 0 | 2 | averaged, scalar tau | 3 | 2 | 0.9000 | +0 % | 50.00 % |",
        "| e | w4a4 | 0 | 2 | gradient-tuned | 3, 4 | 2, 0.5 | 0.9600 | +60 % | 75.00 % |",
    ]


def test_the_page_holds_the_table_of_the_stored_results() -> None:
    rows = json.loads((RESULTS / "registers.json").read_text(encoding="utf-8"))
    page = (RESULTS / "registers.md").read_text(encoding="utf-8")
    assert rows
    assert table(rows) in page
