"""SYNTHETIC: an encoder with a planted outlier mechanism of known place, to prove the algorithm on ground truth.

Nothing here is trained except a linear classifier. The weights of a `ViTForImageClassification` (6 blocks, width 64, 64
patches) are random, except for a circuit planted in block :data:`PLANTED_BLOCK`:

- images carry 2 to 4 *black* patches (tier 1) and 14 *dark* patches (tier 2); the patch embedding writes darkness into
  channel 0 of the residual stream;
- one attention head is a sink head: every token looks for dark tokens, and the head writes into channel 1 how much of its
  attention found a black one ("a sink is present");
- two MLP neurons explode on dark tokens *unless* channel 1 says that a sink is present, and write the massive value into
  channel 2. The black tokens of the image are sink enough to keep the dark ones quiet, not to keep themselves quiet;
- the rest of that MLP carries all class information, in activations of ordinary size.

Hence naive static W8A8 loses the class (one scale for exploding and ordinary neurons); deleting the black tokens alone wakes
the dark ones; a prefixed sink alone quiets the black tokens only in part; both together restore the output.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from optimum_regcache.encoders.tower import Tower, find_tower

if TYPE_CHECKING:
    from datasets import Dataset

PLANTED_BLOCK = 3
NUM_CLASSES = 10
NUM_DARK = 14
SPLITS = ("train", "search", "calibration", "report")

_SIDE, _PATCH, _WIDTH, _HEADS, _DEPTH, _HIDDEN = 8, 8, 64, 4, 6, 128
_DARKNESS, _GATE, _MASSIVE = 0, 1, 2
_CONTENT = slice(8, 36)  # channels with the class information before the planted MLP
_OUTPUT = slice(36, 64)  # channels that only the planted MLP and later blocks write
_BLACK, _DARK = -1.0, -0.5  # pixel values in [-1, 1]
_NEURONS = (0, 1)

# constants of the circuit in units of the normalised (LayerNorm) stream, see the module docstring
SINK_LOGIT = 1.2
VALUE_OFFSET, VALUE_SPAN = 4.4, 2.0
DARKNESS_WEIGHT = 0.2
THRESHOLD = -0.45
EXPLOSION = 2500.0


def _patterns() -> np.ndarray:
    """One zero-mean texture per class, [classes, 3, patch, patch], about unit variance x 0.3."""
    rng = np.random.default_rng(1234)
    patterns = rng.uniform(-0.5, 0.5, (NUM_CLASSES, 3, _PATCH, _PATCH))
    return patterns - patterns.mean((1, 2, 3), keepdims=True)


def black_patches(split: str, index: int, seed: int = 0) -> list[int]:
    """Ground truth: patch numbers (0 to 63, CLS not counted) of the black patches of an image."""
    return _layout(split, index, seed)[1]


def _layout(split: str, index: int, seed: int) -> tuple[np.random.Generator, list[int], list[int], int]:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(SPLITS.index(split), index)))
    label = int(rng.integers(NUM_CLASSES))
    order = [int(p) for p in rng.permutation(_SIDE * _SIDE)]
    black = int(rng.integers(2, 5))
    return rng, sorted(order[:black]), sorted(order[black : black + NUM_DARK]), label


def render(split: str, index: int, seed: int = 0) -> tuple[Image.Image, int]:
    """Image ``index`` of a split (64 x 64 RGB) and its class."""
    rng, black, dark, label = _layout(split, index, seed)
    pattern = _patterns()[label]
    pixels = np.empty((_SIDE * _SIDE, 3, _PATCH, _PATCH))
    for patch in range(_SIDE * _SIDE):
        if patch in black:
            pixels[patch] = _BLACK
        elif patch in dark:
            pixels[patch] = _DARK
        else:
            noise = rng.normal(0, 0.25, pattern.shape)
            pixels[patch] = 0.45 * pattern + noise - noise.mean()
    grid = pixels.reshape(_SIDE, _SIDE, 3, _PATCH, _PATCH).transpose(0, 3, 1, 4, 2)
    image = grid.reshape(_SIDE * _PATCH, _SIDE * _PATCH, 3)
    return Image.fromarray(np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8)), label


def load_dataset(split: str, num_samples: int, seed: int = 0) -> Dataset:
    """The first images of a split as a ``datasets.Dataset`` (columns image, label); splits are disjoint."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    rows = [render(split, i, seed) for i in range(num_samples)]
    return Dataset.from_dict(
        {"image": [r[0] for r in rows], "label": [r[1] for r in rows]},
        features=Features(
            {"image": ImageFeature(), "label": ClassLabel(names=[f"class {i}" for i in range(NUM_CLASSES)])}
        ),
    )


