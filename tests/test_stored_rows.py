"""`benchmarks/stored_rows.py`: what is there is found again, and a write that fails leaves it."""
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import pytest

from stored_rows import StoredRows


def test_rows_are_there_for_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    stored = StoredRows(path)
    assert stored.rows == []
    stored.add([{"encoder": "a", "seed": 0, "cosine": 0.5}, {"encoder": "a", "seed": 1, "cosine": 0.25}])
    stored.add([{"encoder": "b", "seed": 0, "cosine": 1.0}])
    again = StoredRows(path)
    assert again.rows == stored.rows
    assert again.matching(encoder="a", seed=1) == [{"encoder": "a", "seed": 1, "cosine": 0.25}]
    assert len(again.matching(seed=0)) == 2
    assert again.matching(encoder="c") == again.matching(preset="w8a8") == []


def test_a_row_that_cannot_be_written_leaves_the_file(tmp_path: Path) -> None:
    stored = StoredRows(tmp_path / "rows.json")
    stored.add([{"seed": 0}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        stored.add([{"seed": tmp_path}])
    assert stored.rows == StoredRows(tmp_path / "rows.json").rows == [{"seed": 0}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
