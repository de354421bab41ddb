"""The job behind `optimum-cli regcache report`."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from optimum_regcache.commands.page import facts, findings
from optimum_regcache.commands.page.attention import measure_attention
from optimum_regcache.commands.page.parts import Chapter, Item, LeftOut, Section, Text
from optimum_regcache.commands.page.plots import Plotter
from optimum_regcache.commands.page.runs import ANALYZE, BENCHMARK, CHECK, EVALUATE, QUANTIZE, Run, find_runs
from optimum_regcache.commands.page.together import overview, with_rows
from optimum_regcache.config.files import write_text
from optimum_regcache.config.output import digests
from optimum_regcache.config.validation import require

_MARK = "optimum-regcache report"
_BESIDE = {
    "Outlier tokens": "outliers.png",
    "Attention to the registers": "config.json",
}  # what these can do without a JSON
_Make = Callable[[], list[Item]]


def report_job(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    dataset: str | None = None,
    num_images: int = 32,
    overwrite: bool = False,
) -> str:
    """One HTML page over results, complete in itself, and the same as Markdown beside it.

    Args:
        paths: folders of `quantize` or `analyze`, folders of these, JSON files of `evaluate` or of a benchmark.
        output: ``*.html``.
        dataset: images to measure attention on; default: those of embedded encoders, where one was quantized.
        num_images: number of them.
        overwrite: replace a page over other results.

    Returns:
        Summary as text.

    Raises:
        ValueError: a path that holds no result, or an output that is no ``.html`` file or not ours.
        FileNotFoundError: a path that does not exist.
        ImportError: matplotlib is missing.
    """
    page, plotter = Path(output), Plotter()
    require(page.suffix == ".html", f"The output {page} must end in .html; the Markdown goes beside it.")
    require(num_images >= 1, f"--num-images must be at least 1, got {num_images}.")
    job = {"paths": [str(Path(p).resolve()) for p in paths], "dataset": dataset, "images": num_images}
    mark = f"{_MARK} {' '.join(digests(job).values())}"
    text = page.with_suffix(".md")
    for path in (page, text):
        _check_output(path, mark, overwrite)
    runs = find_runs(paths)
    left_out: list[str] = []
    alike = with_rows(runs)
    chapters = [_together(alike, plotter, left_out)] if len(alike) > 1 else []
    for place, run in enumerate(runs, 1):
        chapters.append(_chapter(run, f"r{place}", plotter, dataset, num_images, left_out))
    content = {
        "title": f"RegCache: {', '.join(run.label for run in runs)}",
        "mark": mark,
        "chapters": chapters,
        "version": version("optimum-regcache"),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    for path, template in ((page, "page.html.jinja"), (text, "page.md.jinja")):
        written = _templates().get_template(template).render(content)
        write_text(path, written.encode("utf-8", "replace").decode("utf-8"))  # a result may hold half a character
    shown = [f"{len(runs)} result{'s' * (len(runs) != 1)}: {', '.join(run.label for run in runs)}"]
    return "\n".join([*shown, *left_out, f"written: {page}, {text}"])


def _check_output(path: Path, mark: str, overwrite: bool) -> None:
    require(not path.is_dir(), f"The output {path} is a folder; a file is written here.")
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(400)
    require(_MARK in head, f"The output {path} is a file that optimum-regcache did not write. Use another name.")
    require(
        overwrite or mark in head,
        f"The output {path} holds a page over other results. Use another name, or --overwrite (overwrite=True).",
    )


def _chapter(run: Run, anchor: str, plotter: Plotter, dataset: str | None, count: int, left_out: list[str]) -> Chapter:
    """The sections of one result."""

    def attention() -> list[Item]:
        return findings.attention(measure_attention(run, dataset, count), plotter)

    builders: dict[str, tuple[_Make, tuple[str, ...]]] = {
        "What it is": (partial(facts.what_it_is, run, plotter), (QUANTIZE, ANALYZE, CHECK, EVALUATE, BENCHMARK)),
        "Does it fit": (partial(facts.fitness, run, plotter), (CHECK,)),
        "Accuracy": (partial(facts.accuracy, run, plotter), (QUANTIZE, ANALYZE, EVALUATE)),
        "Token norms": (partial(findings.norms, run, plotter), (QUANTIZE, ANALYZE, EVALUATE)),
        "Sensitivity": (partial(findings.sensitivity, run, plotter), (QUANTIZE, ANALYZE)),
        "Outlier tokens": (partial(findings.outliers, run, plotter), (QUANTIZE, ANALYZE)),
        "Attention to the registers": (attention, (QUANTIZE,)),
        "Search": (partial(findings.search, run, plotter), (QUANTIZE,)),
        "Speed": (partial(facts.speed, run, plotter), (BENCHMARK,)),
    }
    beside = [title for title, name in _BESIDE.items() if (run.folder / name).is_file()]
    sections = [Section("State", f"{anchor}-state", [Text(p, True) for p in run.problems])] if run.problems else []
    for title, (make, kinds) in builders.items():
        if run.kind in kinds and (run.data or title in beside):
            place = f"{anchor}-{re.sub(r'[^a-z]+', '-', title.lower())}"
            sections.append(_section(title, place, make, f"{run.label}: ", left_out))
    return Chapter(run.label, anchor, sections)


def _together(runs: Sequence[Run], plotter: Plotter, left_out: list[str]) -> Chapter:
    section = _section("Overview", "all-overview", partial(overview, runs, plotter), "", left_out)
    return Chapter("Side by side", "all", [section])


def _section(title: str, anchor: str, make: _Make, whose: str, left_out: list[str]) -> Section:
    """A section, or the reason why there is none. Results come from elsewhere: whatever is wrong with one is said."""
    try:
        return Section(title, anchor, make())
    except LeftOut as reason:
        text = str(reason)
    except (ArithmeticError, AttributeError, LookupError, RuntimeWarning, TypeError, ValueError) as error:
        text = f"the result does not hold it in the form that this version reads ({type(error).__name__}: {error})"
    left_out.append(f"{whose}{title.lower()} left out: {' '.join(text.split())}")
    return Section(title, anchor, [Text(f"Left out: {text.rstrip('.')}.")])


def _templates() -> Environment:
    loader = PackageLoader("optimum_regcache.commands.page", "")
    environment = Environment(
        loader=loader, autoescape=lambda name: name is not None and ".html" in name, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["markup"] = Markup
    environment.filters["md"] = _markdown
    return environment


def _markdown(value: Any) -> str:
    """Text on one line of Markdown, nothing of it markup."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", line)
