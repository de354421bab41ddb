"""Objects in pictures (boxes and classes): the column that holds them, in the forms in which data sets store them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs

COLUMNS = ("objects", "annotations")
BOX_FORMATS = ("coco", "corners")
_BOXES, _CLASSES = ("bbox", "bboxes", "boxes"), ("category", "category_id", "categories", "label", "labels")
_ROUNDING = 1.0  # pixels by which annotators' boxes stand out of the picture


@dataclass(frozen=True)
class Objects:
    """The objects of one picture.

    Attributes:
        boxes: float64 [k, 4]: left, top, width and height in pixels.
        classes: int64 [k], as the data numbers them.
        crowd: bool [k], whether a box stands for many objects (``iscrowd`` of COCO).
        size: width and height of the picture.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    crowd: torch.Tensor
    size: tuple[int, int]


def objects_column(inputs: ImageInputs, wanted: str | None = None) -> str | None:
    """Name of the column of objects, None if there is none; ``wanted`` names it.

    Raises:
        ValueError: there is no column ``wanted``.
    """
    known: Sequence[str] = getattr(inputs.source, "column_names", ())
    if wanted is not None:
        require(
            wanted in known,
            f"The data set has no column of objects {wanted!r}; its columns are {', '.join(known) or 'none'}. Give one of them "
            "with --objects-column.",
        )
        return wanted
    return next((name for name in COLUMNS if name in known), None)


def object_class_names(inputs: ImageInputs, column: str) -> list[str] | None:
    """Names of the classes of objects, None if the data set does not know them."""
    feature: Any = inputs.source.features[column]
    feature = getattr(feature, "feature", feature)  # a list of objects
    classes = (
        next((feature[name] for name in _CLASSES if name in feature), None) if isinstance(feature, Mapping) else None
    )
    names = getattr(getattr(classes, "feature", classes), "names", None)
    return list(names) if names else None


def objects_of(inputs: ImageInputs, column: str, box_format: str = "coco") -> list[Objects]:
    """The objects of each image.

    A cell is a mapping of lists, or a list of mappings, with ``bbox`` (or ``boxes``) and ``category`` (or ``category_id``,
    ``label``); ``iscrowd`` is read where it is there.

    Args:
        inputs: pictures, which are opened for their size.
        column: of the objects.
        box_format: ``coco``: left, top, width, height; ``corners``: left, top, right, bottom; both in pixels.

    Raises:
        ValueError: another kind of cell, boxes of another format, or classes that are no numbers.
    """
    require(box_format in BOX_FORMATS, f"--box-format must be one of {', '.join(BOX_FORMATS)}, got {box_format!r}.")
    cells = inputs.source.with_format(None)[column]
    found = []
    for position, row in enumerate(inputs.indices):
        boxes, classes, crowd = _lists(cells[row], f"The objects of image {row} (column {column!r})")
        found.append(Objects(boxes, classes, crowd, inputs.picture(position).size))
    _check_format(found, box_format)
    if box_format == "coco":
        return found
    return [
        Objects(torch.cat((o.boxes[:, :2], o.boxes[:, 2:] - o.boxes[:, :2]), 1), o.classes, o.crowd, o.size)
        for o in found
    ]


def _lists(cell: Any, what: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if isinstance(cell, list) and all(isinstance(item, Mapping) for item in cell):
        names = {name for item in cell for name in item}
        cell = {name: [item.get(name) for item in cell] for name in names} if cell else {"bbox": [], "category": []}
    given: Mapping[str, Any] = cell if isinstance(cell, Mapping) else {}
    boxes, classes = (next((given[n] for n in names if n in given), None) for names in (_BOXES, _CLASSES))
    require(
        boxes is not None and classes is not None,
        f"{what} have no {_BOXES[0]} and {_CLASSES[0]}. Store them as COCO does, or name another column with --objects-column.",
    )
    rows: Any = boxes
    require(
        all(isinstance(box, (list, tuple)) and len(box) == 4 for box in rows) and len(rows) == len(classes or []),
        f"{what} are not one box of four numbers and one class each.",
    )
    numbers: Any = classes
    require(
        all(isinstance(number, int) and number >= 0 for number in numbers),
        f"{what} have classes such as {str(next(iter(numbers), ''))[:40]!r}, which are no class numbers. Make them so: "
        "ClassLabel(names=...).",
    )
    crowd = [bool(value) for value in given.get("iscrowd") or [False] * len(rows)]
    return (
        torch.tensor(rows, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(numbers, dtype=torch.int64),
        torch.tensor(crowd),
    )


def _check_format(found: Sequence[Objects], box_format: str) -> None:
    """Raise ``ValueError`` for boxes that lie outside of their picture, or are those of another format."""
    outside = {name: sum(int(_outside(o, name).sum()) for o in found) for name in BOX_FORMATS}
    count = sum(len(o.boxes) for o in found)
    if outside[box_format] == 0:
        return
    other = next(name for name in BOX_FORMATS if name != box_format)
    largest = max((float(o.boxes.max()) for o in found if len(o.boxes)), default=0.0)
    if outside[other] == 0:
        advice = f"All of them fit as --box-format {other}: give that"
    elif largest <= 1:
        advice = "They are fractions of the picture: multiply them by its width and height"
    else:
        advice = "Mend or leave out these images"
    raise ValueError(
        f"{outside[box_format]} of {count} boxes are empty or leave their picture when read as --box-format {box_format}. "
        f"{advice}."
    )


def _outside(objects: Objects, box_format: str) -> torch.Tensor:
    """bool [k]: boxes that are empty, or leave the picture by more than rounding."""
    first, last = objects.boxes[:, :2], objects.boxes[:, 2:]
    end = first + last if box_format == "coco" else last
    limit = torch.tensor(objects.size, dtype=torch.float64) + _ROUNDING
    good = (first >= -_ROUNDING) & (end > first) & (end <= limit)
    return ~good.all(1)
