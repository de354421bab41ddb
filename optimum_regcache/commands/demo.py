"""What the page of `optimum-cli regcache demo` shows: one image in the float model, plain quantization and RegCache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from optimum_regcache.commands.page.parts import Picture
from optimum_regcache.commands.page.plots import Plotter
from optimum_regcache.commands.pictures import frame_outliers, patch_grid, shade_patches, to_picture
from optimum_regcache.commands.sources import Hub, Source, open_model, open_source, saved_recipe
from optimum_regcache.config import DeletionConfig, RegCacheConfig, RegistersConfig
from optimum_regcache.config.recipe import LOCAL, Recipe
from optimum_regcache.config.validation import require
from optimum_regcache.data import reference
from optimum_regcache.data.images import class_names, collate, image_column
from optimum_regcache.data.labels import readable_names
from optimum_regcache.data.picture import model_inputs
from optimum_regcache.encoders.outputs import class_logits
from optimum_regcache.encoders.passes import Batch, image_features, patch_tokens
from optimum_regcache.encoders.tower import has_classifier
from optimum_regcache.evaluation.objective import zero_shot_features, zero_shot_problem
from optimum_regcache.evaluation.places import patch_norms
from optimum_regcache.methods import without_methods
from optimum_regcache.quantizer import RegCacheQuantizer

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES, SIDE, SHOWN = 12, 256, 5
FLOAT, NAIVE, REGCACHE = "float", "naive", "RegCache"


@dataclass(frozen=True)
class Look:
    """One image in all variants.

    Attributes:
        predictions: variant -> class -> confidence, the float model's first; empty where nothing names classes.
        cosines: variant -> (cosine of the features to float, mean cosine of the patch tokens, largest token norm).
        outliers: variant -> the image with outlier tokens framed and deleted ones crossed out, at the block of `Look.block`.
        patches: variant -> the image, red where patch tokens differ from float's; the float model is left out.
        norms: token norms per block.
        block: where the float model's largest token is farthest above the median.
    """

    predictions: dict[str, dict[str, float]]
    cosines: dict[str, tuple[float, float, float]]
    outliers: dict[str, Image]
    patches: dict[str, Image]
    norms: Picture
    block: int


class Demo:
    """Models and images of the page; :meth:`open` makes it.

    Attributes:
        source: float model and images; the report images are the examples.
        models: variant -> model, float first.
        installed: what RegCache installed, for readers.
        predicts: whether an image gets classes.
        classes: names to begin with, empty where the model has no text tower.
    """

    def __init__(self, source: Source, models: dict[str, Any], installed: str) -> None:
        self.source, self.models, self.installed = source, models, installed
        self._lock, self._plotter = threading.Lock(), Plotter()
        self.zero_shot = zero_shot_problem(source.model, source.processor) is None
        self.predicts = self.zero_shot or has_classifier(source.model)
        names = class_names(source.report_images) if self.zero_shot else None
        self.classes = [] if names is None else readable_names(names)
        self._column = image_column(source.report_images)
        require(
            patch_grid(source.model, self._batch(self.example(0))) is not None,
            f"The demo needs a model that takes whole pictures; {type(source.model).__name__} takes patches. Use analyze.",
        )

    @classmethod
    def open(
        cls,
        model: str,
        images: str | None = None,
        *,
        preset: str | None = None,
        original: str | None = None,
        device: str = "cpu",
        hub: Hub | None = None,
    ) -> Demo:
        """Open a float model and quantize it with a quick search, or open one that `quantize` wrote, and its original.

        Args:
            model: directory, Hub id or reference encoder.
            images: data set to quantize with and to show; default: the embedded encoder's scenes.
            preset: bits for a float model, default W8A8.
            original: of a quantized model; default: the one in the recipe beside it.
            device: ``cpu`` or ``cuda``.
            hub: for `load_model` and `load_processor`.

        Raises:
            ValueError: no images, an original that is not known, an option without effect, or a model that takes patches.
            OSError: a name that leads nowhere.
        """
        hub, opened = dict(hub or {}), None if model in reference.names() else open_model(model, dict(hub or {}))
        finished: Any = None if opened is None else opened[0]
        config = getattr(getattr(finished, "config", None), "quantization_config", None)
        recipe = Recipe().with_effort("quick")
        recipe = replace(recipe, data=replace(recipe.data, num_report=EXAMPLES))
        if not isinstance(config, RegCacheConfig):
            require(original is None, "--float-model has no effect: --model is a float model. Leave it out.")
            source = open_source(model, images, recipe, device=device, hub=hub, opened=opened)
            return cls.quantized(source, RegCacheConfig.from_preset(preset or "w8a8"), recipe)
        require(preset is None, "--preset has no effect: --model is quantized already. Leave it out.")
        saved = saved_recipe(model, hub)
        name = original or saved.model
        require(
            name is not None and not name.startswith(LOCAL),
            f"{model} does not say where its float original is, which the demo compares with. Give it with --float-model.",
        )
        images = images or (None if name in reference.names() else saved.dataset)
        hub = {k: v for k, v in hub.items() if k not in ("revision", "code_revision")}
        revised = replace(recipe, model=name, revision=None if original else saved.revision)
        source = open_source(name, images, revised, device=device, hub=hub)
        made = {REGCACHE: finished.to(device)}
        registers = config.registers.mode != "none" or config.deletion.active
        return cls(source, {**_plain(source, config, recipe), **made}, "as saved" if registers else "nothing")

    @classmethod
    def quantized(cls, source: Source, config: RegCacheConfig, recipe: Recipe) -> Demo:
        """Quantize the model of ``source`` as ``config`` says, with the search settings and amounts of ``recipe``."""
        quantizer = RegCacheQuantizer(source.model, source.processor)
        wanted = recipe.with_quantization(config)
        made = quantizer.quantize(recipe=wanted, calibration_dataset=source.search_images, template=source.template)
        fit = quantizer.fit_result
        installed = "nothing" if fit is None else fit.search.chosen.describe()
        return cls(source, {**_plain(source, config, recipe), REGCACHE: made}, installed)

    def example(self, number: int) -> Image:
        """One of the report images."""
        return self.source.report_images[number][self._column].convert("RGB")

    def examples(self) -> list[Image]:
        """All of them."""
        return [self.example(number) for number in range(len(self.source.report_images))]

    def look(self, picture: Image, classes: Sequence[str] = ()) -> Look:
        """All that the page shows of ``picture``.

        Args:
            picture: any size; the processor cuts it.
            classes: names for a model with a text tower; others have their own, or none.

        Raises:
            ValueError: no names for a model with a text tower.
        """
        names = list(dict.fromkeys(name.strip() for name in classes if name.strip()))
        require(bool(names) or not self.zero_shot, "Name at least one class, one on each line.")
        with self._lock, torch.inference_mode():
            batch = self._batch(picture)
            grid = patch_grid(self.source.model, batch) or (1, 1)
            shown = to_picture(batch["pixel_values"][0])
            norms = {name: patch_norms(model, batch)[:, 0] for name, model in self.models.items()}
            block = int((_largest(norms[FLOAT]) / norms[FLOAT].nanmedian(-1).values).argmax())
            features = {name: image_features(model, batch).cpu() for name, model in self.models.items()}
            tokens = {name: patch_tokens(model, batch)[0].cpu() for name, model in self.models.items()}
            close = {name: F.cosine_similarity(t, tokens[FLOAT], dim=-1) for name, t in tokens.items()}
            cosines = {
                name: (
                    float(F.cosine_similarity(features[name], features[FLOAT]).mean()),
                    float(close[name].mean()),
                    float(_largest(norms[name]).max()),
                )
                for name in self.models
            }
            return Look(
                self._predictions(batch, features, names),
                cosines,
                {name: frame_outliers(shown, found[block], grid, SIDE) for name, found in norms.items()},
                {name: shade_patches(shown, 1 - close[name], grid, SIDE) for name in self.models if name != FLOAT},
                self._curves(norms),
                block,
            )

    def _batch(self, picture: Image) -> Batch:
        return collate([model_inputs(picture, self.source.processor, "The image")])

    def _predictions(
        self, batch: Batch, features: dict[str, torch.Tensor], names: list[str]
    ) -> dict[str, dict[str, float]]:
        if self.zero_shot:
            model: Any = self.source.model
            text = zero_shot_features(model, self.source.processor, names, self.source.template)
            bias = getattr(model, "logit_bias", None)
            logits = {k: F.normalize(f, dim=-1) @ text.T * model.logit_scale.exp().cpu() for k, f in features.items()}
            if bias is not None:  # SigLIP: each class on its own
                return {k: _named((v + bias.cpu()).sigmoid()[0], names) for k, v in logits.items()}
            return {k: _named(v.softmax(-1)[0], names) for k, v in logits.items()}
        if not self.predicts:
            return {}
        labels: Any = self.source.model.config.id2label or {}
        found = {name: class_logits(model, batch).softmax(-1)[0] for name, model in self.models.items()}
        return {name: _named(v, [str(labels.get(i, i)) for i in range(len(v))]) for name, v in found.items()}

    def _curves(self, norms: dict[str, torch.Tensor]) -> Picture:
        curves: dict[str, list[float | None]] = {
            f"{name}, largest": [*_largest(n).tolist()] for name, n in norms.items()
        }
        curves[f"{FLOAT}, median"] = [*norms[FLOAT].nanmedian(-1).values.tolist()]
        return self._plotter.lines(curves, "", "Token norms per block", x="block", y="largest value of a token")


def _plain(source: Source, config: RegCacheConfig, recipe: Recipe) -> dict[str, Any]:
    """The float model, and the same bits rounded to nearest with nothing installed."""
    plain = without_methods(config).replace(registers=RegistersConfig(mode="none"), deletion=DeletionConfig())
    wanted = Recipe(plain, data=recipe.data)
    quantizer = RegCacheQuantizer(source.model, source.processor)
    made = quantizer.quantize(recipe=wanted, calibration_dataset=source.search_images, progress=False)
    return {FLOAT: source.model, NAIVE: made}


def _largest(norms: torch.Tensor) -> torch.Tensor:
    """[blocks] of norms [blocks, patches]."""
    return norms.nan_to_num(0.0).amax(-1)


def _named(values: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """The largest by name; nan counts as 0."""
    best = values.nan_to_num(0.0).topk(min(SHOWN, len(values)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {str(names[i]): value for i, value in found}
