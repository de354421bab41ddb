"""Draw docs/images/concept.png: prefix, deletion and fill in one picture.

    python scripts/draw_concept.py

Needs matplotlib (the extra ``plots``). The picture is a drawing, not a measurement.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GREY, PALE = "#22303c", "#8795a1", "#eef2f5"
BLUE, RED, GREEN = "#2f6f9f", "#c8423b", "#2e8b57"
SIDE = 6  # patches per side
SINKS = ((0, 4), (1, 5), (4, 0))  # row, column of the outlier tokens


def draw(path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(12.4, 6.7), dpi=110, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 124)
    axes.set_ylim(0, 67)
    axes.axis("off")
    axes.plot([51, 51], [3, 64], color="#d5dce2", lw=1)
    _problem(axes)
    _remedy(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _problem(axes: Any) -> None:
    """Left column: the outlier tokens of one image, and what they do to a scale."""
    _heading(axes, 4, 62.5, "The trouble", "a few tokens without content carry enormous values")
    _patches(axes, 6, 38, 3.1, sinks=RED)
    _text(axes, (27, 53.5), "patch tokens of one image\nat the sensitive block", INK, 9.5)
    axes.add_patch(Rectangle((27, 45.7), 2, 2, color=RED))
    _text(axes, (30, 46.7), "outlier tokens (sinks)", RED, 9.5)
    axes.add_patch(Rectangle((27, 42.2), 2, 2, color=BLUE, alpha=0.55))
    _text(axes, (30, 43.2), "ordinary tokens", BLUE, 9.5)

    _text(axes, (4, 33), "one scale for all tokens, before", INK, 10, weight="bold")
    _ruler(axes, 5, 25, 42, spread=0.075, outliers=(0.80, 0.90, 1.0), colour=RED)
    _text(axes, (5, 20.4), "ordinary tokens share a few codes", GREY, 9)
    _text(axes, (4, 15.5), "one scale for all tokens, after", INK, 10, weight="bold")
    _ruler(axes, 5, 7.5, 42, spread=1.0, outliers=(), colour=GREEN)
    _text(axes, (5, 2.9), "ordinary tokens use all codes", GREY, 9)


def _remedy(axes: Any) -> None:
    """Right: the encoder with its three interventions."""
    _heading(axes, 55.5, 62.5, "RegCache", "no training, no weight changes")
    left, width, gap, bottom, height = 55.5, 8.0, 2.5, 32.5, 11.5
    names = ("0", "1", "2", "3", "4", "5")
    starts = [left + i * (width + gap) for i in range(len(names))]
    for number, (x, name) in enumerate(zip(starts, names, strict=True)):
        active = number >= 3
        face = "#dcebdd" if active else PALE
        edge = GREEN if active else GREY
        box = FancyBboxPatch((x, bottom), width, height, "round,pad=0,rounding_size=1", fc=face, ec=edge, lw=1.4)
        axes.add_patch(box)
        _text(axes, (x + width / 2, bottom + height / 2), f"block\n{name}", INK, 10, align="center")
        if number:
            _arrow(axes, (x - gap + 0.1, bottom + height / 2), (x - 0.1, bottom + height / 2), INK)
        if active:
            _register(axes, x + width / 2, bottom + height)
    _text(axes, (starts[3] + width / 2, bottom - 1.9), "sensitive block", GREY, 9, align="center")

    middle = (starts[3] + starts[5] + width) / 2
    _text(axes, (middle, 55.6), "1  Prefix", GREEN, 12, weight="bold", align="center")
    _text(axes, (middle, 52.6), "a cached key and value: a sink for free", INK, 9.5, align="center")

    cut = starts[3] - gap / 2
    axes.plot([cut, cut], [bottom - 2.2, bottom + height + 1.5], color=RED, lw=1.6, ls=(0, (3, 2)))
    _arrow(axes, (cut, bottom - 1.9), (cut - 6, 26.4), RED)
    _text(axes, (cut - 23, 24.6), "2  Deletion", RED, 12, weight="bold")
    _text(axes, (cut - 23, 21.7), "the few outlier tokens that are left", INK, 9.5)
    _text(axes, (cut - 23, 19.4), "leave, image by image", INK, 9.5)
    _patches(axes, cut - 22.4, 3.2, 2.3, sinks="white", crossed=True)

    end = starts[5] + width
    _arrow(axes, (end + 0.1, bottom + height / 2), (end + 3.4, bottom + height / 2), INK)
    axes.add_patch(
        FancyArrowPatch(
            (end + 1.9, bottom + height / 2 - 1), (end - 5.5, 26.4), connectionstyle="arc3,rad=-0.3",
            arrowstyle="-|>", mutation_scale=11, color=BLUE, lw=1.5,
        )
    )  # fmt: skip
    _text(axes, (end - 21, 24.6), "3  Fill", BLUE, 12, weight="bold")
    _text(axes, (end - 21, 21.7), "empty places get the mean of", INK, 9.5)
    _text(axes, (end - 21, 19.4), "their neighbours: the grid is whole", INK, 9.5)
    _patches(axes, end - 20.4, 3.2, 2.3, sinks=BLUE, filled=True)


def _heading(axes: Any, x: float, y: float, title: str, subtitle: str) -> None:
    axes.text(x, y - 0.7, title, color=INK, fontsize=15, fontweight="bold")
    axes.text(x, y - 3.9, subtitle, color=GREY, fontsize=10)


def _text(axes: Any, at: tuple[float, float], text: str, colour: str, size: float, **style: str) -> None:
    weight, align = style.get("weight", "normal"), style.get("align", "left")
    axes.text(*at, text, color=colour, fontsize=size, fontweight=weight, ha=align, va="center", linespacing=1.35)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.5))


def _register(axes: Any, x: float, top: float) -> None:
    """A register row above a block, with its arrow into the block."""
    axes.add_patch(Rectangle((x - 3.1, top + 2.9), 3.0, 2.4, fc=GREEN, ec="white", lw=0.8))
    axes.add_patch(Rectangle((x + 0.1, top + 2.9), 3.0, 2.4, fc=GREEN, ec="white", lw=0.8))
    for dx, letter in ((-1.6, "K"), (1.6, "V")):
        axes.text(x + dx, top + 4.05, letter, color="white", fontsize=9, ha="center", va="center", fontweight="bold")
    _arrow(axes, (x, top + 2.8), (x, top - 0.2), GREEN)


def _patches(axes: Any, x: float, y: float, cell: float, *, sinks: str, crossed: bool = False,
             filled: bool = False) -> None:  # fmt: skip
    """The patch grid of one image: an object in the middle, sinks on the background."""
    shades = LinearSegmentedColormap.from_list("shades", ["#d6e4ef", BLUE])
    centre = (SIDE - 1) / 2
    for row in range(SIDE):
        for column in range(SIDE):
            near = np.exp(-((row - centre) ** 2 + (column - centre) ** 2) / 4.5)
            colour: Any = shades(0.12 + 0.75 * near)
            edge, width = "white", 1.0
            left, bottom = x + column * cell, y + (SIDE - 1 - row) * cell
            if (row, column) in SINKS:
                if crossed:
                    colour, edge = "white", RED
                elif filled:
                    edge, width = INK, 1.4
                else:
                    colour = sinks
            axes.add_patch(Rectangle((left, bottom), cell, cell, fc=colour, ec="white", lw=1.0))
            if (row, column) in SINKS and (crossed or filled):
                inset = 0.12 * cell
                axes.add_patch(
                    Rectangle(
                        (left + inset, bottom + inset), cell - 2 * inset, cell - 2 * inset, fc=colour, ec=edge,
                        lw=width, ls=(0, (2, 1.5)) if crossed else "-",
                    )
                )  # fmt: skip


def _ruler(axes: Any, x: float, y: float, width: float, *, spread: float, outliers: tuple[float, ...],
           colour: str) -> None:  # fmt: skip
    """A quantizer's codes as ticks, with values above them."""
    codes = 32
    axes.plot([x, x + width], [y, y], color=INK, lw=1.2)
    for code in range(codes + 1):
        axes.plot([x + width * code / codes] * 2, [y - 1.0, y], color=INK, lw=0.8)
    _text(axes, (x, y - 2.2), "0", GREY, 8, align="center")
    _text(axes, (x + width, y - 2.2), "largest code", GREY, 8, align="right")
    draws = np.random.default_rng(3)
    values = np.clip(np.abs(draws.normal(0, 0.36, 70)), 0.02, 1) * spread
    heights = draws.uniform(0.7, 3.4, len(values))
    axes.scatter(x + width * values, y + heights, s=16, color=BLUE, alpha=0.6, lw=0)
    for place in outliers:
        axes.scatter([x + width * place], [y + 1.5], s=46, color=colour, lw=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images" / "concept.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
