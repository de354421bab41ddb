"""A model with its reference and report images, opened by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs, reference_and_report, subsample
from optimum_regcache.data.loading import FORMATS, drop_broken, load_splits
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE, check_template
from optimum_regcache.evaluation.targets import Targets, accuracy_targets
from optimum_regcache.hub.loading import load_model, load_processor

logger = logging.get_logger(__name__)

EMBEDDED_IMAGES = " (embedded images)"


@dataclass(frozen=True)
class Source:
    """A model with its reference and report images; the two share none.

    Attributes:
        name, dataset_name: for reports.
        model, processor: opened.
        search_images, report_images: `datasets.Dataset`.
        template: zero-shot prompt.
        note: what the model is, when it is one of ours.
        dropped: images of either side that ``data.skip_broken`` left out.
    """

    name: str
    dataset_name: str
    model: PreTrainedModel
    processor: Any
    search_images: Any
    report_images: Any
    template: str
    note: str
    dropped: dict[str, int] = field(default_factory=dict)


def open_source(
    model: str | None, dataset: str | None, recipe: Recipe, *, template: str | None = None, device: str = "cpu"
) -> Source:
    """Open model and data by name; without a model the embedded encoder, without data the encoder's own scenes.

    Raises:
        ValueError: a model of the user's without a data set, a data set too small to hold back report images, or a template
            without ``{}``.
    """
    name = model or recipe.model or reference.DEFAULT
    dataset = recipe.dataset if dataset is None else dataset
    seed, data = recipe.search.seed, recipe.data
    if template is not None:
        check_template(template)
    if name in reference.names():
        ref = reference.load(name)
        opened, processor, note, default_template = ref.model, ref.processor, ref.note, ref.template
    else:
        opened, processor, note, default_template = load_model(name), load_processor(name), "", DEFAULT_TEMPLATE
        if dataset is None:
            raise ValueError(
                f"--dataset is needed for {name}: {FORMATS}. Only the reference encoders "
                f"({', '.join(reference.names())}) bring their own images."
            )
    network: Any = opened
    template = default_template if template is None else template
    dropped = {"search": 0, "report": 0}
    if dataset is None:
        ref_data = reference.load(name).dataset
        search_images = ref_data("search", data.num_samples, seed)
        report_images = ref_data("report", data.num_report, seed)
        dataset = f"{name}{EMBEDDED_IMAGES}"
    else:
        search_images, report_images = split_images(dataset, data.num_samples, data.num_report, seed)
        if data.skip_broken:  # after the split, so that it depends on nothing but the data set
            search_images, dropped["search"] = drop_broken(search_images, f"{dataset} (search)")
            report_images, dropped["report"] = drop_broken(report_images, f"{dataset} (report)")
    return Source(name, dataset, network.to(device), processor, search_images, report_images, template, note, dropped)


def split_images(dataset: str, num_samples: int, num_report: int, seed: int) -> tuple[Any, Any]:
    """Seeded subsets of the two sides of `reference_and_report`."""
    search, report = reference_and_report(load_splits(dataset), dataset)
    if num_samples > len(search):
        logger.warning(f"{dataset} has {len(search)} images for the search and {len(report)} for reports.")
    return subsample(search, num_samples, seed), subsample(report, num_report, seed)


def targets_of(source: Source, inputs: ImageInputs) -> Targets:
    """How the labels of ``inputs`` become classes of the source's model."""
    return accuracy_targets(source.model, source.processor, inputs, source.template)


def accuracy_data(
    source: Source, inputs: ImageInputs, images: Any = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(labels, text features) if top-1 accuracy can be computed, else (None, None). ``inputs`` knows its ``images``."""
    del images
    targets = targets_of(source, inputs)
    return targets.labels(inputs), targets.text_features


def saved_recipe(name: str) -> Recipe:
    """The recipe beside a saved model (directory or Hub id); an empty one if there is none."""
    path = Path(name) / "recipe.yaml"
    if not Path(name).exists() and name not in reference.names():
        try:
            path = Path(hf_hub_download(name, "recipe.yaml"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return Recipe()
    try:
        return Recipe.load(path) if path.exists() else Recipe()
    except (ValueError, TypeError) as error:
        logger.warning(f"recipe.yaml of {name} is not one of ours and is left aside: {error}")
        return Recipe()
