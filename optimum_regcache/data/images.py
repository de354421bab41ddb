"""Image data: the rows that search and reports use, turned into model inputs by the model's processor."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pyarrow import compute
from torch.utils.data import DataLoader

from optimum_regcache.config.validation import require
from optimum_regcache.data.loading import image_column, label_column, load_splits, readable_rows, stored_pictures
from optimum_regcache.data.picture import MODEL_INPUTS, model_inputs, picture_name, read_picture, without_pixel_mask
from optimum_regcache.encoders.passes import Batch

if TYPE_CHECKING:
    from datasets import Dataset


REPORT_SPLITS = ("validation", "valid", "val", "test")


def choose_split(splits: dict[str, Dataset], split: str | None, name: str) -> Dataset:
    """The named split; by default ``train`` if there is one, else the first.

    Raises:
        ValueError: no such split.
    """
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    require(chosen in splits, f"{name} has no split {chosen!r}; it has {', '.join(splits)}.")
    return splits[chosen]


def reference_and_report(splits: dict[str, Dataset], name: str) -> tuple[Dataset, Dataset]:
    """(images for search and calibration, images for reports); they share none.

    Reports use the validation or test split. Where there is none, a third of the only split is set aside. Which third
    depends on nothing but the data set, so that a later report with other numbers or another seed cannot meet an image of
    the search.

    Raises:
        ValueError: fewer than 8 images.
    """
    images = choose_split(splits, None, name)
    for split in REPORT_SPLITS:
        if split in splits and splits[split] is not images:
            return images, splits[split]
    count = len(images)
    require(count >= 8, f"{name} has {count} images; at least 8 are needed to keep search and report apart.")
    images = images.shuffle(seed=0)
    return images.select(range(count // 3, count)), images.select(range(count // 3))


def load_images(
    name: str,
    *,
    config_name: str | None = None,
    split: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    token: str | None = None,
) -> Dataset:
    """Load one split and take a seeded random subset.

    Args:
        name, config_name, token: see :func:`load_splits`.
        split: default ``train`` if it exists, else the first.
        num_samples: rows to keep, all if None.
        seed: of the subset.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: unknown split, or no image column.
    """
    loaded = choose_split(load_splits(name, config_name=config_name, token=token), split, name)
    return subsample(loaded, num_samples, seed)


def subsample(dataset: Dataset, num_samples: int | None, seed: int) -> Dataset:
    """A seeded random subset of at most ``num_samples`` rows."""
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(num_samples))


def class_names(dataset: Dataset) -> list[str] | None:
    """Names of the classes, None if the data set does not know them."""
    column = label_column(dataset)
    names = getattr(dataset.features[column], "names", None) if column else None
    return list(names) if names else None


def object_boxes(dataset: Any) -> list[list[float]] | None:
    """Column ``box`` of `scenes.load_dataset`: left, top, right, bottom of the object as fractions of the image.

    None for any other data set; a column ``box`` of another type or in pixels is not taken for one of ours.
    """
    feature = (getattr(dataset, "features", None) or {}).get("box")
    if getattr(feature, "length", None) != 4 or getattr(getattr(feature, "feature", None), "dtype", "") != "float32":
        return None
    boxes = list(dataset["box"])
    return boxes if all(0.0 <= v <= 1.0 for box in boxes for v in box) else None


def as_rows(source: Any) -> Any:
    """What can be indexed, of the forms in which people hold images; see :class:`ImageInputs`.

    Raises:
        TypeError: a form that has no fixed rows, with what to pass in its place.
        ValueError: several splits.
    """
    from datasets import Dataset, IterableDataset, IterableDatasetDict

    if isinstance(source, Mapping) and "pixel_values" in source:
        return [source]
    if isinstance(source, Mapping) and source and all(isinstance(part, Dataset) for part in source.values()):
        require(len(source) == 1, f"The data has the splits {', '.join(map(str, source))}. Pass one: data[split].")
        return next(iter(source.values()))
    if isinstance(source, DataLoader) and hasattr(source.dataset, "__len__"):
        return list(source)
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise TypeError(
            "A streamed data set has no fixed rows, which search and calibration need. Pass one split of it, and how many to "
            "take: fit(..., data=DataConfig(num_samples=256)) or quantize(..., recipe=Recipe(data=...)); or some of the rows: "
            "Dataset.from_list(list(data.take(256)), features=data.features)."
        )
    if isinstance(source, (str, Path)):
        raise TypeError(f"Got the name {str(source)!r} in place of images. Open it: load_images({str(source)!r}).")
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or hasattr(source, "keys"):
        keys = ", ".join(map(str, source)) if isinstance(source, Mapping) else ""
        what = f"a {type(source).__name__}" + (f" of {keys}" if keys else "")
        raise TypeError(
            f"Got {what} in place of images. Give a datasets.Dataset of images, or a list of mappings such as "
            "{'pixel_values': tensor}; of a generator, list(itertools.islice(generator, 256))."
        )
    return source


class ImageInputs(Sequence[Batch]):
    """Model inputs of a data set, one image each, computed when asked for.

    Accepts a `datasets.Dataset` of images (with a processor), or mappings that already hold ``pixel_values``: one image
    ([C, H, W]; SigLIP2 [patches, values]; Qwen-VL likewise, with its ``image_grid_thw``) or a batch of them. The mappings
    come as a sequence, as one batch, or from a `DataLoader`, which is read once, in its order. A `DatasetDict` may have one
    split. ``with_transform`` is applied, also where it makes ``pixel_values``; other formats of a data set change nothing.

    The processor gets the pictures as they are stored, with their EXIF orientation applied: `optimum_regcache.data.picture`.

    Args:
        source: the images.
        processor: image processor or processor of the model; needed for a `datasets.Dataset`.
        data_collator: turns a list of such mappings into a batch, instead of stacking.

    Raises:
        TypeError: data without fixed rows: generators, streamed data sets.
        ValueError: no images, or a data set without processor. Reading an image raises it too, with the name of the image.
    """

    def __init__(
        self,
        source: Any,
        processor: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        from datasets import Dataset as DatasetClass

        self.source, self.processor, self.data_collator = as_rows(source), processor, data_collator
        self._image: str | None = None
        self._pictures: Any = None
        self._rows: list[tuple[int, int | None]] | None = None  # (item, image within a batched item)
        require(len(self.source) > 0, "The data set is empty.")
        if isinstance(self.source, DatasetClass):
            self._open(self.source)
        if self._image is None:
            self._rows = [row for i in range(len(self.source)) for row in self._images_of(i)]
        self.indices = list(range(len(self.source) if self._rows is None else len(self._rows)))
        require(len(self.indices) > 0, "The data set is empty.")

    def _open(self, source: Dataset) -> None:
        """Find out whether ``source`` holds images or model inputs."""
        transformed = source.format["type"] == "custom"
        if "pixel_values" in (source[0] if transformed else source.column_names):
            self.source = source if transformed else source.with_format("torch")
            return
        self._image = image_column(source)
        self._pictures = source if transformed else stored_pictures(source)
        require(
            self.processor is not None,
            "A data set of images needs the model's processor. Save the processor beside the model, pass "
            "RegCacheQuantizer.from_pretrained(model, processor=...), or give ready {'pixel_values': ...} items.",
        )

    def _images_of(self, item: int) -> list[tuple[int, int | None]]:
        row = self.source[item]
        if not isinstance(row, Mapping) or "pixel_values" not in row:
            raise ValueError(
                f"Item {item} of the data is a {type(row).__name__} without 'pixel_values'. Give a datasets.Dataset of "
                "images, or mappings such as {'pixel_values': tensor}."
            )
        pixels = torch.as_tensor(row["pixel_values"])
        single = 2 if "spatial_shapes" in row or "image_grid_thw" in row else 3
        grids = torch.as_tensor(row.get("image_grid_thw", (1, 1, 1)))
        require(
            grids.numel() == 3,
            f"Item {item} packs several images into one sequence (image_grid_thw of shape {tuple(grids.shape)}); give one "
            "image per item.",
        )
        require(
            pixels.ndim in (single, single + 1),
            f"Item {item} has pixel_values of shape {tuple(pixels.shape)}; expected {single} axes, or {single + 1} for a "
            "batch.",
        )
        return [(item, None)] if pixels.ndim == single else [(item, k) for k in range(pixels.shape[0])]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        if self._rows is not None:
            item, position = self._rows[self.indices[index]]
            row = {k: torch.as_tensor(v) for k, v in self.source[item].items() if k in MODEL_INPUTS or _is_label(k, v)}
            if "image_grid_thw" in row:
                return {**row, "image_grid_thw": row["image_grid_thw"].reshape(3)}
            single = row if position is None else {k: v[position] for k, v in row.items()}
            return without_pixel_mask(single, f"Item {self._rows[self.indices[index]][0]} of the data")
        value = self._pictures[self.indices[index]].get(self._image)
        return model_inputs(self.picture(index), self.processor, picture_name(value, self.indices[index]))

    def picture(self, index: int) -> Any:
        """The picture of an image, where :attr:`decodes`; with its EXIF orientation applied."""
        row = self.indices[index]
        value = self._pictures[row].get(self._image)
        return read_picture(value, row, getattr(self.source.features[self._image], "mode", None))

    @property
    def decodes(self) -> bool:
        """Whether pictures are decoded and processed here, as opposed to ready ``pixel_values``."""
        return self._image is not None

    def subset(self, positions: Sequence[int]) -> ImageInputs:
        """The given positions, in that order; the data is not read again."""
        part = copy.copy(self)
        part.indices = [self.indices[p] for p in positions]
        require(len(part.indices) > 0, "The data set is empty.")
        return part

    def class_names(self) -> list[str] | None:
        """Names of the classes, None if the data does not know them."""
        return class_names(self.source) if hasattr(self.source, "features") else None

    def label_values(self) -> list[Any]:
        """One value per image, as the data holds it, None where there is none. Images are not decoded."""
        if self._image is not None:
            column = label_column(self.source)
            values = self.source.with_format(None)[column] if column else [None] * len(self.source)
            return [values[i] for i in self.indices]
        values = [item.get("labels", item.get("label")) for item in self]
        return [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]

    def highest_label(self) -> int | None:
        """The highest class number in the table that the images were chosen from; None for ready ``pixel_values``."""
        if self._image is None:
            return None
        column: Any = self.source.data.column(label_column(self.source))
        return cast("Any", compute).max(column).as_py()

    def labels(self) -> torch.Tensor | None:
        """int64 [n], as the data numbers its classes; None without labels, or if they are not class numbers."""
        values = self.label_values()
        return torch.tensor(values) if all(isinstance(v, int) and v >= 0 for v in values) else None

    def readable(self) -> ImageInputs:
        """Without images that are missing or cannot be decoded, with one warning for them."""
        if self._image is None or self.source.format["type"] == "custom":
            return self
        good = set(readable_rows(self._pictures, self.indices, "the reference images"))
        return self.subset([p for p, row in enumerate(self.indices) if row in good])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of model inputs, without labels, in order."""
        for start in range(0, len(self), batch_size):
            items = [self[i] for i in range(start, min(start + batch_size, len(self)))]
            for position, item in enumerate(items, start):
                require(
                    bool(torch.isfinite(torch.as_tensor(item["pixel_values"])).all()),
                    f"Image {self.indices[position]} of the data holds values that are not finite (nan or inf). Leave it out, "
                    "or mend what computes its pixel_values.",
                )
            if self.data_collator is None:  # labels go first: some images may lack them
                batch = collate([{k: v for k, v in item.items() if k not in ("labels", "label")} for item in items])
            else:
                batch = dict(self.data_collator(items))
            yield {k: v for k, v in batch.items() if k not in ("labels", "label")}

    def fingerprint(self) -> str:
        """Hash of the first inputs and of the number of rows, to recognise the data when a search is resumed."""
        digest = hashlib.sha256(str(len(self)).encode())
        for i in sorted({0, len(self) // 2, len(self) - 1}):
            digest.update(torch.as_tensor(self[i]["pixel_values"]).float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _is_label(key: str, value: Any) -> bool:
    return key in ("labels", "label") and value is not None and not isinstance(value, str)


def collate(items: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack mappings of tensors of one image each; patches that come with ``image_grid_thw`` are packed into one sequence.

    Raises:
        ValueError: images of different shapes.
    """
    batch: Batch = {}
    for key in items[0]:
        values = [torch.as_tensor(item[key]) for item in items]
        if key == "pixel_values" and "image_grid_thw" in items[0]:
            batch[key] = torch.cat(values)
            continue
        shapes = {tuple(v.shape) for v in values}
        require(
            len(shapes) == 1,
            f"Items of one batch have different shapes of {key!r}: {sorted(shapes)}. Use a processor that resizes, or "
            "batch_size=1, or a data_collator.",
        )
        batch[key] = torch.stack(values)
    return batch


def split_reference(
    count: int, calibration_fraction: float, confirm_fraction: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Disjoint, seeded positions for (calibration, selection, confirmation). Calibration takes at most 128 images.

    Raises:
        ValueError: fewer than 4 images.
    """
    require(
        count >= 4,
        f"{count} reference images are too few to keep calibration, selection and confirmation apart; give at least 4 "
        "(64 or more for a sound result).",
    )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    calibration = min(128, count - 2, max(1, round(count * calibration_fraction)))
    rest = count - calibration
    confirm = max(1, min(rest - 1, round(rest * confirm_fraction)))
    return (
        sorted(order[:calibration]),
        sorted(order[calibration : count - confirm]),
        sorted(order[count - confirm :]),
    )
