"""Everything that is judged of an encoder, from one run: features, class logits and patch tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from optimum_regcache.encoders.passes import (
    Batch,
    FeatureEncoder,
    image_features,
    move,
    patch_tokens,
    pooled_features,
)
from optimum_regcache.encoders.tower import find_tower, has_boxes, has_classifier, reads_patches
from optimum_regcache.math.linear import fast_linears


@fast_linears()
def class_logits(model: Any, batch: Batch) -> torch.Tensor:
    """What a model with a classifier says, [B, classes], float32 on the CPU."""
    return model(**move(batch, model)).logits.float().cpu()


@dataclass(frozen=True)
class Outputs:
    """What one run over a batch gives; float32 on the CPU.

    Attributes:
        features: [B, D], as `image_features`.
        pooled: the same, but [B, M] where a larger model reads patch tokens: the mean of these.
        logits: [B, classes] of a classifier, None for others.
        tokens: [rows, D], as `patch_tokens`; None if they were not asked for.
        lengths: rows of each image.
        detections: class logits [B, Q, C + 1] and boxes [B, Q, 4] (centre and size, fractions of the image) of a detector,
            None for others.
    """

    features: torch.Tensor
    pooled: torch.Tensor
    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    lengths: tuple[int, ...] = ()
    detections: tuple[torch.Tensor, torch.Tensor] | None = None


@fast_linears()
def _detections(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(**move(batch, model))
    return output.logits.float().cpu(), output.pred_boxes.float().cpu()


@torch.inference_mode()
def run_once(model: Any, batch: Batch, *, tokens: bool = False) -> Outputs:
    """Run ``model`` once.

    Args:
        model: torch module, or an exported encoder.
        batch: the images.
        tokens: give patch tokens too.

    Raises:
        ValueError: ``tokens`` of an encoder that gives none.
    """
    if isinstance(model, FeatureEncoder):
        return _run_exported(model, batch, tokens)
    tower, outputs = find_tower(model), list[Any]()
    handle = tower.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits: torch.Tensor | None = None
    detections: tuple[torch.Tensor, torch.Tensor] | None = None
    try:
        if has_classifier(model):
            logits = class_logits(model, batch)
            features = pooled_features(tower, outputs[0])
        elif has_boxes(model):
            detections = _detections(model, batch)
            features = pooled_features(tower, outputs[0])
        else:
            features = image_features(model, batch)
    finally:
        handle.remove()
    features = features.clone()  # it may be a view, which would hold on to all tokens
    mean = reads_patches(model, tower) and not tower.family.packed
    if not (mean or tokens):
        return Outputs(features.cpu(), features.cpu(), logits, detections=detections)
    rows, lengths = patch_tokens(model, batch, outputs[0])
    pooled = torch.stack([part.mean(0) for part in torch.split(rows, lengths)]) if mean else features
    kept = rows.cpu() if tokens else None
    return Outputs(features.cpu(), pooled.cpu(), logits, kept, tuple(lengths), detections)


def _run_exported(model: FeatureEncoder, batch: Batch, tokens: bool) -> Outputs:
    output = model.run(batch)
    features = model.features_of(output).clone()  # no view either
    logits = getattr(output, "logits", None)
    if not tokens:
        return Outputs(features, features, logits)
    rows, lengths = patch_tokens(model, batch, output)
    return Outputs(features, features, logits, rows, tuple(lengths))
