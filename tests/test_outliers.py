"""Counting outlier tokens: against plain NumPy, on the planted model, and on scenes whose object is known."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import MODELS, TOWERS

from optimum_regcache import DeletionConfig
from optimum_regcache.data import scenes
from optimum_regcache.data.images import ImageInputs, object_boxes
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation import measure_outliers
from optimum_regcache.evaluation.outliers import REPORTED_RATIO, cross_cosine, outside_box
from optimum_regcache.registers import prepare_tower, set_deletion


def images(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)} for _ in range(count)]


def block_inputs(model, batches) -> list[np.ndarray]:
    """[images, tokens, D] at the input of every block."""
    tower = find_tower(model)
    seen: list[list[torch.Tensor]] = [[] for _ in tower.blocks]
    handles = [
        block.register_forward_pre_hook(lambda module, args, i=i: seen[i].append(args[0]))
        for i, block in enumerate(tower.blocks)
    ]
    with torch.no_grad():
        for batch in batches:
            tower.module(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(rows).numpy() for rows in seen]


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_ratios_and_counts_agree_with_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_regcache.evaluation.outliers.REPORTED_RATIO", 1.3)  # random tokens are no outliers
    model, batches = TOWERS[name].build(), images(2)
    report, lead = measure_outliers(model, batches), find_tower(model).num_prefix_tokens
    for block, states in enumerate(block_inputs(model, batches)):
        norms = np.abs(states[:, lead:]).max(-1)
        ordered = np.sort(norms, 1)
        ratios = norms / ordered[:, (norms.shape[1] - 1) // 2][:, None]  # torch's median is the lower one
        largest = np.sort(ratios.max(1))
        assert float(report.ratio[block]) == pytest.approx(largest[(len(largest) - 1) // 2], rel=1e-5)
        assert float(report.per_image[block]) == pytest.approx((ratios >= 1.3).sum(1).mean())
        assert float(report.images[block]) == pytest.approx((ratios >= 1.3).any(1).mean())


def test_planted_outliers_are_found_where_they_were_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_regcache.evaluation.outliers.REPORTED_RATIO", 8.0)  # the largest are 15x the median
    inputs = ImageInputs(planted.load_dataset("report", 24), planted.build_processor())
    report = measure_outliers(planted.build_planted_model(), inputs.batches(12))
    assert report.first_block == planted.PLANTED_BLOCK + 1  # the block's MLP writes them
    black = np.mean([len(planted.black_patches("report", i)) for i in range(24)])
    assert float(report.per_image[report.first_block]) == pytest.approx(black, abs=1.0)
    assert int(report.fc2_ratio.argmax()) == planted.PLANTED_BLOCK
    assert report.cosine is not None
    assert report.normal_cosine is not None
    assert report.cosine > 0.99 > report.normal_cosine
    assert report.on_background is None  # no boxes were given
    assert "from the input of block 4 on" in report.describe()[0]
    assert report.to_dict()["first_block"] == 4


def test_a_model_without_outliers_is_said_to_have_none() -> None:
    report = measure_outliers(TOWERS["clip"].build(), images(2))
    assert report.first_block is None
    first, second = report.describe()
    assert first.startswith("no block input with outlier tokens (>= 20x the median) in half of the images")
    assert first.endswith(f"{float(report.ratio.max()):.1f}x")
    assert second.startswith("fc2 input: largest token")
    assert REPORTED_RATIO == 20


def test_no_images() -> None:
    with pytest.raises(ValueError, match="No images to look for outlier tokens in"):
        measure_outliers(TOWERS["clip"].build(), [])


def test_outside_box() -> None:
    # a 4 x 4 grid; the object covers the lower right quarter
    outside = outside_box(torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), 16)
    assert outside is not None
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[2:, 2:] = False
    assert torch.equal(outside[0].view(4, 4), expected)
    assert not outside[1].any()
    assert outside_box(torch.zeros(1, 4), 12) is None  # no square grid


def test_boxes_of_scenes_hold_the_shape() -> None:
    dataset = scenes.load_dataset("search", 20)
    boxes = object_boxes(dataset)
    assert boxes is not None
    for row, box in zip(dataset, boxes, strict=True):
        pixels, size = np.asarray(row["image"]).astype(float), scenes.SIZE
        colour = np.asarray(scenes.COLOURS[scenes.CLASS_NAMES[row["label"]].split(" ")[0]], dtype=float)
        tones = np.linspace(0.85, 1.1, 26)[:, None] * colour
        y, x = np.nonzero(np.abs(pixels[:, :, None] - np.clip(tones, 0, 255)).max(-1).min(-1) <= 4)
        left, top, right, bottom = (v * size for v in box)
        assert left - 1 <= x.min() <= left + 5
        assert right - 5 <= x.max() <= right
        assert top - 1 <= y.min() <= top + 5
        assert bottom - 5 <= y.max() <= bottom
    assert object_boxes(planted.load_dataset("search", 2)) is None
    pixels = [[10.0, 20.0, 300.0, 200.0]] * 20
    assert object_boxes(dataset.remove_columns("box").add_column("box", pixels)) is None  # a box of the user's own


def test_padding_and_what_is_installed_are_respected() -> None:
    siglip2 = MODELS["siglip2"]
    model, batch = siglip2.build(), siglip2.inputs(batch=2)
    expected = measure_outliers(model, [batch])
    spoilt = dict(batch)
    padding = ~batch["pixel_attention_mask"].bool()
    assert bool(padding.any())
    spoilt["pixel_values"] = batch["pixel_values"].masked_fill(padding.unsqueeze(-1), 1e4)
    torch.testing.assert_close(measure_outliers(model, [spoilt]).ratio, expected.ratio)
    clip, batches = TOWERS["clip"].build(), images(1)
    before = measure_outliers(clip, batches)
    prepare_tower(clip)
    set_deletion(clip, DeletionConfig(block=2, count=2))
    after = measure_outliers(clip, batches)
    assert torch.equal(after.ratio[:2], before.ratio[:2])
    assert float(after.ratio[2]) < float(before.ratio[2])  # what the delete block computes on lacks them
    assert float(after.ratio[3]) != float(before.ratio[3])


def test_share_on_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_regcache.evaluation.outliers.REPORTED_RATIO", 1.2)
    model, batches = TOWERS["clip"].build(), images(1)
    everywhere = measure_outliers(model, batches, [[0.0, 0.0, 0.0, 0.0]] * 3)
    nowhere = measure_outliers(model, batches, [[0.0, 0.0, 1.0, 1.0]] * 3)
    assert (everywhere.on_background, everywhere.background) == (1.0, 1.0)
    assert (nowhere.on_background, nowhere.background) == (0.0, 0.0)


def test_cross_cosine_compares_different_images_only() -> None:
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = cross_cosine(states, torch.tensor([0, 0, 1]))
    assert found is not None
    assert found[0] == pytest.approx(0.0)  # the equal pair is of one image
    assert cross_cosine(states[:2], torch.tensor([0, 0])) is None
