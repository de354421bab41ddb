"""Masks and depths in the geometry of the processor, and the figures of linear heads, on cases small enough for the eye."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from transformers import CLIPImageProcessor, ViTImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.loading import DEPTHS, MASKS, image_column
from optimum_regcache.data.pixels import Geometry, class_masks, depth_maps, geometry_problem, target_column
from optimum_regcache.evaluation.pixels import (
    DepthProbe,
    PatchGrid,
    SegmentationProbe,
    class_shares,
    confusion,
    depth_errors,
    influences,
    mean_iou,
    pixel_accuracy,
)

NONE = {"do_rescale": False, "do_normalize": False}
CROP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}
WIDER = {"size": {"shortest_edge": 12}, "crop_size": {"height": 16, "width": 20}}
PROCESSORS: dict[str, Any] = {
    "shorter side, centre crop": lambda: CLIPImageProcessor(**CROP, resample=0, **NONE),
    "with Pillow": lambda: BitImageProcessorPil(**CROP, resample=0, **NONE),
    "a crop that pads": lambda: CLIPImageProcessor(**WIDER, resample=0, **NONE),
    "stretched": lambda: ViTImageProcessor(size={"height": 16, "width": 16}, resample=0, **NONE),
}


def picture(width: int = 45, height: int = 31, seed: int = 0) -> np.ndarray:
    """Blocks of colours, uint8 [height, width, 3]; the first channel is never 0."""
    blocks = np.random.default_rng(seed).integers(1, 200, (-(-height // 4), -(-width // 4), 3))
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width].astype(np.uint8)


def data(pictures: list[Any], **columns: list[Any]) -> Dataset:
    images = {"image": pictures, **columns}
    return Dataset.from_dict(images, features=Features({name: ImageFeature() for name in images}))


def clip() -> CLIPImageProcessor:
    return CLIPImageProcessor(**CROP)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_mask_of_the_colours_stays_with_its_image(name: str) -> None:
    """Where the processor takes the nearest pixel for images too, red IS the mask."""
    arrays = [picture(), picture(31, 45, 1), picture(64, 64, 2)]
    inputs = ImageInputs(
        data([Image.fromarray(a) for a in arrays], mask=[Image.fromarray(a[..., 0]) for a in arrays]),
        PROCESSORS[name](),
    )
    for item, mask in zip(inputs, class_masks(inputs, "mask"), strict=True):
        red = item["pixel_values"][0].to(torch.int16)
        assert mask.shape == red.shape
        assert torch.equal(mask.clamp(min=0), red)  # padding is 0 in the one and -1 in the other
        assert bool((mask == -1).any()) == (name == "a crop that pads")


def test_the_resampling_of_the_model_moves_no_mask() -> None:
    """Bicubic images differ from the nearest colour at the edges of blocks only."""
    array = picture(48, 48)
    processor = CLIPImageProcessor(**CROP, **NONE)
    inputs = ImageInputs(data([Image.fromarray(array)], mask=[Image.fromarray(array[..., 0])]), processor)
    away = (class_masks(inputs, "mask")[0] - inputs[0]["pixel_values"][0]).abs()
    assert float(away.median()) < 12
    shifted = (class_masks(inputs, "mask")[0].roll(2, 1) - inputs[0]["pixel_values"][0]).abs()
    assert float(shifted.median()) > 3 * float(away.median())


def test_a_processor_that_does_more_is_refused() -> None:
    class Flips(CLIPImageProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            return {"pixel_values": found["pixel_values"].flip(1)}  # RGB to BGR

    with pytest.raises(ValueError, match=r"Flips does more to pictures than to resize, crop and pad them"):
        Geometry(Flips(**CROP))(40, 30)
    with pytest.raises(ValueError, match=r"A picture of 5000 x 4000 pixels is too large for dense tasks"):
        Geometry(clip())(5000, 4000)


def test_ignored_numbers_and_all_forms_of_masks() -> None:
    array = np.zeros((32, 32), np.uint8)
    array[:, 16:] = 7
    array[:4] = 255
    palette = Image.fromarray(array)
    palette.putpalette([value for n in range(256) for value in (n, 0, 255 - n)])
    wide = Image.fromarray(array.astype(np.uint16))
    images = [Image.fromarray(picture(32, 32))]
    expected = class_masks(ImageInputs(data(images, mask=[Image.fromarray(array)]), clip()), "mask")[0]
    assert expected.unique().tolist() == [0, 7]  # the ignored rows are cropped
    whole = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for mask in (Image.fromarray(array), palette, wide):
        inputs = ImageInputs(data(images, mask=[mask]), whole)
        assert torch.equal(
            class_masks(inputs, "mask")[0],
            torch.from_numpy(array.astype(np.int16)).masked_fill(torch.from_numpy(array) == 255, -1),
        )
        assert class_masks(inputs, "mask", ignore=-1)[0].unique().tolist() == [0, 7, 255]
    depths = ImageInputs(data(images, depth=[Image.fromarray(array.astype(np.float32) / 2)]), whole)
    found = depth_maps(depths, "depth")[0]
    assert torch.equal(found.isnan(), torch.from_numpy(array == 0))
    assert float(found[10, 20]) == 3.5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (16, 31)), r"is 16 x 31 pixels and its image 32 x 32\. Scale it to the size of the image"),
        (Image.new("RGB", (32, 32)), r"holds colours \(mode RGB\); class numbers are expected, one a pixel"),
        (Image.fromarray(np.full((32, 32), 26001, np.uint16)), r"mask of row 0 \(column 'mask'\) holds the class \[26001\]"),
        (None, r"Row 0 of the data has nothing in column 'mask'\. Leave it out, or name another with --mask-column"),
    ],
)  # fmt: skip
def test_what_is_no_mask_says_why(mask: Any, message: str) -> None:
    inputs = ImageInputs(data([Image.fromarray(picture(32, 32))], mask=[mask]), clip())
    with pytest.raises(ValueError, match=message):
        class_masks(inputs, "mask")


def test_a_lossy_mask_is_refused(tmp_path: Any) -> None:
    Image.new("L", (32, 32)).save(tmp_path / "mask.jpg")
    inputs = ImageInputs(data([Image.fromarray(picture(32, 32))], mask=[str(tmp_path / "mask.jpg")]), clip())
    with pytest.raises(
        ValueError, match=r"mask\.jpg \(row 0\) of column 'mask' is a JPEG, which changes class numbers"
    ):
        class_masks(inputs, "mask")


def test_columns_are_found_by_name_and_images_are_not_taken_for_masks() -> None:
    blank = [Image.new("L", (8, 8))]
    table = data(blank, annotation=blank, depth_map=blank).select_columns(["annotation", "depth_map", "image"])
    assert image_column(table) == "image"
    assert image_column(table.select_columns(["annotation"])) == "annotation"  # nothing else is there
    inputs = ImageInputs(table, clip())
    assert target_column(inputs, MASKS, "--mask-column") == "annotation"
    assert target_column(inputs, DEPTHS, "--depth-column") == "depth_map"
    assert target_column(inputs, DEPTHS, "--depth-column", "annotation") == "annotation"
    labelled = ImageInputs(table.remove_columns("annotation").add_column("label", [3]), clip())
    assert target_column(labelled, MASKS, "--mask-column") is None  # numbers
    with pytest.raises(
        ValueError, match=r"no column of pictures 'label'; those of pictures are depth_map, image\. Give one"
    ):
        target_column(labelled, MASKS, "--mask-column", "label")
    ready = ImageInputs([{"pixel_values": torch.zeros(3, 8, 8)}])
    assert "holds ready pixel_values" in str(geometry_problem(ready))
    assert geometry_problem(inputs) is None


# --- figures


def test_patches_of_a_picture() -> None:
    grid = PatchGrid.of((5, 7), (2, 3))
    assert (grid.rows, grid.columns) == (2, 2)  # a row and a column fill no patch
    target = torch.arange(35).reshape(5, 7)
    assert grid.patches(target)[1].tolist() == [3, 4, 5, 10, 11, 12]
    assert grid.covered(target).shape == (4, 6)
    two = torch.arange(16.0).reshape(8, 2)  # two states of four tokens
    assert grid.tokens(two)[1].tolist() == [2, 3, 10, 11]
    with pytest.raises(ValueError, match=r"gives 7 patch tokens for 2 x 2 patches: their places are not known"):
        grid.tokens(two[:7])
    shares = class_shares(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 2, -1, 1, 1, 1]]), 3, PatchGrid.of((2, 6), (2, 3)))
    assert shares.tolist() == [pytest.approx([3 / 6, 1 / 6, 1 / 6]), [0, 1, 0]]


def test_upsampling_is_that_of_pixel_centres() -> None:
    grid = PatchGrid(1, 2, 1, 2)
    assert grid.upsample(torch.tensor([[0.0], [1.0]])).tolist() == [[[0.0, 0.25, 0.75, 1.0]]]


def test_iou_of_a_case_on_paper() -> None:
    mask = torch.tensor([[0, 0, 0, 1], [1, 1, -1, -1]])
    found = torch.tensor([[0, 0, 1, 1], [1, -1, 0, 2]])
    matrix = confusion(mask, found, 3)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mean_iou(matrix) == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert pixel_accuracy(matrix) == pytest.approx(4 / 6)
    assert confusion(torch.full((2, 2), -1), found[:, :2], 3).sum() == 0


def test_iou_and_its_error_are_those_of_all_images() -> None:
    rng = np.random.default_rng(0)
    masks, found = (torch.from_numpy(rng.integers(0, 4, (9, 8, 8))) for _ in range(2))
    found = torch.where(torch.from_numpy(rng.random((9, 8, 8)) < 0.6), masks, found)
    parts = torch.stack([confusion(m, f, 4) for m, f in zip(masks, found, strict=True)])
    for figure, reference in (
        (mean_iou, lambda a, b: jaccard_score(a, b, average="macro")),
        (pixel_accuracy, accuracy_score),
    ):
        values = influences(parts, figure)
        flat = [masks.flatten().numpy(), found.flatten().numpy()]
        assert float(values.mean()) == pytest.approx(reference(*flat))
        left = []
        for i in range(9):
            rest = [n for n in range(9) if n != i]
            left.append(reference(masks[rest].flatten().numpy(), found[rest].flatten().numpy()))
        jackknife = np.sqrt(8 / 9 * ((np.array(left) - np.mean(left)) ** 2).sum())
        assert float(values.std() / 3) == pytest.approx(jackknife)
    assert influences(parts[:1], mean_iou).tolist() == [mean_iou(parts[0])]


def tokens_of(masks: torch.Tensor, grid: PatchGrid, count: int) -> torch.Tensor:
    """Tokens from which the shares of classes can be read."""
    noise = torch.randn(len(masks) * grid.places, 6, generator=torch.Generator().manual_seed(0))
    noise[:, :count] += 8 * torch.cat([class_shares(mask, count, grid) for mask in masks]).float()
    return noise


@pytest.mark.parametrize("count", [2, 3])
def test_a_head_learns_what_tokens_say(count: int) -> None:
    grid = PatchGrid(4, 4, 4, 4)
    masks = torch.randint(0, count, (12, 4, 4), generator=torch.Generator().manual_seed(1))
    masks = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    tokens = tokens_of(masks, grid, count)
    probe = SegmentationProbe(tokens, torch.cat([class_shares(mask, count, grid) for mask in masks]))
    centres = [
        probe.predictions(part, grid)[1::4, 1::4].eq(mask[1::4, 1::4]).float().mean()
        for part, mask in zip(tokens.split(16), masks, strict=True)
    ]
    assert float(torch.stack(centres).mean()) > 0.95
    tokens[0, 0] = float("nan")
    found = probe.predictions(tokens[:16], grid)
    assert (found[:4, :4] == -1).all()
    assert (found[8:, 8:] >= 0).all()
    with pytest.raises(ValueError, match=r"no numbers for 1 of 16 training patches"):
        SegmentationProbe(tokens[:16], class_shares(masks[0], count, grid))


def test_a_patch_of_two_classes_counts_for_both() -> None:
    """A third of every patch is class 1: with tokens that say nothing, its probability is a third."""
    probe = SegmentationProbe(torch.zeros(6, 2), torch.tensor([[2 / 3, 1 / 3]] * 6, dtype=torch.float64))
    scores = probe._probe.scores(torch.zeros(1, 2))  # pyright: ignore[reportPrivateUsage]
    assert scores.softmax(1)[0].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-4)


def test_depth_errors_on_paper() -> None:
    truth = torch.tensor([[1.0, 2.0], [4.0, float("nan")]])
    errors = depth_errors(truth, torch.tensor([[1.5, 2.0], [3.5, 9.0]]))
    assert errors == pytest.approx({"RMSE": (0.5 / 3) ** 0.5, "AbsRel": (0.5 + 0 + 0.125) / 3, "delta1": 2 / 3})
    with pytest.raises(ValueError, match=r"gives no numbers for patch tokens of a report image, and so no depth"):
        depth_errors(truth, torch.full((2, 2), float("nan")))


def test_a_depth_head_reads_log_depths_and_leaves_out_what_was_not_measured() -> None:
    grid = PatchGrid(1, 2, 1, 2)
    logs = torch.linspace(-1, 1, 40, dtype=torch.float64)
    depths = logs.exp()[:, None].repeat(1, 2)
    depths[3], depths[4, 0] = float("nan"), float("nan")
    tokens = torch.stack([logs, torch.zeros(40, dtype=torch.float64)], 1)
    tokens[3] = 100  # a patch without a measurement says nothing
    found = DepthProbe(tokens, depths).predictions(tokens[[10, 10]], grid)
    assert found.shape == (1, 4)
    assert float(found[0, 0]) == pytest.approx(float(depths[10, 0]), rel=0.05)
    with pytest.raises(ValueError, match=r"No training image has a depth\. Depths are numbers above 0"):
        DepthProbe(tokens, torch.full((40, 2), float("nan")))
