"""The fit: from reference images to a sensitive block, a register, its place, tau and k~ (docs/method.md 2 to 9)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import ActivationsConfig, DeletionConfig, RegCacheConfig, RegistersConfig, WeightsConfig
from optimum_regcache.config.effects import require_search_effect
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs, split_reference
from optimum_regcache.encoders.passes import Batch, num_images
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE, Objective, check_template, make_objective
from optimum_regcache.evaluation.targets import Targets, accuracy_targets
from optimum_regcache.methods import ResolvedConfig, quantize_with, resolve
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.search import (
    Candidates,
    FinalScorer,
    Judges,
    RegisterSearch,
    SearchRecord,
    SearchResult,
    Setup,
)
from optimum_regcache.search.sensitivity import SensitivityReport, scan_sensitivity
from optimum_regcache.search.trials import TrialRunner

Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class ReferenceImages:
    """Images for calibration and search, as the caller has them.

    Attributes:
        dataset: a `datasets.Dataset`, or a sequence of ``{"pixel_values": ...}``.
        processor: of the model; for images and for zero-shot accuracy.
        collator: builds a batch from items.
        template: zero-shot prompt for ``objective="accuracy"``.
    """

    dataset: Any
    processor: Any = None
    collator: Collator | None = None
    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        check_template(self.template)

    @cached_property
    def inputs(self) -> ImageInputs:
        """Model inputs, one image each."""
        return ImageInputs(self.dataset, self.processor, self.collator)

    def split(self, data: DataConfig, seed: int) -> ReferenceParts:
        """Their division by `split_inputs`."""
        return split_inputs(self.inputs, data, seed)


@dataclass(frozen=True)
class ReferenceParts:
    """Reference images divided into three parts that share none.

    Attributes:
        calibration: for the activation scales.
        selection: configurations are ranked on these.
        confirmation: the best have to beat "install nothing" on these.
        everything: the three together, in the order of the data set.
    """

    calibration: ImageInputs
    selection: ImageInputs
    confirmation: ImageInputs
    everything: ImageInputs


def split_inputs(inputs: ImageInputs, data: DataConfig, seed: int) -> ReferenceParts:
    """Seeded division of at most ``data.num_samples`` inputs, of which ``data.skip_broken`` may leave some out."""
    inputs = inputs.subset(range(min(len(inputs), data.num_samples)))
    inputs = inputs.readable() if data.skip_broken else inputs
    split = split_reference(len(inputs), data.calibration_fraction, data.confirm_fraction, seed)
    return ReferenceParts(*(inputs.subset(positions) for positions in split), everything=inputs)


@dataclass(frozen=True)
class QuantizationPlan:
    """A recipe whose config is resolved; :meth:`of` makes one, once, at the entrance.

    Attributes:
        recipe: the recipe, its quantization being that of ``resolved``.
        resolved: the config with its methods.
    """

    recipe: Recipe
    resolved: ResolvedConfig

    @classmethod
    def of(cls, recipe: Recipe) -> QuantizationPlan:
        """The plan for ``recipe``.

        Raises:
            ValueError: settings that contradict each other or have no effect.
        """
        resolved = resolve(recipe.quantization)
        return cls(recipe.with_quantization(resolved.config), resolved)


@dataclass(frozen=True)
class FitResult:
    """What `RegCacheQuantizer.fit` found.

    Attributes:
        resolved: config with the positions that were found; registers are ``fixed`` or ``none``.
        cache: the registers, None if nothing is installed.
        sensitivity: the scan, None if the block was given.
        sensitive_block: l_q.
        mined: start block -> mined tokens.
        search: the search.
        variants: registers and deletion of the best ``prefix only`` and ``delete only`` setups, for the report.
        parts: the images.
        requested, settings, data: the arguments of the fit.
        seconds: duration of each stage.
    """

    resolved: ResolvedConfig
    cache: RegisterCache | None
    sensitivity: SensitivityReport | None
    sensitive_block: int
    mined: dict[int, MinedTokens]
    search: SearchResult
    variants: dict[str, tuple[RegisterCache | None, DeletionConfig]]
    parts: ReferenceParts
    requested: RegCacheConfig
    settings: SearchConfig
    data: DataConfig
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> RegCacheConfig:
        """The config with the positions that were found."""
        return self.resolved.config

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


def fit_registers(
    model: nn.Module,
    images: ReferenceImages,
    plan: QuantizationPlan,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> FitResult:
    """Run sensitivity, mining and search.

    Args:
        model: float model, unchanged.
        images: reference images.
        plan: what to search for and how.
        work_dir: directory for the record of finished trials; call again with the same one to resume.
        progress: show progress bars.

    Raises:
        ValueError: settings that do not fit the model or the data, or that the search would not read.
    """
    resolved, search, data, seconds = plan.resolved, plan.recipe.search, plan.recipe.data, {}
    require_search_effect(search, resolved.config)
    parts = images.split(data, search.seed)
    calibration, selection = (list(p.batches(data.batch_size)) for p in (parts.calibration, parts.selection))
    runner = TrialRunner(model, search_config(resolved.config), calibration)
    targets = _targets(model, images, parts) if search.objective == "accuracy" else None
    scoring = _Scoring(runner, search.objective, targets)
    judges = scoring.judges(parts, selection, data.batch_size)
    begun = time.perf_counter()
    depth, scan = len(find_tower(runner.float_model).blocks), None
    if search.sensitive_block is None:
        scanned = selection[: -(-search.sensitivity_images // data.batch_size)]
        scan = scoring.scan(parts.selection, scanned, search.sensitivity, progress)
    sensitive = scan.sensitive_block if scan else int(search.sensitive_block or 0)
    require(sensitive < depth, f"search.sensitive_block={sensitive}, but the encoder has blocks 0 to {depth - 1}.")
    seconds["sensitivity"] = time.perf_counter() - begun
    begun = time.perf_counter()
    averaged = search.strategy == "averaged_tokens"
    first = max(0, sensitive - search.blocks_before) if averaged else sensitive
    mined = mine_tokens(
        runner.float_model,
        calibration + selection,
        list(range(first, sensitive + 1)),
        top=search.top_tokens if averaged else search.num_candidates,
        score_site=search.score_site,
        seed=search.seed,
        progress=progress,
    )
    seconds["mining"] = time.perf_counter() - begun
    begun = time.perf_counter()
    if resolved.methods:
        judges = replace(judges, final=_final_scorer(model, resolved, calibration))
    most = min(search.max_delete, smallest_patch_count(runner, calibration[0]) // 4)
    engine = RegisterSearch(
        runner,
        search,
        Candidates(mined, sensitive, most, depth),
        judges,
        _open_record(work_dir, model, plan.recipe, parts, sensitive, targets),
        progress=progress,
    )
    result = engine.run()
    seconds["search"] = time.perf_counter() - begun
    cache, deletion = engine.cache(result.chosen), engine.deletion(result.chosen)
    best = {"prefix only": result.best_prefix, "delete only": result.best_delete}
    variants = {k: (engine.cache(t.setup), engine.deletion(t.setup)) for k, t in best.items() if t is not None}
    return FitResult(
        install_setup(resolved, cache, deletion), cache, scan, sensitive, mined, result, variants, parts,
        resolved.config, search, data, seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class _Scoring:
    """Makes objectives of the kind that the search maximises.

    Attributes:
        runner: holds the float model that they compare with.
        kind: `SearchConfig.objective`.
        targets: how labels become classes of the model; None where nothing looks at labels.
    """

    runner: TrialRunner
    kind: str
    targets: Targets | None

    def objective(self, part: ImageInputs, batches: list[Batch]) -> Objective:
        """On the first ``batches`` of ``part``."""
        labels = None if self.targets is None else self.targets.labels(part)
        if labels is not None:
            labels = labels[: sum(num_images(b) for b in batches)]
        text = None if self.targets is None else self.targets.text_features
        return make_objective(self.kind, self.runner.float_model, batches, labels, text)

    def judges(self, parts: ReferenceParts, selection: list[Batch], size: int) -> Judges:
        """For the batches of the selection part, and the confirmation part in batches of ``size``."""
        selecting = self.objective(parts.selection, selection)
        confirming = self.objective(parts.confirmation, list(parts.confirmation.batches(size)))
        return Judges(selecting, confirming, float(selecting.scores(self.runner.float_model).mean()))

    def scan(self, part: ImageInputs, batches: list[Batch], granularity: str, progress: bool) -> SensitivityReport:
        """Sensitivity on ``batches``."""
        scanned, runner = self.objective(part, batches), self.runner
        return scan_sensitivity(
            runner.float_model, runner.config, runner.calibration, scanned, granularity, progress=progress
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


def _final_scorer(model: Any, resolved: ResolvedConfig, calibration: list[Batch]) -> FinalScorer:
    """Scores a setup with the complete final quantizer instead of round to nearest."""

    def score(
        setup: Setup, cache: RegisterCache | None, deletion: DeletionConfig, objective: Objective
    ) -> torch.Tensor:
        del setup
        installed = install_setup(resolved, cache, deletion)
        return objective.scores(quantize_with(model, installed, cache, calibration, progress=False).model)

    return score


def _targets(model: Any, images: ReferenceImages, parts: ReferenceParts) -> Targets:
    return accuracy_targets(model, images.processor, parts.everything, images.template, warn=False).needed()


def _open_record(
    work_dir: str | Path | None,
    model: nn.Module,
    recipe: Recipe,
    parts: ReferenceParts,
    sensitive: int,
    targets: Targets | None,
) -> SearchRecord:
    """The record of finished trials in ``work_dir``, bound to everything that can change a score."""
    if work_dir is None:
        return SearchRecord(None, "")
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    plain = replace(recipe, data=replace(recipe.data, num_report=1)).to_dict()  # the report changes no score
    versions = [version(p) for p in ("optimum-regcache", "torch", "transformers")]
    device = str(next(model.parameters()).device)
    settings = [plain["quantization"], plain["search"], plain["data"], sensitive, versions, device]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in (parts.calibration, parts.selection, parts.confirmation):
        digest.update(part.fingerprint().encode())
    tensors = dict(model.state_dict())
    extra = (
        {} if targets is None else {"text features": targets.text_features, "labels": targets.labels(parts.selection)}
    )
    tensors |= {name: value for name, value in extra.items() if value is not None}
    for name, tensor in tensors.items():
        digest.update(f"{name} {float(tensor.double().sum())!r} {float(tensor.double().abs().sum())!r}".encode())
    return SearchRecord(Path(work_dir) / "search.json", digest.hexdigest()[:32])


def smallest_patch_count(runner: TrialRunner, batch: Batch) -> int:
    """Patches of the smallest image of a batch (padding left out)."""
    mask = batch.get("pixel_attention_mask")
    if mask is not None:
        return int(mask.sum(1).min())
    tower = find_tower(runner.float_model)
    if tower.family.packed:  # nothing can be deleted
        return 0
    seen: list[int] = []
    handle = tower.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    try:
        with torch.inference_mode():
            tower.module(pixel_values=batch["pixel_values"][:1].to(next(tower.module.parameters())))
    finally:
        handle.remove()
    return seen[0] - tower.num_prefix_tokens


def install_setup(resolved: ResolvedConfig, cache: RegisterCache | None, deletion: DeletionConfig) -> ResolvedConfig:
    """``resolved`` with the positions of registers and deletion filled in."""
    if cache is None:
        return resolved.installing(RegistersConfig(mode="none"), deletion)
    registers = RegistersConfig(
        mode="fixed",
        blocks=cache.blocks,
        num_registers=cache.num_registers,
        num_copies=cache.num_copies,
        kv_mode=resolved.config.registers.kv_mode,
    )
    return resolved.installing(registers, deletion)
