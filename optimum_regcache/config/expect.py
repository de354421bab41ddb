"""What a recipe should reach, and whether a result does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from optimum_regcache.config.validation import check_types, one_of, require

METRICS = ("accuracy", "cosine")
SOURCES = ("measured", "published")


class Measured(Protocol):
    """A row of a report."""

    @property
    def accuracy(self) -> float | None: ...

    @property
    def cosine(self) -> float: ...


@dataclass(frozen=True)
class ExpectConfig:
    """What a result of the recipe should reach. Figures are fractions.

    Attributes:
        metric: ``accuracy`` (top-1) or ``cosine`` (of features to those of the float model).
        source: ``measured``: by this project with this recipe; a result must come within ``tolerance``. ``published``: by
            others, on images and a protocol that may differ; it is shown beside the result and binds nothing.
        float_model, naive, result: the metric of the float model, of round to nearest with nothing installed, and of the saved
            model.
        tolerance: how far below ``result``, and how far off ``float_model``, a result may be.
        retention: least metric of the saved model / that of the float model.
        recovered: least (saved - naive) / (float - naive), the share of naive's loss that is gained back.
        where: images and source, in words.
    """

    metric: str = "cosine"
    source: str = "measured"
    float_model: float | None = None
    naive: float | None = None
    result: float | None = None
    tolerance: float = 0.01
    retention: float | None = None
    recovered: float | None = None
    where: str = ""

    def __post_init__(self) -> None:
        check_types(self, "expect")
        one_of("expect", "metric", self.metric, METRICS)
        one_of("expect", "source", self.source, SOURCES)
        for name in ("float_model", "naive", "result", "retention", "recovered"):
            value = getattr(self, name)
            require(value is None or -1 <= value <= 2, f"expect.{name} is a fraction such as 0.98, got {value}.")
        require(0 <= self.tolerance < 1, f"expect.tolerance must lie between 0 and 1, got {self.tolerance}.")


@dataclass(frozen=True)
class Check:
    """One expectation.

    Attributes:
        name: what is compared.
        wanted, found: in words, and as a figure.
        passed: None where it binds nothing.
    """

    name: str
    wanted: str
    found: float | None
    passed: bool | None

    def describe(self) -> str:
        """A line of the summary."""
        word = {True: "reached", False: "MISSED", None: "for comparison"}[self.passed]
        found = "none" if self.found is None else f"{self.found:.4f}"
        return f"{self.name}: {found}, expected {self.wanted}: {word}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {"name": self.name, "wanted": self.wanted, "found": self.found, "passed": self.passed}


def compare_expected(expect: ExpectConfig, original: Measured, naive: Measured, saved: Measured) -> list[Check]:
    """Compare the rows of a report with what its recipe expects; a metric that was not measured misses all that binds."""
    first, plain, last = (getattr(row, expect.metric) for row in (original, naive, saved))
    binds, allowed = expect.source == "measured", expect.tolerance
    checks: list[Check] = []

    def add(name: str, wanted: str, found: float | None, good: bool, binding: bool) -> None:
        checks.append(Check(name, wanted, found, (found is not None and good) if binding else None))

    if expect.float_model is not None:
        near = first is not None and abs(first - expect.float_model) <= allowed
        add(f"float {expect.metric}", f"{expect.float_model:.4f} +- {allowed:g}", first, near, binds)
    if expect.naive is not None:
        add(f"naive {expect.metric}", f"{expect.naive:.4f}", plain, True, False)
    if expect.result is not None:
        reached = last is not None and last >= expect.result - allowed
        add(f"result {expect.metric}", f"{expect.result:.4f} less at most {allowed:g}", last, reached, binds)
    if expect.retention is not None:
        kept = None if first is None or last is None or not first else last / first
        add("retention", f"at least {expect.retention:g}", kept, kept is not None and kept >= expect.retention, True)
    if expect.recovered is not None:
        lost = None if first is None or plain is None or not first > plain else first - plain
        back = None if lost is None or last is None or plain is None else (last - plain) / lost
        add("recovered", f"at least {expect.recovered:g}", back, back is not None and back >= expect.recovered, True)
    return checks
