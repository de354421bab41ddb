"""From a name on the command line to the splits of an image data set, whatever form they are stored in."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from optimum_regcache.config.validation import require
from optimum_regcache.data.picture import read_picture

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

FORMATS = (
    "a Hub id, a folder of images, a folder written by save_to_disk, parquet or arrow files, csv or json lines with a column "
    "of image paths, webdataset tar files, a zip of images, or one image"
)
_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".tar": "webdataset",
    ".zip": "imagefolder",
}
_LABEL_COLUMNS = ("label", "labels", "cls")
MASKS = ("mask", "masks", "annotation", "annotations", "segmentation", "segmentation_mask", "semantic_mask", "label")
DEPTHS = ("depth", "depth_map")
_PATH_COLUMNS = ("image", "file_name", "filename", "file", "path", "image_path", "img")
_TRIED = 10  # values of a column that are looked at to find out what it holds


def load_splits(name: str | Path, *, config_name: str | None = None, token: str | None = None) -> dict[str, Dataset]:
    """All splits of an image data set.

    Args:
        name: Hub id; directory of images (``imagefolder``, with or without ``metadata.csv``, ``.jsonl``, ``.parquet``) or of
            parquet, arrow, csv, json or tar files (splits by file or folder name); directory that ``save_to_disk`` wrote; or
            one such file or image (split ``train``). Paths in a table are relative to its directory. A column of class
            names as text becomes a ``ClassLabel``.
        config_name: configuration of a Hub data set.
        token: Hub token.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no image column, no rows, or files of another kind.
    """
    loaded, folder = open_splits(str(name), config_name=config_name, token=token)
    splits = {split: with_image_column(rows, folder) for split, rows in loaded.items() if len(rows)}
    require(bool(splits), f"{name} holds no rows.")
    image_column(next(iter(splits.values())))
    return with_class_labels(splits)


def local_path(name: str) -> Path | None:
    """The file or directory that ``name`` is; None for a Hub id.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no name.
    """
    require(bool(name.strip()), f"The name of the data set is empty. Give {FORMATS}.")
    path = Path(name).expanduser()
    if path.exists():
        return path
    known = path.suffix.lower() in _BUILDERS or path.suffix.lower() in _image_suffixes()
    if name.startswith((".", "/", "~")) or known:
        raise FileNotFoundError(f"No such data set file or directory: {name}")
    return None


def open_splits(name: str, **options: Any) -> tuple[dict[str, Any], Path | None]:
    """(splits as they are stored, what paths in them are relative to); ``options`` of `datasets.load_dataset`."""
    from datasets import load_dataset

    path = local_path(name)
    if path is None:
        try:
            loaded: Any = load_dataset(name, options.pop("config_name", None), **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"{name} is no file or folder here, and the Hub does not give it: {error}. Check the name and the network; "
                "without one, only a data set that was loaded before opens."
            ) from error
        return {str(k): v for k, v in loaded.items()}, None
    return _load_local(path, options.get("streaming", False)), path if path.is_dir() else path.parent


@contextmanager
def named_errors(path: Path, builder: str, files: list[Path]) -> Iterator[None]:
    """Say which file could not be read, whatever `datasets` made of it."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, OSError, tarfile.TarError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        culprit = _damaged_parquet(files) or path
        raise ValueError(
            f"{culprit} could not be read ({builder}): {reason or type(reason).__name__} It must hold images, in one of "
            f"these forms: {FORMATS}."
        ) from error


def _load_local(path: Path, streaming: bool) -> dict[str, Any]:
    from datasets import Dataset, load_dataset, load_from_disk

    is_saved = [(path / name).is_file() for name in ("dataset_dict.json", "state.json")]
    builder, files = ("load_from_disk", []) if any(is_saved) else _builder(path)
    options: dict[str, Any] = {"delimiter": "\t"} if files and Path(files[0]).suffix == ".tsv" else {}
    with named_errors(path, builder, files):
        if any(is_saved):
            loaded: Any = load_from_disk(str(path))
        elif builder == "imagefolder" and path.is_dir():
            loaded = load_dataset("imagefolder", data_dir=str(path), streaming=streaming)
        else:
            named = {"train": [str(files[0])]} if len(files) == 1 else _named_splits(files)
            loaded = load_dataset(builder, data_files=named, streaming=streaming, **options)
    splits = {"train": loaded} if isinstance(loaded, Dataset) else {str(k): v for k, v in loaded.items()}
    return {k: v.to_iterable_dataset() for k, v in splits.items()} if any(is_saved) and streaming else splits


def _builder(path: Path) -> tuple[str, list[Path]]:
    """(builder of `datasets`, its files) for a local file or directory."""
    if path.is_file():
        suffix = path.suffix.lower()
        is_image = suffix in _image_suffixes()
        require(is_image or suffix in _BUILDERS, f"{path} is no data set that can be opened. Give {FORMATS}.")
        return _BUILDERS.get(suffix, "imagefolder"), [path]
    tables = sorted(path.rglob("*.parquet"))
    data = [file for file in tables if file.name != "metadata.parquet"]
    if data:
        return "parquet", data
    if next(_files(path, _image_suffixes()), None) is not None:
        return "imagefolder", []
    for suffix, builder in _BUILDERS.items():
        found = sorted(_files(path, {suffix}))
        if found:
            return builder, found
    raise ValueError(f"{path} holds no images and no table of images. Give {FORMATS}.")


