"""What a quantized model is compared with: the rows of its report, and the notes below them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from optimum_regcache.commands.labelled import labelled_choice
from optimum_regcache.commands.pictures import draw_report
from optimum_regcache.commands.recommend import Advice, ReportOptions, advice_note, advice_row
from optimum_regcache.commands.report import NOTHING, Reporter, Row
from optimum_regcache.commands.sources import Source, accuracy_data, targets_of
from optimum_regcache.config import DeletionConfig, RegCacheConfig
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reading import store_batches
from optimum_regcache.encoders.passes import count_images
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.methods import ResolvedConfig, quantize_with
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.fit import FitResult, install_setup, search_config
from optimum_regcache.search.plan import QuantizationPlan, space_of
from optimum_regcache.search.run import QuantizationRun
from optimum_regcache.search.setups import Setup
from optimum_regcache.search.trials import TrialRunner

logger = logging.get_logger(__name__)

_Variant = tuple[str, Setup, RegisterCache | None, DeletionConfig]
LEGEND = {
    " only": "prefix only / delete only: what is installed, one half of it at a time",
    "best ": "best prefix / best delete: the best of their kind in the search",
}


@dataclass
class Comparison:
    """Rows, notes, and the main rows on other scenes.

    Attributes:
        rows: the table; the last one is the saved checkpoint.
        notes: below the table.
        seeds: ``--report-seeds``: row -> values, mean and standard deviation of its metric; empty for one seed.
        labelled: what labels say about the choice of a label-free search; None where there is nothing to say.
        other: the row of a clearly better alternative, None if there is none; in the table only if it was saved.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seeds: dict[str, Any] = field(default_factory=dict)
    labelled: dict[str, Any] | None = None
    other: Row | None = None


def installs(config: RegCacheConfig) -> bool:
    """Whether the model holds registers or deletes tokens."""
    return config.registers.mode != "none" or config.deletion.active


