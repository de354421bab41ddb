"""Progress of one loop: a bar where there is a terminal or a notebook, a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

QUIET = 60.0  # seconds after which a loop without a bar says how far it is


def on_terminal() -> bool:
    """Whether stderr shows a bar in place."""
    return sys.stderr.isatty()


def bar(
    items: Iterable[Any] | None = None,
    name: str = "",
    *,
    total: int | None = None,
    unit: str = "it",
    shown: bool = True,
) -> Any:
    """Shows how far a loop is: iterate over it, or enter it and call ``update``.

    Args:
        items: to iterate over, if any.
        name: of the work.
        total: number of steps, if ``items`` has no length.
        unit: of a step.
        shown: show anything.
    """
    notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    if shown and not (on_terminal() or notebook):
        return Lines(() if items is None else items, name, total)
    return tqdm(items, desc=name, total=total, unit=unit, disable=not shown)


class Lines:
    """What of tqdm the loops use, in plain lines: one at the end, and one a minute before."""

    def __init__(self, items: Iterable[Any], name: str, total: int | None) -> None:
        self.items, self.name = items, name
        self.total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
        self.n, self._postfix = 0, ""
        self._begun = self._shown = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            self._say(f"{self.n} done in {duration(time.monotonic() - self._begun)}")

    def update(self, steps: int = 1) -> None:
        """``steps`` more are done."""
        self.n += steps
        now = time.monotonic()
        if now - self._shown > QUIET:
            self._shown = now
            rest = "" if self.total is None else f" of {self.total}"
            self._say(f"{self.n}{rest} after {duration(now - self._begun)}")

    def set_postfix_str(self, text: str) -> None:
        """``text`` is said with the next line."""
        self._postfix = f"; {text}"

    def _say(self, text: str) -> None:
        print(f"{self.name}: {text}{self._postfix}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
