"""A model with its reference and report images, opened by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_regcache.config.recipe import LOCAL, Recipe, recorded_name
from optimum_regcache.config.recipe_files import packaged_recipes
from optimum_regcache.config.validation import require
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs, reference_and_report, subsample
from optimum_regcache.data.loading import FORMATS, drop_broken, load_splits
from optimum_regcache.data.streaming import stream_images
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE, check_template
from optimum_regcache.evaluation.targets import Targets, accuracy_targets
from optimum_regcache.hub.loading import load_model, load_processor

logger = logging.get_logger(__name__)

EMBEDDED_IMAGES = " (embedded images)"
Hub = dict[str, Any]  # arguments of `load_model` and `load_processor` that say where files are and what may run


@dataclass(frozen=True)
class Source:
    """A model with its reference and report images; the two share none.

    Attributes:
        name, dataset_name: for reports and recipes; of a path the last part only.
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

    @property
    def title(self) -> str:
        """The name for readers."""
        return self.name.removeprefix(LOCAL)

    @property
    def images_title(self) -> str:
        """The name of the images for readers."""
        return self.dataset_name.removeprefix(LOCAL)


def check_name(name: str, option: str) -> None:
    """Refuse a path that leads nowhere, before it is asked for at the Hub.

    Raises:
        FileNotFoundError: it looks like a path, or has no ``owner/name`` form, and does not exist.
        ValueError: it stands for a folder of another machine.
    """
    if name.startswith(LOCAL):
        raise ValueError(
            f"{name} stands for a folder of the machine where the recipe was made. Give its path here with {option}."
        )
    if Path(name).exists() and not Path(name).is_dir() and name not in reference.names():
        raise ValueError(f"{option}: {name} is a file; give the folder that holds the model.")
    first = Path(name).parts[0]
    looks = name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    bare = "/" not in name and name not in reference.names()
    if (looks or bare or (first != name and Path(first).is_dir())) and not Path(name).exists():
        names = ", ".join(reference.names())
        hint = f", no embedded encoder has that name ({names}), and one on the Hub is OWNER/NAME" if bare else ""
        raise FileNotFoundError(
            f"{option}: there is no directory {name} (the working directory is {Path.cwd()}){hint}."
        )


def is_here(name: str) -> bool:
    """Whether ``name`` is a reference encoder or a path, and not on the Hub."""
    return name in reference.names() or Path(name).exists()


def require_hub(name: str, hub: Hub) -> None:
    """Raise ``ValueError`` for a revision of what is not on the Hub."""
    if hub.get("revision") and is_here(name):
        raise ValueError(f"--revision has no effect: {name} is not on the Hub. Leave it out.")


def open_model(name: str, hub: Hub, option: str = "--model") -> tuple[PreTrainedModel, Any]:
    """Model and processor by directory, Hub id or reference name.

    Raises:
        OSError: neither a directory here, nor to be had from the Hub.
        ValueError: ``revision`` for what is not on the Hub.
    """
    check_name(name, option)
    require_hub(name, hub)
    asked = ask_hub(name, hub)
    try:
        return load_model(name, **hub), load_processor(name, **hub)
    except OSError as error:
        if is_here(name):
            raise
        if not asked:
            raise OSError(
                f"{option}: {name} is no directory here, the cache does not hold all of it, and the Hub is not asked "
                f"(--offline or HF_HUB_OFFLINE). Leave that out, or run `hf download {name}` once where there is a network."
            ) from error
        raise OSError(
            f"{option}: {name} is no directory here, and the Hub does not give it. Check the spelling and the network; what is "
            f"private or gated needs --token. The error was: {error}"
        ) from error


def ask_hub(name: str, hub: Hub, kind: str = "") -> bool:
    """Whether the Hub will be asked for ``name``; says so, for its answer may take a while."""
    asked = not (is_here(name) or hub.get("local_files_only") or constants.HF_HUB_OFFLINE)
    if asked:
        print(f"Asking the Hub for {kind}{name} ...", file=sys.stderr, flush=True)
    return asked


