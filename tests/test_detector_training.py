"""The training code of the detector: it starts from CLIP's blocks and embeddings, and its targets follow the pictures."""
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from optimum_regcache.data import reference, scenes
from reference_training.detection import START, START_SIZE, DetectionTask, build_detector
from reference_training.recipes import RECIPES

RECIPE = RECIPES["yolos-scenes"]


@pytest.fixture(scope="module")
def task() -> DetectionTask:
    return DetectionTask(RECIPE, 24, 0)


def test_blocks_and_embeddings_are_those_of_clip(task: DetectionTask) -> None:
    """With their norm in front, which the detector's embeddings stand for up to a scale that is the mean one."""
    pixels = task.development[:8]
    model, clip = build_detector(RECIPE, 0, pixels), reference.load(START).model
    tower: Any = getattr(clip.vision_model, "vision_model", clip.vision_model)
    patches = 1 + (scenes.SIZE // 8) ** 2
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(pixels))
        found = model.vit.embeddings(pixels)
        assert found.shape == (8, patches + RECIPE.detection_tokens, RECIPE.width)
        assert F.cosine_similarity(found[:, :patches], states, dim=-1).mean() > 0.95
        for mine, theirs in zip(model.vit.encoder.layer, tower.encoder.layers, strict=True):
            after = theirs(states, attention_mask=None)
            torch.testing.assert_close(mine(states), after, rtol=1e-4, atol=1e-3)
            states = after
    assert model.config.id2label == dict(enumerate(scenes.SHAPES))


def test_targets_follow_mirrored_pictures(task: DetectionTask) -> None:
    """A box holds the same pixels as before: its shape."""
    pixels, targets = task.batch(0, 24)
    again = task.batch(0, 24)
    assert torch.equal(pixels, again[0])
    rows = {p.numpy().tobytes(): i for i, p in enumerate(task.normalise(task.pixels))}
    mirrored = 0
    for picture, target in zip(pixels, targets, strict=True):
        row = rows.get(picture.numpy().tobytes())
        kept = row is not None
        mirrored += not kept
        row = rows[picture.flip(-1).contiguous().numpy().tobytes()] if row is None else row
        boxes = task.targets[row]["boxes"]
        assert torch.equal(target["class_labels"], task.targets[row]["class_labels"])
        assert torch.equal(target["boxes"][:, 1:], boxes[:, 1:])
        torch.testing.assert_close(target["boxes"][:, 0], boxes[:, 0] if kept else 1 - boxes[:, 0])
    assert 0 < mirrored < 24
    assert torch.isfinite(torch.tensor(task.score(build_detector(RECIPE, 0, task.development[:8]))))


def test_boxes_begin_at_the_places_of_their_tokens(task: DetectionTask) -> None:
    with torch.no_grad():
        boxes = build_detector(RECIPE, 0, task.development)(task.development[:32]).pred_boxes.mean(0)
    number = torch.arange(RECIPE.detection_tokens)
    places = torch.stack(((number % 5 + 0.5) / 5, (number // 5 + 0.5) / 4), 1)
    assert (boxes[:, :2] - places).abs().max() < 0.1
    torch.testing.assert_close(boxes[:, 2:], torch.full((20, 2), START_SIZE), rtol=0, atol=0.02)
