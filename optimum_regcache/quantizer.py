"""`RegCacheQuantizer`: the Optimum quantizer. fit = sensitivity, mining, search; quantize = build, calibrate, save."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_regcache.architectures import find_tower
from optimum_regcache.calibration import calibrate
from optimum_regcache.config import DeletionConfig, RegCacheConfig, RegistersConfig, require
from optimum_regcache.data import Batch, ImageInputs, class_names, load_images, split_reference
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE, has_classifier, make_objective, zero_shot_features
from optimum_regcache.hf_integration import attach_quantizer
from optimum_regcache.loading import load_model, load_processor
from optimum_regcache.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.registers import RegisterCache, get_register_cache
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.search import RegisterSearch, SearchRecord, SearchResult, Setup
from optimum_regcache.search.sensitivity import SensitivityReport, scan_sensitivity
from optimum_regcache.search.workbench import Workbench

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class FitResult:
    """What `RegCacheQuantizer.fit` found.

    Attributes:
        config: resolved config; registers are ``fixed`` or ``off``.
        cache: the registers, None if nothing is installed.
        sensitivity: the scan, None if the block was given.
        mined: start block -> mined tokens.
        search: the search.
        caches: (prefix only, delete only) parts of the best setups, for the report.
        seconds: duration of each stage.
    """

    config: RegCacheConfig
    cache: RegisterCache | None
    sensitivity: SensitivityReport | None
    sensitive_block: int
    mined: dict[int, MinedTokens]
    search: SearchResult
    variants: dict[str, tuple[RegisterCache | None, DeletionConfig]]
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


class RegCacheQuantizer(OptimumQuantizer):
    """Quantizes a vision encoder with registers and token deletion (RegCache, arXiv 2510.04547).

    Args:
        model: a supported encoder, or a model that contains one; it is never changed.
        processor: its processor, for data sets of images and for zero-shot accuracy.

    Raises:
        ValueError: ``model`` holds no supported encoder.

    Example:
        >>> quantizer = RegCacheQuantizer.from_pretrained("openai/clip-vit-base-patch16")  # doctest: +SKIP
        >>> images = quantizer.get_calibration_dataset("imagenet-1k", num_samples=256)  # doctest: +SKIP
        >>> model = quantizer.quantize("clip-regcache-w8a8", calibration_dataset=images)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        super().__init__()
        find_tower(model)
        self.model, self.processor = model.eval(), processor
        self.fit_result: FitResult | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        file_name: str | None = None,
        *,
        processor: Any = None,
        **kwargs: Any,
    ) -> RegCacheQuantizer:
        """From a model in memory, a directory, a Hub id or the name of a reference encoder.

        Args:
            model_or_path: the float model.
            file_name: not used; weights are found by transformers.
            processor: overrides the one saved beside the model.
            kwargs: for the model's `from_pretrained` (``dtype``, ``revision``, ``token``).

        Raises:
            ValueError: the model is already quantized, or holds no supported encoder.
        """
        del file_name
        if isinstance(model_or_path, PreTrainedModel):
            model = model_or_path
        else:
            model = load_model(model_or_path, **kwargs)
            processor = load_processor(model_or_path) if processor is None else processor
        require(
            not getattr(model, "is_quantized", False),
            f"{model_or_path if isinstance(model_or_path, (str, Path)) else type(model).__name__} is already quantized; "
            "start from the float model.",
        )
        return cls(model, processor)

    def get_calibration_dataset(
        self,
        dataset_name: str,
        num_samples: int = 100,
        dataset_config_name: str | None = None,
        dataset_split: str | None = None,
        preprocess_function: Callable[..., Any] | None = None,
        preprocess_batch: bool = True,
        seed: int = 2016,
        token: str | None = None,
    ) -> Dataset:
        """A seeded subset of a Hub data set, an image folder or parquet files (the arguments of Optimum's ORTQuantizer).

        Args:
            dataset_name: Hub id or path.
            num_samples: images to keep.
            dataset_config_name: Hub configuration.
            dataset_split: default ``train`` if there is one.
            preprocess_function: mapped over the data set; must produce ``pixel_values``. Without it the model's processor is
                applied when the images are used.
            preprocess_batch: map in batches.
            seed: of the subset.
            token: Hub token.
        """
        data = load_images(
            dataset_name,
            config_name=dataset_config_name,
            split=dataset_split,
            num_samples=num_samples,
            seed=seed,
            token=token,
        )
        return data if preprocess_function is None else data.map(preprocess_function, batched=preprocess_batch)

    def fit(
        self,
        dataset: Any,
        quantization_config: RegCacheConfig | None = None,
        search: SearchConfig | None = None,
        data: DataConfig | None = None,
        *,
        data_collator: Collator | None = None,
        template: str = DEFAULT_TEMPLATE,
        work_dir: str | Path | None = None,
        progress: bool = True,
    ) -> FitResult:
        """Find the sensitive block, the register, its place, tau and k~ (A.4 to A.8).

        Args:
            dataset: reference images: a `datasets.Dataset`, or a sequence of ``{"pixel_values": ...}``. They are divided
                into calibration, selection and confirmation parts that share no image.
            quantization_config: bits and granularity to search for; default W8A8.
            search: search settings.
            data: amounts; ``num_samples`` limits how much of ``dataset`` is used.
            data_collator: builds a batch from items.
            template: zero-shot prompt for ``objective="accuracy"``.
            work_dir: directory for the record of finished trials; call again with the same one to resume.
            progress: show progress bars.

        Returns:
            The result, also kept for :meth:`quantize`.

        Raises:
            ValueError: settings that do not fit the model or the data.
        """
        config = quantization_config or RegCacheConfig.from_preset("w8a8")
        search, data = search or SearchConfig(), data or DataConfig()
        inputs = ImageInputs(dataset, self.processor, data_collator)
        inputs = inputs.subset(range(min(len(inputs), data.num_samples)))
        parts = self.split_inputs(inputs, data, search.seed)
        calibration, selection, confirmation = (list(p.batches(data.batch_size)) for p in parts)
        text = self._text_features(dataset, template) if search.objective == "accuracy" else None
        bench = Workbench(self.model, config, calibration)
        tower = find_tower(bench.float_model)
        depth, seconds = len(tower.blocks), {}

        def objective(part: int, batches: list[Batch]) -> Any:
            labels = parts[part].labels() if search.objective == "accuracy" else None
            count = sum(len(b["pixel_values"]) for b in batches)
            labels = None if labels is None else labels[:count]
            return make_objective(search.objective, bench.float_model, batches, labels, text)

        selecting, confirming = objective(1, selection), objective(2, confirmation)
        begun = time.perf_counter()
        scan = None
        if search.sensitive_block is None:
            scanned = objective(1, selection[: -(-search.sensitivity_images // data.batch_size)])
            scan = scan_sensitivity(
                bench.float_model, config, calibration, scanned, search.sensitivity, progress=progress
            )
        sensitive = scan.sensitive_block if scan else int(search.sensitive_block or 0)
        require(
            sensitive < depth, f"search.sensitive_block={sensitive}, but the encoder has blocks 0 to {depth - 1}."
        )
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
        record = self._record(work_dir, config, search, data, inputs, sensitive)
        max_delete = min(search.max_delete, smallest_patch_count(bench, calibration[0]) // 4)
        ceiling = float(selecting.scores(bench.float_model).mean())
        engine = RegisterSearch(
            bench, search, mined, sensitive, selecting, confirming, max_delete, record, depth, ceiling, progress
        )
        result = engine.run()
        seconds["search"] = time.perf_counter() - begun
        cache = engine.cache(result.chosen)
        kinds = {"prefix only": result.best_prefix, "delete only": result.best_delete, "both": result.best_both}
        variants = {
            kind: (engine.cache(trial.setup), engine.deletion(trial.setup))
            for kind, trial in kinds.items()
            if trial is not None
        }
        resolved = resolve_config(config, result.chosen, cache, engine.deletion(result.chosen), search.kv_mode)
        self.fit_result = FitResult(resolved, cache, scan, sensitive, mined, result, variants, seconds)
        return self.fit_result

    def quantize(
        self,
        save_dir: str | Path | None = None,
        file_prefix: str | None = None,
        quantization_config: RegCacheConfig | None = None,
        calibration_dataset: Any = None,
        batch_size: int = 8,
        data_collator: Collator | None = None,
        *,
        search: SearchConfig | None = None,
        progress: bool = True,
    ) -> PreTrainedModel:
        """Quantize a copy of the model.

        Registers are taken from an earlier :meth:`fit` with the same bits. Without one, ``registers.mode="search"`` (the
        presets) runs the search on ``calibration_dataset``; ``"fixed"`` mines the registers for the given blocks;
        ``"off"`` is plain quantization.

        Args:
            save_dir: where model, processor, recipe and results are written; nothing is saved if None.
            file_prefix: stored as the checkpoint's ``variant`` (``model.PREFIX.safetensors``).
            quantization_config: default: that of the fit, else W8A8.
            calibration_dataset: `datasets.Dataset` of images or sequence of ``{"pixel_values": ...}``; needed unless
                activations are dynamic and no registers are searched.
            batch_size: images per forward pass.
            data_collator: builds a batch from items.
            search: search settings when a search is run.
            progress: show progress bars.

        Returns:
            The quantized model, ready for `save_pretrained` and `push_to_hub`.

        Raises:
            ValueError: data that is needed and missing, or settings that do not fit.
        """
        data = DataConfig(batch_size=batch_size)
        config = quantization_config or (self.fit_result.config if self.fit_result else RegCacheConfig())
        if config.registers.mode == "search" and not self._fitted_for(config):
            if calibration_dataset is None:
                raise ValueError(
                    "registers.mode='search' needs images: pass calibration_dataset, call fit() first, or set "
                    "registers.mode='off' for plain quantization."
                )
            count = len(ImageInputs(calibration_dataset, self.processor, data_collator))
            data = replace(data, num_samples=max(count, 4))
            self.fit(calibration_dataset, config, search, data, data_collator=data_collator, progress=progress)
        cache = None
        if config.registers.mode == "search" and self.fit_result is not None:
            config, cache = self.fit_result.config, self.fit_result.cache
        elif config.registers.mode == "fixed":
            cache = self._fixed_cache(config, calibration_dataset, data, data_collator)
        calibration: list[Batch] = []
        if config.activations.mode == "static":
            if calibration_dataset is None:
                raise ValueError(
                    "Static activations need calibration images: pass calibration_dataset, or use the preset 'w8a8-dynamic'."
                )
            inputs = ImageInputs(calibration_dataset, self.processor, data_collator)
            seed = (search or SearchConfig()).seed
            part = self.split_inputs(inputs, data, seed)[0] if self.fit_result is not None and cache else inputs
            part = part.subset(range(min(len(part), 128)))
            calibration = list(part.batches(data.batch_size))
        model = build_quantized(self.model, config, cache, calibration)
        if save_dir is not None:
            self.save(model, save_dir, file_prefix=file_prefix)
        return model

    def save(
        self,
        model: PreTrainedModel,
        save_dir: str | Path,
        *,
        file_prefix: str | None = None,
        recipe: Recipe | None = None,
        results: dict[str, Any] | None = None,
    ) -> None:
        """Write model, processor, resolved recipe and results into ``save_dir``."""
        path = Path(save_dir)
        model.save_pretrained(path, variant=file_prefix)
        if self.processor is not None:
            self.processor.save_pretrained(path)
        config: Any = model.config.quantization_config
        (recipe or Recipe()).with_quantization(config).save(path / "recipe.yaml")
        if results is None and self.fit_result is not None:
            results = {"fit": self.fit_result.to_dict()}
        if results is not None:
            write_json(path / "results.json", results)

    # internals

    @staticmethod
    def split_inputs(inputs: ImageInputs, data: DataConfig, seed: int) -> tuple[ImageInputs, ImageInputs, ImageInputs]:
        split = split_reference(len(inputs), data.calibration_fraction, data.confirm_fraction, seed)
        return inputs.subset(split[0]), inputs.subset(split[1]), inputs.subset(split[2])

    def _text_features(self, dataset: Any, template: str) -> torch.Tensor | None:
        from datasets import Dataset as DatasetClass

        if has_classifier(self.model):
            return None
        names = class_names(dataset) if isinstance(dataset, DatasetClass) else None
        require(
            names is not None,
            "objective='accuracy' needs class names: a datasets.Dataset whose label column is a ClassLabel. Use "
            "objective='cosine' otherwise.",
        )
        return zero_shot_features(self.model, self.processor, names or [], template)

    def _fitted_for(self, config: RegCacheConfig) -> bool:
        if self.fit_result is None:
            return False
        done = self.fit_result.config
        return (done.weights, done.activations, done.modules) == (config.weights, config.activations, config.modules)

    def _fixed_cache(
        self, config: RegCacheConfig, dataset: Any, data: DataConfig, data_collator: Collator | None
    ) -> RegisterCache:
        r = config.registers
        if self.fit_result is not None and self.fit_result.config.registers == r and self.fit_result.cache is not None:
            return self.fit_result.cache
        if dataset is None:
            raise ValueError("registers.mode='fixed' mines its registers from images: pass calibration_dataset.")
        require(r.num_registers == 1, "Mining gives one register per block; registers.num_registers must be 1.")
        depth = len(find_tower(self.model).blocks)
        require(r.blocks[-1] < depth, f"registers.blocks={list(r.blocks)}, but the encoder has {depth} blocks.")
        inputs = ImageInputs(dataset, self.processor, data_collator)
        mined = mine_tokens(self.model, inputs.batches(data.batch_size), [r.blocks[0]], progress=False)[r.blocks[0]]
        return mined.average(r.blocks, depth).restricted(r.blocks, r.num_copies)

    def _record(
        self,
        work_dir: str | Path | None,
        config: RegCacheConfig,
        search: SearchConfig,
        data: DataConfig,
        inputs: ImageInputs,
        sensitive: int,
    ) -> SearchRecord:
        if work_dir is None:
            return SearchRecord(None, "")
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        settings = json.dumps([config.to_dict(), Recipe(search=search, data=data).to_dict(), sensitive], sort_keys=True)
        digest = hashlib.sha256(settings.encode())
        digest.update(inputs.fingerprint().encode())
        for name, tensor in find_tower(self.model).module.state_dict().items():
            digest.update(f"{name} {float(tensor.double().sum())!r}".encode())
        return SearchRecord(Path(work_dir) / "search.json", digest.hexdigest()[:32])


def smallest_patch_count(bench: Workbench, batch: Batch) -> int:
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
        registers = RegistersConfig(mode="off")
    else:
        registers = RegistersConfig(
            mode="fixed",
            blocks=cache.blocks,
            num_registers=cache.num_registers,
            num_copies=chosen.num_copies,
            kv_mode=kv_mode,
        )
    return config.replace(registers=registers, deletion=deletion)


def build_quantized(
    model: PreTrainedModel, config: RegCacheConfig, cache: RegisterCache | None, calibration: Sequence[Batch]
) -> PreTrainedModel:
    """The quantized copy of ``model``: registers, deletion, scales calibrated with both active.

    Args:
        model: float model, unchanged.
        config: resolved (registers ``fixed`` or ``off``).
        cache: registers for ``fixed``.
        calibration: batches for static activations.

    Raises:
        ValueError: config and cache disagree.
    """
    from optimum_regcache.registers import set_deletion, set_registers
    from optimum_regcache.surgery import assign_input_qparams, install_structure, quantize_modules, validate_positions

    validate_positions(model, config)
    require(
        (config.registers.mode == "fixed") == (cache is not None),
        f"registers.mode={config.registers.mode!r} and the register cache disagree.",
    )
    quantized = copy.deepcopy(model).eval().requires_grad_(False)
    install_structure(quantized, config)
    set_registers(quantized, cache)
    set_deletion(quantized, config.deletion)
    qparams = calibrate(quantized, config, calibration)
    quantize_modules(quantized, config)
    assign_input_qparams(quantized, qparams)
    attach_quantizer(quantized, config)
    stored = get_register_cache(quantized)
    require(stored is None or stored.blocks == config.registers.blocks, "Register blocks were not stored as configured.")
    return quantized


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=2, allow_nan=True) + "\n")
    temporary.replace(path)
