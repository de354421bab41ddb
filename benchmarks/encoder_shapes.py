"""Encoders with random weights, by their sizes: what the benchmarks measure when no checkpoint is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

Shape = Callable[[], PreTrainedModel]


def _sizes(width: int, mlp: int, blocks: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return dict(zip(names, (width, mlp, blocks, heads, image, patch), strict=True))


def clip(*sizes: int) -> Shape:
    """CLIP vision tower: width, MLP width, blocks, heads, image and patch size in pixels."""
    return lambda: CLIPVisionModel(CLIPVisionConfig(**_sizes(*sizes)))


def siglip(*sizes: int) -> Shape:
    """SigLIP vision tower; sizes as for :func:`clip`."""
    return lambda: SiglipVisionModel(SiglipVisionConfig(**_sizes(*sizes)))


def dinov2(*sizes: int) -> Shape:
    """DINOv2; sizes as for :func:`clip`. The image size is that of the position embeddings."""
    values = _sizes(*sizes)
    ratio, rest = divmod(values.pop("intermediate_size"), values["hidden_size"])
    if rest:
        raise ValueError(f"DINOv2's MLP width is a multiple of its width, got {sizes[1]} for {sizes[0]}.")
    return lambda: Dinov2Model(Dinov2Config(**values, mlp_ratio=ratio))


def clip_full_b16() -> PreTrainedModel:
    """CLIP ViT-B/16 with its text tower, which stays float."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={"image_size": 224, "patch_size": 16}))
