"""Plots as SVG that lies inside a page: its colours of text and axes follow the page, its names clash with no other's."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from optimum_regcache.commands.page.parts import Picture
from optimum_regcache.commands.pictures import require_plots

# Okabe and Ito: told apart by colour-blind readers, on light and on dark ground
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
MARKERS = "osD^vP*X"
LEAST_LOSS = 1e-6  # of a cosine in float32
_MOST_TICKS = 9
_INK = "#010203"  # stands for the page's own colour of text
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "regcache", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
    "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8, "axes.axisbelow": True, "grid.alpha": 0.2,
    "lines.markersize": 4,
}  # fmt: skip
_STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "grid.color"), _INK)
_STYLE |= dict.fromkeys(("xtick.color", "ytick.color"), _INK)
Values = Sequence[float | None]


class Plotter:
    """Makes the pictures of one page; each gets a number of its own."""

    def __init__(self) -> None:
        self._figure, self._count = require_plots(), 0

    @contextmanager
    def axes(self, width: float = 5.2, height: float = 3.2) -> Iterator[tuple[Any, list[str]]]:
        """(axes to draw on, list that gets the SVG when the block ends); sizes in inches."""
        from matplotlib import rc_context

        found: list[str] = []
        with rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has other fonts
            warnings.filterwarnings("error", category=RuntimeWarning)  # numbers too large for a picture
            figure = self._figure(figsize=(width, height), layout="constrained")
            yield figure.subplots(), found
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
        self._count += 1
        found.append(_inside_a_page(file.getvalue(), f"p{self._count}-"))

    def lines(
        self, curves: Mapping[str, Values], caption: str, alt: str, *, x: str, y: str, log: bool = True
    ) -> Picture:
        """Curves over blocks; those of one name up to its first comma share a colour, the second of them is dashed."""
        groups = list(dict.fromkeys(name.split(",")[0] for name in curves))
        with self.axes() as (axes, svg):
            seen: set[str] = set()
            for name, values in curves.items():
                group = name.split(",")[0]
                place, second = groups.index(group), group in seen
                seen.add(group)
                axes.plot(
                    range(len(values)), _floats(values), label=name, color=COLOURS[place % len(COLOURS)],
                    marker=MARKERS[place % len(MARKERS)], linestyle="--" if second else "-",
                    fillstyle="none" if second else "full",
                )  # fmt: skip
            if log:
                axes.set_yscale("log")
                _plain(axes.yaxis)
            axes.set(xlabel=x, ylabel=y)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
            axes.legend()
        return Picture(caption, alt, svg[0])

    def bars(
        self,
        groups: Sequence[str],
        series: Mapping[str, tuple[Values, Values]],
        caption: str,
        alt: str,
        *,
        x: str,
        log: bool = False,
    ) -> Picture:
        """Horizontal bars: for each of ``groups`` one of each series (values, standard errors or None). On a log axis, which
        has no zero that bars could begin at, marks. A series without values keeps its place and colour."""
        thick = 0.8 / len(series)
        with self.axes(height=max(1.8, 0.8 + 0.26 * len(groups) * max(1.0, 0.75 * len(series)))) as (axes, svg):
            for place, (name, (values, errors)) in enumerate(series.items()):
                if all(v is None for v in values):
                    continue
                at = [g + (place - (len(series) - 1) / 2) * thick for g in range(len(groups))]
                found, bars = _floats(values), [e or 0.0 for e in errors]
                look: dict[str, Any] = {
                    "xerr": bars if any(bars) else None,
                    "label": name,
                    "ecolor": _INK,
                    "capsize": 2,
                }
                look["color"] = COLOURS[place % len(COLOURS)]
                if log:  # which has nothing below zero
                    low = [min(bar, 0.9 * value) for bar, value in zip(bars, found, strict=True)]
                    look["xerr"] = [low, bars] if any(bars) else None
                    axes.errorbar(found, at, fmt=MARKERS[place], markersize=7, **look)
                else:
                    axes.barh(at, found, thick, **look)
            axes.set_yticks(range(len(groups)), [_short(g) for g in groups])
            axes.set_ylim(len(groups) - 0.4, -0.6)
            if log:
                axes.set_xscale("log")
                _plain(axes.xaxis)
            axes.set_xlabel(x)
            axes.grid(axis="x")
            if len(series) > 1:
                axes.figure.legend(loc="outside upper left", ncols=2)
        return Picture(caption, alt, svg[0])

    def losses(
        self, groups: Sequence[str], series: Mapping[str, tuple[Values, Values]], more: str = ""
    ) -> Picture | None:
        """`bars` of cosines to the float model as what they lack of 1, on a log axis; None where none lacks `LEAST_LOSS`."""
        lost = {
            name: ([None if v is None or 1 - v < LEAST_LOSS else 1 - v for v in values], errors)
            for name, (values, errors) in series.items()
        }
        if not any(v is not None for values, _ in lost.values() for v in values):
            return None
        alt = "Marks, log axis, 1 - feature cosine: " + "; ".join(
            f"{name} "
            + ", ".join(f"{g} {'-' if v is None else f'{1 - v:.3g}'}" for g, v in zip(groups, values, strict=True))
            for name, (values, _) in series.items()
            if any(v is not None for v in lost[name][0])
        )
        caption = f"What the feature cosine lacks of 1{more}; no mark: less than {LEAST_LOSS:g}, or not measured"
        return self.bars(
            groups, lost, caption, alt, x="1 - cosine to float, log axis; further left is better", log=True
        )

    def heat(
        self, rows: Sequence[str], values: Sequence[Values], caption: str, alt: str, *, x: str, y: str, bar: str
    ) -> Picture:
        """``values`` [rows][columns] as colours; cells without a value stay empty."""
        with self.axes(height=max(2.2, 1.1 + 0.24 * len(rows))) as (axes, svg):
            cells = axes.pcolormesh([_floats(v) for v in values], cmap="cividis")
            axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
            columns = range(len(values[0]))
            step = max(1, len(columns) // 12)
            axes.set_xticks([i + 0.5 for i in columns[::step]], [str(i) for i in columns[::step]])
            axes.invert_yaxis()
            axes.set(xlabel=x, ylabel=y)
            axes.figure.colorbar(cells, ax=axes, label=bar)
        return Picture(caption, alt, svg[0])

    def trials(
        self,
        points: Mapping[str, Sequence[tuple[float, float]]],
        base: float,
        caption: str,
        alt: str,
        *,
        x: str,
        log: bool,
    ) -> Picture:
        """The score of every trial over a setting ``x``, by kind, and the score ``base`` of nothing; the kind ``chosen`` is a
        ring."""
        values = sorted({at for found in points.values() for at, _ in found})
        with self.axes() as (axes, svg):
            for place, (name, found) in enumerate(points.items()):
                look: dict[str, Any] = {"s": 26, "alpha": 0.8, "color": COLOURS[place], "linewidths": 0}
                if name == "chosen":
                    look = {"s": 130, "facecolors": "none", "edgecolors": _INK, "linewidths": 1.5}
                if found:
                    axes.scatter(*zip(*found, strict=True), label=name, marker=MARKERS[place % 3], **look)
            axes.axhline(base, color=_INK, linestyle=":", linewidth=1, label="nothing")
            if log:
                axes.set_xscale("log", base=2)
                _plain(axes.xaxis)
            else:
                axes.xaxis.get_major_locator().set_params(integer=True)
            if len(values) <= _MOST_TICKS:
                axes.set_xticks(values, [f"{v:.3g}" for v in values], minor=False)
            axes.set(xlabel=x, ylabel="score on selection images")
            axes.grid(axis="y")
            axes.figure.legend(loc="outside upper left", ncols=5, columnspacing=1.0, handletextpad=0.3)
        return Picture(caption, alt, svg[0])


def _plain(axis: Any) -> None:
    """Numbers instead of powers, which would be formulas; more of them where the axis is short."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(lambda value, position: "")


def _floats(values: Values) -> list[float]:
    return [float("nan") if v is None else float(v) for v in values]


def _short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _inside_a_page(svg: str, prefix: str) -> str:
    """The element alone, its names under ``prefix``, the ink in the page's colour of text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\b(id=")|(url\(#)|(href="#)', lambda m: m.group(0) + prefix, svg)
    return svg.replace(_INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)
