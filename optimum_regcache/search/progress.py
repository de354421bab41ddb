"""One bar for a whole job, with the time that is left; lines instead of it where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.nn.modules.module import register_module_forward_hook
from tqdm.auto import tqdm

from optimum_regcache.config.bars import duration, on_terminal

QUIET = 10.0  # seconds after which a job says that it is alive
_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]{postfix}"


class Progress:
    """Work done of work expected, over all stages of a job.

    The unit is a block-forward: one image through one block. What a stage will take is said before it begins and replaced by
    what it took when it ends.

    Args:
        name: of the job.
        enabled: show anything.
    """

    def __init__(self, name: str, enabled: bool) -> None:
        self.name, self.enabled = name, enabled
        self.terminal = on_terminal()
        self._expected: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._stage, self._best = "", ""
        self._begun = self._shown = time.monotonic()
        self._bar: Any = tqdm(
            total=1, desc=name, disable=not (enabled and self.terminal), bar_format=_BAR, smoothing=0, leave=False
        )

    @property
    def done(self) -> float:
        """Block-forwards so far."""
        return sum(self._done.values())

    @property
    def total(self) -> float:
        """Block-forwards in all, as far as one can tell."""
        return sum(max(self._expected.get(s, 0.0), self._done.get(s, 0.0)) for s in {*self._expected, *self._done})

    def left(self) -> float | None:
        """Seconds that the rest will take at the rate so far; None before anything is done."""
        if not self.done:
            return None
        return (self.total - self.done) * (time.monotonic() - self._begun) / self.done

    def expect(self, **stages: float) -> None:
        """Block-forwards that stages will take."""
        self._expected |= stages

    def advance(self, work: float) -> None:
        """``work`` block-forwards of the stage under way are done, or about to be."""
        self._done[self._stage] = self._done.get(self._stage, 0.0) + work
        self._bar.total = max(self.total, 1)
        self._bar.update(work)

    def best(self, text: str) -> None:
        """What is best so far, beside the bar."""
        self._best = text
        self._bar.set_postfix_str(text, refresh=False)

    def tick(self) -> None:
        """Something moves: show that, if nothing was shown for a while."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self.terminal and now - self._shown > 1:
            self._shown = now
            self._bar.refresh()
        elif now - self._shown > QUIET:
            self.say(f"{self._stage or self.name} ...")

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """A part of the job."""
        before, begun = self._stage, time.monotonic()
        self._stage = name
        self._bar.set_description(f"{self.name}: {name}")
        yield
        seconds = time.monotonic() - begun
        self._expected[name] = self._done.get(name, 0.0)
        self._bar.total = max(self.total, 1)
        self._stage = before
        self.best("")
        if self.enabled and not self.terminal and not before:  # a stage within one is no news
            self.say(f"{name} done in {duration(seconds)}")

    def say(self, text: str) -> None:
        """A line, with how far the job is."""
        self._shown = time.monotonic()
        if not self.enabled:
            return
        left, share = self.left(), self.done / self.total if self.total else 0.0
        rest = f"; {100 * share:.0f} %, about {duration(left)} left" if left and share < 1 else ""
        best = f"; best so far: {self._best}" if self._best else ""
        tqdm.write(f"{self.name}: {text}{rest}{best}", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)
_NOWHERE = Progress("", False)


def current() -> Progress:
    """The progress of the job under way; one that shows nothing if there is none."""
    return _current.get() or _NOWHERE


@contextmanager
def watching(name: str, enabled: bool) -> Generator[Progress, None, None]:
    """A job; inside of another one it is a part of that."""
    known = _current.get()
    if known is not None:
        yield known
        return
    progress = Progress(name, enabled)
    token = _current.set(progress)
    handle = register_module_forward_hook(lambda module, args, output: progress.tick()) if enabled else None
    try:
        yield progress
    finally:
        if handle is not None:
            handle.remove()
        progress.close()
        _current.reset(token)
