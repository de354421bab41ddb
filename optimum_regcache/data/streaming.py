"""A few images of a data set that is not downloaded: read once, in a seeded order, and kept for whatever reads them again."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pyarrow
from filelock import FileLock
from transformers.utils import logging

from optimum_regcache.config.validation import require
from optimum_regcache.data.images import REPORT_SPLITS, choose_split
from optimum_regcache.data.loading import (
    image_column,
    label_column,
    local_path,
    named_errors,
    open_splits,
    with_class_labels,
    with_image_column,
)

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.get_logger(__name__)

MOST_BUFFERED = 1000  # images among which a stream is shuffled
_CHUNK = 500
_SIDES = ("search", "report")


def stream_images(
    name: str, num_samples: int, num_report: int, seed: int, token: str | None = None
) -> tuple[Dataset, Dataset]:
    """(images for search and calibration, images for reports) of a data set of which no more is read than they take.

    Reports use the validation or test split. Where there is none, the content of an image decides on which side it is, so that
    neither counts nor seeds can bring an image of the search into a report. Files and rows are taken in a seeded order, rows
    shuffled among as many as are asked for (at most 1000): at most twice as many images are read, of a single split about three
    times. They are kept in the cache of `datasets`, one folder for each commit of the data set (a local one: state of the
    files), and another call with equal arguments reads them there, also where the Hub cannot be reached.

    Args:
        name: see `load_splits`; class names as text are classes as far as the images that are read have them.
        num_samples, num_report: of each side.
        seed: of the order.
        token: Hub token.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no image column, no rows on a side, or files that cannot be read.
        OSError: a Hub that does not give it, and nothing is kept.
    """
    from datasets import Dataset, config

    path, counts = local_path(name), (num_samples, num_report)
    request = _digest([name if path is None else str(path.resolve()), *counts, seed])
    place = Path(config.HF_DATASETS_CACHE) / "regcache-streams" / request
    state = _commit(name, place, token) if path is None else _state(path)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        kept = place / state
        if not kept.is_dir():
            new = Path(tempfile.mkdtemp(prefix="new-", dir=place))
            try:
                _read(name, path, counts, seed, new, {"token": token, "revision": state} if path is None else {})
                new.rename(kept)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    folder = None if path is None else path if path.is_dir() else path.parent
    sides = {side: with_image_column(Dataset.from_file(str(kept / f"{side}.arrow")), folder) for side in _SIDES}
    image_column(sides["search"])
    sides = with_class_labels(sides)
    _warn_of_one_class(sides["search"], name)
    return sides["search"], sides["report"]


def take_images(stream: IterableDataset, count: int, seed: int) -> Any:
    """At most ``count`` rows of a stream in memory, in a seeded order: a `datasets.Dataset` with its images encoded, or the
    rows themselves where they hold ``pixel_values``.

    Raises:
        ValueError: the stream is empty.
    """
    rows = _rows(_shuffled(stream, count, seed), count)
    first = next(rows, None)
    if first is None:
        raise ValueError("The data set is empty.")
    taken = [first, *rows]
    return taken if "pixel_values" in first else with_image_column(_table(taken, stream.features), None)


def _digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def _state(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return _digest([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files)


def _commit(name: str, place: Path, token: str | None) -> str:
    """The commit of a Hub data set; where the Hub does not give it, the one that was read last."""
    try:
        return str(huggingface_hub.dataset_info(name, token=token).sha)
    except Exception as error:  # of the HTTP client of huggingface_hub too, which changes with its version
        kept = sorted(
            (p.stat().st_mtime, p.name) for p in place.glob("*") if p.is_dir() and not p.name.startswith("new-")
        )
        reason = str(error).partition("\n")[0]
        if not kept:
            raise OSError(f"{name} is no file or folder here, and the Hub does not give it: {reason}") from error
        commit = kept[-1][1]
        logger.warning(
            f"The images of {name} are those that were kept at commit {commit}: the Hub cannot be asked: {reason}"
        )
        return commit


def _read(
    name: str, path: Path | None, counts: tuple[int, int], seed: int, folder: Path, options: dict[str, Any]
) -> None:
    """Read both sides into ``folder``."""
    splits, _ = open_splits(name, streaming=True, **options)
    images: Any = choose_split(splits, None, name)
    other = next((splits[s] for s in REPORT_SPLITS if s in splits and splits[s] is not images), None)
    tables = [] if path is None else [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    with ExitStack() as stack:
        if path is not None:
            stack.enter_context(named_errors(path, "streamed", tables))
        sides = [
            stack.enter_context(_File(folder / f"{side}.arrow", features_of.features))
            for side, features_of in zip(_SIDES, (images, images if other is None else other), strict=True)
        ]
        if other is None:
            for row in _rows(_shuffled(images, sum(counts), seed)):
                side = _side(row, images.features)
                if sides[side].rows < counts[side]:
                    sides[side].append(row)
                elif all(file.rows == count for file, count in zip(sides, counts, strict=True)):
                    break
        else:
            for file, stream, count in zip(sides, (images, other), counts, strict=True):
                for row in _rows(_shuffled(stream, count, seed), count):
                    file.append(row)
    search, report = (file.rows for file in sides)
    require(search + report > 0, f"{name} holds no rows.")
    require(
        min(search, report) > 0,
        f"{name} streams {search} images for the search and {report} for reports, too few to keep the two apart. Leave "
        "data.streaming out.",
    )
    if search < counts[0]:
        logger.warning(f"{name} has {search} images for the search and {report} for reports.")


class _File:
    """Rows on their way into an Arrow file, some hundred at a time; closed without any it is not there."""

    def __init__(self, path: Path, features: Features | None) -> None:
        self.path, self.features = path, features
        self.rows = 0
        self._waiting: list[dict[str, Any]] = []
        self._writer: Any = None

    def append(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        chunk = _table(self._waiting, self.features)
        self.features, self._waiting = chunk.features, []
        rows: Any = chunk.with_format("arrow")[:]
        table = rows.cast(chunk.features.arrow_schema)
        if self._writer is None:
            self._writer = pyarrow.ipc.new_stream(str(self.path), table.schema)
        self._writer.write_table(table)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()


def _shuffled(stream: IterableDataset, count: int, seed: int) -> IterableDataset:
    """In a seeded order, its images as they are stored."""
    from datasets import Image

    for column, feature in (stream.features or {}).items():
        if isinstance(feature, Image):
            stream = stream.cast_column(column, Image(mode=feature.mode, decode=False))
    return stream.shuffle(seed=seed, buffer_size=min(count, MOST_BUFFERED))


def _rows(stream: IterableDataset, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows with the content of the files that images are in."""
    for row in islice(stream, count):
        yield {name: _with_content(value) for name, value in row.items()}


