"""The sections that tell why: norms, sensitivity, outlier tokens, attention to the registers, the search."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from optimum_regcache.commands.page.attention import Measured
from optimum_regcache.commands.page.parts import Item, LeftOut, Picture, Pictures, Table, Text, number
from optimum_regcache.commands.page.plots import Plotter
from optimum_regcache.commands.page.runs import ANALYZE, EVALUATE, QUANTIZE, Run
from optimum_regcache.search.setups import Setup

_NORMS = {"max_block_input": "block input, max", "mean_block_input": "block input, mean", "max_fc2_input": "fc2 input, max",
          "median_fc2_input": "fc2 input, median"}  # fmt: skip
_NORMS_OF = {
    QUANTIZE: "in the float model with the same registers, deletion and rewrites, on the report images",
    ANALYZE: "in the float model, on the images of the sensitivity scan",
    EVALUATE: "in the model as it was evaluated, on the report images",
}
_MOST_PNG = 1 << 23
_SHOWN = 10


def norms(run: Run, plotter: Plotter) -> list[Item]:
    """Token norms per block before and after."""
    if "norms" not in run.data:
        raise LeftOut("this result holds no norms per block")
    found: Mapping[str, Any] = run.data["norms"]
    if run.kind in (ANALYZE, EVALUATE):
        found = {"float" if run.kind == ANALYZE else "the model": found}
    pictures = []
    for site, kinds in (("block input", ("max", "mean")), ("fc2 input", ("max", "median"))):
        key = site.replace(" ", "_")
        curves = {f"{name}, {kind}": values[f"{kind}_{key}"] for name, values in found.items() for kind in kinds}
        peaks = {name: max(v[f"max_{key}"]) for name, v in found.items()}
        alt = f"Curves over blocks, log axis, token norm at the {site}; largest: "
        alt += ", ".join(f"{name} {value:.4g}" for name, value in peaks.items())
        caption = f"l_inf norm of patch tokens at the {site}"
        pictures.append(plotter.lines(curves, caption, alt, x="block", y="l_inf norm"))
    depth = len(next(iter(found.values()))["max_block_input"])
    heads = [f"{name}: {text}" for name in found for text in _NORMS.values()]
    rows = [[str(b), *(number(v[k][b], ".2f") for v in found.values() for k in _NORMS)] for b in range(depth)]
    text = f"l_inf norm of the patch tokens that each block computes on, a deleted token not among them; {_NORMS_OF[run.kind]}."
    return [Text(text), Pictures(pictures), Table(["block", *heads], rows, "The same as numbers.", folded=True)]


def sensitivity(run: Run, plotter: Plotter) -> list[Item]:
    """Drop of the objective when one layer alone is quantized, block by layer."""
    found = run.at("sensitivity") or run.at("fit", "sensitivity")
    if found is None:
        raise LeftOut("no scan was made: nothing had to be repaired, or the sensitive block was given")
    cells: dict[str, dict[int, float | None]] = {}
    for name, drop in found["drops"].items():
        whole = re.fullmatch(r"block (\d+)", name)
        part = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        if whole is None and part is None:
            raise LeftOut(f"the layer {name} has no number of a block in its name")
        block, layer = (int(whole[1]), "whole block") if whole else (int(part[1]), part[2])  # type: ignore[index]
        cells.setdefault(layer, {})[block] = drop
    depth = 1 + max(block for row in cells.values() for block in row)
    matrix = [[row.get(block) for block in range(depth)] for row in cells.values()]
    top = sorted(found["drops"].items(), key=lambda e: -math.inf if e[1] is None else -e[1])[:_SHOWN]
    alt = f"Heat map, layers by blocks, drop of {found['objective']}; largest: "
    alt += ", ".join(f"{name} {number(drop)}" for name, drop in top[:3])
    caption = f"Drop of {found['objective']} when the inputs of one layer alone are quantized"
    picture = plotter.heat(list(cells), matrix, caption, alt, x="block", y="", bar=f"drop of {found['objective']}")
    rows = [[name, number(drop, ".5f")] for name, drop in top]
    grid = [[str(b), *(number(line[b], ".5f") for line in matrix)] for b in range(depth)]
    return [
        Text(f"Sensitive block: {found['sensitive_block']}."),
        Pictures([picture]),
        Table(["layer", "drop"], rows, "The most sensitive."),
        Table(["block", *cells], grid, "Every drop; -: not scanned, or not finite.", folded=True),
    ]


def outliers(run: Run, plotter: Plotter) -> list[Item]:
    """The picture that `quantize` or `analyze` drew."""
    del plotter
    path, found = run.folder / "outliers.png", run.at("outliers")
    if not path.is_file():
        raise LeftOut("there is no outliers.png in the folder")
    data = path.read_bytes()
    if len(data) > _MOST_PNG:
        raise LeftOut(f"outliers.png is larger than {_MOST_PNG >> 20} MiB")
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise LeftOut(f"outliers.png cannot be read ({type(error).__name__})") from error
    caption = (
        "The first report images. Framed in magenta: outlier tokens; in grey: the largest of the others. Images of your own "
        "are grey sheets unless the job was asked for --show-photos."
    )
    alt = "Sample images of the report with their outlier tokens framed"
    items: list[Item] = [Pictures([Picture(caption, alt, png=base64.b64encode(data).decode())])]
    if found:
        ratio, block = found["outlier_ratio"], found["block"]
        first = found["first_block"]
        text = (
            "No block has outlier tokens in half of the images"
            if first is None
            else f"Outlier tokens from block {first} on"
        )
        text += f"; at block {block} {found['per_image'][block]:.2f} an image (at least {ratio:g} times the median)."
        items.insert(0, Text(text))
    return items


def attention(measured: Measured, plotter: Plotter) -> list[Item]:
    """Attention to the registers, block by head."""
    share, heads = measured.share, measured.share.shape[1]
    with_rows = set(measured.blocks)
    values = [[float(v) if b in with_rows else None for v in row] for b, row in enumerate(share.tolist())]
    means = share.mean(1)
    peak = int(means.argmax())
    alt = "Heat map, blocks by heads, share of attention to the registers; largest mean over heads "
    alt += f"{float(means[peak]):.3f} in block {peak}"
    caption = "Share of the attention that goes to the registers, mean over queries and images"
    transposed = [[row[head] for row in values] for head in range(heads)]
    picture = plotter.heat([str(h) for h in range(heads)], transposed, caption, alt, x="block", y="head", bar="share")
    rows = [
        [
            str(b),
            number(float(share[b].mean()), ".4f"),
            number(float(share[b].max()), ".4f"),
            str(int(share[b].argmax())),
        ]
        for b in sorted(with_rows)
    ]
    where = f"{measured.images} unseen images of {measured.dataset}"
    return [
        Text(f"Measured for this page on {where}; blocks without registers are empty."),
        Pictures([picture]),
        Table(["block", "mean over heads", "largest head", "which"], rows),
    ]  # fmt: skip


def search(run: Run, plotter: Plotter) -> list[Item]:
    """Every trial of the search, what was chosen, and its confirmation."""
    found = run.at("fit", "search")
    if found is None:
        raise LeftOut("nothing was searched")
    trials = [(_setup(t), t["score"]) for t in found["trials"]]
    chosen, confirmation = _setup(found["chosen"]), found["confirmation"]
    gain = f"{number(confirmation['gain'], '+.4f')} ± {number(confirmation['standard_error'])}"
    text = f"Chosen: {chosen.describe()}. Reason: {found['reason']}."
    if "gain " not in found["reason"]:
        text += f" Gain over nothing on the confirmation images: {gain}."
    items: list[Item] = [Text(text)]
    scored = [(setup, score) for setup, score in trials if score is not None]
    axes = [("num_copies", "tau", True), ("count", "k~", False), ("start_block", "start block", False)]
    if any(setup.candidate is not None for setup, _ in scored):
        axes.append(("candidate", "mined token", False))
    pictures = []
    for key, name, log in axes:
        points = {kind: list[tuple[float, float]]() for kind in ("prefix", "delete", "both", "chosen")}
        for setup, score in scored:
            value = getattr(setup, key)
            if setup.kind == "nothing" or value is None or (key == "num_copies" and setup.start_block is None):
                continue
            for kind in (setup.kind, *(["chosen"] if setup == chosen else [])):
                points[kind].append((float(value), score))
        tried = [p for kind in points.values() for p in kind]
        if not tried:
            continue
        best, base = max(tried, key=lambda p: p[1]), found["baseline"]
        alt = f"Points, score of every trial over {name}: best {best[1]:.4f} at {best[0]:.4g}, nothing {base:.4f}"
        pictures.append(plotter.trials(points, base, f"Score over {name}", alt, x=name, log=log))
    items += [Pictures(pictures)] if pictures else []
    rows = [[setup.describe(), number(score)] for setup, score in sorted(scored, key=lambda t: -t[1])]
    items.append(
        Table(["trial", "score"], rows[:_SHOWN], f"The best of {len(trials)} trials, on the selection images.")
    )
    if len(rows) > _SHOWN:
        items.append(Table(["trial", "score"], rows, "Every trial.", folded=True))
    return items


def _setup(trial: Mapping[str, Any]) -> Setup:
    return Setup(**{name: trial[name] for name in Setup.__dataclass_fields__ if name in trial})
