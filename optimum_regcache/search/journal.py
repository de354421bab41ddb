"""The journal of a fit: one checked line for every finished step, so that a fit may be killed at any moment and continued."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load, save
from transformers.utils import logging

from optimum_regcache.config.files import sync_folder, write_bytes
from optimum_regcache.search import processes

logger = logging.get_logger(__name__)


class Journal:
    """Results of finished steps by name, on disk, appended and flushed one by one.

    The file is ``FOLDER/FINGERPRINT.jsonl``: a fit of another model, other data or settings has a file of its own, so neither
    disturbs the other. A last line that was cut off is dropped.

    Args:
        folder: where the file is; None keeps everything in memory.
        fingerprint: hexadecimal identity of everything that can change a result.

    Raises:
        ValueError: a line other than the last is damaged, the file is a link, or another process is writing it.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.path = None if folder is None else folder / f"{fingerprint}.jsonl"
        self._values: dict[str, list[float]] = {}
        self._lock: FileLock | None = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link; the journal of a fit is a plain file. Remove the link.")
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is fitting with {self.path}. Wait for it, or use another work directory."
            ) from None
        try:
            self._read(self.path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def shared(cls, folder: Path | None, fingerprint: str) -> Journal:
        """The journal of all processes of a run: the main one reads and writes the file, the others know what was in it and
        keep what comes in memory.

        Raises:
            ValueError: as the constructor does, in all processes.
        """
        journal = processes.together(lambda: cls(folder if processes.is_main() else None, fingerprint))
        journal._values = processes.from_main(journal._values)
        return journal

    def _read(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            entry = _parse(line)
            if entry is None:
                raise ValueError(
                    f"Line {number} of {path} is damaged. Delete the file to start this fit again, or the line and all after "
                    "it to lose only these steps."
                )
            self._values[entry[0]] = entry[1]
        if rest:  # a line that a kill cut off
            with path.open("rb+") as file:
                file.truncate(len(content) - len(rest))
        if lines:
            logger.info(f"{path}: {len(lines)} finished steps are taken from it.")

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str) -> list[float] | None:
        """The result of a finished step."""
        return self._values.get(name)

    def put(self, name: str, values: list[float]) -> None:
        """Add the result of a step, unless it is there; it is on disk when this returns."""
        if name in self._values:
            return
        self._values[name] = values
        if self.path is None:
            return
        text = json.dumps([name, values])
        line = f"{text}\t{zlib.crc32(text.encode()):08x}\n"
        new = not self.path.exists()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(self.path, flags, 0o644), "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)

    def kept(self, name: str, file: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of a step, made once: a safetensors file beside the journal, its checksum and size a step of the journal.

        Args:
            name: of the step.
            file: part of the file's name.
            make: the tensors, on the CPU.

        Raises:
            ValueError: a file that is not what was written, or is gone.
        """
        known, path = self.get(name), self.path and self.path.with_name(f"{self.path.name}.{file}.safetensors")
        if path is None:
            return make()
        if known is None:
            data = save({key: tensor.contiguous() for key, tensor in make().items()})
            write_bytes(path, data, sync=True)
            self.put(name, _checksum(data))
            return load(data)
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if _checksum(data) != known:
            raise ValueError(f"{path} is not what this fit wrote. Delete it and {self.path} to start this fit again.")
        return load(data)

    def close(self) -> None:
        """Let other processes write."""
        if self._lock is not None:
            self._lock.release()


def _parse(line: bytes) -> tuple[str, list[float]] | None:
    """(name, values) of a line; None if it is not as it was written."""
    text, _, check = line.rpartition(b"\t")
    if check != b"%08x" % zlib.crc32(text):
        return None
    name, values = json.loads(text)
    return name, values


def _checksum(data: bytes) -> list[float]:
    return [float(zlib.crc32(data)), float(len(data))]