def compare(
    source: Source,
    plan: QuantizationPlan,
    run: QuantizationRun,
    opened: Any,
    options: ReportOptions,
    progress: bool,
    advice: Advice | None = None,
) -> tuple[Comparison, Reporter]:
    """Measure the variants of ``run`` on the report images; ``opened`` is the saved checkpoint, opened again: of ``run``, or of
    the alternative where ``advice`` says that it was saved."""
    report = ImageInputs(source.report_images, source.processor)
    config, fit = run.quantized.config, run.fit
    data = plan.recipe.data
    same = fit is not None and search_config(fit.config) == search_config(config)
    scales = fit.scales if fit is not None and same else None
    runner = TrialRunner(source.model, search_config(config), run.calibration, space=run.space, scales=scales)
    found = fit.sensitive_block if fit else None
    sensitive = len(find_tower(source.model).blocks) // 2 if found is None else found
    targets = targets_of(source, report)
    labels = targets.labels(report)
    reporter = Reporter(
        runner, store_batches(report, data, run.space, progress=progress), labels, targets.text_features, sensitive
    )
    result = Comparison(plain_rows(reporter), [source.note] if source.note else [])
    notes = result.notes
    if targets.note is not None:
        notes.append(f"{'top-1' if targets.available else 'no top-1'}: {targets.note}")
    if any(source.dropped.values()):
        notes.append("broken images left out: {search} of the search, {report} of the report".format(**source.dropped))
    if fit is not None:
        result.rows += [reporter.row(name, c, d, s.describe()) for name, s, c, d in _ablation(fit)]
        top = ", ".join(f"{name} ({drop:.4f})" for name, drop in fit.sensitivity.top()) if fit.sensitivity else "given"
        if found is not None:
            notes.append(f"sensitive block {found}; most sensitive layers: {top}")
        notes.append(f"chosen: {fit.search.chosen.describe()}; {fit.search.reason}")
        labelled = labelled_choice(source, fit, runner)
        if labelled is not None:
            result.labelled = labelled.to_dict()
            notes.append(labelled.describe())
        told = [text for word, text in LEGEND.items() if any(word in row.name for row in result.rows)]
        notes += ["; ".join(told)] if told else []
    if any(row.name == "per token" for row in result.rows):
        notes.append("per token: dynamic scales, one per token; for comparison only, never what is saved")
    untrained = plan.resolved.untrained()
    if untrained.config.methods:
        result.rows += _method_rows(source, untrained, run, reporter, progress)
        notes.append(f"{method_label(untrained.config)}: the methods; rows above without the name are round to nearest")
    if len(untrained.methods) < len(plan.resolved.methods):
        result.rows.append(_untrained_row(source, untrained, run, reporter, progress))
        notes.append(f"{method_label(config)}: what is saved; nothing was trained for the rows above it")
    name = "RegCache" if installs(config) else "plain"
    installed = fit.search.chosen.describe() if fit else f"registers {config.registers.mode}, as the recipe says"
    swapped = advice.swapped if advice is not None else None
    made = opened if swapped is None else run.quantized.model
    result.rows.append(reporter.model_row(name, made, run.quantized.float_model, installed))
    if advice is not None:
        result.other = advice_row(advice, reporter, opened)
        notes.append(advice_note(advice, result.other, result.rows[-1]))
    if swapped is not None and result.other is not None:
        result.rows.append(result.other)
        name, config = result.other.name, swapped.quantized.config
    notes.append(f"the {name} row is the saved checkpoint, opened again from disk")
    notes.append("retention: metric / that of float; recovered: (metric - naive) / (float - naive)")
    few, every = count_images(reporter.norm_batches), count_images(reporter.batches)
    on = f", on the first {few} of the {every} images" if few < every else ""
    notes.append(
        f"norms and FLOPs: patch tokens and blocks, float model with the same registers, deletion and rewrites{on}"
    )
    notes.append(f"quantized: {config.protocol}")
    if config.simulated_reason:
        notes.append(f"simulated, not run in integers: {config.simulated_reason}")
    if options.seeds > 1:
        result.seeds = _other_seeds(source, plan, reporter, opened, options.seeds, result.rows)
        notes.append(_describe_seeds(result.seeds, labels is not None))
    named = {name, *(r.name for r in result.rows if r.name.startswith(f"{method_label(untrained.config)}, "))}
    worse = [row.name for row in result.rows if row.below_naive and row.name in named]
    if worse:
        notes.append(f"WORSE THAN ROUND TO NEAREST (naive): {', '.join(worse)}. Do not use these settings here.")
    if result.rows[-1].below_naive:
        logger.warning(
            f"The quantized model is worse than plain round to nearest: {result.rows[-1].metric:.4f}, naive "
            f"{result.rows[1].metric:.4f}. Other methods, or none, serve this encoder better."
        )
    return result, reporter


def plain_rows(reporter: Reporter) -> list[Row]:
    """Float, and quantized with nothing installed."""
    rows = [reporter.float_row(), reporter.row("naive", None, DeletionConfig(), NOTHING)]
    static = reporter.runner.config.activations.mode == "static"
    return [*rows, reporter.dynamic_row("per token")] if static else rows


def method_label(config: RegCacheConfig) -> str:
    """The methods of a config in one word, for tables."""
    return " + ".join(entry["name"] for entry in config.methods) or "rtn"


def _ablation(fit: FitResult) -> Iterator[_Variant]:
    """The two halves of what is installed, and the best of each kind in the search where that is another one."""
    chosen, halves = fit.search.chosen, set[Setup]()
    if chosen.start_block is not None and chosen.count:
        prefix = replace(chosen, count=0)
        delete = Setup(count=chosen.count)
        halves = {prefix, delete}
        yield "prefix only", prefix, fit.cache, DeletionConfig()
        yield "delete only", delete, None, fit.config.deletion
    best = {"prefix": fit.search.best_prefix, "delete": fit.search.best_delete}
    for kind, trial in best.items():
        if trial is not None and trial.setup not in (*halves, chosen):
            yield f"best {kind}", trial.setup, *fit.variants[f"{kind} only"]


