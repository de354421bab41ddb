"""Exit codes of the command line, and one line for every exception."""

from __future__ import annotations

import errno
import os
import re
from typing import Any

USER_ERROR, INTERRUPTED, MACHINE, UNEXPECTED = 2, 3, 4, 1
MISSED = 6  # no failure: `run` is done and written, and the result misses what the recipe expects
DOES_NOT_FIT = 5  # no failure: `analyze --check` is done and written, and its verdict is that


class Unfinished(KeyboardInterrupt):
    """A search was interrupted, and what was best until then is saved."""


def require_finished(results: dict[str, Any]) -> None:
    """Make sure that what was written comes from a whole search.

    Raises:
        Unfinished: it does not.
    """
    if results["fit"] and results["fit"]["search"]["unfinished"]:
        raise Unfinished(
            "the best so far is saved, marked unfinished. The same command with --overwrite goes on with the search."
        )


_STORAGE = {
    errno.ENOSPC: "Free some space, or use another --output.",
    errno.EDQUOT: "Your quota is used up: free some space, or use another --output.",
    errno.EFBIG: "The file system takes no file of this size; use another --output.",
    errno.EROFS: "It is mounted read-only; use another --output.",
    errno.EACCES: "You may not read or write it; check its permissions, or use another --output.",
    errno.EPERM: "You may not read or write it; check its permissions, or use another --output.",
    errno.EIO: "The disk or the file system fails; use another one.",
}
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and line for an exception.

    Returns:
        2: the user can correct it. 3: interrupted. 4: no space, permission, memory or network. 1: a fault of ours.
    """
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, Unfinished):
        return INTERRUPTED, f"interrupted: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted.{notes or ' Nothing was written.'}"
    text = _sentence(error)
    number = _errno(error)
    if number in _STORAGE:
        return MACHINE, f"error: {text} {_STORAGE[number]}{notes}"
    if isinstance(error, ConnectionError):
        return MACHINE, f"error: {text}{notes}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        return MACHINE, f"error: out of memory. Use a smaller --batch-size or --num-samples.{notes}"
    if isinstance(error, (ValueError, TypeError, ImportError, OSError)):
        return USER_ERROR, f"error: {text}{notes}"
    return UNEXPECTED, (
        f"error: {type(error).__name__}: {text} This is unexpected: run the command again with --debug and report what it "
        f"prints.{notes}"
    )


def _sentence(error: BaseException) -> str:
    """The message on one line, with a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text[-1] in ".!?" else f"{text}."


def _errno(error: BaseException | None) -> int | None:
    """Of the exception or of what it came from; libraries in Rust put the number into the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _STORAGE:
            return error.errno
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and int(found.group(1)) in _STORAGE:
            return int(found.group(1))
        if os.strerror(errno.ENOSPC) in str(error):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None
