"""Rows of a benchmark in a JSON file that grows as they come and is never half written; a run that ends early goes on there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimum_regcache.config.files import write_text

Row = dict[str, Any]


class StoredRows:
    """The rows in a file; none where there is none yet.

    Attributes:
        rows: in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def matching(self, **values: Any) -> list[Row]:
        """Rows that hold ``values``."""
        return [row for row in self.rows if values.items() <= row.items()]

    def add(self, rows: Iterable[Row]) -> None:
        """Put ``rows`` at the end."""
        self.store([*self.rows, *rows])

    def store(self, rows: list[Row]) -> None:
        """Put ``rows`` in place of all."""
        write_text(self.path, json.dumps(rows, indent=1) + "\n")
        self.rows = rows