def _method_rows(
    source: Source, resolved: ResolvedConfig, run: QuantizationRun, reporter: Reporter, progress: bool
) -> list[Row]:
    """The methods of ``resolved`` without registers, and under each half of what is installed."""
    config, fit, rows = run.quantized.config, run.fit, list[Row]()
    setups: list[_Variant] = []
    if installs(config) or fit is not None:
        setups.append(("alone", Setup(), None, DeletionConfig()))
    if fit is not None:
        setups += _ablation(fit)
    for kind, setup, cache, deletion in setups:
        installed = install_setup(resolved, cache, deletion)
        result = quantize_with(source.model, installed, cache, run.calibration, progress)
        name = f"{method_label(resolved.config)}, {kind}"
        rows.append(reporter.model_row(name, result.model, result.float_model, setup.describe()))
    return rows


def _untrained_row(
    source: Source, untrained: ResolvedConfig, run: QuantizationRun, reporter: Reporter, progress: bool
) -> Row:
    """What is saved, without its methods that train."""
    setup = run.fit.search.chosen if run.fit is not None else Setup()
    installed = install_setup(untrained, run.cache, run.quantized.config.deletion, setup.refinement)
    result = quantize_with(source.model, installed, run.cache, run.calibration, progress)
    text = setup.describe() if run.fit is not None else f"registers {run.quantized.config.registers.mode}"
    return reporter.model_row("without training", result.model, result.float_model, text)


def _other_seeds(
    source: Source, plan: QuantizationPlan, reporter: Reporter, opened: Any, seeds: int, rows: list[Row]
) -> dict[str, Any]:
    """float, naive and the saved model on the scenes of further seeds; the first values are those of the table."""
    first, count, runner = plan.recipe.search.seed, plan.recipe.data.num_report, reporter.runner
    names = ("float", "naive", rows[-1].name)
    values = {name: [next(r.metric for r in rows if r.name == name)] for name in names}
    scenes = reference.load(source.name).dataset
    for seed in range(first + 1, first + seeds):
        images = scenes("report", count, seed)
        inputs = ImageInputs(images, source.processor)
        runner.reset()
        labels, text = accuracy_data(source, inputs)
        space = runner.space or space_of(plan.recipe.data)
        other = Reporter(runner, store_batches(inputs, plan.recipe.data, space), labels, text, reporter.block)
        values["float"].append(float(other.scores(runner.float_model).mean()))
        runner.install(None, DeletionConfig())
        values["naive"].append(float(other.scores(runner.quantized).mean()))
        runner.reset()
        values[names[2]].append(float(other.scores(opened).mean()))
    return {
        name: {"values": v, "mean": statistics.mean(v), "std": statistics.stdev(v)} for name, v in values.items()
    } | {"seeds": list(range(first, first + seeds))}


def _describe_seeds(seeds: dict[str, Any], percent: bool) -> str:
    scale, unit = (100, " %") if percent else (1, "")
    digits = 1 if percent else 4
    parts = [
        f"{name} {scale * v['mean']:.{digits}f} +- {scale * v['std']:.{digits}f}{unit}"
        for name, v in seeds.items()
        if name != "seeds"
    ]
    return f"over {len(seeds['seeds'])} seeds of the report scenes: {', '.join(parts)} (mean +- standard deviation)"


def pictures(
    source: Source, fit: FitResult, reporter: Reporter, rows: list[Row], folder: Path, photos: bool
) -> list[str]:
    """``analysis.png`` and ``outliers.png`` in ``folder``; returns a note if they cannot be drawn."""
    norms = {name: reporter.norms[name] for name in ("naive", rows[-1].name)}
    per_block = fit.sensitivity.per_block() if fit.sensitivity else {}
    try:
        draw_report(source, norms, per_block, reporter.cosine.name, folder, photos)
    except ImportError as error:
        return [f"no pictures: {error}"]
    return []
