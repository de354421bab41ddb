"""Objectives: one score per image, higher is better, so that configurations can be compared pairwise."""

from __future__ import annotations

import copy
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.outputs import Outputs, run_once
from optimum_regcache.encoders.passes import (
    Batch,
    FeatureEncoder,
    ImageRange,
    class_logits,
    count_images,
    encode,
    image_features,
    move,
)
from optimum_regcache.encoders.tower import has_classifier

DEFAULT_TEMPLATE = "a photo of a {}."
_TEXTS = 256  # in one pass


@dataclass(frozen=True)
class Bank:
    """Reference images that others are compared with, by their features in the float model.

    Attributes:
        features: float32 [m, D], normalised.
        labels: int64 [m], None where nothing asks for them.
        own: row of the first image that is scored, where the scored images are rows of the bank, in the same order: none of
            them is compared with itself. None where they are not in the bank.
    """

    features: torch.Tensor
    labels: torch.Tensor | None = None
    own: int | None = None

    def __post_init__(self) -> None:
        count = len(self.features)
        require(
            self.labels is None or len(self.labels) == count, f"Not a label for each of {count} images of the bank."
        )

    @classmethod
    def of(
        cls, model: nn.Module, *parts: Sequence[Batch], labels: torch.Tensor | None = None, own: int | None = None
    ) -> Bank:
        """The images of all ``parts``, as ``model`` sees them."""
        return cls(torch.cat([F.normalize(encode(model, part), dim=-1) for part in parts]), labels, own)

    def others(self, images: int) -> torch.Tensor:
        """bool [images, m]: which rows each of the first ``images`` scored images is compared with."""
        rows = torch.arange(len(self.features))
        own = torch.full((images, 1), -1) if self.own is None else self.own + torch.arange(images)[:, None]
        return rows[None] != own


@dataclass(frozen=True)
class Given:
    """What objectives are made of; each takes what it needs.

    Attributes:
        float_model: the reference.
        batches: the images to score.
        labels: int64 [n], the images' classes.
        text_features: float [classes, D], normalised, where classes are told zero-shot.
        bank: other images.
    """

    float_model: nn.Module
    batches: Sequence[Batch]
    labels: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    bank: Bank | None = None


class Objective(ABC):
    """Scores a model on fixed batches.

    Attributes:
        name: shown in reports.
        labels_read: ``model``: labels in the numbers of the model's classes; ``any``: labels in whatever numbers; ``none``.
        needs_bank: whether images are compared with those of a `Bank`.
        best_score: of every image under the float model; None where that depends on the image.
        batches: the images, in the order of the scores.
    """

    name: str
    labels_read: ClassVar[Literal["none", "model", "any"]] = "none"
    needs_bank: ClassVar[bool] = False
    best_score: ClassVar[float | None] = None
    batches: Sequence[Batch]  # `scores` runs the model once for each, in order

    @classmethod
    @abstractmethod
    def make(cls, given: Given) -> Objective:
        """From what there is.

        Raises:
            ValueError: something is missing, or does not fit.
        """

    @abstractmethod
    def first(self, images: int) -> Objective:
        """The same objective on the first ``images``; what is known of them is not computed again."""

    @abstractmethod
    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        """float32 [n], one score per image in the order of the batches; nan (or the lowest, where scores are 0 and 1) for an
        image that the model gives no numbers for."""

    def ceiling(self, float_model: nn.Module) -> float:
        """Mean score of the float model that is the reference."""
        return float(self.scores(float_model).mean())


