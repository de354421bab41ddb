"""Results of other commands, found and read: whole, cut off, unfinished, of earlier versions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_regcache.config.output import MANIFEST, WORK

QUANTIZE, ANALYZE, CHECK, EVALUATE, BENCHMARK = "quantize", "analyze", "check", "evaluate", "benchmark"
_FILES = {"results.json": QUANTIZE, "analysis.json": ANALYZE, "check.json": CHECK}
_KEYS = {  # what only a result of the kind holds
    QUANTIZE: ("rows", "recipe", "fit"),
    ANALYZE: ("sensitivity", "norms", "outliers"),
    CHECK: ("verdict", "parts"),
    EVALUATE: ("quantized_layers",),
    BENCHMARK: ("results", "settings", "environment"),
}
_ADVICE = "Give a folder that quantize or analyze wrote, or a JSON file of evaluate or of benchmarks/bench_cpu_int8.py."


@dataclass(frozen=True)
class Run:
    """A result.

    Attributes:
        label: short, unique in the page.
        kind: the command that made it.
        folder: where its other files are.
        data: the JSON; empty where it cannot be read.
        problems: what is wrong with it, in sentences.
    """

    label: str
    kind: str
    folder: Path
    data: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def at(self, *names: str) -> Any:
        """What lies under ``names``, one inside the other; None where one is missing."""
        found: Any = self.data
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The results that ``paths`` name, in their order; a folder of such folders stands for all of them.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no result of ours.
    """
    runs = [run for path in paths for run in _runs_at(Path(path))]
    labels = _labels([run.folder / run.label for run in runs])
    return [Run(label, r.kind, r.folder, r.data, r.problems) for label, r in zip(labels, runs, strict=True)]


def _runs_at(path: Path) -> list[Run]:
    if not path.exists():
        raise FileNotFoundError(f"There is no result {path} (the working directory is {Path.cwd()}). {_ADVICE}")
    if path.is_file():
        return [_of_file(path)]
    found = _of_folder(path)
    if found is not None:
        return [found]
    inside = [run for p in sorted(path.iterdir()) if p.is_dir() for run in [_of_folder(p)] if run is not None]
    if not inside:
        raise ValueError(f"{path} holds no result of optimum-regcache. {_ADVICE}")
    return inside


def _of_file(path: Path) -> Run:
    data, problem = _read(path)
    kind = _kind(data)
    if kind is not None:
        return Run("" if _FILES.get(path.name) == kind else path.stem, kind, path.parent, data, _unfinished(data))
    found = _of_folder(path.parent) if path.name in _FILES else None
    if found is None:
        raise ValueError(f"{path} is no result of optimum-regcache{f': {problem}' if problem else ''}. {_ADVICE}")
    return found


def _of_folder(path: Path) -> Run | None:
    """The result in a folder; None if it holds none of ours."""
    name = next((name for name in _FILES if (path / name).is_file()), None)
    if name is not None:
        data, problem = _read(path / name)
        kind = _kind(data)
        missing = [n for n in _KEYS[_FILES[name]] if n not in data]
        if problem is not None:
            problems = (f"{name} cannot be used: {problem}.",)
        elif kind is None:
            problems = (f"{name} is not as this version writes it: no {', '.join(missing)}.",)
        else:
            problems = _unfinished(data)
        return Run("", kind or _FILES[name], path, data, problems)
    steps = sum(len(p.read_bytes().splitlines()) for p in (path / WORK).glob("*.jsonl"))
    if steps:
        text = f"This job is not finished: {steps} steps are kept, nothing is written yet. The same command goes on."
        return Run("", QUANTIZE, path, problems=(text,))
    if (path / MANIFEST).is_file() or (path / "recipe.yaml").is_file():
        text = "There is no results.json beside the model, so there are no figures. Quantize again, or use evaluate."
        return Run("", QUANTIZE, path, problems=(text,))
    return None


def _kind(data: dict[str, Any]) -> str | None:
    return next((kind for kind, names in _KEYS.items() if all(name in data for name in names)), None)


def _unfinished(data: dict[str, Any]) -> tuple[str, ...]:
    if Run("", "", Path(), data).at("fit", "search", "unfinished") is not True:
        return ()
    text = (
        "The search was interrupted: this is the best of what it had tried. The same command with --overwrite goes on."
    )
    return (text,)


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The JSON object in ``path``, and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, f"it is no JSON, perhaps cut off ({type(error).__name__})"
    return (data, None) if isinstance(data, dict) else ({}, "it holds no JSON object")


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the last part of each path, with more parts or a number where these are the same."""
    full = [p.resolve().parts for p in paths]
    names = [parts[-1] for parts in full]
    for length in (2, 3):
        same = {name for name, count in Counter(names).items() if count > 1}
        names = ["/".join(p[-length:]) if n in same else n for n, p in zip(names, full, strict=True)]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names
