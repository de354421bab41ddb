"""Atomic writes: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, cast


def write_text(path: str | Path, text: str, *, sync: bool = False) -> None:
    """Write ``text`` as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"), sync=sync)


def write_bytes(path: str | Path, data: bytes, *, sync: bool = False) -> None:
    """Write ``data`` under a temporary name of its own in the same directory, then rename. A link is replaced, not followed.

    Args:
        path: the file.
        data: its content.
        sync: return only when it is on disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # "x" fails on whatever is there, a link included
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | Path, data: Any, *, sync: bool = False) -> None:
    """Write JSON atomically; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n", sync=sync)


def sync_file(path: Path) -> None:
    """Return when the content of a file is on disk.

    Raises:
        OSError: the disk fails.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on disk, where the system can do that."""
    with suppress(OSError):  # Windows opens no folder, and some network file systems sync none
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def finite(data: Any) -> Any:
    """``data`` with None for every float that JSON cannot hold."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in cast("dict[Any, Any]", data).items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in cast("list[Any]", data)]
    return None if isinstance(data, float) and not math.isfinite(data) else data
