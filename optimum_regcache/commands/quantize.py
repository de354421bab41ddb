"""The job behind `optimum-cli regcache quantize`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_regcache.commands.card import write_model_card
from optimum_regcache.commands.pictures import _draw_outliers, plot_analysis
from optimum_regcache.commands.report import NOTHING, Reporter, Row, environment, render_table
from optimum_regcache.commands.sources import EMBEDDED_IMAGES, Source, targets_of
from optimum_regcache.config import DeletionConfig, RegCacheConfig
from optimum_regcache.config.files import write_json
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.tower import find_tower, has_classifier
from optimum_regcache.hub.loading import load_model
from optimum_regcache.methods import quantize_with
from optimum_regcache.quantizer import RegCacheQuantizer
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.fit import FitResult, install_setup, search_config
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.run import QuantizationRun, run_plan
from optimum_regcache.search.setups import Setup
from optimum_regcache.search.trials import TrialRunner


def quantize_job(
    source: Source, recipe: Recipe, output: str | Path, *, progress: bool = True
) -> tuple[dict[str, Any], str]:
    """Search, quantize, save, open again, report.

    Returns:
        (results as written to ``results.json``, summary table as text).
    """
    begun = time.perf_counter()
    path = Path(output)
    path.mkdir(parents=True, exist_ok=True)
    images = ReferenceImages(source.search_images, source.processor, template=source.template)
    plan = QuantizationPlan.of(recipe)
    run = run_plan(source.model, images, plan, work_dir=path / "search", progress=progress)
    quantized, config, fit = run.quantized, run.quantized.config, run.fit
    given = None if source.dataset_name.endswith(EMBEDDED_IMAGES) else source.dataset_name
    recipe = replace(run.recipe, model=source.name, dataset=given)
    RegCacheQuantizer(source.model, source.processor).save(quantized.model, path, recipe=recipe)
    rows, notes = _report(source, plan, run, path, progress)
    results: dict[str, Any] = {
        "model": source.name,
        "dataset": source.dataset_name,
        "note": source.note,
        "quantization": config.label,
        "protocol": config.protocol,
        "methods": [dict(entry) for entry in config.methods],
        "simulated": config.simulated_reason,
        "measured": quantized.measured,
        "stage_seconds": quantized.seconds,
        "report_images": len(source.report_images),
        "dropped_images": source.dropped,
        "rows": [row.to_dict() for row in rows],
        "fit": fit.to_dict() if fit else None,
        "recipe": recipe.to_dict(),
        "environment": environment(),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    write_json(path / "results.json", results)
    title = (
        f"{source.name} {config.label.upper()} on {len(source.report_images)} unseen images of {source.dataset_name}"
    )
    write_model_card(path, source.name, config.label, source.dataset_name, rows, notes, _pipeline_tag(source.model))
    return results, render_table(rows, title, notes)


def _report(
    source: Source, plan: QuantizationPlan, run: QuantizationRun, path: Path, progress: bool
) -> tuple[list[Row], list[str]]:
    """The rows of the table, the last of them of the checkpoint in ``path``, and the notes below."""
    report = ImageInputs(source.report_images, source.processor)
    targets = targets_of(source, report)
    config, fit = run.quantized.config, run.fit
    runner = TrialRunner(source.model, search_config(config), run.calibration)
    found = fit.sensitive_block if fit else None
    sensitive = len(find_tower(source.model).blocks) // 2 if found is None else found
    batches = list(report.batches(plan.recipe.data.batch_size))
    reporter = Reporter(runner, batches, targets.labels(report), targets.text_features, sensitive)
    rows = _plain_rows(reporter)
    notes = [source.note] if source.note else []
    if targets.note is not None:
        notes.append(f"{'top-1' if targets.available else 'no top-1'}: {targets.note}")
    if any(source.dropped.values()):
        notes.append("broken images left out: {search} of the search, {report} of the report".format(**source.dropped))
    if fit is not None:
        best = {"prefix only": fit.search.best_prefix, "delete only": fit.search.best_delete}
        for kind, (cache, deletion) in fit.variants.items():
            trial = best[kind]
            rows.append(reporter.row(kind, cache, deletion, trial.setup.describe() if trial else ""))
        top = ", ".join(f"{name} ({drop:.4f})" for name, drop in fit.sensitivity.top()) if fit.sensitivity else "given"
        if found is not None:
            notes.append(f"sensitive block {found}; most sensitive layers: {top}")
        notes.append(f"chosen: {fit.search.chosen.describe()}; {fit.search.reason}")
        if fit.variants:
            notes.append("prefix only / delete only: the best of their kind in the search, whether installed or not")
    if any(row.name == "per token" for row in rows):
        notes.append("per token: dynamic scales, one per token; for comparison only, never what is saved")
    if config.methods:
        rows += _method_rows(source, plan, run, reporter, progress)
        notes.append(f"{method_label(config)}: the methods; rows above without the name are round to nearest")
    opened: Any = load_model(path, dtype=next(source.model.parameters()).dtype)
    opened = opened.to(source.model.device)
    name = "plain" if fit is None and config.registers.mode == "none" and not config.deletion.active else "RegCache"
    installed = fit.search.chosen.describe() if fit else f"registers {config.registers.mode}, as the recipe says"
    rows.append(reporter.model_row(name, opened, run.quantized.float_model, installed))
    notes.append(f"the {name} row is the saved checkpoint, opened again from disk")
    if fit is not None:
        _pictures(source, fit, reporter, path, notes)
    notes.append("norms: patch tokens, float model with the same registers, deletion and rewrites")
    notes.append(f"quantized: {config.protocol}")
    if config.simulated_reason:
        notes.append(f"simulated, not run in integers: {config.simulated_reason}")
    return rows, notes


def method_label(config: RegCacheConfig) -> str:
    """The methods of a config in one word, for tables."""
    return " + ".join(entry["name"] for entry in config.methods) or "rtn"


def _method_rows(
    source: Source, plan: QuantizationPlan, run: QuantizationRun, reporter: Reporter, progress: bool
) -> list[Row]:
    """The methods without registers, and under the best prefix and the best deletion of the search."""
    config, fit = run.quantized.config, run.fit
    setups: list[tuple[str, Setup, RegisterCache | None, DeletionConfig]] = []
    if config.registers.mode == "fixed" or config.deletion.active or fit is not None:
        setups.append(("alone", Setup(), None, DeletionConfig()))
    if fit is not None:
        best = {"prefix only": fit.search.best_prefix, "delete only": fit.search.best_delete}
        for kind, (cache, deletion) in fit.variants.items():
            trial = best[kind]
            if trial is not None:
                setups.append((kind, trial.setup, cache, deletion))
    rows = []
    for kind, setup, cache, deletion in setups:
        installed = install_setup(plan.resolved, cache, deletion)
        result = quantize_with(source.model, installed, cache, run.calibration, progress)
        name = f"{method_label(config)}, {kind}"
        rows.append(reporter.model_row(name, result.model, result.float_model, setup.describe()))
    return rows


def _plain_rows(reporter: Reporter) -> list[Row]:
    """Float, and quantized with nothing installed."""
    rows = [reporter.float_row(), reporter.row("naive", None, DeletionConfig(), NOTHING)]
    static = reporter.runner.config.activations.mode == "static"
    return [*rows, reporter.dynamic_row("per token")] if static else rows


def _pictures(source: Source, fit: FitResult, reporter: Reporter, path: Path, notes: list[str]) -> None:
    try:
        norms = {name: reporter.norms[name] for name in ("naive", "RegCache")}
        per_block = fit.sensitivity.per_block() if fit.sensitivity else {}
        plot_analysis(path / "analysis.png", per_block, norms, source.name, reporter.cosine.name)
        peak = int((norms["naive"].max_block_input / norms["naive"].median_block_input).argmax())
        _draw_outliers(source, peak, path / "outliers.png")
    except ImportError as error:
        notes.append(f"no pictures: {error}")


def _pipeline_tag(model: PreTrainedModel) -> str:
    if hasattr(model, "get_text_features"):
        return "zero-shot-image-classification"
    return "image-classification" if has_classifier(model) else "image-feature-extraction"
