"""Objectives: one score per image, higher is better, so that configurations can be compared pairwise."""

from __future__ import annotations

import copy
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import (
    Batch,
    FeatureEncoder,
    FirstImages,
    count_images,
    encode,
    image_features,
    move,
    pooled_features,
)
from optimum_regcache.encoders.tower import find_tower, has_classifier

DEFAULT_TEMPLATE = "a photo of a {}."


class Objective(ABC):
    """Scores a model on fixed batches.

    Attributes:
        name: shown in reports.
        batches: the images, in the order of the scores.
    """

    name: str
    batches: Sequence[Batch]  # `scores` runs the model once for each, in order

    @abstractmethod
    def first(self, images: int) -> Objective:
        """The same objective on the first ``images``; what is known of them is not computed again."""

    @abstractmethod
    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        """float32 [n], one score per image in the order of the batches."""


class CosineObjective(Objective):
    """Cosine between the features of a model and those of the float model (docs/method.md 8); needs no labels.

    Args:
        float_model: the reference; its features are computed once.
        batches: the images.
    """

    name = "feature cosine"

    def __init__(self, float_model: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.reference = F.normalize(encode(float_model, batches), dim=-1)

    def first(self, images: int) -> CosineObjective:
        part = copy.copy(self)
        part.batches, part.reference = FirstImages(self.batches, images), self.reference[:images]
        return part

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        features = F.normalize(encode(model, self.batches), dim=-1)
        return (features * self.reference).sum(-1)


class AccuracyObjective(Objective):
    """Top-1 accuracy: 1 where the prediction equals the label, else 0.

    Uses the model's classifier if it has one, otherwise zero-shot classification against ``text_features``.

    Args:
        batches: the images.
        labels: int64 [n].
        text_features: float [classes, D], normalised; None for models with a classifier.
    """

    name = "top-1 accuracy"

    def __init__(
        self, batches: Sequence[Batch], labels: torch.Tensor, text_features: torch.Tensor | None = None
    ) -> None:
        count = count_images(batches)
        require(len(labels) == count, f"{len(labels)} labels for {count} images.")
        self.batches, self.labels, self.text_features = batches, labels, text_features

    def first(self, images: int) -> AccuracyObjective:
        return AccuracyObjective(FirstImages(self.batches, images), self.labels[:images], self.text_features)

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        return self.predictions(model).eq(self.labels).float()

    @torch.inference_mode()
    def predictions(self, model: Any) -> torch.Tensor:
        """Predicted classes, int64 [n]."""
        predictions = []
        for batch in self.batches:
            if self.text_features is not None:
                logits = F.normalize(image_features(model, batch), dim=-1).cpu() @ self.text_features.T
            else:
                logits = model(**move(batch, model)).logits.float().cpu()
            predictions.append(logits.argmax(-1))
        return torch.cat(predictions)


@torch.inference_mode()
def score_both(
    model: nn.Module, cosine: CosineObjective, accuracy: AccuracyObjective | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores of both objectives, each float32 [n], from one run of the model over their common images."""
    if accuracy is None:
        return cosine.scores(model), None
    if accuracy.text_features is not None:
        features = F.normalize(encode(model, cosine.batches), dim=-1)
        predictions = (features @ accuracy.text_features.T).argmax(-1)
    else:
        tower, outputs = find_tower(model), list[Any]()
        handle = tower.module.register_forward_hook(lambda module, args, output: outputs.append(output))
        parts, classes = [], []
        try:
            for batch in cosine.batches:
                outputs.clear()
                classes.append(model(**move(batch, model)).logits.float().cpu().argmax(-1))
                parts.append(pooled_features(tower, outputs[0]).cpu())
        finally:
            handle.remove()
        features, predictions = F.normalize(torch.cat(parts), dim=-1), torch.cat(classes)
    return (features * cosine.reference).sum(-1), predictions.eq(accuracy.labels).float()


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


@torch.inference_mode()
def zero_shot_features(model: Any, processor: Any, names: list[str], template: str = DEFAULT_TEMPLATE) -> torch.Tensor:
    """Normalised text features [classes, D] of ``template.format(name)``.

    Of a list of synonyms ("tench, Tinca tinca") the first is taken. SigLIP's text tower expects padding to its full length.

    Raises:
        ValueError: the model has no text tower, the processor no tokenizer or one without its files, or the template no
            place for the name.
    """
    check_template(template)
    problem = zero_shot_problem(model, processor)
    require(problem is None, f"Zero-shot accuracy cannot be computed: {problem}. Use objective='cosine'.")
    tokenizer = processor.tokenizer
    length = model.config.text_config.max_position_embeddings
    padding = "max_length" if "siglip" in str(model.config.model_type) else True
    prompts = [template.format(name.split(",")[0]) for name in names]
    tokens = tokenizer(prompts, padding=padding, max_length=length, truncation=True, return_tensors="pt")
    output = model.get_text_features(**move(dict(tokens), model))
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return F.normalize(features.float().cpu(), dim=-1)


def make_objective(
    kind: str,
    float_model: nn.Module,
    batches: Sequence[Batch],
    labels: torch.Tensor | None,
    text_features: torch.Tensor | None,
) -> Objective:
    """``cosine`` or ``accuracy``.

    Raises:
        ValueError: accuracy without labels, or without a classifier and without text features.
    """
    if kind == "cosine":
        return CosineObjective(float_model, batches)
    require(kind == "accuracy", f"Unknown objective {kind!r}; expected cosine or accuracy.")
    if labels is None:
        raise ValueError("objective='accuracy' needs labels that the model can predict. Use objective='cosine'.")
    require(
        text_features is not None or has_classifier(float_model),
        f"objective='accuracy' needs a classifier or a text tower with class names; {type(float_model).__name__} gives "
        "neither here. Use objective='cosine'.",
    )
    return AccuracyObjective(batches, labels, text_features)