def build_processor() -> Any:
    """Image processor: no resizing, pixels to [-1, 1]."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    side = _SIDE * _PATCH
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)


def _linears(tower: Tower, block: int) -> tuple[Any, ...]:
    """Query, key, value and output projection of attention, and both layers of the MLP."""
    out = tower.attention(block).get_submodule(tower.family.out)
    return (*tower.projections(block), out, *tower.norm_consumers(block, 1), tower.mlp_out(block))


def random_block(linears: tuple[Any, ...], generator: torch.Generator, channels: slice, gain: float) -> None:
    """Random attention and MLP that read and write only ``channels``."""
    width = channels.stop - channels.start

    def fill(linear: nn.Linear, read: slice | None, write: slice | None, std: float) -> None:
        linear.weight.zero_()
        linear.bias.zero_()
        rows, columns = write or slice(None), read or slice(None)
        shape = linear.weight[rows, columns].shape
        linear.weight[rows, columns] = torch.randn(shape, generator=generator) * std

    query, key, value, out, fc1, fc2 = linears
    fill(query, channels, None, 0.6 * width**-0.5)
    fill(key, channels, None, 0.6 * width**-0.5)
    fill(value, channels, None, width**-0.5)
    fill(out, None, channels, gain * _WIDTH**-0.5)
    fill(fc1, channels, None, 1.2 * width**-0.5)
    fill(fc2, None, channels, gain * _HIDDEN**-0.5)


def plant_sink(linears: tuple[Any, ...], generator: torch.Generator) -> None:
    """The sink head, the exploding neurons and the class-carrying MLP."""
    (query, key, value, out, fc1, fc2), head = linears, _WIDTH // _HEADS
    # head 0: constant query, key = darkness; value = darkness above that of a dark token
    for projection in (query, key, value):
        projection.weight[:head] = 0
        projection.bias[:head] = 0
    query.bias[0] = 1.0
    key.weight[0, _DARKNESS] = SINK_LOGIT * head**0.5
    value.weight[0, _DARKNESS] = 1.0 / VALUE_SPAN
    value.bias[0] = -VALUE_OFFSET / VALUE_SPAN
    out.weight[:, :head] = 0
    out.weight[_GATE, 0] = 1.0
    # exploding neurons: darkness against the sink signal
    neurons = list(_NEURONS)
    fc1.weight[neurons] = 0
    fc1.bias[neurons] = EXPLOSION * THRESHOLD
    fc1.weight[neurons, _DARKNESS] = EXPLOSION * DARKNESS_WEIGHT
    fc1.weight[neurons, _GATE] = -EXPLOSION
    fc2.weight.zero_()
    fc2.weight[_MASSIVE, neurons] = 0.1
    rest = [i for i in range(_HIDDEN) if i not in neurons]
    shape = fc2.weight[_OUTPUT][:, rest].shape
    fc2.weight[_OUTPUT.start : _OUTPUT.stop, rest[0] :] = torch.randn(shape, generator=generator) * 0.35


@lru_cache(maxsize=1)
def _built() -> ViTForImageClassification:
    generator = torch.Generator().manual_seed(7)
    config = ViTConfig(
        hidden_size=_WIDTH,
        num_attention_heads=_HEADS,
        num_hidden_layers=_DEPTH,
        intermediate_size=_HIDDEN,
        image_size=_SIDE * _PATCH,
        patch_size=_PATCH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
    )
    config.id2label = {i: f"class {i}" for i in range(NUM_CLASSES)}
    config.label2id = {v: k for k, v in config.id2label.items()}
    model: Any = ViTForImageClassification(config).eval().requires_grad_(False)
    vit: Any = model.vit
    content = _CONTENT.stop - _CONTENT.start
    projection = vit.embeddings.patch_embeddings.projection
    projection.weight.zero_()
    projection.bias.zero_()
    random = torch.randn(content, 3, _PATCH, _PATCH, generator=generator)
    random -= random.mean((1, 2, 3), keepdim=True)  # flat patches have no content
    projection.weight[_CONTENT] = random * 0.25
    projection.weight[_DARKNESS] = -8.0 / (3 * _PATCH * _PATCH)
    vit.embeddings.cls_token.zero_()
    vit.embeddings.position_embeddings.zero_()
    tokens = vit.embeddings.position_embeddings.shape[1]
    vit.embeddings.position_embeddings[0, :, _CONTENT] = torch.randn(tokens, content, generator=generator)
    tower = find_tower(vit)
    for index in range(len(tower.blocks)):
        channels = _CONTENT if index <= PLANTED_BLOCK else _OUTPUT
        random_block(_linears(tower, index), generator, channels, 0.3)
        if index == PLANTED_BLOCK:
            plant_sink(_linears(tower, index), generator)
    _fit_classifier(model)
    return model


def _fit_classifier(model: Any) -> None:
    """Ridge regression on the CLS features of 600 training images; only the output channels are read."""
    processor = build_processor()
    rows = [render("train", i) for i in range(600)]
    pixels = processor(images=[r[0] for r in rows], return_tensors="pt").pixel_values
    with torch.inference_mode():
        features = model.vit(pixels).last_hidden_state[:, 0, _OUTPUT].double()
    target = nn.functional.one_hot(torch.tensor([r[1] for r in rows]), NUM_CLASSES).double()
    mean = features.mean(0)
    centred = features - mean
    gram = centred.T @ centred + 1e-3 * len(rows) * centred.var() * torch.eye(centred.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (target - target.mean(0)))
    model.classifier.weight.zero_()
    model.classifier.weight[:, _OUTPUT] = weight.T.float()
    model.classifier.bias.copy_((target.mean(0) - mean @ weight).float())


def build_planted_model() -> ViTForImageClassification:
    """A fresh copy of the planted model, float32, evaluation mode. SYNTHETIC, see the module docstring."""
    return copy.deepcopy(_built())
