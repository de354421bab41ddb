"""`benchmarks/bench_norm_tuning.py`: the table, and that the stored results are of its form."""

from __future__ import annotations

import json
from pathlib import Path

from bench_norm_tuning import table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_the_table_shows_gains_over_the_composition_alone() -> None:
    given = {"encoder": "e", "preset": "w4a4", "seed": 0, "base": "rotation + mse", "setup": "delete 1"}
    start = {"row": "", "cosine": [0.9, 0.01], "patch cosine": [0.8, 0.01], "top-1": [0.5, 0.1]}
    gains = {"cosine gain": [0.05, 0.001], "patch cosine gain": [-0.01, 0.002], "top-1 gain": [0.25, 0.05]}
    tuned = {"row": "norms", "cosine": [0.95, 0.01], "patch cosine": [0.79, 0.01], "top-1": [0.75, 0.1], **gains}
    record = {"tuning": {"iterations": 90, "best_iteration": 40, "installed": True}, "seconds": 12.3}
    assert table([{**given, **start}, {**given, **tuned, **record}]).splitlines()[2:] == [
        "| e | w4a4 | rotation + mse |  | 0 | 0.9000 |  |  | 50.0 |  |  |  |",
        "| e | w4a4 | rotation + mse | norms | 0 | 0.9500 | +0.0500 +- 0.0010 | -0.0100 +- 0.0020 | 75.0 | +25.0 +- 5.0 "
        "| 90 (40) | 12 |",
    ]


def test_the_page_holds_the_table_of_the_stored_results() -> None:
    rows = json.loads((RESULTS / "norm-tuning.json").read_text(encoding="utf-8"))["rows"]
    page = (RESULTS / "norm-tuning.md").read_text(encoding="utf-8")
    assert rows
    assert table(rows) in page
