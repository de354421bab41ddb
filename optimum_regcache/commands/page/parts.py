"""What a page is made of, whatever it is written as: sections of paragraphs, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_LONG = 24  # characters


@dataclass(frozen=True)
class Text:
    """A paragraph; ``warning`` sets it off."""

    text: str
    warning: bool = False
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Table:
    """Headings and cells as text.

    Attributes:
        headings: of the columns; the first column names the row.
        rows: cells.
        caption: what it shows.
        folded: closed until somebody opens it (HTML).
        words: columns of words, set left; the others hold numbers.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    words: frozenset[int] = frozenset({0})
    kind: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [[str(cell) for cell in row] for row in self.rows])  # JSON may hold anything

    @property
    def long(self) -> set[int]:
        """Columns of words whose text takes more than one line where there is little room."""
        return {i for i in self.words if any(len(row[i]) > _LONG for row in self.rows)}


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        caption: what it shows.
        alt: what is to be seen, for those who do not see it.
        svg: markup of ours; empty for a PNG.
        png: the file in base64.
    """

    caption: str
    alt: str
    svg: str = ""
    png: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room."""

    pictures: Sequence[Picture]
    kind: str = field(default="pictures", init=False)


Item = Text | Table | Pictures


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; ``anchor`` is unique in the page."""

    title: str
    anchor: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Chapter:
    """The sections of one result, or of all together."""

    title: str
    anchor: str
    sections: Sequence[Section]


class LeftOut(Exception):  # noqa: N818
    """A section has nothing to show; the text says why."""


def number(value: float | None, form: str = ".4f") -> str:
    """Text of a number; a dash for None and for what is no number."""
    return "-" if value is None or math.isnan(value) else f"{value:{form}}"


def percent(value: float | None, digits: int = 1) -> str:
    """Text of a share; a dash for None and for what is no number."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def with_error(value: float | None, error: float | None, share: bool) -> str:
    """``value`` with its standard error, if there is one; a share in percent."""
    text = percent(value, 2) if share else number(value)
    if value is None or error is None:
        return text
    return f"{100 * value:.2f} ± {100 * error:.2f} %" if share else f"{text} ± {error:.4f}"
