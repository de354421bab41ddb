"""From a float model, images and a recipe to a quantized model: the one way, for Python and the command line.

divide the images -> search registers and deletion, or mine the given ones, or neither -> quantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.effects import require_search_unused
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.config.validation import require
from optimum_regcache.data.reading import read_batches
from optimum_regcache.encoders.passes import Batch, JoinedBatches
from optimum_regcache.encoders.store import TensorSpace
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.door import require_float
from optimum_regcache.methods import Quantized, quantize_with, resolve
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.fit import FitResult, fit_registers
from optimum_regcache.search.mining import isolated_cache, mine_tokens
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages, ReferenceParts, space_of
from optimum_regcache.search.processes import is_main
from optimum_regcache.search.progress import current
from optimum_regcache.search.refine import MAKERS


@dataclass(frozen=True)
class QuantizationRun:
    """What came out of a plan.

    Attributes:
        recipe: the recipe with the config of the result, and without notes: nothing was measured with it yet.
        quantized: the model, its config and what the methods found.
        cache: the registers that were installed, None if none were.
        fit: the search, None if nothing was searched.
        calibration: the batches that the activation scales come from; empty if no images were given.
        space: where batches are kept.
    """

    recipe: Recipe
    quantized: Quantized
    cache: RegisterCache | None
    fit: FitResult | None
    calibration: Sequence[Batch]
    space: TensorSpace


def run_plan(
    model: PreTrainedModel,
    images: ReferenceImages | None,
    plan: QuantizationPlan,
    *,
    known: FitResult | None = None,
    work_dir: str | Path | None = None,
    keep_best: bool = False,
    progress: bool = True,
) -> QuantizationRun:
    """Quantize a copy of ``model`` as ``plan`` says.

    The images are divided by the recipe's ``data`` and ``search.seed`` whatever ``registers.mode`` is. Scales are calibrated on
    the calibration part, methods that train learn from it and the selection part, so the same recipe on the same images gives
    the same bits.

    Args:
        model: float model, unchanged.
        images: reference images; may be None if ``known`` holds some, or if nothing looks at any.
        plan: what to make and how.
        known: an earlier fit of this model. It answers a search of the same config and settings, and gives its registers to a
            config that describes them.
        work_dir: directory for the record of finished trials.
        keep_best: see `fit_registers`.
        progress: show progress bars.

    Raises:
        ValueError: images that are needed and missing, or settings that do not fit.
    """
    if torch.is_inference_mode_enabled():  # tensors made there could never be used with autograd
        with torch.inference_mode(False), torch.no_grad():
            return run_plan(model, images, plan, known=known, work_dir=work_dir, keep_best=keep_best, progress=progress)
    require_float(model)
    recipe, resolved = plan.recipe, plan.resolved
    progress = progress and is_main()
    folder = None if work_dir is None or not is_main() else Path(work_dir)
    parts = known.parts if known is not None else None
    if images is not None:
        parts = images.split(recipe.data, recipe.search.seed, folder)
    fit, mode = None, resolved.config.registers.mode
    if mode == "search":
        fit = known if known is not None and answers(known, recipe) else None
        if fit is None:
            if images is None:
                raise ValueError(
                    "registers.mode='search' needs images: pass calibration_dataset, call fit() first, or set "
                    "registers.mode='none' for plain quantization."
                )
            fit = fit_registers(model, images, plan, work_dir=work_dir, keep_best=keep_best, progress=progress)
        resolved, cache = fit.resolved, fit.cache
        parts = fit.parts if fit is not known else parts  # what the fit has read is there already
    elif mode == "fixed":
        cache = _fixed_registers(model, resolved.config, parts, recipe, known)
    else:
        cache = None
    if resolved.needs_images and parts is None:
        raise ValueError(
            f"{resolved.image_users} need calibration images: pass calibration_dataset, or use the preset 'w8a8-dynamic'."
        )
    calibration = parts.batches("calibration") if parts is not None else list[Batch]()
    training: Sequence[Batch] = ()
    if parts is not None and any(method.trains for method in resolved.methods):
        training = JoinedBatches(calibration, parts.batches("selection"))
    with current().stage("quantize"):
        quantized = quantize_with(model, resolved, cache, calibration, progress, folder, training)
    recipe = replace(recipe, quantization=quantized.config, notes="")
    space = parts.space if parts is not None else space_of(recipe.data, folder)
    return QuantizationRun(recipe, quantized, cache, fit, calibration, space)


def plan_call(
    fit: FitResult | None,
    config: RegCacheConfig | None,
    search: SearchConfig | None,
    images: ReferenceImages | None,
    batch_size: int | None,
) -> QuantizationPlan:
    """The plan of a call without a recipe: what is left open comes from ``fit``, if it is one of this config."""
    resolved = resolve(config or (fit.config if fit else RegCacheConfig()))
    if fit is not None and (resolved.config not in (fit.requested, fit.config) or search not in (None, fit.settings)):
        fit = None
    if search is not None and resolved.config.registers.mode != "search":
        require_search_unused(search, resolved.config)
    if fit is not None:
        settings, data = fit.settings, fit.data
    else:
        count = len(images.inputs) if images is not None else 0
        settings, data = search or SearchConfig(), DataConfig(num_samples=max(count, 4))
    data = data if batch_size is None else replace(data, batch_size=batch_size)
    return QuantizationPlan(Recipe(resolved.config, settings, data), resolved)


def repeatable(recipe: Recipe, fit: FitResult | None) -> Recipe:
    """``recipe`` of a result as it is saved: used again on the same images it gives the same model, or says why it cannot.

    Blocks and tau tell how to mine registers, not how they were refined. So where refined registers were installed, the
    recipe searches again; where none were, it holds no refinement. Where the fit's refined registers went into something else
    than the fit was for, it stays as it is, and `run_plan` refuses to mine for it.

    Args:
        recipe: with the config of the result.
        fit: the search behind it, if there was one.
    """
    if fit is None or not fit.settings.refinements or recipe.quantization.registers != fit.config.registers:
        return recipe
    if fit.search.chosen.refinement not in MAKERS:
        return replace(recipe, search=replace(recipe.search, refinements=()))
    again = recipe.with_quantization(fit.requested)
    return again if recipe.quantization == fit.config and answers(fit, again) else replace(recipe, search=fit.settings)


def answers(fit: FitResult, recipe: Recipe) -> bool:
    """Whether ``fit`` is the search that the resolved ``recipe`` asks for. How many images a pass takes does not matter."""
    data = replace(
        recipe.data,
        batch_size=fit.data.batch_size,
        num_report=fit.data.num_report,
        memory_budget=fit.data.memory_budget,
        workers=fit.data.workers,
    )
    return (fit.requested, fit.settings, fit.data) == (recipe.quantization, recipe.search, data)


def _fixed_registers(
    model: PreTrainedModel,
    config: RegCacheConfig,
    parts: ReferenceParts | None,
    recipe: Recipe,
    known: FitResult | None,
) -> RegisterCache:
    """The registers of ``known`` if they are those of ``config``, else mined from all images for the given blocks."""
    r = config.registers
    if known is not None and known.cache is not None and known.config.registers == r:
        return known.cache
    refinements = list(recipe.search.refinements)
    require(
        not refinements,
        f"search.refinements={refinements} may have made the registers of this recipe, and registers.mode='fixed' would mine "
        "others. Use registers.mode='search' to find the same ones again, or search.refinements=[] for mined ones.",
    )
    require(
        r.refinement is None,
        f"registers.refinement={r.refinement!r} made the registers of this config, and registers.mode='fixed' would mine "
        "others. Use the recipe beside the model, which searches for them again, or registers.refinement=null for mined ones.",
    )
    if parts is None:
        raise ValueError("registers.mode='fixed' mines its registers from images: pass calibration_dataset.")
    require(r.num_registers == 1, "Mining gives one register per block; registers.num_registers must be 1.")
    depth = len(find_tower(model).blocks)
    require(r.blocks[-1] < depth, f"registers.blocks={list(r.blocks)}, but the encoder has blocks 0 to {depth - 1}.")
    start = r.blocks[0]
    mined = mine_tokens(model, read_batches(parts.everything, recipe.data), [start], progress=False)[start]
    if r.kv_mode == "isolated":
        return isolated_cache(model, mined.states.mean(0), start, r.blocks).restricted(r.blocks, r.num_copies)
    return mined.average(r.blocks, depth).restricted(r.blocks, r.num_copies)
