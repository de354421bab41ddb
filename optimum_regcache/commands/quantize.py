"""The job behind `optimum-cli regcache quantize`."""

from __future__ import annotations

import errno
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_regcache.commands.card import measured
from optimum_regcache.commands.compare import compare, pictures
from optimum_regcache.commands.recommend import ReportOptions, advise
from optimum_regcache.commands.report import environment, expected_work, render_table
from optimum_regcache.commands.sources import EMBEDDED_IMAGES, Hub, Source
from optimum_regcache.config.expect import compare_expected
from optimum_regcache.config.files import write_json
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import LOCAL, Recipe
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.card import known_licence, pipeline_tag, write_card
from optimum_regcache.hub.loading import load_model
from optimum_regcache.hub.saving import write_model
from optimum_regcache.hub.stored import content
from optimum_regcache.search.fit import fit_registers
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.processes import alone
from optimum_regcache.search.progress import watching
from optimum_regcache.search.run import repeatable, run_plan

PARTS = ("calibration", "selection", "confirmation")  # of the reference images


def quantize_job(
    source: Source,
    recipe: Recipe,
    output: Output | None,
    *,
    options: ReportOptions | None = None,
    hub: Hub | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], str]:
    """Search, quantize, save, open again, report; the folder changes at the end, all at once.

    Args:
        source: model and images.
        recipe: what to make.
        output: folder of the result; None in a process that only helps the main one with the search.
        options: of the report.
        hub: how the model was opened; for the card.
        progress: show progress bars.

    Returns:
        (results as written to ``results.json``, summary table as text, with the command of a better alternative); nothing of
        these from a process that only helps.

    Raises:
        ValueError: options that do not fit.
        OSError: too little space, or a file that is not what was written.
    """
    begun, options, origin = time.perf_counter(), options or ReportOptions(), recipe.model
    options.check(source.dataset_name)
    images = ReferenceImages(source.search_images, source.processor, template=source.template)
    plan = QuantizationPlan.of(recipe)
    if output is None:
        if plan.resolved.config.registers.mode == "search":
            fit_registers(source.model, images, plan, progress=False)
        return {}, ""
    with output, watching("quantize", progress) as job, ExitStack() as rest:
        output.require_space(least_bytes(source.model))
        job.expect(report=expected_work(len(source.report_images), len(find_tower(source.model).blocks)))
        run = run_plan(source.model, images, plan, work_dir=output.work, keep_best=True, progress=progress)
        rest.enter_context(alone())  # the other processes are done
        with job.stage("alternatives"):
            advice, fit = advise(source, images, run, options, progress), run.fit
        saved = (advice.swapped if advice is not None else None) or run
        config = saved.quantized.config
        given = None if source.dataset_name.endswith(EMBEDDED_IMAGES) else source.dataset_name
        recipe = replace(saved.recipe, model=source.name, dataset=given, revision=(hub or {}).get("revision"))
        recipe = repeatable(recipe, fit)
        with job.stage("save"):
            write_model(output.stage, saved.quantized.model, source.processor, recipe)
            opened: Any = load_model(output.stage, dtype=next(source.model.parameters()).dtype)
            require_same_tensors(saved.quantized.model, opened)
        with job.stage("report"):
            found, reporter = compare(source, plan, run, opened.to(source.model.device), options, progress, advice)
            if fit is not None:
                found.notes += pictures(source, fit, reporter, found.rows, output.stage, options.show_photos)
        original, naive, *_, last = found.rows
        checks = [] if recipe.expect is None else compare_expected(recipe.expect, original, naive, last)
        found.notes += [f"expected by the recipe: {check.describe()}" for check in checks]
        results: dict[str, Any] = {
            "model": source.name,
            "dataset": source.dataset_name,
            "note": source.note,
            "quantization": config.label,
            "protocol": config.protocol,
            "methods": [dict(entry) for entry in config.methods],
            "simulated": config.simulated_reason,
            "measured": saved.quantized.measured,
            "stage_seconds": saved.quantized.seconds,
            "search_images": fit and {name: len(getattr(fit.parts, name)) for name in PARTS},
            "report_images": len(source.report_images),
            "dropped_images": source.dropped,
            "rows": [row.to_dict() for row in found.rows],
            "norms": {name: reporter.norms[name].to_dict() for name in ("float", found.rows[-1].name)},
            "below_naive": [row.name for row in found.rows if row.below_naive],
            "seeds": found.seeds,
            "expected": [check.to_dict() for check in checks],
            "labelled": found.labelled,
            "fit": fit.to_dict() if fit else None,
            "recommendation": advice.to_dict(found.other) if advice else None,
            "recipe": recipe.to_dict(),
            "environment": environment(),
            "seconds": round(time.perf_counter() - begun, 1),
        }
        output.keep_journal = fit is not None and fit.search.unfinished
        write_json(output.stage / "results.json", results)
        write_card(
            output.stage, output.path, config, source.name, pipeline_tag(source.model),
            licence=known_licence(source.name, origin, recipe.revision), measured=measured(source, found.rows),
            notes=[*found.notes, *_origin(source, hub or {})],
        )  # fmt: skip
    label, shown = run.quantized.config.label.upper(), len(source.report_images)
    title = f"{source.title} {label} on {shown} unseen images of {source.images_title}"
    table = render_table(found.rows, title, found.notes)
    better = advice.found.better if advice is not None and advice.swapped is None else None
    if better is not None and options.command is not None:
        table += f"{better.name}: {options.command(better)}\n"
    return results, table


def least_bytes(model: nn.Module) -> int:
    """Bytes that the quantized model takes at least: half a byte for a weight of a block's linear layer."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    tower = find_tower(model)
    for block in range(len(tower.blocks)):
        weights: list[Any] = [layer.weight for layer in tower.block_linears(block).values()]
        total -= sum(w.numel() * w.element_size() - w.numel() // 2 for w in weights)
    return total


def require_same_tensors(saved: nn.Module, opened: nn.Module) -> None:
    """Compare what was opened with what was saved, bit by bit.

    Raises:
        OSError: a tensor differs.
    """
    theirs = opened.state_dict()
    for name, tensor in saved.state_dict().items():
        other = theirs.get(name)
        same = other is None or (
            tensor.shape == other.shape and torch.equal(content(tensor), content(other.to(tensor.dtype)))
        )
        if not same:
            raise OSError(
                errno.EIO, f"{name} is another one when the saved model is opened again; nothing was replaced"
            )


def _origin(source: Source, hub: Hub) -> list[str]:
    """How the float original was opened, for the card."""
    lines = []
    if hub.get("revision"):
        lines.append(f"float original at revision `{hub['revision']}`")
    if hub.get("trust_remote_code"):
        lines.append("opened with `trust_remote_code`: code of the original's repository ran")
    if source.name.startswith(LOCAL):
        lines.append("the float original was a local folder; `evaluate` compares with it through `--float-model`")
    return lines
