"""`RegCacheQuantizer`: the Optimum quantizer. fit = sensitivity, mining, search; quantize = build, calibrate, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig, recorded_name
from optimum_regcache.config.validation import require
from optimum_regcache.data import reference
from optimum_regcache.data.images import choose_split, load_splits, reference_and_report, subsample
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE
from optimum_regcache.hub.card import known_licence, pipeline_tag, write_card
from optimum_regcache.hub.door import require_float
from optimum_regcache.hub.loading import load_model, load_processor
from optimum_regcache.hub.saving import write_model
from optimum_regcache.hub.upload import push_folder
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.alternatives import Recommendation, find_alternatives
from optimum_regcache.search.fit import FitResult, fit_registers
from optimum_regcache.search.plan import Collator, QuantizationPlan, ReferenceImages
from optimum_regcache.search.processes import on_main
from optimum_regcache.search.run import plan_call, repeatable, run_plan

if TYPE_CHECKING:
    from datasets import Dataset


class RegCacheQuantizer(OptimumQuantizer):
    """Quantizes a vision encoder with registers and token deletion (RegCache, arXiv 2510.04547).

    Args:
        model: a supported encoder, or a model that contains one; only its copies are quantized (it is put into
            evaluation mode).
        processor: its processor, for data sets of images and for zero-shot accuracy.

    Raises:
        TypeError: ``model`` is no PyTorch model.
        ValueError: it holds no supported encoder, is quantized already, has adapters (LoRA), is wrapped, or is not in memory.

    Example:
        >>> quantizer = RegCacheQuantizer.from_pretrained("openai/clip-vit-base-patch16")  # doctest: +SKIP
        >>> images = quantizer.get_calibration_dataset("imagenet-1k", num_samples=256)  # doctest: +SKIP
        >>> model = quantizer.quantize("clip-regcache-w8a8", calibration_dataset=images)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        super().__init__()
        require_float(model)
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
            kwargs: for the model's `from_pretrained` (``dtype``); those that say where files are and whose code may
                run (``revision``, ``token``, ``trust_remote_code``, ...) hold for config and processor too.

        Raises:
            ValueError: the model is already quantized, or holds no supported encoder.
        """
        del file_name
        if isinstance(model_or_path, PreTrainedModel):
            model = model_or_path
        else:
            model = load_model(model_or_path, **kwargs)
            processor = load_processor(model_or_path, **kwargs) if processor is None else processor
        return cls(model, processor)

    def get_calibration_dataset(  # noqa: PLR0913 (the arguments of Optimum's ORTQuantizer)
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

    def fit(  # noqa: PLR0913 (public: data and settings side by side, as in quantize)
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
            dataset: reference images: a `datasets.Dataset`, or a sequence of ``{"pixel_values": ...}``; also a streamed split,
                if ``data`` is given. They are divided into calibration, selection and confirmation parts that share none.
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
        config = quantization_config or RegCacheConfig.from_preset("w8a8")
        plan = QuantizationPlan.of(Recipe(config, search or SearchConfig(), data or DataConfig()))
        images = ReferenceImages(dataset, self.processor, data_collator, template, plan.recipe if data else None)
        self.fit_result = fit_registers(self.model, images, plan, work_dir=work_dir, progress=progress)
        self.fit_result.parts.release()
        return self.fit_result

    def quantize(  # noqa: PLR0913 (the arguments of Optimum's quantizers, and ours)
        self,
        save_dir: str | Path | None = None,
        file_prefix: str | None = None,
        quantization_config: RegCacheConfig | None = None,
        calibration_dataset: Any = None,
        batch_size: int | None = None,
        data_collator: Collator | None = None,
        *,
        search: SearchConfig | None = None,
        recipe: Recipe | None = None,
        template: str = DEFAULT_TEMPLATE,
        work_dir: str | Path | None = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> PreTrainedModel:
        """Quantize a copy of the model. The command line does the same: equal recipes and images give equal bits.

        Registers are taken from an earlier `fit` with the same bits. Without one, ``registers.mode`` decides: ``"search"`` (the
        presets), ``"fixed"`` (mined for the given blocks) or ``"none"``; the calibration part gives the activation scales.

        Args:
            save_dir: where model, processor, recipe and results are written; nothing is saved if None.
            file_prefix: stored as the checkpoint's ``variant`` (``model.PREFIX.safetensors``).
            quantization_config: default: that of the fit, else W8A8.
            calibration_dataset: `datasets.Dataset` of images or sequence of ``{"pixel_values": ...}``, at least 4; needed
                unless activations are dynamic and no registers are searched. All of them are used, or as many as ``recipe``
                or the fit says, which a streamed split needs.
            batch_size: images per forward pass; default: that of the fit, else of `DataConfig`.
            data_collator: builds a batch from items.
            search: search settings when a search is run.
            recipe: in place of ``quantization_config``, ``search`` and ``batch_size``; may be that of an earlier search.
            template: zero-shot prompt for ``objective="accuracy"``.
            work_dir: directory for finished trials and reconstructed blocks; call again with the same one to resume.
            overwrite: ``save_dir`` may hold the result of another call.
            progress: show progress bars.

        Returns:
            The quantized model, ready for `save_pretrained` and `push_to_hub`; all processes get it, the main one saves it.

        Raises:
            ValueError: data that is needed and missing, settings that do not fit or have no effect, a recipe beside settings
                that it holds, or a ``save_dir`` with the float model, a model that is not ours, or another call's result.
            OSError: ``save_dir`` cannot be written.
        """
        images = None
        if calibration_dataset is not None:
            stated = recipe or ((fit := self.fit_result) and Recipe(search=fit.settings, data=fit.data))
            images = ReferenceImages(calibration_dataset, self.processor, data_collator, template, stated)
        if recipe is None:
            plan = plan_call(self.fit_result, quantization_config, search, images, batch_size)
        else:
            beside = {"quantization_config": quantization_config, "search": search, "batch_size": batch_size}
            double = [name for name, value in beside.items() if value is not None]
            require(
                not double,
                f"quantize() got a recipe and {', '.join(double)}, which a recipe holds too. Give the recipe alone, changed "
                "with dataclasses.replace or recipe.override.",
            )
            plan = QuantizationPlan.of(recipe)
        output = None
        if save_dir is not None:
            seen = images.inputs.fingerprint() if images is not None else None
            output = on_main(lambda: self._output(save_dir, plan.recipe, file_prefix, overwrite, seen))
        run = run_plan(self.model, images, plan, known=self.fit_result, work_dir=work_dir, progress=progress)
        self.fit_result = run.fit or self.fit_result
        if self.fit_result is not None:
            self.fit_result.parts.release()  # a result is kept, the images need not be
        model = run.quantized.model

        def write(output: Output) -> None:
            with output:
                self._write(output, model, run.recipe, None, file_prefix)

        if save_dir is not None:
            on_main(lambda: write(output) if output is not None else None)
        return model

    def recommend(
        self,
        model: PreTrainedModel,
        calibration_dataset: Any,
        *,
        recipe: Recipe | None = None,
        data_collator: Collator | None = None,
        template: str = DEFAULT_TEMPLATE,
        progress: bool = True,
    ) -> Recommendation:
        """Other quantizers at the same bits, compared with ``model`` on images that calibrated nothing and ranked nothing.

        ``quantize(recipe=found.better.recipe, calibration_dataset=...)`` on the same images makes the best of those that are
        clearly better, as ``--best`` of the command line does.

        Args:
            model: what `quantize` returned.
            calibration_dataset: the images that it was made with.
            recipe: that it was made with; default: the settings of the fit, else the defaults with all images.
            data_collator, template: as for `quantize`.
            progress: show a progress bar.

        Raises:
            TypeError: ``model`` is not quantized.
            ValueError: ``search.objective="accuracy"`` for images without usable labels.
        """
        config = getattr(model.config, "quantization_config", None)
        if not isinstance(config, RegCacheConfig):
            raise TypeError(
                f"recommend() takes the model that quantize() returned; this {type(model).__name__} is float."
            )
        images = ReferenceImages(calibration_dataset, self.processor, data_collator, template, recipe)
        fit = self.fit_result
        if fit is not None and fit.config.registers != config.registers:
            fit = None
        if recipe is None:
            count = max(len(images.inputs), 4)
            recipe = Recipe(search=fit.settings, data=fit.data) if fit else Recipe(data=DataConfig(num_samples=count))
        return find_alternatives(
            self.model, model, recipe.with_quantization(config), images, known=fit, progress=progress
        )

    def save(
        self,
        model: PreTrainedModel,
        save_dir: str | Path,
        *,
        file_prefix: str | None = None,
        recipe: Recipe | None = None,
        results: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write model, processor, resolved recipe and results into ``save_dir``, all at once.

        Args:
            model: what `quantize` returned.
            save_dir: folder; what an earlier job wrote there goes, other files stay.
            file_prefix: stored as the checkpoint's ``variant``.
            recipe: default: the settings of the fit.
            results: for ``results.json``; default: those of the fit.
            overwrite: replace the result of another job.

        Raises:
            ValueError: the folder holds a model that is not ours, the float model, or another job's result.
            OSError: it cannot be written.
        """
        with self._output(save_dir, self._records(model, recipe, results)[0], file_prefix, overwrite) as output:
            self._write(output, model, recipe, results, file_prefix)

    def push_to_hub(self, repo_id: str, model: PreTrainedModel | str | Path, **options: Any) -> str:
        """Publish a result in one commit: weights, processor, recipe, results and card, as ``optimum-cli regcache push`` does.

        Args:
            repo_id: ``user/name``; made if it does not exist.
            model: what `quantize` returned, or the folder that it was saved in.
            options: ``revision`` (a branch), ``create_pr``, ``private``, ``commit_message``, ``token``, ``exist_ok`` (the
                repository may hold another model) and ``unfinished`` (so may the search be).

        Returns:
            The address of the model on the Hub.

        Raises:
            ValueError: no finished model, one that was changed, paths of this machine in its files, or a repository in use.
            OSError: the Hub refuses, or cannot be reached.
        """
        if isinstance(model, (str, Path)):
            return push_folder(model, repo_id, **options).url
        with TemporaryDirectory() as folder:
            self.save(model, Path(folder, repo_id.split("/")[-1]))
            return push_folder(Path(folder, repo_id.split("/")[-1]), repo_id, **options).url

    def _write(
        self,
        output: Output,
        model: PreTrainedModel,
        recipe: Recipe | None,
        results: dict[str, Any] | None,
        file_prefix: str | None,
    ) -> None:
        """All files of a result, the card too."""
        origin = str(self.model.name_or_path or "") or None
        base = None if origin is None else reference.name_of(origin) or recorded_name(origin)
        recipe, results = self._records(model, recipe, results)
        write_model(output.stage, model, self.processor, recipe, results, file_prefix)
        config: Any = model.config.quantization_config
        licence = known_licence(base, origin)
        write_card(output.stage, output.path, config, base, pipeline_tag(model), licence=licence)

    def _output(
        self, save_dir: str | Path, recipe: Recipe, file_prefix: str | None, overwrite: bool, images: str | None = None
    ) -> Output:
        """The folder of a result; made before the work, it refuses before the work."""
        origin = str(self.model.name_or_path or "") or None
        job = {
            "kind": "python",
            "model": [type(self.model).__name__, origin],
            "recipe": recipe.to_dict(),
            "images": images,
            "file_prefix": file_prefix,
        }
        return Output(save_dir, job, overwrite=overwrite, models=[origin])

    def _records(
        self, model: PreTrainedModel, recipe: Recipe | None, results: dict[str, Any] | None
    ) -> tuple[Recipe, dict[str, Any] | None]:
        """The recipe and the results to write beside ``model``."""
        config: Any = model.config.quantization_config
        fit = self.fit_result
        if recipe is None:
            recipe = Recipe(search=fit.settings, data=fit.data) if fit is not None else Recipe()
        if results is None and fit is not None and fit.config == config:
            results = {"fit": fit.to_dict()}
        return repeatable(recipe.with_quantization(config), fit).portable(reference.names()), results


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
        ValueError: config and cache disagree, a method that cannot be used here, or a setting without effect, with the reason.
    """
    return quantize_with(model, resolve(config), cache, calibration, progress).model
