"""Tensors in memory up to a budget, in files beyond it: batches of images and recorded states of any number."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, overload

import psutil
import torch
from safetensors import torch as safetensors

_library = cast("Any", safetensors)
load_file = cast("Callable[[Path], dict[str, torch.Tensor]]", _library.load_file)
save_file = cast("Callable[[dict[str, torch.Tensor], Path], None]", _library.save_file)
S = TypeVar("S")
T = TypeVar("T")
GIB = 2**30
SHARE = 4  # of the memory that is free, one part in this many is the default budget


def available_memory() -> int:
    """Bytes that may be taken without swapping; in a container at most what its limit leaves."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such group, or none that can be read
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    return free


class TensorSpace:
    """Where tensors are kept.

    Args:
        budget: bytes in memory; by default a quarter of what is free now.
        parent: folder in which one is made for what is beyond, when it is needed; `close` removes it, and so does the next
            space in the same place if the process was killed. Default: the system's folder for temporary files.

    Attributes:
        used: bytes in memory now.
        written: bytes in files now.
        pinned: batches that are kept in memory from now on lie in pages that a GPU can read by itself, so that copies to it
            wait for nothing (`optimum_regcache.encoders.passes.move`).
    """

    def __init__(self, budget: float | None = None, parent: Path | None = None) -> None:
        self.budget = available_memory() // SHARE if budget is None else int(budget)
        self.used = self.written = 0
        self.pinned = False
        self.parent, self._files = parent, 0
        self._folder: Path | None = None
        self._remove: weakref.finalize[Any, Any] | None = None

    def take(self, tensors: Mapping[str, torch.Tensor]) -> int | None:
        """Bytes of ``tensors``, entered into the budget; None if they do not fit into it any more."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.used + size > self.budget:
            return None
        self.used += size
        return size

    def write(self, tensors: Mapping[str, torch.Tensor]) -> Path:
        """A new file with ``tensors``."""
        folder = self._open()
        path = folder / f"{self._files:06d}.safetensors"
        self._files += 1
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
        self.written += path.stat().st_size
        return path

    def require_room(self, size: int, what: str) -> None:
        """Make sure that ``size`` bytes fit into memory and folder together.

        Raises:
            OSError: they do not.
        """
        beyond = size - max(0, self.budget - self.used)
        if beyond <= 0:
            return
        folder = self._open()
        free = shutil.disk_usage(folder).free
        if beyond > free:
            raise OSError(
                f"{what} take {size / GIB:.1f} GiB, of which data.memory_budget leaves {beyond / GIB:.1f} GiB to {folder}, "
                f"which has {free / GIB:.1f} GiB free. Use fewer images, a larger data.memory_budget (GiB), or a work folder "
                "on another disk."
            )

    def _open(self) -> Path:
        if self._folder is None:
            parent = Path(tempfile.gettempdir()) if self.parent is None else self.parent
            parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(parent)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def close(self) -> None:
        """Remove the files; whoever still holds batches in them can use them no more."""
        if self._remove is not None:
            self._remove()


_PREFIX = f"regcache-tensors-{socket.gethostname()}-"


def _remove_left_behind(parent: Path) -> None:
    """Remove folders of processes of this machine that are no more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


class LazySequence(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def item(self, position: int) -> T:
        """Of ``position``, from 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(len(self))[index]]
        return self.item(range(len(self))[index])


class StoredBatches(LazySequence[dict[str, torch.Tensor]]):
    """Mappings of tensors in order, each in memory or in a file that is mapped when it is asked for.

    Args:
        space: where they are kept.

    Attributes:
        sizes: images of each batch.
    """

    def __init__(self, space: TensorSpace) -> None:
        self.space = space
        self.sizes: list[int] = []
        self._items: list[dict[str, torch.Tensor] | Path] = []
        self._taken: list[int] = []
        weakref.finalize(self, _free, space, self._items, self._taken)

    def append(self, batch: Mapping[str, torch.Tensor], images: int) -> None:
        """Add a batch of ``images`` images."""
        size = self.space.take(batch)
        self.sizes.append(images)
        if size is not None and self.space.pinned:
            batch = {name: t.pin_memory() for name, t in batch.items()}
        self._items.append(self.space.write(batch) if size is None else dict(batch))
        self._taken.append(size or 0)

    @property
    def in_files(self) -> int:
        """Batches that are in files."""
        return sum(isinstance(item, Path) for item in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def item(self, position: int) -> dict[str, torch.Tensor]:
        found = self._items[position]
        return load_file(found) if isinstance(found, Path) else dict(found)


def _free(space: TensorSpace, items: list[Any], taken: list[int]) -> None:
    space.used -= sum(taken)
    for item in items:
        if isinstance(item, Path):
            space.written -= item.stat().st_size if item.exists() else 0
            item.unlink(missing_ok=True)


class MappedSequence(LazySequence[T], Generic[S, T]):
    """``make`` of each item, made when it is asked for."""

    def __init__(self, items: Sequence[S], make: Callable[[S], T]) -> None:
        self.items, self.make = items, make

    def __len__(self) -> int:
        return len(self.items)

    def item(self, position: int) -> T:
        return self.make(self.items[position])
