"""`RegCacheQuantizer`: the Optimum quantizer. fit = sensitivity, mining, search; quantize = build, calibrate, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.files import write_json
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs, choose_split, load_splits, reference_and_report, subsample
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE
from optimum_regcache.hub.loading import load_model, load_processor
from optimum_regcache.methods import configured, quantize_with
from optimum_regcache.methods.pipeline import image_users, needs_images
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.fit import Collator, FitResult, fit_registers
from optimum_regcache.search.mining import isolated_cache, mine_tokens

if TYPE_CHECKING:
    from datasets import Dataset

MAX_CALIBRATION_IMAGES = 128


class RegCacheQuantizer(OptimumQuantizer):
    """Quantizes a vision encoder with registers and token deletion (RegCache, arXiv 2510.04547).

    Args:
        model: a supported encoder, or a model that contains one; only its copies are quantized (it is put into
            evaluation mode).
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
            processor = load_processor(model_or_path, **kwargs) if processor is None else processor
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
            dataset_split: default: the training split, without the third that reports use if it is the only one.
            preprocess_function: mapped over the data set; must produce ``pixel_values``. Without it the model's processor is
                applied when the images are used.
            preprocess_batch: map in batches.
            seed: of the subset.
            token: Hub token.

        Raises:
            FileNotFoundError: a path that does not exist.
            ValueError: no image column, no such split, or too few images.
        """
        splits = load_splits(dataset_name, config_name=dataset_config_name, token=token)
        if dataset_split is None:
            images, _ = reference_and_report(splits, dataset_name)
        else:
            images = choose_split(splits, dataset_split, dataset_name)
        data = subsample(images, num_samples, seed)
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
        """Find the sensitive block, the register, its place, tau and k~ (docs/method.md 2 to 9).

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
            The result, also kept for `quantize`.

        Raises:
            ValueError: settings that do not fit the model or the data.
        """
        self.fit_result = fit_registers(
            self.model,
            self.processor,
            dataset,
            quantization_config or RegCacheConfig.from_preset("w8a8"),
            search or SearchConfig(),
            data or DataConfig(),
            data_collator=data_collator,
            template=template,
            work_dir=work_dir,
            progress=progress,
        )
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

        Registers are taken from an earlier `fit` with the same bits. Without one, ``registers.mode="search"`` (the
        presets) runs the search on ``calibration_dataset``; ``"fixed"`` mines the registers for the given blocks;
        ``"none"`` is plain quantization.

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
        config = configured(config)
        calibration: ImageInputs | None = None
        if calibration_dataset is not None:
            calibration = ImageInputs(calibration_dataset, self.processor, data_collator)
        if config.registers.mode == "search":
            if not self._fitted_for(config, search):
                if calibration is None:
                    raise ValueError(
                        "registers.mode='search' needs images: pass calibration_dataset, call fit() first, or set "
                        "registers.mode='none' for plain quantization."
                    )
                data = replace(data, num_samples=max(len(calibration), 4))
                self.fit(calibration_dataset, config, search, data, data_collator=data_collator, progress=progress)
                calibration = None  # the fit has set its calibration part aside
            config = self.fit_result.config  # type: ignore[union-attr]
        if calibration is None and self.fit_result is not None:
            calibration = self.fit_result.calibration
        cache = self.fixed_cache(config, calibration, batch_size) if config.registers.mode == "fixed" else None
        batches: list[Batch] = []
        if needs_images(config):
            if calibration is None:
                raise ValueError(
                    f"{image_users(config)} need calibration images: pass calibration_dataset, or use the preset "
                    "'w8a8-dynamic'."
                )
            order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0)).tolist()
            chosen = sorted(order[:MAX_CALIBRATION_IMAGES])  # a data set may be sorted by class
            batches = list(calibration.subset(chosen).batches(batch_size))
        model = build_quantized(self.model, config, cache, batches, progress)
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
        fit = self.fit_result
        if recipe is None:
            recipe = Recipe(search=fit.settings, data=fit.data) if fit is not None else Recipe()
        recipe.with_quantization(config).save(path / "recipe.yaml")
        if results is None and fit is not None and fit.config == config:
            results = {"fit": fit.to_dict()}
        if results is not None:
            write_json(path / "results.json", results)

    # internals

    def _fitted_for(self, config: RegCacheConfig, search: SearchConfig | None) -> bool:
        """Whether the last fit answers this request."""
        fit = self.fit_result
        return fit is not None and fit.requested == config and search in (None, fit.settings)

    def fixed_cache(self, config: RegCacheConfig, inputs: ImageInputs | None, batch_size: int) -> RegisterCache:
        """The registers of the fit if they are those of ``config``, else mined for the given blocks."""
        r, fit = config.registers, self.fit_result
        if fit is not None and fit.cache is not None and fit.config.registers == r:
            return fit.cache
        if inputs is None:
            raise ValueError("registers.mode='fixed' mines its registers from images: pass calibration_dataset.")
        require(r.num_registers == 1, "Mining gives one register per block; registers.num_registers must be 1.")
        depth = len(find_tower(self.model).blocks)
        require(
            r.blocks[-1] < depth, f"registers.blocks={list(r.blocks)}, but the encoder has blocks 0 to {depth - 1}."
        )
        start = r.blocks[0]
        mined = mine_tokens(self.model, inputs.batches(batch_size), [start], progress=False)[start]
        if r.kv_mode == "isolated":
            return isolated_cache(self.model, mined.states.mean(0), start, r.blocks).restricted(r.blocks, r.num_copies)
        return mined.average(r.blocks, depth).restricted(r.blocks, r.num_copies)


def build_quantized(
    model: PreTrainedModel,
    config: RegCacheConfig,
    cache: RegisterCache | None,
    calibration: Sequence[Batch],
    progress: bool = False,
) -> PreTrainedModel:
    """The quantized copy of ``model``: registers and deletion installed, then the methods of ``config`` in the order of
    `optimum_regcache.methods.pipeline`.

    Args:
        model: float model, unchanged.
        config: registers ``fixed`` or ``none``.
        cache: registers for ``fixed``.
        calibration: batches for static activations and methods.
        progress: show progress bars.

    Raises:
        ValueError: config and cache disagree, or a method that cannot be used here, with the reason.
    """
    return quantize_with(model, config, cache, calibration, progress).model
