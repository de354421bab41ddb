"""What else serves this encoder: alternatives to the result of a `quantize` job, and the command that makes the best."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optimum_regcache.commands.report import NOTHING, Reporter, Row
from optimum_regcache.commands.sources import EMBEDDED_IMAGES, Source
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.config.validation import is_mapping
from optimum_regcache.search.alternatives import Alternative, Recommendation, find_alternatives
from optimum_regcache.search.fit import FitResult
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.run import QuantizationRun, run_plan


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows and looks for.

    Attributes:
        show_photos: draw outlier tokens on images of the user's own; those of the embedded encoders are always shown.
        seeds: sets of embedded scenes to repeat the main rows on.
        recommend: try other quantizers where a search leaves something to gain.
        best: try them in any case, and save the one that is clearly better.
        command: the command line that makes an alternative; for the terminal only, it may hold paths.
    """

    show_photos: bool = False
    seeds: int = 1
    recommend: bool = True
    best: bool = False
    command: Callable[[Alternative], str] | None = None

    def check(self, dataset: str) -> None:
        """Refuse what the images ``dataset`` do not allow.

        Raises:
            ValueError: several seeds without embedded scenes, or fewer than one.
        """
        if self.seeds < 1:
            raise ValueError(f"--report-seeds must be at least 1, got {self.seeds}.")
        if self.seeds > 1 and not dataset.endswith(EMBEDDED_IMAGES):
            raise ValueError(
                f"--report-seeds needs the scenes of an embedded encoder; the unseen images of {dataset} are the same for "
                "every seed."
            )


@dataclass(frozen=True)
class Advice:
    """What was tried, and the best of it if it is clearly better.

    Attributes:
        found: the comparison on confirmation images.
        run: the better one, made; None if there is none.
        save: whether it is to be saved.
        fit: the search behind the result, None if nothing was searched.
    """

    found: Recommendation
    run: QuantizationRun | None
    save: bool
    fit: FitResult | None

    @property
    def swapped(self) -> QuantizationRun | None:
        """What is saved in place of the result; None if the result is saved."""
        return self.run if self.save else None

    @property
    def installed(self) -> str:
        """Registers and deletion of the better one."""
        better = self.found.better
        if better is None or not better.registers:
            return NOTHING
        return self.fit.search.chosen.describe() if self.fit is not None else "as the recipe says"

    @property
    def name(self) -> str:
        """Of the better one; empty if there is none."""
        return self.found.better.name if self.found.better is not None else ""

    def to_dict(self, row: Row | None) -> dict[str, Any]:
        """JSON-compatible; ``row`` is the better one on the report images."""
        return {**self.found.to_dict(), "saved": self.swapped is not None, "report": row and row.to_dict()}


SMALL_LOSS = 10  # times search.min_gain: where registers leave less than that, nobody has to wait for alternatives


def advise(
    source: Source, images: ReferenceImages, run: QuantizationRun, options: ReportOptions, progress: bool
) -> Advice | None:
    """Try the alternatives to ``run``, unless nobody wants to know: where nothing was searched, they are asked for by name."""
    if not options.best and (run.fit is None or not options.recommend):
        return None
    if run.fit is not None and run.fit.search.unfinished:  # somebody is in a hurry
        return None
    config, made = run.quantized.config, run.quantized.model
    installed = config.registers.mode != "none" or config.deletion.active
    least = SMALL_LOSS * run.recipe.search.min_gain if installed and not options.best else None
    found = find_alternatives(
        source.model, made, run.recipe, images, known=run.fit, least_loss=least, progress=progress
    )
    other = None
    if found.better is not None:
        plan = QuantizationPlan.of(found.better.recipe)
        other = run_plan(source.model, images, plan, known=run.fit, progress=progress)
    return Advice(found, other, options.best, run.fit)


def advice_row(advice: Advice, reporter: Reporter, opened: Any) -> Row | None:
    """The better alternative on the report images, which had no part in its choice; ``opened`` is what was saved."""
    if advice.run is None:
        return None
    quantized = advice.run.quantized
    model = opened if advice.swapped is not None else quantized.model
    return reporter.model_row(advice.name, model, quantized.float_model, advice.installed)


