"""Several results side by side."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_regcache.commands.page.facts import saved_row, title_of
from optimum_regcache.commands.page.parts import Item, Pictures, Table, Text, number, percent, with_error
from optimum_regcache.commands.page.plots import Plotter, Values
from optimum_regcache.commands.page.runs import ANALYZE, QUANTIZE, Run

_VARIANTS = ("float", "naive", "per token")
_SAVED = "saved"


def with_rows(runs: Sequence[Run]) -> list[Run]:
    """Those with a table of variants."""
    return [r for r in runs if r.kind in (QUANTIZE, ANALYZE) and r.data.get("rows")]


def overview(runs: Sequence[Run], plotter: Plotter) -> list[Item]:
    """One table and grouped pictures of results `with_rows`."""
    made = [
        [run.label, title_of(run.at("model")), run.at("quantization"), _methods(run), _installed(run)] for run in runs
    ]
    caption = "float to saved: top-1 where there are labels, else the cosine to the float model; ±: standard error."
    headings = ["result", "float", "naive", "per token", "saved", "retention", "recovered", "search gain"]
    items: list[Item] = [
        Table(["result", "model", "scheme", "methods", "installed"], made, words=frozenset(range(5))),
        Table(headings, [_figures(run) for run in runs], caption),
    ]
    other = [
        name
        for name, key in (
            ("images", ("dataset",)),
            ("numbers of report images", ("report_images",)),
            ("seeds", ("recipe", "search", "seed")),
            ("protocols", ("protocol",)),
        )
        if len({str(run.at(*key)) for run in runs} - {"None"}) > 1
    ]
    if other:
        items.append(
            Text(f"These results differ in {', '.join(other)}: figures of different ones do not compare.", True)
        )
    labels = [run.label for run in runs]
    pictures = []
    if any(_value(run, "float", "accuracy") is not None for run in runs):
        series = _series(runs, "accuracy", 100.0)
        alt = "Grouped bars, top-1 in %: "
        alt += "; ".join(f"{v} " + ", ".join(number(x, ".4g") for x in values) for v, (values, _) in series.items())
        pictures.append(plotter.bars(labels, series, "top-1 in %", alt, x="top-1 in %"))
    picture = plotter.losses(labels, _series(runs, "cosine", 1.0))
    pictures += [] if picture is None else [picture]
    peaks = {v: ([_value(run, v, "max_block_norm") for run in runs], [None] * len(runs)) for v in ("naive", _SAVED)}
    alt = "Grouped bars, log axis, largest token norm: "
    alt += "; ".join(f"{v} " + ", ".join(number(x, ".4g") for x in values) for v, (values, _) in peaks.items())
    pictures.append(plotter.bars(labels, peaks, "Largest token norm", alt, x="l_inf norm at a block input", log=True))
    searched = [run for run in runs if run.at("fit", "search") is not None]
    if searched:
        gains = [run.at("fit", "search", "confirmation", "gain") for run in searched]
        errors = [run.at("fit", "search", "confirmation", "standard_error") for run in searched]
        alt = "Bars, gain on confirmation images: "
        alt += ", ".join(f"{run.label} {number(g, '+.4f')}" for run, g in zip(searched, gains, strict=True))
        names, gain = [run.label for run in searched], "gain over nothing"
        pictures.append(plotter.bars(names, {gain: (gains, errors)}, "Gain on the confirmation images", alt, x=gain))
    return [*items, Pictures(pictures)]


def _series(runs: Sequence[Run], key: str, scale: float) -> dict[str, tuple[Values, Values]]:
    """Variant -> values and standard errors of ``runs``; variants that one of them has."""
    series: dict[str, tuple[Values, Values]] = {}
    for variant in (*_VARIANTS, _SAVED):
        values = [_value(run, variant, key) for run in runs]
        errors = [_value(run, variant, "standard_error") if _metric(run) == key else None for run in runs]
        if any(v is not None for v in values):
            series[variant] = _scaled(values, scale), _scaled(errors, scale)
    return series


def _scaled(values: Values, scale: float) -> Values:
    return [None if v is None else scale * v for v in values]


def _metric(run: Run) -> str:
    return "cosine" if run.data["rows"][0]["accuracy"] is None else "accuracy"


def _value(run: Run, variant: str, key: str) -> float | None:
    """A figure of a variant; `_SAVED` is the last row, which `analyze` does not have."""
    if variant == _SAVED:
        return saved_row(run).get(key) if run.kind == QUANTIZE else None
    return next((row.get(key) for row in run.data["rows"] if row["name"] == variant), None)


def _methods(run: Run) -> str:
    return " + ".join(str(method["name"]) for method in run.at("methods") or ()) or "rtn"


def _installed(run: Run) -> str:
    return str(saved_row(run)["installed"]) if run.kind == QUANTIZE else "-"


def _figures(run: Run) -> list[str]:
    key = _metric(run)
    found = [
        with_error(_value(run, v, key), _value(run, v, "standard_error"), key == "accuracy")
        for v in (*_VARIANTS, _SAVED)
    ]
    search = run.at("fit", "search", "confirmation") or {}
    gain = "-" if not search else f"{number(search.get('gain'), '+.4f')} ± {number(search.get('standard_error'))}"
    shares = [percent(_value(run, _SAVED, name)) for name in ("retention", "recovered_loss")]
    return [run.label, *found, *shares, gain]
