"""Encoders of the CPU benchmark: shapes with random weights, input images, and how many operations an image costs."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from encoder_shapes import Shape, clip, dinov2
from optimum_regcache.data.images import ImageInputs, load_images
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.loading import load_model, load_processor

SHAPES: dict[str, Shape] = {
    "clip-b16": clip(768, 3072, 12, 12, 224, 16),
    "dinov2-s14": dinov2(384, 1536, 12, 6, 518, 14),  # position embeddings for 518 pixels, as published
}
TINY: dict[str, Shape] = {"clip-tiny": clip(64, 128, 4, 4, 64, 8), "dinov2-tiny": dinov2(64, 128, 4, 4, 80, 8)}


def make_model(name: str) -> PreTrainedModel:
    """The float tower called ``name``: a shape with random weights (seed 0), or the checkpoint in a directory or on the Hub."""
    torch.manual_seed(0)
    known = {**SHAPES, **TINY}
    model: Any = known[name]() if name in known else find_tower(load_model(name)).module
    model.eval().requires_grad_(False).set_attn_implementation("sdpa")
    return model


def make_inputs(name: str, images: str | None, count: int, side: int) -> list[Batch]:
    """``count`` images, one mapping each, without a batch axis: standard normal pixels, or a data set's.

    Raises:
        ValueError: too few images.
    """
    if images is None:
        generator = torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(3, side, side, generator=generator)} for _ in range(count)]
    data = ImageInputs(load_images(images, num_samples=count), load_processor(name))
    if len(data) < count:
        raise ValueError(f"{images} has {len(data)} images; {count} are needed. Lower --calibration or --batch-sizes.")
    return [{k: v for k, v in data[i].items() if k not in ("labels", "label")} for i in range(count)]


@dataclass(frozen=True)
class Operations:
    """Operations of one image in 1e9 (a multiplication and an addition count as two).

    Attributes:
        linears: linear layers of the blocks.
        attention: the two products of attention, queries x keys and probabilities x values.
        patch_embedding: the patch projection.
    """

    linears: float
    attention: float
    patch_embedding: float

    @property
    def total(self) -> float:
        """Sum of the parts. Norms, activation functions, softmax and pooling heads are left out."""
        return self.linears + self.attention + self.patch_embedding

    def to_dict(self) -> dict[str, float]:
        """JSON-compatible, with the total."""
        return {**asdict(self), "total": self.total}


def count_operations(model: PreTrainedModel, side: int) -> Operations:
    """Operations of the float ``model`` on a square image of ``side`` pixels, from the shapes of its modules."""
    tower = find_tower(model)
    patch = tower.module.get_submodule(tower.family.patch_embedding).weight
    kernel = patch.shape[-1] if patch.ndim == 4 else int(tower.config.patch_size)
    patches = (side // kernel) ** 2
    tokens = patches + tower.num_prefix_tokens
    linears = attention = 0
    for block in range(len(tower.blocks)):
        linears += sum(2 * tokens * m.weight.numel() for m in tower.block_linears(block).values())
        width = tower.num_heads * tower.head_dim
        attention += 2 * 2 * tokens**2 * width
    return Operations(linears / 1e9, attention / 1e9, 2 * patches * patch.numel() / 1e9)
