"""The fit: from reference images to a sensitive block, a register, its place, tau and k~ (RegCache A.4 to A.8)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import ActivationsConfig, DeletionConfig, RegCacheConfig, RegistersConfig, WeightsConfig
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs, class_names, split_reference
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower, has_classifier
from optimum_regcache.evaluation.objective import Objective, make_objective, zero_shot_features
from optimum_regcache.methods import configured, quantize_with
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.search import RegisterSearch, SearchRecord, SearchResult, Setup
from optimum_regcache.search.sensitivity import SensitivityReport, scan_sensitivity
from optimum_regcache.search.trials import TrialRunner

Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class FitResult:
    """What `RegCacheQuantizer.fit` found.

    Attributes:
        config: resolved config; registers are ``fixed`` or ``none``.
        cache: the registers, None if nothing is installed.
        sensitivity: the scan, None if the block was given.
        sensitive_block: l_q.
        mined: start block -> mined tokens.
        search: the search.
        variants: registers and deletion of the best ``prefix only`` and ``delete only`` setups, for the report.
        calibration: the images set aside for the activation scales.
        requested, settings, data: the arguments of the fit.
        seconds: duration of each stage.
    """

    config: RegCacheConfig
    cache: RegisterCache | None
    sensitivity: SensitivityReport | None
    sensitive_block: int
    mined: dict[int, MinedTokens]
    search: SearchResult
    variants: dict[str, tuple[RegisterCache | None, DeletionConfig]]
    calibration: ImageInputs
    requested: RegCacheConfig
    settings: SearchConfig
    data: DataConfig
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible record of the fit."""
        mined = {}
        for block, tokens in self.mined.items():
            outlier, normal = tokens.outlier_cosine(), tokens.normal_cosine()
            mined[str(block)] = {
                "tokens": len(tokens.norms),
                "max_norm": float(tokens.norms[0]),
                "outlier_cosine": outlier and {"mean": outlier[0], "std": outlier[1]},
                "normal_cosine": normal and {"mean": normal[0], "std": normal[1]},
            }
        return {
            "sensitive_block": self.sensitive_block,
            "sensitivity": self.sensitivity and self.sensitivity.to_dict(),
            "mined": mined,
            "search": self.search.to_dict(),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class ReferenceParts:
    """Reference images divided into three parts that share none.

    Attributes:
        calibration: for the activation scales.
        selection: configurations are ranked on these.
        confirmation: the best have to beat "install nothing" on these.
    """

    calibration: ImageInputs
    selection: ImageInputs
    confirmation: ImageInputs


def split_inputs(inputs: ImageInputs, data: DataConfig, seed: int) -> ReferenceParts:
    """Seeded division of at most ``data.num_samples`` inputs."""
    inputs = inputs.subset(range(min(len(inputs), data.num_samples)))
    split = split_reference(len(inputs), data.calibration_fraction, data.confirm_fraction, seed)
    return ReferenceParts(*(inputs.subset(positions) for positions in split))


def fit_registers(
    model: nn.Module,
    processor: Any,
    dataset: Any,
    config: RegCacheConfig,
    search: SearchConfig,
    data: DataConfig,
    *,
    data_collator: Collator | None,
    template: str,
    work_dir: str | Path | None,
    progress: bool,
) -> FitResult:
    """Run sensitivity, mining and search; the arguments are those of `RegCacheQuantizer.fit`."""
    config = configured(config)
    parts = split_inputs(ImageInputs(dataset, processor, data_collator), data, search.seed)
    calibration, selection, confirmation = (
        list(p.batches(data.batch_size)) for p in (parts.calibration, parts.selection, parts.confirmation)
    )
    by_label = search.objective == "accuracy"
    text = _text_features(model, processor, dataset, template) if by_label else None
    bench = TrialRunner(model, search_config(config), calibration)
    depth, seconds = len(find_tower(bench.float_model).blocks), {}

    def objective(part: ImageInputs, batches: list[Batch]) -> Objective:
        labels = part.labels() if by_label else None
        if labels is not None:
            labels = labels[: sum(len(b["pixel_values"]) for b in batches)]
        return make_objective(search.objective, bench.float_model, batches, labels, text)

    selecting, confirming = objective(parts.selection, selection), objective(parts.confirmation, confirmation)
    begun = time.perf_counter()
    scan = None
    if search.sensitive_block is None:
        scanned = objective(parts.selection, selection[: -(-search.sensitivity_images // data.batch_size)])
        scan = scan_sensitivity(
            bench.float_model, bench.config, calibration, scanned, search.sensitivity, progress=progress
        )
    sensitive = scan.sensitive_block if scan else int(search.sensitive_block or 0)
    require(sensitive < depth, f"search.sensitive_block={sensitive}, but the encoder has blocks 0 to {depth - 1}.")
    seconds["sensitivity"] = time.perf_counter() - begun
    begun = time.perf_counter()
    first = sensitive if search.strategy == "v2" else max(0, sensitive - search.blocks_before)
    mined = mine_tokens(
        bench.float_model,
        calibration + selection,
        list(range(first, sensitive + 1)),
        top=search.top_tokens if search.strategy == "v4" else search.num_candidates,
        score_site=search.score_site,
        seed=search.seed,
        progress=progress,
    )
    seconds["mining"] = time.perf_counter() - begun
    begun = time.perf_counter()
    engine = RegisterSearch(
        bench,
        search,
        mined,
        sensitive,
        selecting,
        confirming,
        max_delete=min(search.max_delete, smallest_patch_count(bench, calibration[0]) // 4),
        record=_open_record(model, work_dir, config, search, data, parts, sensitive, text),
        num_blocks=depth,
        ceiling=float(selecting.scores(bench.float_model).mean()),
        final=_final_scorer(model, config, search, calibration) if config.methods else None,
        progress=progress,
    )
    result = engine.run()
    seconds["search"] = time.perf_counter() - begun
    cache, deletion = engine.cache(result.chosen), engine.deletion(result.chosen)
    best = {"prefix only": result.best_prefix, "delete only": result.best_delete}
    variants = {k: (engine.cache(t.setup), engine.deletion(t.setup)) for k, t in best.items() if t is not None}
    resolved = resolve_config(config, result.chosen, cache, deletion, search.kv_mode)
    return FitResult(
        resolved, cache, scan, sensitive, mined, result, variants, parts.calibration, config, search, data, seconds
    )


def search_config(config: RegCacheConfig) -> RegCacheConfig:
    """What the search quantizes with: round to nearest at the bits and granularity of ``config``, without its methods."""
    a = config.activations
    return RegCacheConfig(
        weights=WeightsConfig(config.weights.bits, config.weights.granularity),
        activations=ActivationsConfig(
            bits=a.bits,
            mode=a.mode,
            granularity=a.granularity,
            symmetric=a.symmetric,
            observer="minmax" if config.methods else a.observer,
            percentile=a.percentile,
            momentum=a.momentum,
        ),
        registers=config.registers,
        deletion=config.deletion,
        modules=replace(config.modules, mixed_precision=()),
    )


def _final_scorer(
    model: Any, config: RegCacheConfig, search: SearchConfig, calibration: list[Batch]
) -> Callable[[Setup, RegisterCache | None, DeletionConfig, Objective], torch.Tensor]:
    """Scores a setup with the complete final quantizer instead of round to nearest."""

    def score(
        setup: Setup, cache: RegisterCache | None, deletion: DeletionConfig, objective: Objective
    ) -> torch.Tensor:
        resolved = resolve_config(config, setup, cache, deletion, search.kv_mode)
        return objective.scores(quantize_with(model, resolved, cache, calibration, progress=False).model)

    return score


def _text_features(model: Any, processor: Any, dataset: Any, template: str) -> torch.Tensor | None:
    from datasets import Dataset

    if has_classifier(model):
        return None
    names = class_names(dataset) if isinstance(dataset, Dataset) else None
    if names is None:
        raise ValueError(
            "objective='accuracy' needs class names: a datasets.Dataset whose label column is a ClassLabel. Use "
            "objective='cosine' otherwise."
        )
    return zero_shot_features(model, processor, names, template)


def _open_record(
    model: nn.Module,
    work_dir: str | Path | None,
    config: RegCacheConfig,
    search: SearchConfig,
    data: DataConfig,
    parts: ReferenceParts,
    sensitive: int,
    text_features: torch.Tensor | None,
) -> SearchRecord:
    """The record of finished trials in ``work_dir``, bound to everything that can change a score."""
    if work_dir is None:
        return SearchRecord(None, "")
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    plain = Recipe(search=search, data=replace(data, num_report=1)).to_dict()  # the report changes no score
    versions = [version(p) for p in ("optimum-regcache", "torch", "transformers")]
    device = str(next(model.parameters()).device)
    settings = [config.to_dict(), plain["search"], plain["data"], sensitive, versions, device]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in (parts.calibration, parts.selection, parts.confirmation):
        digest.update(part.fingerprint().encode())
    tensors = dict(model.state_dict())
    labels = parts.selection.labels() if search.objective == "accuracy" else None
    extra = {"text features": text_features, "labels": labels}
    tensors |= {name: value for name, value in extra.items() if value is not None}
    for name, tensor in tensors.items():
        digest.update(f"{name} {float(tensor.double().sum())!r} {float(tensor.double().abs().sum())!r}".encode())
    return SearchRecord(Path(work_dir) / "search.json", digest.hexdigest()[:32])


def smallest_patch_count(bench: TrialRunner, batch: Batch) -> int:
    """Patches of the smallest image of a batch (padding left out)."""
    mask = batch.get("pixel_attention_mask")
    if mask is not None:
        return int(mask.sum(1).min())
    tower = find_tower(bench.float_model)
    seen: list[int] = []
    handle = tower.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    try:
        with torch.inference_mode():
            tower.module(pixel_values=batch["pixel_values"][:1].to(next(tower.module.parameters())))
    finally:
        handle.remove()
    return seen[0] - tower.num_prefix_tokens


def resolve_config(
    config: RegCacheConfig,
    chosen: Setup,
    cache: RegisterCache | None,
    deletion: DeletionConfig,
    kv_mode: str,
) -> RegCacheConfig:
    """``config`` with the searched positions filled in."""
    if cache is None:
        registers = RegistersConfig(mode="none")
    else:
        registers = RegistersConfig(
            mode="fixed",
            blocks=cache.blocks,
            num_registers=cache.num_registers,
            num_copies=chosen.num_copies,
            kv_mode=kv_mode,
        )
    return config.replace(registers=registers, deletion=deletion)
