"""Scores for dense use: every patch token counts, not the pooled feature."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, FeatureEncoder, ImageRange, batch_sizes, move, patch_tokens
from optimum_regcache.encoders.store import StoredBatches, TensorSpace
from optimum_regcache.encoders.tower import find_tower, reads_patches
from optimum_regcache.evaluation.objective import Given, Objective


class PatchCosineObjective(Objective):
    """Mean cosine between the patch tokens of a model and those of the float model (docs/method.md 8); needs no labels.

    Tokens are compared position by position, all of them: a deleted one scores what the fill gives there, which is what a
    dense task reads. CLS, trained registers and padding are left out.

    Args:
        float_model: the reference; its tokens are computed once and kept where the images are, within the same budget if these
            are `StoredBatches`; they take about as much.
        batches: the images.
    """

    name = "patch cosine"
    best_score = 1.0

    def __init__(self, float_model: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.reference = StoredBatches(batches.space if isinstance(batches, StoredBatches) else TensorSpace())
        self.lengths: list[list[int]] = []
        for batch, images in zip(batches, batch_sizes(batches), strict=True):
            tokens, lengths = self.unit_tokens(float_model, batch)
            self.reference.append({"tokens": tokens}, images)
            self.lengths.append(lengths)

    @classmethod
    def make(cls, given: Given) -> PatchCosineObjective:
        return cls(given.float_model, given.batches)

    def first(self, images: int) -> PatchCosineObjective:
        part = copy.copy(self)
        part.batches = ImageRange(self.batches, images)
        part.lengths = [known[:n] for n, known in zip(batch_sizes(part.batches), self.lengths, strict=False)]
        return part

    def scores(self, model: nn.Module | FeatureEncoder) -> torch.Tensor:
        scores: list[torch.Tensor] = []
        for batch, lengths, stored in zip(self.batches, self.lengths, self.reference, strict=False):
            reference = stored["tokens"][: sum(lengths)]
            tokens, found = self.unit_tokens(model, batch)
            scores += mean_cosines(tokens, reference, found, lengths)
        return torch.stack(scores)

    @torch.inference_mode()
    def unit_tokens(self, model: nn.Module | FeatureEncoder, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        """Normalised tokens [rows, D] on the CPU, and the rows of each image."""
        tokens, lengths = self.tokens(model, batch)
        return F.normalize(tokens, dim=-1).cpu(), lengths

    def tokens(self, model: nn.Module | FeatureEncoder, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        """What is compared, [rows, D], and the rows of each image."""
        return patch_tokens(model, batch)


def mean_cosines(
    tokens: torch.Tensor, reference: torch.Tensor, found: Sequence[int], lengths: Sequence[int]
) -> list[torch.Tensor]:
    """Mean cosine of the tokens of each image.

    Args:
        tokens, reference: [rows, D], normalised.
        found, lengths: rows of each image in ``tokens`` and in ``reference``.

    Raises:
        ValueError: they differ.
    """
    require(
        list(found) == list(lengths),
        f"The model gives {found[0]} patch tokens for an image of which the float model gives {lengths[0]}: which "
        "positions are left is not known. Use deletion.fill='neighbour_mean'.",
    )
    return [part.mean() for part in (tokens * reference).sum(-1).split(list(lengths))]


class ProjectedCosineObjective(PatchCosineObjective):
    """The same for the image tokens that the language model of a VLM reads: those behind the projector
    (``get_image_features``)."""

    name = "projected token cosine"

    def tokens(self, model: nn.Module | FeatureEncoder, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        call: Any = model
        inputs = move(batch, model)
        given = {"pixel_values": inputs["pixel_values"]}
        if "image_grid_thw" in inputs:
            given["image_grid_thw"] = inputs["image_grid_thw"]
        elif "pixel_attention_mask" in _parameters(model):  # Idefics3, SmolVLM: pictures x crops
            given["pixel_values"] = given["pixel_values"][:, None]
        output = call.get_image_features(**given)
        found = getattr(output, "pooler_output", output)
        images: list[torch.Tensor] = [image.float().reshape(-1, image.shape[-1]) for image in found]
        return torch.cat(images), [len(image) for image in images]


def projector_problem(model: Any) -> str | None:
    """Why there are no projected tokens to compare; None if there are."""
    kind = type(model).__name__
    if isinstance(model, FeatureEncoder) or not reads_patches(model, find_tower(model)):
        return f"{kind} is no vision tower with a language model around it"
    if not hasattr(model, "get_image_features"):
        return f"{kind} has no get_image_features"
    required = [n for n, p in _parameters(model).items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [name for name in required if name != "pixel_values"]
    if more:
        return f"get_image_features of {kind} needs {', '.join(more)} too, and a picture is one crop here"
    return None


def _parameters(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.get_image_features).parameters)
