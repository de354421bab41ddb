"""A model and its float original on the same images, each run once over them: what the tasks of `evaluate` read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from optimum_regcache.commands.sources import Source
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.objects import Objects, objects_column, objects_of
from optimum_regcache.data.pixels import IGNORE
from optimum_regcache.data.reading import store_batches
from optimum_regcache.encoders.outputs import Outputs, run_once
from optimum_regcache.encoders.passes import Batch, batch_sizes
from optimum_regcache.encoders.store import StoredBatches, TensorSpace
from optimum_regcache.evaluation.objective import AccuracyObjective
from optimum_regcache.evaluation.targets import Targets, accuracy_targets
from optimum_regcache.search.plan import space_of
from optimum_regcache.search.setups import mean_and_error


@dataclass(frozen=True)
class Score:
    """One figure of a model, beside that of its float original.

    Attributes:
        value: mean over ``count`` images or texts.
        standard_error: of it; None for a single one.
        count: images or texts.
        float_value: of the float original; None where there is none, or where the figure itself compares with it.
        difference: mean of value - float value, one by one.
        difference_error: its standard error.
        share: whether it is a share, shown in percent, not a cosine or an error.
    """

    value: float
    standard_error: float | None
    count: int
    float_value: float | None = None
    difference: float | None = None
    difference_error: float | None = None
    share: bool = True

    @classmethod
    def of(cls, values: torch.Tensor, float_values: torch.Tensor | None = None, *, share: bool = True) -> Score:
        """From one value for each image or text, float [n]."""
        value, error = _mean_and_error(values)
        if float_values is None:
            return cls(value, error, len(values), share=share)
        difference = _mean_and_error(values - float_values)
        return cls(value, error, len(values), _mean_and_error(float_values)[0], *difference, share=share)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return asdict(self)

    def describe(self) -> str:
        """For a line of text."""
        text = f"{self._number(self.value)}{' %' * self.share}{self._error(self.standard_error)}"
        if self.float_value is None or self.difference is None:
            return text
        difference = f"{self._number(self.difference, '+')}{self._error(self.difference_error)}{' points' * self.share}"
        return f"{text}, float {self._number(self.float_value)}{' %' * self.share}, difference {difference}"

    def _number(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.2f}" if self.share else f"{value:{sign}.4f}"

    def _error(self, error: float | None) -> str:
        return "" if error is None else f" +- {self._number(error)}"


def _mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    mean, error = mean_and_error(values.double())
    return mean, None if math.isinf(error) else error


@dataclass(frozen=True)
class Columns:
    """Where the targets of tasks are; None to look for the column.

    Attributes:
        caption: of the captions.
        mask: of the class masks.
        depth: of the depth maps.
        ignore: number in masks that is no class.
        objects: of boxes and classes of objects.
        box_format: what the numbers of a box are, see `data.objects`.
    """

    caption: str | None = None
    mask: str | None = None
    depth: str | None = None
    ignore: int = IGNORE
    objects: str | None = None
    box_format: str = "coco"


@dataclass(frozen=True)
class Seen:
    """What a model gave for all images in one run; see `encoders.outputs.Outputs`.

    Attributes:
        features, pooled: float32 [n, D], [n, M].
        logits: float32 [n, classes] of a classifier, None for others.
        tokens: ``tokens`` [rows, D] of each batch; empty if nobody reads them.
        lengths: rows of each image, batch by batch.
        detections: class logits [n, Q, C + 1] and boxes [n, Q, 4] of a detector, None for others.
    """

    features: torch.Tensor
    pooled: torch.Tensor
    logits: torch.Tensor | None
    tokens: StoredBatches
    lengths: list[tuple[int, ...]]
    detections: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, model: Any, batches: Sequence[Batch], *, tokens: bool = False) -> Seen:
        """Run ``model`` over ``batches``; ``tokens`` are kept where these are, within the same budget."""
        space = batches.space if isinstance(batches, StoredBatches) else TensorSpace()
        stored, lengths = StoredBatches(space), list[tuple[int, ...]]()
        parts: list[Outputs] = []
        for batch, images in zip(batches, batch_sizes(batches), strict=True):
            found = run_once(model, batch, tokens=tokens)
            parts.append(replace(found, tokens=None))
            if found.tokens is not None:
                stored.append({"tokens": found.tokens.clone()}, images)
                lengths.append(found.lengths)
        features, pooled = (torch.cat([getattr(part, name) for part in parts]) for name in ("features", "pooled"))
        known = [part.logits for part in parts if part.logits is not None]
        objects = [part.detections for part in parts if part.detections is not None]
        logits = torch.cat(known) if known else None
        classes, boxes = zip(*objects, strict=True) if objects else ((), ())
        return cls(
            features, pooled, logits, stored, lengths, (torch.cat(classes), torch.cat(boxes)) if objects else None
        )


@dataclass
class Harness:
    """A model and its float original on the report images.

    Attributes:
        model: float, quantized or exported.
        source: its float original and the images; where ``alone``, the model itself in the place of the original.
        alone: whether there is no float original.
        report: the images that are scored.
        data: how images are read.
        batches: those of ``report``.
        templates: zero-shot prompts, one or several; None for that of the source.
        columns: of the targets.
        tokens: sides whose patch tokens are kept, ``report`` and ``train``; set before anything is run.
    """

    model: Any
    source: Source
    alone: bool
    report: ImageInputs
    data: DataConfig
    batches: Sequence[Batch]
    templates: str | Sequence[str] | None = None
    columns: Columns = field(default_factory=Columns)
    tokens: frozenset[str] = frozenset()
    _seen: dict[tuple[bool, bool], Seen] = field(default_factory=dict)

    @cached_property
    def targets(self) -> Targets:
        """How the labels become classes of the model; warns where they do not."""
        source, templates = self.source, self.templates
        return accuracy_targets(source.model, source.processor, self.report, templates or source.template)

    @cached_property
    def accuracy(self) -> AccuracyObjective | None:
        """None where the labels cannot be predicted."""
        labels = self.targets.labels(self.report)
        return None if labels is None else AccuracyObjective(self.batches, labels, self.targets.text_features)

    @cached_property
    def objects_column(self) -> str | None:
        """Column of the report images' objects, None if there is none."""
        return objects_column(self.report, self.columns.objects)

    @cached_property
    def objects(self) -> list[Objects]:
        """The objects of the report images, whose column must be there."""
        return objects_of(self.report, str(self.objects_column), self.columns.box_format)

    @cached_property
    def train(self) -> ImageInputs:
        """The search side of the data set."""
        return ImageInputs(self.source.search_images, self.source.processor)

    @cached_property
    def train_batches(self) -> Sequence[Batch]:
        return store_batches(self.train, self.data, space_of(self.data), progress=True)

    def seen(self, original: bool = False, train: bool = False) -> Seen:
        """What the model or its float original gives for the report or the training images, from one run."""
        original = original and not self.alone
        if (original, train) not in self._seen:
            model = self.source.model if original else self.model
            batches = self.train_batches if train else self.batches
            tokens = ("train" if train else "report") in self.tokens
            self._seen[original, train] = Seen.of(model, batches, tokens=tokens)
        return self._seen[original, train]

    def logits(self, original: bool = False) -> torch.Tensor:
        """Float32 [n, classes] that `accuracy`, which must be there, judges."""
        accuracy: Any = self.accuracy
        return accuracy.logits_of(self.seen(original))

    def score(self, hits: Callable[[bool], torch.Tensor]) -> Score:
        """Of what ``hits`` gives for the model (False) and for its float original (True)."""
        return Score.of(hits(False), None if self.alone else hits(True))


@dataclass(frozen=True)
class Task:
    """A kind of measurement.

    Attributes:
        problem: why it cannot be done, None if it can.
        run: name of a figure -> figure.
        by_default: whether it is done, where it can be, when nothing is asked for.
        tokens: sides whose patch tokens it reads.
    """

    problem: Callable[[Harness], str | None]
    run: Callable[[Harness], dict[str, Score]]
    by_default: bool = True
    tokens: tuple[str, ...] = ()