def _files(path: Path, suffixes: set[str]) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


def _image_suffixes() -> set[str]:
    from PIL import Image

    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _named_splits(files: list[Path]) -> dict[str, list[str]]:
    """Split name -> files: ``train.parquet``, ``train-00000-of-00002.parquet`` and ``train/0000.parquet`` are ``train``."""
    splits: dict[str, list[str]] = {}
    for file in files:
        stem = re.sub(r"(-\d+-of-\d+|[-_]\d+)$", "", file.stem)
        stem = file.parent.name if stem.isdigit() else stem
        splits.setdefault(re.sub(r"\W", "_", stem), []).append(str(file))
    return splits


def _damaged_parquet(files: list[Path]) -> Path | None:
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            if file.suffix == ".parquet":
                pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError):
            return file
    return None


def with_image_column(dataset: Dataset, folder: Path | None) -> Dataset:
    """``dataset`` with its column of images typed as one: bytes (parquet that `datasets` did not write) or paths.

    Args:
        dataset: any.
        folder: what paths are relative to; None to leave columns of paths alone.

    Raises:
        ValueError: a column of images whose files do not exist.
    """
    from datasets import Image, List

    features = dataset.features
    if any(isinstance(feature, Image) for feature in features.values()):
        return dataset
    for name, feature in features.items():
        kind = getattr(feature, "dtype", "") if not isinstance(feature, (dict, List)) else ""
        stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        if (stored or kind in ("binary", "large_binary")) and any(_is_picture(v) for v in _first_values(dataset, name)):
            return dataset.cast_column(name, Image())
    texts = [name for name, feature in features.items() if "string" in str(getattr(feature, "dtype", ""))]
    texts.sort(key=lambda name: name.lower() not in _PATH_COLUMNS)  # stable
    for name in texts if folder is not None else []:
        values = [v for v in _first_values(dataset, name) if Path(v).suffix.lower() in _image_suffixes()]
        if any((folder / v).is_file() for v in values):
            paths = [None if v is None else str(folder / v) for v in dataset[name]]
            order = dataset.column_names
            typed = dataset.remove_columns(name).add_column(name, paths)  # type: ignore[call-arg]
            return typed.cast_column(name, Image()).select_columns(order)
        if values:
            raise ValueError(
                f"Column {name!r} names the image {values[0]}, which does not exist in {folder}. Paths must be absolute or "
                "relative to the directory of the table."
            )
    return dataset


def _first_values(dataset: Dataset, column: str) -> list[Any]:
    return [v for v in dataset[: 4 * _TRIED][column] if v][:_TRIED]


def _is_picture(value: Any) -> bool:
    try:
        read_picture(value if isinstance(value, dict) else {"bytes": value, "path": None}, 0)
    except ValueError:
        return False
    return True


def with_class_labels(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Class names as text become one `ClassLabel` for all splits, in alphabetical order as in a folder of images."""
    from datasets import ClassLabel

    columns = {split: label_column(rows) or "" for split, rows in splits.items()}
    texts = {s: c for s, c in columns.items() if c and "string" in str(getattr(splits[s].features[c], "dtype", ""))}
    names = sorted({name for split, c in texts.items() for name in splits[split].unique(c) if name is not None})
    label = ClassLabel(names=names) if names else None
    return {s: rows.cast_column(texts[s], label) if s in texts and label else rows for s, rows in splits.items()}


def image_column(dataset: Dataset) -> str:
    """Name of the image column: the first of pictures whose name is not that of masks or depths.

    Raises:
        ValueError: there is none.
    """
    from datasets import Image

    names = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    names.sort(key=lambda name: name in (*MASKS, *DEPTHS))  # stable
    if names:
        return names[0]
    raise ValueError(
        f"The data set has no image column; its columns are {', '.join(dataset.column_names)}. "
        "Cast one with dataset.cast_column(name, datasets.Image())."
    )


def label_column(dataset: Dataset) -> str | None:
    """Name of the class-label column, None if there is none."""
    from datasets import ClassLabel

    for name, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            return name
    return next((name for name in _LABEL_COLUMNS if name in dataset.column_names), None)


def stored_pictures(dataset: Dataset) -> Dataset:
    """The image column alone, as bytes and paths instead of decoded images."""
    from datasets import Image

    column = image_column(dataset)
    return dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))


def readable_rows(stored: Dataset, rows: Iterable[int], name: str) -> list[int]:
    """Those of ``rows`` whose image is there and can be decoded; one warning for all the others.

    Args:
        stored: as `stored_pictures` gives it.
        rows: positions in it; each is decoded once.
        name: for the warning.
    """
    (column,) = stored.column_names
    good, problems = [], []
    for row in rows:
        try:
            read_picture(stored[row][column], row)
            good.append(row)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        count = len(good) + len(problems)
        logger.warning(f"{len(problems)} of {count} images of {name} are left out. The first: {problems[0]}")
    return good


def drop_broken(dataset: Dataset, name: str) -> tuple[Dataset, int]:
    """(``dataset`` without rows whose image is missing or cannot be decoded, how many were left out)."""
    good = readable_rows(stored_pictures(dataset), range(len(dataset)), name)
    dropped = len(dataset) - len(good)
    return (dataset.select(good) if dropped else dataset), dropped