def open_source(
    model: str | None,
    dataset: str | None,
    recipe: Recipe,
    *,
    template: str | None = None,
    device: str = "cpu",
    hub: Hub | None = None,
    opened: tuple[Any, Any] | None = None,
) -> Source:
    """Open model and data by name; without a model the embedded encoder, without data the encoder's own scenes.

    Args:
        model, dataset: names or paths; default: those of the recipe.
        recipe: amounts and seed; its revision belongs to its model.
        template: zero-shot prompt.
        device: ``cpu`` or ``cuda``.
        hub: for `load_model` and `load_processor`.
        opened: model and processor, if they are open already.

    Raises:
        ValueError: a model of the user's without a data set, a data set too small to hold back report images, or a template
            without ``{}``.
    """
    name = model or recipe.model or reference.DEFAULT
    dataset, hub = recipe.dataset if dataset is None else dataset, dict(hub or {})
    seed, data = recipe.search.seed, recipe.data
    if recipe.revision is not None and name == recipe.model:
        hub.setdefault("revision", recipe.revision)
    if opened is None and not name.startswith(LOCAL):
        check_name(name, "--model")
    if dataset is None and name not in reference.names():
        raise ValueError(
            f"--dataset is needed for {name.removeprefix(LOCAL)}: {FORMATS}. Only the "
            f"reference encoders ({', '.join(reference.names())}) bring their own images."
        )
    if dataset is not None and dataset.startswith(LOCAL):
        check_name(dataset, "--dataset")
    require_hub(name, hub)
    if template is not None:
        check_template(template)
    dropped = {"search": 0, "report": 0}
    ref = reference.load(name) if name in reference.names() else None
    network: Any
    network, processor = opened or ((ref.model, ref.processor) if ref else open_model(name, hub))
    if dataset is not None:
        ask_hub(dataset, hub, "the data set ")
        divide = stream_images if data.streaming else split_images
        search_images, report_images = divide(dataset, data.num_samples, data.num_report, seed, hub.get("token"))
        dataset = recorded_name(dataset)
        if data.skip_broken:  # after the split, so that it depends on nothing but the data set
            search_images, dropped["search"] = drop_broken(search_images, f"{dataset} (search)")
            report_images, dropped["report"] = drop_broken(report_images, f"{dataset} (report)")
    else:
        require(not data.streaming, "data.streaming has no effect on embedded images. Leave it out, or give --dataset.")
        scenes = (ref or reference.load(name)).dataset
        search_images, report_images = scenes("search", data.num_samples, seed), scenes("report", data.num_report, seed)
        dataset = f"{name}{EMBEDDED_IMAGES}"
    network = (
        network.to(device) if isinstance(network, torch.nn.Module) else network
    )  # an exported one stays on the CPU
    return Source(
        name if ref else recorded_name(name), dataset, network, processor, search_images, report_images,
        template if template is not None else (ref.template if ref else DEFAULT_TEMPLATE), ref.note if ref else "", dropped,
    )  # fmt: skip


def with_known_images(recipe: Recipe) -> Recipe:
    """``recipe`` with the images that a packaged recipe names for its model of the Hub, and a warning, if it names none itself
    and there is such a recipe."""
    if recipe.dataset is not None or recipe.model is None or is_here(recipe.model):
        return recipe
    for name, path in packaged_recipes().items():
        known = Recipe.load(path)
        if known.model == recipe.model and known.dataset is not None:
            logger.warning(f"No --dataset: taking {known.dataset}, which the recipe {name} names for {known.model}.")
            streaming = recipe.data.streaming or known.data.streaming
            return replace(recipe, dataset=known.dataset, data=replace(recipe.data, streaming=streaming))
    return recipe


def split_images(
    dataset: str, num_samples: int, num_report: int, seed: int, token: str | None = None
) -> tuple[Any, Any]:
    """Seeded subsets of the two sides of `reference_and_report`; ``token`` of the Hub."""
    search, report = reference_and_report(load_splits(dataset, token=token), dataset)
    if num_samples > len(search):
        logger.warning(f"{dataset} has {len(search)} images for the search and {len(report)} for reports.")
    return subsample(search, num_samples, seed), subsample(report, num_report, seed)


def divided_alike(recipe: Recipe, saved: Recipe, dataset: str | None) -> Recipe:
    """``recipe``, streaming ``dataset`` if the recipe ``saved`` beside a model did: a single split is divided otherwise, and
    the report would meet images of the search.

    Raises:
        ValueError: ``recipe`` streams the data set of ``saved``, which did not.
    """
    if dataset is None or saved.dataset is None or recorded_name(dataset) != recorded_name(saved.dataset):
        return recipe
    require(
        saved.data.streaming or not recipe.data.streaming,
        f"data.streaming: the model was made without it on {saved.dataset.removeprefix(LOCAL)}, so a streamed report could "
        "hold images of the search. Leave it out.",
    )
    return replace(recipe, data=replace(recipe.data, streaming=saved.data.streaming))


def targets_of(source: Source, inputs: ImageInputs) -> Targets:
    """How the labels of ``inputs`` become classes of the source's model."""
    return accuracy_targets(source.model, source.processor, inputs, source.template)


def accuracy_data(
    source: Source, inputs: ImageInputs, images: Any = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(labels, text features) if top-1 accuracy can be computed, else (None, None). ``images`` is not read any more: ``inputs``
    knows its images."""
    del images
    targets = targets_of(source, inputs)
    return targets.labels(inputs), targets.text_features


def saved_recipe(name: str, hub: Hub | None = None) -> Recipe:
    """The recipe beside a saved model (directory or Hub id); an empty one if there is none."""
    path = Path(name) / "recipe.yaml"
    if not Path(name).exists() and name not in reference.names():
        where = {k: v for k, v in (hub or {}).items() if k in ("revision", "token", "cache_dir", "local_files_only")}
        try:
            path = Path(hf_hub_download(name, "recipe.yaml", **where))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return Recipe()
    try:
        return Recipe.load(path) if path.exists() else Recipe()
    except (ValueError, TypeError) as error:
        logger.warning(f"recipe.yaml of {name} is not one of ours and is left aside: {error}")
        return Recipe()