def advice_note(advice: Advice, other: Row | None, result: Row) -> str:
    """One line below the table: what is better and by how much, or that nothing is.

    Args:
        advice: what was tried.
        other: the better one on the report images.
        result: the row of what the search made.
    """
    found = advice.found
    loss = found.ceiling - found.score
    if not found.alternatives:
        return f"no alternative was tried: the result loses only {loss:.4f} on held-out search images"
    unfit = [a.name for a in found.alternatives if a.reason is not None]
    tried = ", ".join(a.name for a in found.alternatives if a.reason is None)
    more = f"; not applicable: {', '.join(unfit)}" if unfit else ""
    better = found.better
    if better is None or other is None:
        best = found.alternatives[0]
        closest = "" if best.gain is None else f"; the best one gains {best.gain:+.4f}, needed {best.needed:.4f}"
        return f"alternatives, not clearly better on {found.images} held-out search images: {tried}{closest}{more}"
    figures = f"cosine {other.cosine:.4f} instead of {result.cosine:.4f}"
    if other.accuracy is not None and result.accuracy is not None:
        figures += f", top-1 {100 * other.accuracy:.2f} % instead of {100 * result.accuracy:.2f} %"
    chosen = (
        f"chosen among {len(found.alternatives) - len(unfit)} on {found.images} held-out search images, where the gain is "
        f"{better.gain:+.4f} +- {better.standard_error:.4f}, needed {better.needed:.4f}"
    )
    options = " ".join(better.options)
    head = f"saved in place of {result.name}" if advice.swapped is not None else "better here"
    return f"{head}: {better.name} ({options}): {figures}; {chosen}{more}"


def suggested_command(
    args: Namespace, default: Callable[[str], Any], resolve: Callable[[Namespace], Recipe], better: Alternative
) -> str:
    """The command line that makes ``better``: the one of ``args`` with other options, never with a token.

    Args:
        args: as parsed, with at most one preset.
        default: of an option, by its name in ``args``.
        resolve: the recipe that options stand for.
        better: what to make.
    """
    given = {name: value for name, value in vars(args).items() if not callable(value)}
    given |= {
        "method": list(better.scheme.methods),
        "best": False,
        "overwrite": False,
        "recommend": True,
        "token": None,
    }
    given |= {"no_registers": not better.registers, "output": f"{args.output}-{'-'.join(better.scheme.methods)}"}
    if not better.registers:  # nothing is searched, and options of the search would be refused
        kept = [a for a in args.assignments if not a.startswith("search.") or a.startswith("search.seed=")]
        given |= {"objective": None, "effort": None, "assignments": kept}
        given |= {"num_samples": better.recipe.data.num_samples} if args.effort else {}
    if not _makes(
        Namespace(**given), better, resolve
    ):  # a recipe or --set decides otherwise: so does a --set behind them
        given |= {"method": None, "no_registers": False}
        start, wanted = (_read(r.to_dict(), better.registers) for r in (resolve(Namespace(**given)), better.recipe))
        given["assignments"] = [*given["assignments"], *_differences(start, wanted)]
    return shlex.join(["optimum-cli", "regcache", "quantize", *_words(given, default)])


def _makes(args: Namespace, better: Alternative, resolve: Callable[[Namespace], Recipe]) -> bool:
    """Whether the options lead to the recipe of ``better``."""
    try:
        made, wanted = (QuantizationPlan.of(recipe).recipe.to_dict() for recipe in (resolve(args), better.recipe))
    except (ValueError, TypeError):
        return False
    return _read(made, better.registers) == _read(wanted, better.registers)


def _read(recipe: Mapping[str, Any], searched: bool) -> dict[str, Any]:
    """What decides about the result; registers that are installed are searched for again."""
    found = {"quantization": dict(recipe["quantization"]), "data": recipe["data"], "search": dict(recipe["search"])}
    if searched:
        del found["quantization"]["registers"], found["quantization"]["deletion"]
    else:
        found["search"] = {"seed": found["search"]["seed"]}
    return found


def _differences(start: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Assignments that make ``wanted`` of ``start``."""
    found: list[str] = []
    for name, value in wanted.items():
        before = start.get(name)
        if is_mapping(value) and is_mapping(before):
            found += _differences(before, value, f"{prefix}{name}.")
        elif before != value:
            found.append(f"{prefix}{name}={json.dumps(value)}")
    return found


def _words(given: Mapping[str, Any], default: Callable[[str], Any]) -> Iterator[str]:
    """The options that differ from their defaults."""
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is None or value == default(name):
            continue
        if name == "effort":
            yield f"--{value}"
        elif name == "assignments":
            for assignment in value:
                yield from ("--set", assignment)
        elif value is True:
            yield option
        elif isinstance(value, list):
            yield from (option, *map(str, value))
        elif value is not False:
            yield from (option, str(value))
