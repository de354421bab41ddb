"""Images read once: decoded and processed by worker processes, kept in memory up to a budget and in files beyond it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from optimum_regcache.config.bars import bar
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import Batch, num_images
from optimum_regcache.encoders.store import StoredBatches, TensorSpace

MANY = 512  # images from which on worker processes are started by default
MOST_WORKERS = 8


class _Batches(Dataset[Any]):
    """Batch ``i`` of inputs as arrays, or the error that it ended in: an error of a worker keeps its own words."""

    def __init__(self, inputs: ImageInputs, size: int) -> None:
        self.inputs, self.size = inputs, size

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __getitem__(self, index: int) -> Any:
        positions = range(index * self.size, min((index + 1) * self.size, len(self.inputs)))
        try:
            (batch,) = self.inputs.subset(positions).batches(self.size)
        except Exception as error:
            return error
        # tensors would travel through shared memory, of which containers have little
        return {name: rows.numpy() for name, rows in batch.items()}


def number_of_workers(inputs: ImageInputs, workers: int | None) -> int:
    """Processes to start; 0 reads in this one.

    By default none for few images, for ready ``pixel_values``, on two cores, for data that cannot be sent to a process, in a
    process that may have none, and where a process starts by running the user's script again (spawn).
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 3 or len(inputs) < MANY or not inputs.decodes:
        return 0
    if multiprocessing.get_start_method() != "fork" or multiprocessing.current_process().daemon:
        return 0
    try:
        pickle.dumps((inputs.processor, inputs.data_collator))
    except (pickle.PicklingError, AttributeError, TypeError):
        return 0
    return min(MOST_WORKERS, cores - 1)


def read_batches(inputs: ImageInputs, data: DataConfig) -> Iterator[Batch]:
    """The batches of ``inputs``, in order, each made once.

    Raises:
        ValueError: an image that cannot be read, by its name.
    """
    workers = number_of_workers(inputs, data.workers)
    if not workers:
        yield from inputs.batches(data.batch_size)
        return
    source = _Batches(inputs, data.batch_size)
    loader: Any = DataLoader(source, batch_size=None, num_workers=min(workers, len(source)), collate_fn=_as_it_is)
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield {name: torch.from_numpy(rows) for name, rows in found.items()}


def _as_it_is(found: Any) -> Any:
    return found


def store_batches(
    inputs: ImageInputs, data: DataConfig, space: TensorSpace, *, progress: bool = False
) -> StoredBatches:
    """All batches of ``inputs``, to be used any number of times.

    Raises:
        ValueError: an image that cannot be read, by its name.
        OSError: they fit neither into memory nor on the disk.
    """
    stored = StoredBatches(space)
    with bar(name="reading images", total=len(inputs), unit="image", shown=progress) as shown:
        for batch in read_batches(inputs, data):
            images = num_images(batch)
            if not len(stored):
                size = sum(t.numel() * t.element_size() for t in batch.values())
                space.require_room(size * len(inputs) // images, f"{len(inputs)} images")
            stored.append(batch, images)
            shown.update(images)
    return stored
