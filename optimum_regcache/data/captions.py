"""Captions of images: the column that holds them, in whatever form data sets store them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs

COLUMNS = ("caption", "captions", "sentences", "sentence", "text", "texts", "description", "alt_text")


def caption_column(inputs: ImageInputs, wanted: str | None = None) -> str | None:
    """Name of the column of captions, None if there is none; ``wanted`` names it.

    Raises:
        ValueError: there is no column ``wanted``.
    """
    known: Sequence[str] = getattr(inputs.source, "column_names", ())
    if wanted is not None:
        columns = ", ".join(known) or "none"
        require(
            wanted in known,
            f"The data set has no column of captions {wanted!r}; its columns are {columns}. Give one of them with "
            "--caption-column.",
        )
        return wanted
    return next((name for name in COLUMNS if name in known), None)


def captions_of(inputs: ImageInputs, column: str) -> list[list[str]]:
    """The captions of each image, without surrounding space, each once.

    A cell is a string or a list of strings, or the same with mappings whose ``raw`` is the string (COCO's ``sentences``).

    Raises:
        ValueError: another kind of cell, or an image without caption.
    """
    cells = inputs.source.with_format(None)[column]
    found = [_texts(cells[row], column) for row in inputs.indices]
    missing = sum(not texts for texts in found)
    require(
        missing == 0,
        f"{missing} of {len(found)} images have no caption in column {column!r}. Leave them out, or name another column with "
        "--caption-column.",
    )
    return found


def _texts(cell: Any, column: str) -> list[str]:
    items: list[Any] = cell if isinstance(cell, list) else [cell]
    values = [item.get("raw") if isinstance(item, Mapping) else item for item in items if item is not None]
    texts = [value.strip() for value in values if isinstance(value, str)]
    require(
        len(texts) == len(values),
        f"Column {column!r} holds {str(cell)[:40]!r}, which is no caption: strings or lists of strings are. Name the column "
        "with --caption-column.",
    )
    return list(dict.fromkeys(text for text in texts if text))