class CosineObjective(Objective):
    """Cosine between the features of a model and those of the float model (docs/method.md 8); needs no labels.

    Args:
        float_model: the reference; its features are computed once.
        batches: the images.
    """

    name = "feature cosine"
    best_score = 1.0

    def __init__(self, float_model: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.reference = F.normalize(encode(float_model, batches), dim=-1)

    @classmethod
    def make(cls, given: Given) -> CosineObjective:
        return cls(given.float_model, given.batches)

    def first(self, images: int) -> CosineObjective:
        part = copy.copy(self)
        part.batches, part.reference = ImageRange(self.batches, images), self.reference[:images]
        return part

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        features = F.normalize(encode(model, self.batches), dim=-1)
        return (features * self.reference).sum(-1)

    def ceiling(self, float_model: nn.Module) -> float:
        del float_model  # its features are there already
        return float((self.reference * self.reference).sum(-1).mean())


class AccuracyObjective(Objective):
    """Top-1 accuracy: 1 where the prediction equals the label, else 0.

    Uses the model's classifier if it has one, otherwise zero-shot classification against ``text_features``. An image whose
    logits are no numbers counts as wrong.

    Args:
        batches: the images.
        labels: int64 [n].
        text_features: float [classes, D], normalised; None for models with a classifier.
    """

    name = "top-1 accuracy"
    labels_read = "model"

    def __init__(
        self, batches: Sequence[Batch], labels: torch.Tensor, text_features: torch.Tensor | None = None
    ) -> None:
        require_labels(labels, batches)
        self.batches, self.labels, self.text_features = batches, labels, text_features

    @classmethod
    def make(cls, given: Given) -> AccuracyObjective:
        if given.labels is None:
            raise ValueError("objective='accuracy' needs labels that the model can predict. Use objective='cosine'.")
        require(
            given.text_features is not None or has_classifier(given.float_model),
            f"objective='accuracy' needs a classifier or a text tower with class names; {type(given.float_model).__name__} "
            "gives neither here. Use objective='cosine'.",
        )
        return cls(given.batches, given.labels, given.text_features)

    def first(self, images: int) -> AccuracyObjective:
        return AccuracyObjective(ImageRange(self.batches, images), self.labels[:images], self.text_features)

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        return self.predictions(model).eq(self.labels).float()

    @torch.inference_mode()
    def predictions(self, model: Any) -> torch.Tensor:
        """Predicted classes, int64 [n]; -1 where the logits are no numbers."""
        return torch.cat([predicted_classes(self._logits(model, batch)) for batch in self.batches])

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """float32 [B, classes]; a classifier may be any module."""
        if self.text_features is not None:
            return F.normalize(image_features(model, batch), dim=-1).cpu() @ self.text_features.T
        return class_logits(model, batch)

    def logits_of(self, outputs: Outputs) -> torch.Tensor:
        """float32 [B, classes]."""
        if self.text_features is not None:
            return F.normalize(outputs.features, dim=-1) @ self.text_features.T
        return cast("torch.Tensor", outputs.logits)  # of a classifier, which the objective is only made for


def require_labels(labels: torch.Tensor, batches: Sequence[Batch]) -> None:
    """Raise ``ValueError`` unless there is a label for each image."""
    count = count_images(batches)
    require(len(labels) == count, f"{len(labels)} labels for {count} images.")


def label_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes come before the label, int64 [n]: 0 where it is predicted, all classes where logits are no numbers; of
    equal logits the first comes first.

    Args:
        logits: float [n, classes].
        labels: int64 [n].
    """
    own, classes = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1])
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return before.sum(1).masked_fill(logits.isnan().any(1), logits.shape[1])


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit, int64 [B]; -1 where one is nan, which argmax would take for the largest."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


@torch.inference_mode()
def score_both(
    model: nn.Module, cosine: CosineObjective, accuracy: AccuracyObjective | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores of both objectives, each float32 [n], from one run of the model over their common images."""
    if accuracy is None:
        return cosine.scores(model), None
    if accuracy.text_features is not None:
        return _score_features(F.normalize(encode(model, cosine.batches), dim=-1), cosine, accuracy)
    runs = [run_once(model, batch) for batch in cosine.batches]
    features = F.normalize(torch.cat([run.features for run in runs]), dim=-1)
    predictions = torch.cat([predicted_classes(accuracy.logits_of(run)) for run in runs])
    return (features * cosine.reference).sum(-1), predictions.eq(accuracy.labels).float()


def score_reference(
    float_model: nn.Module, cosine: CosineObjective, accuracy: AccuracyObjective | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`score_both` of the model that is the reference, whose features are known."""
    if accuracy is None or accuracy.text_features is not None:
        return _score_features(cosine.reference, cosine, accuracy)
    return score_both(float_model, cosine, accuracy)


def _score_features(
    features: torch.Tensor, cosine: CosineObjective, accuracy: AccuracyObjective | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hits = None
    if accuracy is not None and accuracy.text_features is not None:
        hits = predicted_classes(features @ accuracy.text_features.T).eq(accuracy.labels).float()
    return (features * cosine.reference).sum(-1), hits


def check_template(template: str) -> None:
    """Refuse a zero-shot prompt in which the class name has no place, or more than one.

    Raises:
        ValueError: anything but exactly one ``{}``.
    """
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except (TypeError, ValueError):
        fields = []
    require(
        fields == [("", "", None)],
        f"The template must hold {{}} once, where the class name goes, and no other braces, for example "
        f"'{DEFAULT_TEMPLATE}'; got {template!r}.",
    )


def zero_shot_problem(model: Any, processor: Any) -> str | None:
    """Why class names cannot be compared with images; None if they can."""
    if not hasattr(model, "get_text_features"):
        return f"{type(model).__name__} has no text tower"
    tokenizer = getattr(processor, "tokenizer", None)
    words, known = 0 if tokenizer is None else len(tokenizer), int(model.config.text_config.vocab_size)
    if words <= known // 2:  # without its files, transformers makes a tokenizer of special tokens only
        return f"the tokenizer has {words} tokens and the text tower {known}; save the full processor beside the model"
    return None


def zero_shot_features(
    model: Any, processor: Any, names: list[str], template: str | Sequence[str] = DEFAULT_TEMPLATE
) -> torch.Tensor:
    """Normalised text features [classes, D] of ``template.format(name)``; of several templates the mean of the normalised ones.

    Of a list of synonyms ("tench, Tinca tinca") the first is taken.

    Raises:
        ValueError: the model has no text tower, the processor no tokenizer or one without its files, or a template no place
            for the name.
    """
    templates = [template] if isinstance(template, str) else template
    for one in templates:
        check_template(one)
    problem = zero_shot_problem(model, processor)
    require(problem is None, f"Zero-shot accuracy cannot be computed: {problem}. Use objective='cosine'.")
    firsts = [name.split(",")[0] for name in names]
    found = [encode_texts(model, processor, [one.format(name) for name in firsts]) for one in templates]
    return found[0] if len(found) == 1 else F.normalize(torch.stack(found).mean(0), dim=-1)


@torch.inference_mode()
def encode_texts(model: Any, processor: Any, texts: Sequence[str]) -> torch.Tensor:
    """Normalised features of texts, float32 [m, D] on the CPU. SigLIP's text tower expects padding to its full length.

    Args:
        model, processor: without a `zero_shot_problem`.
        texts: cut where they are longer than the text tower takes.
    """
    length = model.config.text_config.max_position_embeddings
    padding = "max_length" if "siglip" in str(model.config.model_type) else True
    found = []
    for start in range(0, len(texts), _TEXTS):
        part = list(texts[start : start + _TEXTS])
        tokens = processor.tokenizer(part, padding=padding, max_length=length, truncation=True, return_tensors="pt")
        output = model.get_text_features(**move(dict(tokens), model))
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        found.append(F.normalize(features.float().cpu(), dim=-1))
    return torch.cat(found)
