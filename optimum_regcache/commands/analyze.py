"""The job behind `optimum-cli regcache analyze`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optimum_regcache.commands.compare import plain_rows
from optimum_regcache.commands.pictures import draw_report
from optimum_regcache.commands.report import Reporter, environment
from optimum_regcache.commands.sources import Source, accuracy_data
from optimum_regcache.config.files import write_json
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data.images import ImageInputs, object_boxes
from optimum_regcache.data.reading import store_batches
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.outliers import measure_outliers
from optimum_regcache.evaluation.registry import bank_for, make_objective
from optimum_regcache.evaluation.targets import Targets, objective_targets
from optimum_regcache.hub.door import require_float
from optimum_regcache.search.mining import mine_tokens
from optimum_regcache.search.plan import QuantizationPlan, split_inputs
from optimum_regcache.search.sensitivity import scan_sensitivity
from optimum_regcache.search.trials import TrialRunner


def analyze_job(
    source: Source, recipe: Recipe, output: Output, *, show_photos: bool = False, progress: bool = True
) -> tuple[dict[str, Any], str]:
    """Sensitivity and token norms per block, as ``analysis.json``, ``analysis.png`` and ``outliers.png``.

    Sensitivity and mined tokens come from the reference images, outlier tokens and the loss by naive quantization from
    the report images. Methods shape the observers; nothing of theirs that is fitted takes part.

    Args:
        source: model and images.
        recipe: bits, observers, amounts.
        output: folder of the result.
        show_photos: draw outlier tokens on images of the user's own.
        progress: show progress bars.

    Returns:
        (``analysis.json``, summary as text).
    """
    require_float(source.model)
    recipe = QuantizationPlan.of(recipe).recipe
    inputs = ImageInputs(source.search_images, source.processor)
    parts = split_inputs(inputs, recipe.data, recipe.search.seed)
    parts = replace(parts, selection=parts.selection[: recipe.search.sensitivity_images])
    calibration, images = (parts.batches(name, progress=progress) for name in ("calibration", "selection"))
    runner = TrialRunner(source.model, recipe.quantization, calibration, space=parts.space)
    kind = recipe.search.objective
    targets = objective_targets(kind, source.model, source.processor, inputs, source.template) or Targets(False)
    bank = bank_for(kind, runner.float_model, calibration, images, targets.labels(parts.calibration, parts.selection))
    labels = targets.labels(parts.selection)
    objective = make_objective(kind, runner.float_model, images, labels, targets.text_features, bank)
    scan = scan_sensitivity(
        runner.float_model, recipe.quantization, calibration, objective, recipe.search.sensitivity, progress=progress
    )
    norms = measure_token_norms(runner.float_model, images)
    site = recipe.search.score_site
    mined = mine_tokens(runner.float_model, images, [scan.sensitive_block], score_site=site, progress=progress)
    tokens = mined[scan.sensitive_block]
    report = ImageInputs(source.report_images, source.processor)
    unseen = store_batches(report, recipe.data, parts.space, progress=progress)
    outliers = measure_outliers(runner.float_model, unseen, object_boxes(source.report_images), recipe.search.seed)
    rows = plain_rows(Reporter(runner, unseen, *accuracy_data(source, report), scan.sensitive_block))
    results: dict[str, Any] = {
        "model": source.name,
        "dataset": source.dataset_name,
        "note": source.note,
        "quantization": recipe.quantization.label,
        "images": len(parts.selection),
        "report_images": len(report),
        "dropped_images": source.dropped,
        "sensitivity": scan.to_dict(),
        "norms": norms.to_dict(),
        "outlier_cosine": tokens.outlier_cosine(),
        "normal_cosine": tokens.normal_cosine(),
        "outliers": outliers.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "environment": environment(),
    }
    with output as out:
        write_json(out.stage / "analysis.json", results)
        draw_report(source, {"float": norms}, scan.per_block(), objective.name, out.stage, show_photos, outliers.block)
    lines = [f"{source.title}: sensitive block {scan.sensitive_block} ({objective.name}, {recipe.quantization.label})"]
    lines += [f"  {name}: drop {drop:.4f}" for name, drop in scan.top()]
    for block, per in enumerate(zip(norms.max_block_input, norms.median_block_input, norms.max_fc2_input, strict=True)):
        lines.append(f"  block {block}: input max {per[0]:.2f}, median {per[1]:.2f}; fc2 input max {per[2]:.2f}")
    lines += [f"on {len(report)} unseen images:", *(f"  {line}" for line in outliers.describe())]
    for row in rows:
        accuracy = "" if row.accuracy is None else f"top-1 {100 * row.accuracy:.2f} %, "
        lines.append(f"  {row.name}: {accuracy}feature cosine {row.cosine:.4f}")
    if source.note:
        lines.append(source.note)
    return results, "\n".join([*lines, f"written: {output.path}/analysis.json, analysis.png, outliers.png"])
