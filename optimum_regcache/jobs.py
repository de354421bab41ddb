"""The three jobs behind the command line: quantize, analyze, evaluate. Each returns what it wrote."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from optimum_regcache import reference
from optimum_regcache.architectures import find_tower
from optimum_regcache.config import DeletionConfig, RegCacheConfig
from optimum_regcache.data import Batch, ImageInputs, object_boxes
from optimum_regcache.evaluation.features import encode
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective, has_classifier, make_objective
from optimum_regcache.evaluation.outliers import OUTLIER_RATIO, measure_outliers
from optimum_regcache.export.layout import is_exported
from optimum_regcache.export.runner import ExportedEncoder
from optimum_regcache.files import write_json
from optimum_regcache.fitting import FitResult, resolve_config, search_config, split_inputs
from optimum_regcache.fusion import fuse
from optimum_regcache.kernels import native
from optimum_regcache.loading import load_model
from optimum_regcache.methods import configured, quantize_with
from optimum_regcache.modules import quant_linears
from optimum_regcache.quantizer import RegCacheQuantizer
from optimum_regcache.recipe import Recipe
from optimum_regcache.registers import RegisterCache
from optimum_regcache.report import (
    NOTHING,
    Reporter,
    Row,
    draw_outliers,
    environment,
    plot_analysis,
    render_table,
    write_model_card,
)
from optimum_regcache.search.mining import mine_tokens
from optimum_regcache.search.search import Setup
from optimum_regcache.search.sensitivity import scan_sensitivity
from optimum_regcache.search.workbench import Workbench
from optimum_regcache.sources import EMBEDDED_IMAGES, Source, accuracy_data, open_source, saved_recipe


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
    quantizer = RegCacheQuantizer(source.model, source.processor)
    config, fit = configured(recipe.quantization), None
    data = replace(recipe.data, num_samples=min(recipe.data.num_samples, len(source.search_images)))
    inputs = ImageInputs(source.search_images, source.processor)
    calibration = list(split_inputs(inputs, data, recipe.search.seed).calibration.batches(data.batch_size))
    if config.registers.mode == "search":
        fit = quantizer.fit(
            source.search_images,
            config,
            recipe.search,
            data,
            template=source.template,
            work_dir=path / "search",
            progress=progress,
        )
        config, cache = fit.config, fit.cache
    else:
        cache = quantizer.fixed_cache(config, inputs, data.batch_size) if config.registers.mode == "fixed" else None
    quantized = quantize_with(source.model, config, cache, calibration, progress)
    config = quantized.config
    given = None if source.dataset_name.endswith(EMBEDDED_IMAGES) else source.dataset_name
    recipe = replace(recipe, quantization=config, model=source.name, dataset=given, notes="")
    quantizer.save(quantized.model, path, recipe=recipe)
    rows, notes = _report(source, recipe, fit, path, calibration, quantized.float_model, progress)
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
    source: Source,
    recipe: Recipe,
    fit: FitResult | None,
    path: Path,
    calibration: list[Batch],
    float_twin: PreTrainedModel,
    progress: bool,
) -> tuple[list[Row], list[str]]:
    report = ImageInputs(source.report_images, source.processor)
    labels, text = accuracy_data(source, report, source.report_images)
    config = recipe.quantization
    bench = Workbench(source.model, search_config(config), calibration)
    sensitive = fit.sensitive_block if fit else len(find_tower(source.model).blocks) // 2
    reporter = Reporter(bench, list(report.batches(recipe.data.batch_size)), labels, text, sensitive)
    rows = _plain_rows(reporter)
    notes = [source.note] if source.note else []
    if fit is not None:
        best = {"prefix only": fit.search.best_prefix, "delete only": fit.search.best_delete}
        for kind, (cache, deletion) in fit.variants.items():
            trial = best[kind]
            rows.append(reporter.row(kind, cache, deletion, trial.setup.describe() if trial else ""))
        top = ", ".join(f"{name} ({drop:.4f})" for name, drop in fit.sensitivity.top()) if fit.sensitivity else "given"
        notes += [
            f"sensitive block {fit.sensitive_block}; most sensitive layers: {top}",
            f"chosen: {fit.search.chosen.describe()}; {fit.search.reason}",
            "prefix only / delete only: the best of their kind in the search, whether installed or not",
        ]
    if any(row.name == "per token" for row in rows):
        notes.append("per token: dynamic scales, one per token; for comparison only, never what is saved")
    if config.methods:
        rows += _method_rows(source, config, fit, reporter, calibration, progress)
        notes.append(f"{method_label(config)}: the methods; rows above without the name are round to nearest")
    opened: Any = load_model(path, dtype=next(source.model.parameters()).dtype)
    opened = opened.to(source.model.device)
    name = "plain" if fit is None and config.registers.mode == "none" and not config.deletion.active else "RegCache"
    installed = fit.search.chosen.describe() if fit else f"registers {config.registers.mode}, as the recipe says"
    rows.append(reporter.model_row(name, opened, float_twin, installed))
    notes.append(f"the {name} row is the saved checkpoint, opened again from disk")
    if fit is not None:
        _pictures(source, recipe, fit, reporter, path, notes)
    notes.append("norms: patch tokens, float model with the same registers, deletion and rewrites")
    notes.append(f"quantized: {config.protocol}")
    if config.simulated_reason:
        notes.append(f"simulated, not run in integers: {config.simulated_reason}")
    return rows, notes


def method_label(config: RegCacheConfig) -> str:
    """The methods of a config in one word, for tables."""
    return " + ".join(entry["name"] for entry in config.methods) or "rtn"


def _method_rows(
    source: Source,
    config: RegCacheConfig,
    fit: FitResult | None,
    reporter: Reporter,
    calibration: list[Batch],
    progress: bool,
) -> list[Row]:
    """The methods without registers, and under the best prefix and the best deletion of the search."""
    setups: list[tuple[str, Setup, RegisterCache | None, DeletionConfig]] = []
    if config.registers.mode == "fixed" or config.deletion.active or fit is not None:
        setups.append(("alone", Setup(), None, replace(config.deletion, block=None, count=0)))
    if fit is not None:
        best = {"prefix only": fit.search.best_prefix, "delete only": fit.search.best_delete}
        for kind, (cache, deletion) in fit.variants.items():
            trial = best[kind]
            if trial is not None:
                setups.append((kind, trial.setup, cache, deletion))
    rows = []
    for kind, setup, cache, deletion in setups:
        resolved = resolve_config(config, setup, cache, deletion, config.registers.kv_mode)
        result = quantize_with(source.model, resolved, cache, calibration, progress)
        name = f"{method_label(config)}, {kind}"
        rows.append(reporter.model_row(name, result.model, result.float_model, setup.describe()))
    return rows


def _plain_rows(reporter: Reporter) -> list[Row]:
    """Float, and quantized with nothing installed."""
    rows = [reporter.float_row(), reporter.row("naive", None, DeletionConfig(), NOTHING)]
    static = reporter.bench.config.activations.mode == "static"
    return [*rows, reporter.dynamic_row("per token")] if static else rows


def _pictures(source: Source, recipe: Recipe, fit: FitResult, reporter: Reporter, path: Path, notes: list[str]) -> None:
    try:
        norms = {name: reporter.norms[name] for name in ("naive", "RegCache")}
        per_block = fit.sensitivity.per_block() if fit.sensitivity else {}
        plot_analysis(path / "analysis.png", per_block, norms, source.name, reporter.cosine.name)
        peak = int((norms["naive"].max_block_input / norms["naive"].median_block_input).argmax())
        _draw_outliers(source, peak, path / "outliers.png")
    except ImportError as error:
        notes.append(f"no pictures: {error}")


def _draw_outliers(source: Source, block: int, path: Path, count: int = 12) -> None:
    """The outlier tokens (as `measure_outliers` counts them) of the first report images at the input of ``block``, and the
    largest other tokens up to three an image."""
    tower = find_tower(source.model)
    images = ImageInputs(source.report_images.select(range(min(count, len(source.report_images)))), source.processor)
    pictures, outliers, others, grid = [], [], [], 0
    for index in range(len(images)):
        batch = next(images.subset([index]).batches(1))
        if batch["pixel_values"].ndim != 4:
            return  # SigLIP2: patches of varying grids
        every = mine_tokens(source.model, [batch], [block], top=10**6, per_image=10**6, progress=False)[block]
        number = int((every.norms >= OUTLIER_RATIO * every.norms.median()).sum())
        pictures.append(_to_picture(batch["pixel_values"][0]))
        outliers.append(every.position[:number].tolist())
        others.append(every.position[number:3].tolist())
        grid = batch["pixel_values"].shape[-1] // tower.config.patch_size
    draw_outliers(path, pictures, outliers, others, tower.num_prefix_tokens, grid)


def _to_picture(pixels: torch.Tensor) -> Any:
    """Model input [3, H, W] as a picture, contrast stretched."""
    from PIL import Image

    low, high = pixels.amin(), pixels.amax()
    scaled = ((pixels - low) / (high - low).clamp(min=1e-6) * 255).byte()
    return Image.fromarray(scaled.permute(1, 2, 0).cpu().numpy())


def _pipeline_tag(model: PreTrainedModel) -> str:
    if hasattr(model, "get_text_features"):
        return "zero-shot-image-classification"
    return "image-classification" if has_classifier(model) else "image-feature-extraction"


def analyze_job(
    source: Source, recipe: Recipe, output: str | Path, *, progress: bool = True
) -> tuple[dict[str, Any], str]:
    """Sensitivity and token norms per block, as ``analysis.json``, ``analysis.png`` and ``outliers.png``.

    Sensitivity and mined tokens come from the reference images, outlier tokens and the loss by naive quantization from
    the report images.
    """
    path = Path(output)
    path.mkdir(parents=True, exist_ok=True)
    inputs = ImageInputs(source.search_images, source.processor)
    parts = split_inputs(inputs, recipe.data, recipe.search.seed)
    calibration = list(parts.calibration.batches(recipe.data.batch_size))
    parts = replace(parts, selection=parts.selection[: recipe.search.sensitivity_images])
    images = list(parts.selection.batches(recipe.data.batch_size))
    bench = Workbench(source.model, recipe.quantization, calibration)
    labels, text = accuracy_data(source, parts.selection, source.search_images)
    objective = make_objective(recipe.search.objective, bench.float_model, images, labels, text)
    scan = scan_sensitivity(
        bench.float_model, recipe.quantization, calibration, objective, recipe.search.sensitivity, progress=progress
    )
    norms = measure_token_norms(bench.float_model, images)
    site = recipe.search.score_site
    mined = mine_tokens(bench.float_model, images, [scan.sensitive_block], score_site=site, progress=progress)
    tokens = mined[scan.sensitive_block]
    report = ImageInputs(source.report_images, source.processor)
    unseen = list(report.batches(recipe.data.batch_size))
    outliers = measure_outliers(bench.float_model, unseen, object_boxes(source.report_images), recipe.search.seed)
    rows = _plain_rows(
        Reporter(bench, unseen, *accuracy_data(source, report, source.report_images), scan.sensitive_block)
    )
    results: dict[str, Any] = {
        "model": source.name,
        "dataset": source.dataset_name,
        "note": source.note,
        "quantization": recipe.quantization.label,
        "images": len(parts.selection),
        "report_images": len(report),
        "sensitivity": scan.to_dict(),
        "norms": norms.to_dict(),
        "outlier_cosine": tokens.outlier_cosine(),
        "normal_cosine": tokens.normal_cosine(),
        "outliers": outliers.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "environment": environment(),
    }
    write_json(path / "analysis.json", results)
    plot_analysis(path / "analysis.png", scan.per_block(), {"float": norms}, source.name, objective.name)
    _draw_outliers(source, outliers.block, path / "outliers.png")
    lines = [f"{source.name}: sensitive block {scan.sensitive_block} ({objective.name}, {recipe.quantization.label})"]
    lines += [f"  {name}: drop {drop:.4f}" for name, drop in scan.top()]
    for block, per in enumerate(zip(norms.max_block_input, norms.median_block_input, norms.max_fc2_input, strict=True)):
        lines.append(f"  block {block}: input max {per[0]:.2f}, median {per[1]:.2f}; fc2 input max {per[2]:.2f}")
    lines += [f"on {len(report)} unseen images:", *(f"  {line}" for line in outliers.describe())]
    for row in rows:
        accuracy = "" if row.accuracy is None else f"top-1 {100 * row.accuracy:.2f} %, "
        lines.append(f"  {row.name}: {accuracy}feature cosine {row.cosine:.4f}")
    if source.note:
        lines.append(source.note)
    return results, "\n".join([*lines, f"written: {path}/analysis.json, analysis.png, outliers.png"])


def evaluate_job(
    model_dir: str,
    source_model: str | None,
    dataset: str | None,
    recipe: Recipe,
    output: str | Path,
    template: str | None = None,
    device: str = "cpu",
    metrics: Sequence[str] = (),
    fused: bool = False,
) -> tuple[dict[str, Any], str]:
    """Evaluate a saved model (float, quantized or exported); beside its float original if that is given or recorded.

    Args:
        model_dir: directory, Hub id or reference name. An exported encoder takes the place of the image side; text features
            are those of the float original.
        source_model: the float original; default: the one in the recipe beside the model.
        dataset: images; default: those of the recipe.
        recipe: amounts and seed.
        output: JSON file.
        template: zero-shot prompt.
        device: ``cpu`` or ``cuda``.
        metrics: further metrics of the `evaluate` library, by name or path; they get predictions and labels.
        fused: evaluate the model twice more after `fuse`, with float32 and with int8 attention (simulated where this machine
            has no operator for it).

    Returns:
        (results, text).

    Raises:
        ValueError: ``metrics`` without labels.
    """
    saved = saved_recipe(model_dir)
    original = source_model or (model_dir if model_dir in reference.names() else saved.model)
    base, data_name = original or model_dir, dataset or saved.dataset
    source = open_source(base, data_name, recipe, template=template, device=device)
    exported = is_exported(model_dir)
    if fused and exported:
        raise ValueError(f"--fused is for models that run in PyTorch; {model_dir} is exported.")
    model: Any = ExportedEncoder.from_pretrained(model_dir) if exported else load_model(model_dir).to(device)  # type: ignore
    report = ImageInputs(source.report_images, source.processor)
    batches = list(report.batches(recipe.data.batch_size))
    labels, text = accuracy_data(source, report, source.report_images)
    results: dict[str, Any] = {
        "model": model_dir,
        "float_model": original,
        "dataset": source.dataset_name,
        "images": len(report),
        "quantized_layers": model.info["quantized_layers"] if exported else sum(1 for _ in quant_linears(model)),
        "environment": environment(),
    }
    if labels is not None:
        accuracy = AccuracyObjective(batches, labels, text)
        results["accuracy"] = float(accuracy.scores(model).mean())
        if original is not None:
            results["float_accuracy"] = float(accuracy.scores(source.model).mean())
            results["recovery"] = results["accuracy"] / max(results["float_accuracy"], 1e-12)
        for name in metrics:
            results |= evaluate.load(name).compute(predictions=accuracy.predictions(model), references=labels) or {}
    elif metrics:
        raise ValueError(f"Metrics {', '.join(metrics)} need labels that the model can predict; {dataset} gives none.")
    if original is not None:
        ours, theirs = encode(model, batches), encode(source.model, batches)
        results["feature_cosine"] = float(F.cosine_similarity(ours, theirs).mean())
    if exported:
        results["quantization"], results["format"] = model.info["quantization"], model.format
    else:
        results["norms"] = measure_token_norms(model, batches).to_dict()
        config = getattr(model.config, "quantization_config", None)
        results["quantization"] = config.label if config else None
    if fused:
        results["fused"] = {}
        for attention in ("float32", "simulated" if native.unavailable_reason() else "int8"):
            again: dict[str, Any] = {"how": str(fuse(model, attention=attention))}
            if labels is not None:
                again["accuracy"] = float(accuracy.scores(model).mean())
            if original is not None:
                again["feature_cosine"] = float(F.cosine_similarity(encode(model, batches), theirs).mean())
            results["fused"][f"{attention} attention"] = again
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    shown = {k: v for k, v in results.items() if k not in ("norms", "environment", "fused")}
    shown |= {f"fused, {k}": ", ".join(f"{n} {x}" for n, x in v.items()) for k, v in results.get("fused", {}).items()}
    return results, "\n".join(f"{k}: {v}" for k, v in shown.items()) + f"\nwritten: {path}"
