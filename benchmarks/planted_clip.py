"""SYNTHETIC: an encoder of the size of CLIP ViT-B/16 with a sink mechanism planted in a known block, and images that set it
off.

The circuit is that of ``optimum_regcache.data.reference.planted`` (6 blocks of width 64), here in block :data:`SINK_BLOCK` of
12 and widened to 768: every channel, head and hidden unit is there several times over, with small noise between the copies, so
the function is that of the narrow encoder while every product has the real size. Its trigger is not darkness but the colour
magenta, which photographs have little of: the images are photographs on which 2 to 4 magenta patches and 14 paler ones are
drawn.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.tower import find_tower

SINK_BLOCK, DEPTH = 6, 12
SIDE, PATCH = 224, 16
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
WIDE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
TRIGGER, PALE = (255, 0, 255), (180, 75, 180)


def _config(sizes: dict[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(**sizes, num_hidden_layers=DEPTH, image_size=SIDE, patch_size=PATCH, hidden_act="gelu")


@torch.no_grad()
def _narrow() -> CLIPVisionModel:
    """The circuit at width 64."""
    generator = torch.Generator().manual_seed(7)
    model: Any = CLIPVisionModel(_config(NARROW)).eval()
    tower = find_tower(model)
    embeddings: Any = tower.module.get_submodule("embeddings")
    weight: Any = embeddings.patch_embedding.weight
    weight.zero_()
    content = planted._CONTENT
    random = torch.randn(content.stop - content.start, 3, PATCH, PATCH, generator=generator)
    random -= random.mean((2, 3), keepdim=True)  # flat patches have no content
    weight[content] = random * 0.12
    for channel, share in enumerate((0.5, -1.0, 0.5)):  # magenta: red and blue without green
        weight[planted._DARKNESS, channel] = 2.1 * share / PATCH**2
    embeddings.class_embedding.zero_()
    positions: Any = embeddings.position_embedding.weight
    positions.zero_()
    positions[:, content] = torch.randn(len(positions), content.stop - content.start, generator=generator)
    for index in range(DEPTH):
        channels = content if index <= SINK_BLOCK else planted._OUTPUT
        planted.random_block(planted._linears(tower, index), generator, channels, 0.3)
        if index == SINK_BLOCK:
            planted.plant_sink(planted._linears(tower, index), generator)
    return model


def _copies(narrow: int, wide: int, head: tuple[int, int] | None = None) -> torch.Tensor:
    """int64 [wide]: which narrow unit each wide one repeats; within heads of the two sizes ``head`` where they matter."""
    units = torch.arange(wide)
    if head is None:
        return units % narrow
    small, large = head
    return units // large % (narrow // small) * small + units % large % small


@torch.no_grad()
def planted_clip() -> CLIPVisionModel:
    """Width 768, 12 blocks, 224 pixels; float32, evaluation mode. SYNTHETIC, see the module docstring."""
    generator = torch.Generator().manual_seed(8)
    narrow, model = _narrow(), CLIPVisionModel(_config(WIDE)).eval()
    small, large = find_tower(narrow), find_tower(model)
    stream = _copies(64, 768)
    hidden = _copies(128, 3072)
    heads = _copies(64, 768, (16, 64))
    source, target = small.module.get_submodule("embeddings"), large.module.get_submodule("embeddings")
    for name in ("class_embedding", "patch_embedding.weight"):
        target.get_parameter(name).copy_(source.get_parameter(name)[stream])
    target.get_parameter("position_embedding.weight").copy_(
        source.get_parameter("position_embedding.weight")[:, stream]
    )
    # query, key, value, output, both layers of the MLP: (rows, columns, factor); logits of 64 channels over sqrt(64)
    # are twice those of 16 over sqrt(16)
    units = [
        (heads, stream, 0.5), (heads, stream, 1.0), (heads, stream, 1.0), (stream, heads, 1.0), (hidden, stream, 1.0),
        (stream, hidden, 1.0),
    ]  # fmt: skip
    for index in range(DEPTH):
        pairs = zip(planted._linears(small, index), planted._linears(large, index), units, strict=True)
        for old, new, (rows, columns, factor) in pairs:
            ratio = factor * old.in_features / new.in_features
            weight = old.weight[rows][:, columns] * ratio
            noise = torch.randn(weight.shape, generator=generator) * 0.1 * weight.abs().median()
            new.weight.copy_(weight + noise)
            new.bias.copy_(old.bias[rows] * factor)
    return model.requires_grad_(False)


def trigger_patches(index: int) -> tuple[list[int], list[int]]:
    """Ground truth of image ``index``: numbers of the magenta patches and of the pale ones, CLS not counted."""
    rng = np.random.default_rng(np.random.SeedSequence(entropy=5, spawn_key=(index,)))
    order = [int(p) for p in rng.permutation((SIDE // PATCH) ** 2)]
    count = int(rng.integers(2, 5))
    return sorted(order[:count]), sorted(order[count : count + planted.NUM_DARK])


def with_triggers(images: Iterator[Image.Image], folder: Path) -> int:
    """Write photographs with the patches drawn on them as PNG files of 224 pixels; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for number, image in enumerate(images, 1):
        size = min(image.size)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        square = image.convert("RGB").crop((left, top, left + size, top + size)).resize((SIDE, SIDE))
        pixels = np.array(square)
        for patches, colour in zip(trigger_patches(number - 1), (TRIGGER, PALE), strict=True):
            for patch in patches:
                row, column = divmod(patch, SIDE // PATCH)
                pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = colour
        Image.fromarray(pixels).save(folder / f"{number - 1:05d}.png")
    return number
