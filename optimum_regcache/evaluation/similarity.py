"""Objectives that compare distributions or neighbours: what becomes of an image among others, or among the classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, FeatureEncoder, ImageRange, class_logits, count_images, encode
from optimum_regcache.encoders.tower import has_classifier
from optimum_regcache.evaluation.objective import Bank, Given, Objective, require_labels

NEIGHBOURS = 10
TEMPERATURE = 0.07  # of the weighted k-NN of arXiv 1805.01978 and 2104.14294 (DINO)


class SimilarityObjective(Objective):
    """Minus the KL divergence, in nats, between the similarities of an image to a bank of others (docs/method.md 8).

    ``p = softmax(<f, bank> / T)`` of the float model's feature ``f``, ``q`` the same of the model's; both look at the float
    features of the bank. A label-free stand-in for zero-shot logits: other images take the place of the class names.

    Args:
        float_model: the reference; T is the one of its contrastive loss (``logit_scale``) where it has one, else 0.07.
        batches: the images.
        bank: the other images.

    Raises:
        ValueError: a bank of fewer than two other images.
    """

    name = "minus KL of similarities"
    best_score = 0.0
    needs_bank = True

    def __init__(self, float_model: nn.Module, batches: Sequence[Batch], bank: Bank) -> None:
        _require_others(bank, "similarity_kl")
        self.batches, self.bank = batches, bank
        scale: Any = getattr(float_model, "logit_scale", None)
        self.temperature = TEMPERATURE if scale is None else float(torch.exp(-scale.detach().double()))
        self.reference = self._logits(_features(float_model, batches, bank))

    @classmethod
    def make(cls, given: Given) -> SimilarityObjective:
        return cls(given.float_model, given.batches, _bank(given, "similarity_kl"))

    def first(self, images: int) -> SimilarityObjective:
        part = copy.copy(self)
        part.batches, part.reference = ImageRange(self.batches, images), self.reference[:images]
        return part

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        return -divergence(self.reference, self._logits(F.normalize(encode(model, self.batches), dim=-1)))

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        """float64 [n, m], -inf at the own image."""
        logits = (features @ self.bank.features.T).double() / self.temperature
        return logits.masked_fill(~self.bank.others(len(features)), float("-inf"))


class NeighbourObjective(Objective):
    """k-NN accuracy: 1 where the nearest images of a labelled bank vote for the image's label, else 0 (docs/method.md 8).

    The 10 most similar images (cosine) vote with weight ``exp(cosine / 0.07)``. The bank is that of the float model: a score
    then depends on its own image only, and no configuration costs a pass over the bank. Labels need not be the model's.

    Args:
        batches: the images.
        labels: int64 [n].
        bank: labelled images.

    Raises:
        ValueError: a bank without labels or of fewer than two other images, or more than half of the images without another
            one of their class in it.
    """

    name = "k-NN accuracy"
    labels_read = "any"
    needs_bank = True

    def __init__(self, batches: Sequence[Batch], labels: torch.Tensor, bank: Bank) -> None:
        require_labels(labels, batches)
        _require_others(bank, "knn")
        self.batches, self.labels, self.bank = batches, labels, bank
        if bank.labels is None:
            raise ValueError("objective='knn' needs labels of the bank's images. Use objective='similarity_kl'.")
        self.names, self.classes = bank.labels.unique(return_inverse=True)
        alike = (labels[:, None] == bank.labels) & bank.others(len(labels))
        alone = int((~alike.any(1)).sum())
        require(
            2 * alone <= len(labels),
            f"objective='knn' needs several images of a class: for {alone} of {len(labels)} there is no other one among "
            f"{len(self.classes)}. Use more images (data.num_samples), or objective='similarity_kl'.",
        )

    @classmethod
    def make(cls, given: Given) -> NeighbourObjective:
        if given.labels is None:
            raise ValueError("objective='knn' needs labels. Use objective='similarity_kl'.")
        return cls(given.batches, given.labels, _bank(given, "knn"))

    def first(self, images: int) -> NeighbourObjective:
        part = copy.copy(self)
        part.batches, part.labels = ImageRange(self.batches, images), self.labels[:images]
        return part

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        return self.predictions(model).eq(self.labels).float()

    def predictions(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        """Predicted classes, int64 [n]; -1 where the feature is no number."""
        features = F.normalize(encode(model, self.batches), dim=-1)
        others = self.bank.others(len(features))
        cosines = (features @ self.bank.features.T).masked_fill(~others, float("-inf"))
        nearest = cosines.topk(min(NEIGHBOURS, int(others.sum(1).min())), dim=1)
        weights = ((nearest.values - 1) / TEMPERATURE).double().exp()  # the common factor changes no vote
        votes = torch.zeros(len(features), len(self.names), dtype=torch.float64)
        votes.scatter_add_(1, self.classes[nearest.indices], weights)
        return self.names[votes.argmax(1)].masked_fill(features.isnan().any(1), -1)


class LogitObjective(Objective):
    """Minus the KL divergence, in nats, between the class probabilities of the float model's classifier and a model's; needs
    no labels.

    Args:
        float_model: the reference, with a classifier.
        batches: the images.

    Raises:
        ValueError: no classifier.
    """

    name = "minus KL of class probabilities"
    best_score = 0.0

    def __init__(self, float_model: nn.Module, batches: Sequence[Batch]) -> None:
        require(
            has_classifier(float_model),
            f"objective='logit_kl' needs a classifier; {type(float_model).__name__} has none. Use "
            "objective='similarity_kl'.",
        )
        self.batches, self.reference = batches, _class_logits(float_model, batches)

    @classmethod
    def make(cls, given: Given) -> LogitObjective:
        return cls(given.float_model, given.batches)

    def first(self, images: int) -> LogitObjective:
        part = copy.copy(self)
        part.batches, part.reference = ImageRange(self.batches, images), self.reference[:images]
        return part

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        return -divergence(self.reference, _class_logits(model, self.batches))


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(logits)) of each row, in nats.

    Args:
        reference, logits: float64 [n, m]; -inf, in both at the same places, takes no part.

    Returns:
        float32 [n].
    """
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(reference == float("-inf"), 0.0)
    return terms.sum(-1).float()


@torch.inference_mode()
def _class_logits(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """float64 [n, classes] on the CPU."""
    return torch.cat([class_logits(model, batch).double() for batch in batches])


def _features(model: nn.Module, batches: Sequence[Batch], bank: Bank) -> torch.Tensor:
    """Normalised features of the images in the float model, which the bank may know already."""
    if bank.own is None:
        return F.normalize(encode(model, batches), dim=-1)
    return bank.features[bank.own : bank.own + count_images(batches)]


def _bank(given: Given, kind: str) -> Bank:
    if given.bank is None:
        raise ValueError(f"objective={kind!r} compares with a bank of reference images: pass bank=Bank.of(...).")
    return given.bank


def _require_others(bank: Bank, kind: str) -> None:
    others = len(bank.features) - (bank.own is not None)
    require(others >= 2, f"objective={kind!r} needs at least two other images to compare with, got {others}.")
