"""The objective for dense use: every patch token counts, not the pooled feature."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, FeatureEncoder, ImageRange, batch_sizes, patch_tokens
from optimum_regcache.encoders.store import StoredBatches, TensorSpace
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
            tokens, lengths = _unit_tokens(float_model, batch)
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
            tokens, found = _unit_tokens(model, batch)
            require(
                found == lengths,
                f"The model gives {found[0]} patch tokens for an image of which the float model gives {lengths[0]}: which "
                "positions are left is not known. Use deletion.fill='neighbour_mean'.",
            )
            cosines = (tokens * reference).sum(-1)
            scores += [part.mean() for part in cosines.split(lengths)]
        return torch.stack(scores)


@torch.inference_mode()
def _unit_tokens(model: nn.Module | FeatureEncoder, batch: Batch) -> tuple[torch.Tensor, list[int]]:
    """Normalised patch tokens [rows, D] on the CPU, and the rows of each image."""
    tokens, lengths = patch_tokens(model, batch)
    return F.normalize(tokens, dim=-1).cpu(), lengths
