"""Final features of an encoder: what quantization is meant to preserve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from optimum_regcache.architectures import find_tower
from optimum_regcache.data import Batch


class FeatureEncoder(ABC):
    """An encoder that is no torch module and takes batches on the CPU, such as an exported one."""

    @abstractmethod
    def image_features(self, batch: Batch) -> torch.Tensor:
        """Pooled features [B, D], float32."""


def move(batch: Batch, model: nn.Module | FeatureEncoder) -> Batch:
    """Batch on the model's device; floating tensors in the model's dtype."""
    if isinstance(model, FeatureEncoder):
        return batch
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {
        k: v.to(parameter.device, parameter.dtype) if v.is_floating_point() else v.to(parameter.device)
        for k, v in batch.items()
    }


def image_features(model: Any, batch: Batch) -> torch.Tensor:
    """Pooled features [B, D], float32.

    Projected image embeddings for CLIP- and SigLIP-like models; otherwise the tower's pooled output, the CLS token if it
    has none, and the mean token where there is no CLS either.
    """
    inputs = move(batch, model)
    if isinstance(model, FeatureEncoder):
        return model.image_features(inputs)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        output = model.get_image_features(**inputs)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()
    tower = find_tower(model)
    output = tower.module(**inputs)
    if getattr(output, "image_embeds", None) is not None:
        return output.image_embeds.float()
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.float()
    if getattr(output, "feature_maps", None) is not None:
        return output.feature_maps[-1].flatten(2).mean(-1).float()
    last = output.last_hidden_state
    return (last[:, 0] if tower.num_prefix_tokens else last.mean(1)).float()


@torch.inference_mode()
def encode(model: nn.Module | FeatureEncoder, batches: Iterable[Batch]) -> torch.Tensor:
    """Features of all batches, [n, D] float32 on the CPU."""
    return torch.cat([image_features(model, batch).cpu() for batch in batches])
