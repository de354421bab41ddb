"""What a fit is given: images, their division into parts that share none, and a recipe whose config is resolved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from optimum_regcache.config.recipe import DataConfig, Recipe
from optimum_regcache.data.images import ImageInputs, split_reference
from optimum_regcache.data.reading import store_batches
from optimum_regcache.data.streaming import take_images
from optimum_regcache.encoders.store import GIB, SHARE, StoredBatches, TensorSpace, available_memory
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE, check_template
from optimum_regcache.methods import ResolvedConfig, resolve
from optimum_regcache.search.processes import local_processes

Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class ReferenceImages:
    """Images for calibration and search, as the caller has them.

    Attributes:
        dataset: anything that `ImageInputs` accepts.
        processor: of the model; for images and for zero-shot accuracy.
        collator: builds a batch from items.
        template: zero-shot prompt for ``objective="accuracy"``.
        stated: says how many images are taken of a streamed data set, and with which seed; None refuses it.
    """

    dataset: Any
    processor: Any = None
    collator: Collator | None = None
    template: str = DEFAULT_TEMPLATE
    stated: Recipe | None = None
    _parts: dict[tuple[DataConfig, int], ReferenceParts] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_template(self.template)

    @cached_property
    def inputs(self) -> ImageInputs:
        """Model inputs, one image each."""
        dataset = self.dataset
        if isinstance(dataset, IterableDataset) and self.stated is not None:
            dataset = take_images(dataset, self.stated.data.num_samples, self.stated.search.seed)
        return ImageInputs(dataset, self.processor, self.collator)

    def split(self, data: DataConfig, seed: int, folder: Path | None = None) -> ReferenceParts:
        """Their division by `split_inputs`; the same one, with what it has read, when it is asked for again."""
        key = (data, seed)
        if key not in self._parts:
            self._parts[key] = split_inputs(self.inputs, data, seed, folder)
        return self._parts[key]


@dataclass(frozen=True)
class ReferenceParts:
    """Reference images divided into three parts that share none.

    Attributes:
        calibration: for the activation scales.
        selection: configurations are ranked on these.
        confirmation: the best have to beat "install nothing" on these.
        everything: the three together, in the order of the data set.
        data: how they are read.
        space: where what was read is kept.
        objectives: those made so far (`optimum_regcache.search.objectives`); the float model's features are in them.
    """

    calibration: ImageInputs
    selection: ImageInputs
    confirmation: ImageInputs
    everything: ImageInputs
    data: DataConfig
    space: TensorSpace
    objectives: dict[tuple[str, str, int], Any] = field(default_factory=dict, repr=False)
    _stored: dict[str, StoredBatches] = field(default_factory=dict, repr=False)

    def batches(self, part: str, *, progress: bool = False) -> StoredBatches:
        """Batches of the named part; its images are decoded and processed when they are first asked for."""
        if part not in self._stored:
            self._stored[part] = store_batches(getattr(self, part), self.data, self.space, progress=progress)
        return self._stored[part]

    def release(self) -> None:
        """Forget what was read; it is read again when it is asked for."""
        self._stored.clear()
        self.objectives.clear()


def split_inputs(inputs: ImageInputs, data: DataConfig, seed: int, folder: Path | None = None) -> ReferenceParts:
    """Seeded division of at most ``data.num_samples`` inputs, of which ``data.skip_broken`` may leave some out.

    Args:
        inputs: all of them.
        data: amounts.
        seed: of the division.
        folder: for images beyond ``data.memory_budget``; see `TensorSpace`.
    """
    inputs = inputs.subset(range(min(len(inputs), data.num_samples)))
    inputs = inputs.readable() if data.skip_broken else inputs
    split = split_reference(len(inputs), data.calibration_fraction, data.confirm_fraction, seed)
    parts = (inputs.subset(positions) for positions in split)
    return ReferenceParts(*parts, everything=inputs, data=data, space=space_of(data, folder))


def space_of(data: DataConfig, folder: Path | None = None) -> TensorSpace:
    """Memory of ``data.memory_budget`` GiB for this process, and files in ``folder`` beyond it."""
    if data.memory_budget is not None:
        return TensorSpace(data.memory_budget * GIB, folder)
    several = local_processes()  # each has images of its own
    return TensorSpace(None if several == 1 else available_memory() // SHARE // several, folder)


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
