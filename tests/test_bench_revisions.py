"""benchmarks/bench_revisions.py: both sides in turn, and the ratio that survives a drifting machine."""

from __future__ import annotations

from typing import Any

import pytest

from bench_revisions import compare, table


class Drifting:
    """A side whose machine becomes slower with every step that either side takes."""

    clock = 1.0

    def __init__(self, cost: float, steps: list[str]) -> None:
        self.cost, self.steps, self.asked = cost, steps, 0

    def __call__(self, step: str) -> float:
        Drifting.clock *= 1.05
        self.asked += 1
        return self.cost * Drifting.clock


def test_the_ratio_is_before_over_now_whatever_the_machine_does() -> None:
    before: Any = Drifting(30.0, ["quantize", "int8 fused, batch 1", "gone"])
    now: Any = Drifting(10.0, ["quantize", "int8 fused, batch 1", "new"])
    found = compare(before, now, 9)
    assert list(found) == ["quantize", "int8 fused, batch 1"]  # steps of both sides
    assert before.asked == now.asked == 3 + 9
    assert found["int8 fused, batch 1"]["ratio"] == pytest.approx(3.0, rel=0.06)
    low, high = found["int8 fused, batch 1"]["quartiles"]
    assert low <= found["int8 fused, batch 1"]["ratio"] <= high


def test_the_table_names_the_revision() -> None:
    row = {"before": 20.0, "now": 10.0, "ratio": 2.0, "quartiles": [1.9, 2.1]}
    assert "| open | 20.0 | 10.0 | 2.00 | 1.90 to 2.10 |" in table({"open": row}, "abc1234")
    assert "abc1234, ms" in table({}, "abc1234")
