"""The objectives by name: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, count_images
from optimum_regcache.evaluation.dense import PatchCosineObjective
from optimum_regcache.evaluation.objective import AccuracyObjective, Bank, CosineObjective, Given, Objective
from optimum_regcache.evaluation.similarity import LogitObjective, NeighbourObjective, SimilarityObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "cosine": CosineObjective,
    "patch_cosine": PatchCosineObjective,
    "similarity_kl": SimilarityObjective,
    "logit_kl": LogitObjective,
    "accuracy": AccuracyObjective,
    "knn": NeighbourObjective,
}  # the names are those of `SearchConfig.objective`


def make_objective(
    kind: str,
    float_model: nn.Module,
    batches: Sequence[Batch],
    labels: torch.Tensor | None = None,
    text_features: torch.Tensor | None = None,
    bank: Bank | None = None,
) -> Objective:
    """The objective called ``kind``.

    Args:
        kind: a name of :data:`OBJECTIVES`.
        float_model: the reference.
        batches: the images to score.
        labels: int64 [n], for those that read labels.
        text_features: float32 [classes, D], normalised, for zero-shot accuracy.
        bank: for those that compare with other images.

    Raises:
        ValueError: no such objective, or something that it needs is missing: labels, a classifier or text features, a bank.
    """
    require(kind in OBJECTIVES, f"Unknown objective {kind!r}; expected one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[kind].make(Given(float_model, batches, labels, text_features, bank))


def bank_for(
    kind: str,
    float_model: nn.Module,
    calibration: Sequence[Batch],
    scored: Sequence[Batch],
    labels: torch.Tensor | None = None,
) -> Bank | None:
    """The bank of the objective ``kind`` for the images ``scored``: the calibration images and themselves; None if it needs
    none. For images that are not in it: ``dataclasses.replace(bank, own=None)``.

    Args:
        kind: a name of :data:`OBJECTIVES`.
        float_model: the reference.
        calibration, scored: the images.
        labels: int64, of the calibration images and then the scored ones.

    Raises:
        ValueError: not a label for each image.
    """
    if not OBJECTIVES[kind].needs_bank:
        return None
    return Bank.of(float_model, calibration, scored, labels=labels, own=count_images(calibration))
