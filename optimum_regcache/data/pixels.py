"""Targets of pixels (class masks, depth maps): the column that holds them, in the geometry of the model's processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.picture import model_inputs, picture_name, read_picture

IGNORE = 255
_LARGEST = 2**24 - 1  # pixels that three channels of 8 bits can number
_CLASSES = 256
_REMEMBERED = 64  # sizes of pictures; photographs have hundreds


def target_column(inputs: ImageInputs, names: Sequence[str], option: str, wanted: str | None = None) -> str | None:
    """Name of the first column of ``names`` that holds pictures, None if there is none; ``wanted`` names it.

    Raises:
        ValueError: there is no column ``wanted``, or it holds no pictures.
    """
    from datasets import Image as ImageFeature

    features: dict[str, Any] = getattr(inputs.source, "features", None) or {}
    pictures = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if wanted is None:
        return next((name for name in names if name in pictures), None)
    require(
        wanted in pictures,
        f"The data set has no column of pictures {wanted!r}; those of pictures are {', '.join(pictures) or 'none'}. Give "
        f"one of them with {option}, or make it one: dataset.cast_column(name, datasets.Image()).",
    )
    return wanted


def geometry_problem(inputs: ImageInputs) -> str | None:
    """Why it is not known which pixels of a picture the model gets; None if it is."""
    if not inputs.decodes or inputs.source.format["type"] == "custom":
        return (
            "the data set holds ready pixel_values or a transform: which pixels of a mask belong to them is not known"
        )
    return None


class Geometry:
    """Which pixel of a picture each pixel of the model's input shows, as ``processor`` resizes, crops and pads.

    The processor is given a picture whose colours number its pixels, with ``resample=NEAREST`` and no change of values.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, width: int, height: int) -> np.ndarray:
        """int64 [H, W] of a picture: ``row * width + column``, -1 at padding.

        Raises:
            ValueError: too many pixels, or a processor that does more than resize, crop and pad.
        """
        if (width, height) not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[width, height] = self._find(width, height)
        return self._known[width, height]

    def _find(self, width: int, height: int) -> np.ndarray:
        name = f"A picture of {width} x {height} pixels"
        require(
            width * height <= _LARGEST,
            f"{name} is too large for dense tasks; scale pictures and masks to {_LARGEST} pixels.",
        )
        numbers = 1 + np.arange(width * height).reshape(height, width)  # 0 is padding
        colours = Image.fromarray(np.stack([numbers >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8))
        settings = {"resample": Image.Resampling.NEAREST, "do_rescale": False, "do_normalize": False}
        pixels = model_inputs(colours, self._processor, name, **settings)["pixel_values"].double()
        found = None
        if pixels.ndim == 3 and len(pixels) == 3:
            found = (pixels * torch.tensor([1.0, 2**8, 2**16])[:, None, None]).sum(0).numpy() - 1
        if found is None or not _is_resized(found, width, height):
            kind = type(getattr(self._processor, "image_processor", self._processor)).__name__
            raise ValueError(
                f"{kind} does more to pictures than to resize, crop and pad them, so masks cannot follow. Use a model whose "
                "pixel_values are a picture [3, H, W]."
            )
        return found.astype(np.int64)


def _is_resized(found: np.ndarray, width: int, height: int) -> bool:
    """Whether pixel numbers are whole, and rows and columns of the picture have stayed rows and columns."""
    inside = found >= 0
    if not inside.any() or (found != found.round()).any() or found.max() >= width * height:
        return False
    rows, columns = np.divmod(found, width)
    hidden = [np.where(inside, values, np.nan) for values in (rows, columns)]
    used = [
        values[inside.any(axis)] if axis == 1 else values[:, inside.any(axis)]
        for values, axis in zip(hidden, (1, 0), strict=True)
    ]
    spreads = [np.nanmax(v, axis) - np.nanmin(v, axis) for v, axis in zip(used, (1, 0), strict=True)]
    return all((spread == 0).all() for spread in spreads)


def class_masks(inputs: ImageInputs, column: str, ignore: int = IGNORE) -> list[torch.Tensor]:
    """Class of each pixel that the model gets, int16 [H, W] for each image; -1 at ``ignore`` and at padding.

    Raises:
        ValueError: a mask that is missing, of another size than its picture, of colours, lossy, or with other numbers than 0 to
            255.
    """
    masks = []
    for row, values in _targets(inputs, column, "class numbers", "--mask-column"):
        values = np.where(values == ignore, -1, values)
        beyond = values[(values < -1) | (values >= _CLASSES)]
        require(
            not beyond.size,
            f"The mask of row {row} (column {column!r}) holds the class {beyond[:1].tolist()}: classes are numbered from 0 to "
            f"{_CLASSES - 1}. Numbers of instances are no classes; map them, or leave one out with --ignore-index.",
        )
        masks.append(torch.from_numpy(values.astype(np.int16)))
    return masks


def depth_maps(inputs: ImageInputs, column: str) -> list[torch.Tensor]:
    """Depth of each pixel that the model gets, float32 [H, W] for each image, in the unit of the column; nan at padding and
    where the stored value is 0, less, or no number.

    Raises:
        ValueError: a map that is missing, of another size than its picture, of colours, or lossy.
    """
    found = [torch.from_numpy(v.astype(np.float32)) for _, v in _targets(inputs, column, "depths", "--depth-column")]
    return [values.masked_fill(~(values.isfinite() & (values > 0)), float("nan")) for values in found]


def _targets(inputs: ImageInputs, column: str, what: str, option: str) -> Any:
    """(row, values [H, W] of the pixels that the model gets; -1 at padding) of each image."""
    from datasets import Image as ImageFeature

    stored = inputs.source.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))
    geometry = Geometry(inputs.processor)
    for position, row in enumerate(inputs.indices):
        value = stored[row][column]
        name = picture_name(value, row)
        require(
            value is not None,
            f"Row {row} of the data has nothing in column {column!r}. Leave it out, or name another with {option}.",
        )
        picture, (width, height) = read_picture(value, row), inputs.picture(position).size
        require(
            picture.format != "JPEG",
            f"{name} of column {column!r} is a JPEG, which changes {what}. Store it without loss, as PNG.",
        )
        values = np.asarray(picture)
        require(
            values.ndim == 2,
            f"{name} of column {column!r} holds colours (mode {picture.mode}); {what} are expected, one a pixel. Convert it, "
            f"or name another with {option}.",
        )
        require(
            picture.size == (width, height),
            f"{name} of column {column!r} is {picture.width} x {picture.height} pixels and its image {width} x {height}. "
            "Scale it to the size of the image, without interpolation.",
        )
        places = geometry(width, height)
        yield (
            row,
            np.where(
                places < 0, -1, values.reshape(-1)[places].astype(np.float64 if values.dtype.kind == "f" else np.int64)
            ),
        )
