"""The fit: from reference images to a sensitive block, a register, its place, tau and k~ (docs/method.md 2 to 9)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_regcache.calibration.calibrate import QParams
from optimum_regcache.config import ActivationsConfig, DeletionConfig, RegCacheConfig, RegistersConfig, WeightsConfig
from optimum_regcache.config.effects import require_patches, require_search_effect
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, ImageRange, count_images, encode
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.evaluation.targets import Targets, objective_targets
from optimum_regcache.layers.install import config_sites
from optimum_regcache.methods import ResolvedConfig, quantize_with
from optimum_regcache.methods.pipeline import require_quantized_fc2
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.estimate import expected_work
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.objectives import bank_of, objective_on
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages, ReferenceParts
from optimum_regcache.search.processes import from_main, gathered, is_main, on_main, together, world_size
from optimum_regcache.search.progress import current, duration, watching
from optimum_regcache.search.refine import MAKERS
from optimum_regcache.search.scores import TrialScores
from optimum_regcache.search.search import Candidates, FinalScorer, Judges, RegisterSearch, SearchResult
from optimum_regcache.search.sensitivity import SensitivityReport, scan_sensitivity
from optimum_regcache.search.setups import Setup
from optimum_regcache.search.trials import TrialRunner

PROBED = 8  # images that are timed before a fit


@dataclass(frozen=True)
class FitResult:
    """What `RegCacheQuantizer.fit` found.

    Attributes:
        resolved: config with the positions that were found; registers are ``fixed`` or ``none``.
        cache: the registers, None if nothing is installed.
        sensitivity: the scan, None if the block was given.
        sensitive_block: l_q; None if nothing had to be repaired, so that nobody looked for it.
        mined: start block -> mined tokens.
        search: the search.
        variants: registers and deletion of the best ``prefix only``, ``delete only`` and ``both`` setups, for the report.
        parts: the images.
        requested, settings, data: the arguments of the fit.
        seconds: duration of each stage.
        scales: of the configurations that were calibrated on all calibration images (`TrialRunner`).
    """

    resolved: ResolvedConfig
    cache: RegisterCache | None
    sensitivity: SensitivityReport | None
    sensitive_block: int | None
    mined: dict[int, MinedTokens]
    search: SearchResult
    variants: dict[str, tuple[RegisterCache | None, DeletionConfig]]
    parts: ReferenceParts
    requested: RegCacheConfig
    settings: SearchConfig
    data: DataConfig
    seconds: dict[str, float] = field(default_factory=dict)
    scales: dict[str, QParams] = field(default_factory=dict, repr=False, compare=False)

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
    keep_best: bool = False,
    progress: bool = True,
) -> FitResult:
    """Run sensitivity, mining and search; processes that torchrun started share the work (`optimum_regcache.search.processes`).

    Args:
        model: float model, unchanged.
        images: reference images.
        plan: what to search for and how.
        work_dir: directory for the journal of finished steps; call again with the same one to resume.
        keep_best: an interruption (Ctrl-C) of the search ends it with the best so far, marked unfinished.
        progress: show progress bars.

    Raises:
        ValueError: settings that do not fit the model or the data, or that the search would not read, or processes that read
            other images.
    """
    resolved, search = plan.resolved, plan.recipe.search
    require_search_effect(search, resolved.config)
    require_patches(search, resolved.config)
    progress, folder = progress and is_main(), Path(work_dir) if work_dir is not None and is_main() else None

    def read() -> tuple[ReferenceParts, Targets | None]:
        parts = images.split(plan.recipe.data, search.seed, folder)
        parts.space.pinned = next(model.parameters()).is_cuda
        found = objective_targets(search.objective, model, images.processor, parts.everything, images.template)
        for part in ("calibration", "selection", "confirmation"):
            parts.batches(part, progress=progress)
        return parts, found

    parts, targets = together(read)
    journal = _open_journal(folder, model, plan.recipe, parts, targets)
    try:
        with watching("fit", progress):
            fit = together(lambda: _Fit(model, parts, plan, journal, targets))
            fit.judges = replace(fit.judges, ceiling=from_main(fit.judges.ceiling))
            return fit.run(keep_best)
    finally:
        journal.close()


class _Fit:
    """The stages of one fit, in order."""

    def __init__(
        self,
        model: Any,
        parts: ReferenceParts,
        plan: QuantizationPlan,
        journal: Journal,
        targets: Targets | None,
    ) -> None:
        current().say("preparing float and quantized model")
        self.model, self.parts, self.plan, self.journal = model, parts, plan, journal
        self.search, self.resolved = plan.recipe.search, plan.resolved
        calibration, self.selection = parts.batches("calibration"), parts.batches("selection")
        self.runner = TrialRunner(model, search_config(self.resolved.config), calibration, space=parts.space)
        self.depth = len(find_tower(self.runner.float_model).blocks)
        self.seconds: dict[str, float] = {}
        self._expect()
        with self._stage("features"):
            self.judges = _judges(self.search.objective, self.runner.float_model, parts, targets or Targets(False))
        self.scores = TrialScores(self.runner, self.judges.selection, journal)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        with current().stage(name):
            yield
        self.seconds[name] = time.perf_counter() - begun

    def _expect(self) -> None:
        """Say how long it will take: by the number of block-forwards, and one batch that is timed."""
        batch, depth, job = self.runner.calibration[0], self.depth, current()
        job.expect(
            **expected_work(
                self.parts, self.search, depth, len(config_sites(self.runner.float_model, self.runner.config))
            )
        )
        encode(self.runner.float_model, ImageRange([batch], 1))  # the first pass sets kernels up
        part = ImageRange([batch], PROBED)
        begun = time.perf_counter()
        encode(self.runner.float_model, part)
        rate = (time.perf_counter() - begun) / (count_images(part) * depth)
        job.say(f"about {duration(job.total * rate)} at most, less if naive quantization loses nothing")

    def run(self, keep_best: bool) -> FitResult:
        """Cheap first: where round to nearest loses nothing, nothing is searched."""
        given = self.search.sensitive_block or 0
        require(
            given < self.depth, f"search.sensitive_block={given}, but the encoder has blocks 0 to {self.depth - 1}."
        )
        with self._stage("naive"):
            naive = self.scores(Setup(), lambda: None, DeletionConfig())
        loss = self.judges.ceiling - naive.mean
        if loss < self.search.min_gain and not self.search.always:
            reason = f"nothing to repair: naive loses {loss:.4f}, less than search.min_gain={self.search.min_gain:g}"
            nothing = SearchResult(Setup(), None, None, None, naive.mean, 0.0, 0.0, reason, [naive])
            return self._result(None, self.search.sensitive_block, {}, nothing, None)
        with self._stage("sensitivity"):
            scan, sensitive = self._sensitive_block()
        with self._stage("mining"):
            mined = from_main(on_main(lambda: self._mine(sensitive))) or {}
        with self._stage("search"):
            engine = self._engine(mined, sensitive)
            result = engine.run(keep_best)
        return self._result(scan, sensitive, mined, result, engine)

    def _sensitive_block(self) -> tuple[SensitivityReport | None, int]:
        given = self.search.sensitive_block
        if given is not None:
            return None, given
        objective = self.judges.selection.first(self.search.sensitivity_images)
        scan = scan_sensitivity(
            self.runner.float_model, self.runner.config, self.runner.calibration, objective, self.search.sensitivity,
            progress=False, journal=self.journal, scales=self.runner.plain_scales() if self.runner.reuse else None,
        )  # fmt: skip
        return scan, scan.sensitive_block

    def _mine(self, sensitive: int) -> dict[int, MinedTokens]:
        search, averaged = self.search, self.search.strategy == "averaged_tokens"
        first = max(0, sensitive - search.blocks_before) if averaged else sensitive

        def mine() -> dict[str, torch.Tensor]:
            mined = mine_tokens(
                self.runner.float_model,
                chain(self.runner.calibration, self.selection),
                list(range(first, sensitive + 1)),
                top=search.top_tokens if averaged else search.num_candidates,
                score_site=search.score_site,
                seed=search.seed,
                progress=False,
            )
            return MinedTokens.pack(mined)

        return MinedTokens.unpack(self.journal.kept("mining", "mining", mine))

    def _engine(self, mined: dict[int, MinedTokens], sensitive: int) -> RegisterSearch:
        judges, calibration = self.judges, self.runner.calibration
        if "per_token" in self.search.refinements or self.resolved.config.deletion.action == "per_token":
            require_quantized_fc2(self.runner.float_model, self.runner.config, sensitive)
        if self.resolved.methods:
            judges = replace(judges, final=_final_scorer(self.model, self.resolved, calibration))
        most = min(self.search.max_delete, smallest_patch_count(self.runner, calibration[0]) // 4)
        candidates = Candidates(mined, sensitive, most, self.depth)
        return RegisterSearch(self.scores, self.search, candidates, judges)

    def _result(
        self,
        scan: SensitivityReport | None,
        sensitive: int | None,
        mined: dict[int, MinedTokens],
        result: SearchResult,
        engine: RegisterSearch | None,
    ) -> FitResult:
        def installed(setup: Setup) -> tuple[RegisterCache | None, DeletionConfig]:
            return (None, DeletionConfig()) if engine is None else (engine.cache(setup), engine.deletion(setup))

        cache, deletion = installed(result.chosen)
        leaders = {"prefix only": result.best_prefix, "delete only": result.best_delete, "both": result.best_both}
        variants = {kind: installed(trial.setup) for kind, trial in leaders.items() if trial is not None}
        resolved = install_setup(self.resolved, cache, deletion, result.chosen.refinement)
        return FitResult(
            resolved, cache, scan, sensitive, mined, result, variants, self.parts,
            self.resolved.config, self.search, self.plan.recipe.data, self.seconds, self.runner.scales,
        )  # fmt: skip


def _judges(kind: str, float_model: nn.Module, parts: ReferenceParts, targets: Targets) -> Judges:
    """Objectives of the kind that the search maximises, on the selection and on the confirmation part."""
    bank = bank_of(kind, float_model, parts, targets)
    selecting, confirming = (
        objective_on(name, kind, float_model, parts, targets, bank) for name in ("selection", "confirmation")
    )
    images = len(parts.selection) + len(parts.confirmation)
    current().advance(images * len(find_tower(float_model).blocks))
    return Judges(selecting, confirming, selecting.ceiling(float_model))


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


def _final_scorer(model: Any, resolved: ResolvedConfig, calibration: Sequence[Batch]) -> FinalScorer:
    """Scores a setup with the final quantizer instead of round to nearest; methods that train are left out."""
    untrained = resolved.untrained()

    def score(
        setup: Setup, cache: RegisterCache | None, deletion: DeletionConfig, objective: Objective
    ) -> torch.Tensor:
        installed = install_setup(untrained, cache, deletion, setup.refinement)
        return objective.scores(quantize_with(model, installed, cache, calibration, progress=False).model)

    return score


def _open_journal(
    folder: Path | None,
    model: nn.Module,
    recipe: Recipe,
    parts: ReferenceParts,
    targets: Targets | None,
) -> Journal:
    """The journal of finished steps in ``folder``, named after everything that can change a score."""
    if folder is None and world_size() == 1:
        return Journal(None, "")
    data = replace(recipe.data, num_report=1, memory_budget=None, workers=None)  # these change no score
    plain = replace(recipe, data=data).to_dict()
    versions = [version(p) for p in ("optimum-regcache", "torch", "transformers")]
    device = next(model.parameters()).device  # each process has a GPU of its own
    settings = [plain["quantization"], plain["search"], plain["data"], versions, device.type]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in (parts.calibration, parts.selection, parts.confirmation):
        digest.update(part.fingerprint().encode())
    tensors = dict(model.state_dict())
    labels = None if targets is None else targets.labels(parts.everything)
    if targets is not None and targets.text_features is not None:
        tensors["text features"] = targets.text_features
    if labels is not None:
        digest.update(repr(labels.tolist()).encode())
    require(
        len(set(gathered(digest.hexdigest()))) == 1,
        "The processes of this fit read other images, or have other settings or versions. Give all of them the same.",
    )
    if folder is None and not is_main():
        return Journal.shared(None, "")
    for name, tensor in tensors.items():
        digest.update(f"{name} {float(tensor.double().sum())!r} {float(tensor.double().abs().sum())!r}".encode())
    return Journal.shared(folder, digest.hexdigest()[:32])


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
    return tower.patches_at(0).count(seen[0])


def install_setup(
    resolved: ResolvedConfig, cache: RegisterCache | None, deletion: DeletionConfig, refinement: str | None = None
) -> ResolvedConfig:
    """``resolved`` with the positions of registers and deletion filled in, and what refined the registers."""
    if cache is None:
        return resolved.installing(RegistersConfig(mode="none"), deletion)
    registers = RegistersConfig(
        mode="fixed",
        blocks=cache.blocks,
        num_registers=cache.num_registers,
        num_copies=cache.num_copies,
        kv_mode=resolved.config.registers.kv_mode,
        refinement=refinement if refinement in MAKERS else None,  # the others leave registers as they were mined
    )
    return resolved.installing(registers, deletion)