def _table(rows: list[dict[str, Any]], features: Features | None) -> Dataset:
    """A data set of ``rows`` with stored images: `datasets` would forget the content of one where a file has its name."""
    from datasets import Dataset, Features, Image, Value

    if features is None:
        return Dataset.from_list(rows)
    stored = {"bytes": Value("binary"), "path": Value("string")}
    plain = Features({name: stored if isinstance(f, Image) else f for name, f in features.items()})
    table = Dataset.from_list(rows, features=plain)
    for name, feature in features.items():
        table = table.cast_column(name, feature) if isinstance(feature, Image) else table
    return table


def _with_content(value: Any) -> Any:
    if not (
        isinstance(value, Mapping) and set(value) == {"bytes", "path"} and value["bytes"] is None and value["path"]
    ):
        return value
    from datasets.utils.file_utils import xopen

    try:
        with xopen(value["path"], "rb") as file:
            return {"bytes": file.read(), "path": value["path"]}
    except FileNotFoundError:
        return value  # `read_picture` names it


def _side(row: dict[str, Any], features: Features | None) -> int:
    """0 for the search, 1 for reports: by the content of the image, or of the row where nothing says which column it is in."""
    from datasets import Image

    column = next((name for name, feature in (features or {}).items() if isinstance(feature, Image)), None)
    value: Any = row if column is None else row[column]
    content = value.get("bytes") if isinstance(value, Mapping) else None
    return hashlib.sha256(content or repr(value).encode()).digest()[0] % 2


def _warn_of_one_class(images: Dataset, name: str) -> None:
    """A stream that is sorted by class, as folders of images are."""
    column = label_column(images)
    classes = getattr(images.features[column], "num_classes", 0) if column else 0
    if column and classes > 1 and len(images) > 1 and len(images.unique(column)) == 1:
        logger.warning(
            f"All {len(images)} streamed images of {name} are of one class, though it has {classes}: its rows are sorted. "
            "Leave data.streaming out for a random choice."
        )
