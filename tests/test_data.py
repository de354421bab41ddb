"""Images from data sets and sequences to model inputs; the split of the reference images."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_regcache.data import scenes
from optimum_regcache.data.images import ImageInputs, collate, split_reference

SIDE = 8


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    return scenes.load_dataset("report", 6, size=16)


def pixel_items(count: int = 5) -> list[dict[str, Any]]:
    return [{"pixel_values": torch.full((3, SIDE, SIDE), float(i)), "labels": i % 2} for i in range(count)]


def first_values(inputs: ImageInputs) -> list[float]:
    return [float(item["pixel_values"].flatten()[0]) for item in inputs]


# --- ImageInputs: data sets of images


def test_pictures_go_through_the_processor(pictures: Dataset, processor: CLIPImageProcessorPil) -> None:
    inputs = ImageInputs(pictures, processor)
    assert len(inputs) == 6
    expected = processor(images=pictures[3]["image"], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(inputs[3]["pixel_values"], expected)
    assert inputs[3]["pixel_values"].shape == (3, SIDE, SIDE)
    assert int(inputs[3:4].labels()[0]) == pictures[3]["label"]
    assert torch.equal(inputs[-1]["pixel_values"], inputs[5]["pixel_values"])


def test_a_full_processor_lends_its_image_processor(pictures: Dataset, processor: CLIPImageProcessorPil) -> None:
    class TextAndImages:
        image_processor = processor

    both = ImageInputs(pictures, TextAndImages()), ImageInputs(pictures, processor)
    assert torch.equal(both[0][0]["pixel_values"], both[1][0]["pixel_values"])


def test_grey_and_transparent_pictures_become_rgb() -> None:
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_convert_rgb=False)
    modes = [Image.new(mode, (SIDE, SIDE)) for mode in ("L", "RGBA", "P")]
    inputs = ImageInputs(Dataset.from_dict({"picture": modes}), processor)
    assert [tuple(item["pixel_values"].shape) for item in inputs] == [(3, SIDE, SIDE)] * 3
    assert "labels" not in inputs[0]
    assert inputs.labels() is None


def test_pictures_need_a_processor(pictures: Dataset) -> None:
    with pytest.raises(
        ValueError, match=r"A data set of images needs the model's processor\. Save the processor beside"
    ):
        ImageInputs(pictures)


def test_labels_are_read_without_the_pictures(pictures: Dataset) -> None:
    def refuse(images: Any, return_tensors: str) -> None:
        raise AssertionError("labels() must not process images")

    labels = ImageInputs(pictures, refuse).subset([4, 0]).labels()
    assert labels is not None
    assert labels.dtype == torch.int64
    assert labels.tolist() == [pictures[4]["label"], pictures[0]["label"]]


# --- ImageInputs: ready pixel values


def test_single_and_batched_items_are_flattened_in_order() -> None:
    source = [
        {"pixel_values": torch.full((3, 4, 4), 0.0), "labels": 7},
        {"pixel_values": torch.stack([torch.full((3, 4, 4), v) for v in (1.0, 2.0, 3.0)]), "labels": [4, 5, 6]},
        {"pixel_values": np.full((3, 4, 4), 4.0, np.float32), "labels": np.int64(3)},
        {"pixel_values": torch.full((1, 3, 4, 4), 5.0), "labels": torch.tensor([2])},
    ]
    inputs = ImageInputs(source)
    assert first_values(inputs) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert {tuple(item["pixel_values"].shape) for item in inputs} == {(3, 4, 4)}
    labels = inputs.labels()
    assert labels is not None
    assert labels.tolist() == [7, 4, 5, 6, 3, 2]


@pytest.mark.parametrize("key", ["labels", "label"])
def test_labels_of_ready_items_and_their_absence(key: str) -> None:
    items = [{"pixel_values": torch.zeros(3, 4, 4), key: i} for i in (1, 0, 2)]
    labels = ImageInputs(items).labels()
    assert labels is not None
    assert (labels.tolist(), labels.dtype) == ([1, 0, 2], torch.int64)
    del items[1][key]
    assert ImageInputs(items).labels() is None


def siglip2_item(value: float, patches: int = 6) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.full((patches, 12), value),
        "pixel_attention_mask": torch.ones(patches, dtype=torch.int32),
        "spatial_shapes": torch.tensor([2, 3]),
    }


def test_siglip2_items_have_one_axis_less() -> None:
    batched = {k: torch.stack([v, v + 1]) for k, v in siglip2_item(1.0).items()}
    inputs = ImageInputs([siglip2_item(0.0), batched])
    assert first_values(inputs) == [0.0, 1.0, 2.0]
    assert torch.equal(inputs[2]["spatial_shapes"], torch.tensor([3, 4]))
    (batch,) = inputs.subset([0, 1]).batches(2)
    shapes = {"pixel_values": (2, 6, 12), "pixel_attention_mask": (2, 6), "spatial_shapes": (2, 2)}
    assert {k: tuple(v.shape) for k, v in batch.items()} == shapes


def processed_dataset() -> Dataset:
    """What ``dataset.map(lambda row: processor(row["image"]))`` leaves: all the old columns are still there."""
    values = [np.full((3, 4, 4), i, np.float32) for i in range(3)]
    features = {"pixel_values": Array3D((3, 4, 4), "float32"), "label": ClassLabel(names=["a", "b"])}
    features |= {"image": ImageFeature(), "caption": Value("string")}
    columns = {
        "pixel_values": values,
        "label": [1, 0, 1],
        "image": [Image.new("RGB", (4, 4))] * 3,
        "caption": ["x"] * 3,
    }
    return Dataset.from_dict(columns, features=Features(features))


def test_a_data_set_with_pixel_values_needs_no_processor() -> None:
    inputs = ImageInputs(processed_dataset().remove_columns(["image", "caption"]))
    assert first_values(inputs) == [0.0, 1.0, 2.0]
    assert {tuple(item["pixel_values"].shape) for item in inputs} == {(3, 4, 4)}
    labels = inputs.labels()
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]


def test_columns_that_are_no_model_input_stay_behind() -> None:
    (batch,) = ImageInputs(processed_dataset()).batches(3)
    assert set(batch) == {"pixel_values"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            [torch.zeros(3, 4, 4)],
            r"Item 0 of the data is a Tensor without 'pixel_values'\. Give a datasets\.Dataset of",
        ),
        ([(torch.zeros(3, 4, 4), 1)], r"Item 0 of the data is a tuple without 'pixel_values'"),
        (
            [*pixel_items(1), {"pixels": 0}],
            r"Item 1 of the data is a dict without 'pixel_values'.*such as \{'pixel_values'",
        ),
        (
            [{"pixel_values": torch.zeros(4, 4)}],
            r"Item 0 has pixel_values of shape \(4, 4\); expected 3 axes, or 4 for a",
        ),
        ([siglip2_item(0.0) | {"pixel_values": torch.zeros(6)}], r"shape \(6,\); expected 2 axes, or 3 for a batch\."),
        ([], r"The data set is empty\."),
        (Dataset.from_dict({"text": ["a"]}), r"The data set has no image column; its columns are text\. Cast one with"),
    ],
    ids=["tensor", "tuple", "no-pixels", "axes", "siglip2-axes", "empty", "text"],
)
def test_other_data_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageInputs(source)


# --- subsets and batches


def test_subsets_and_slices_compose() -> None:
    inputs = ImageInputs(pixel_items(6))
    assert first_values(inputs.subset([4, 1, 4])) == [4.0, 1.0, 4.0]
    assert first_values(inputs[1:5].subset([3, 0])) == [4.0, 1.0]
    assert first_values(inputs[::-2]) == [5.0, 3.0, 1.0]
    assert len(inputs) == 6
    labels = inputs[1:4].labels()
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"The data set is empty\."):
        inputs.subset([])
    with pytest.raises(IndexError):
        inputs[6]


def test_subsets_keep_processor_and_collator(pictures: Dataset, processor: CLIPImageProcessorPil) -> None:
    def only_sum(items: list[Any]) -> dict[str, torch.Tensor]:
        return {"total": torch.stack([item["pixel_values"].sum() for item in items]), "labels": torch.zeros(1)}

    inputs = ImageInputs(pictures, processor, only_sum)
    (batch,) = inputs[2:4].batches(5)
    assert set(batch) == {"total"}
    torch.testing.assert_close(batch["total"][1], inputs[3]["pixel_values"].sum())


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (99, [5])])
def test_batches_cover_everything_once_in_order_without_labels(size: int, sizes: list[int]) -> None:
    batches = list(ImageInputs(pixel_items(5)).batches(size))
    assert [len(batch["pixel_values"]) for batch in batches] == sizes
    assert all(set(batch) == {"pixel_values"} for batch in batches)
    values = torch.cat([batch["pixel_values"] for batch in batches])
    assert values[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_collate_stacks_every_key() -> None:
    batch = collate(
        [{"pixel_values": torch.zeros(3, 2, 2), "labels": 1}, {"pixel_values": torch.ones(3, 2, 2), "labels": 0}]
    )
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["labels"].tolist() == [1, 0]


def test_collate_names_the_shapes_that_differ() -> None:
    items = [{"pixel_values": torch.zeros(3, side, side)} for side in (6, 4)]
    expected = (
        r"Items of one batch have different shapes of 'pixel_values': \[\(3, 4, 4\), \(3, 6, 6\)\]\. Use a processor "
        r"that resizes, or batch_size=1, or a data_collator\."
    )
    with pytest.raises(ValueError, match=expected):
        collate(items)
    inputs = ImageInputs(items)
    with pytest.raises(ValueError, match=expected):
        list(inputs.batches(2))
    assert [tuple(batch["pixel_values"].shape) for batch in inputs.batches(1)] == [(1, 3, 6, 6), (1, 3, 4, 4)]


def test_fingerprint_recognises_the_data() -> None:
    items = pixel_items(5)
    print_of = ImageInputs(items).fingerprint()
    assert print_of == ImageInputs([dict(item) for item in items]).fingerprint()
    assert print_of != ImageInputs(items[:4]).fingerprint()
    assert print_of != ImageInputs(items[::-1]).fingerprint()
    assert print_of != ImageInputs(items)[1:].fingerprint()


# --- the split of the reference images


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(4, 600),
    calibration=st.floats(0, 1, exclude_min=True, exclude_max=True),
    confirm=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_reference_parts_are_disjoint_complete_and_never_empty(
    count: int, calibration: float, confirm: float, seed: int
) -> None:
    parts = split_reference(count, calibration, confirm, seed)
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert all(part and part == sorted(part) for part in parts)
    assert len(parts[0]) <= 128
    assert parts == split_reference(count, calibration, confirm, seed)


def test_reference_parts_have_the_asked_sizes_and_follow_the_seed() -> None:
    parts = split_reference(256, 0.25, 0.33, 0)
    assert [len(part) for part in parts] == [64, 129, 63]
    assert len(split_reference(4000, 0.25, 0.33, 0)[0]) == 128
    assert parts != split_reference(256, 0.25, 0.33, 1)


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_reference_images(count: int) -> None:
    expected = (
        rf"{count} reference images are too few to keep calibration, selection and confirmation apart; give at least 4"
    )
    with pytest.raises(ValueError, match=expected):
        split_reference(count, 0.25, 0.33, 0)


@pytest.mark.parametrize("labels", [["a", "b", "c"], [None, 1, 2], [[1], [2], [3]], [-1, -1, -1]])
def test_labels_that_are_no_class_numbers_are_left_aside(labels: list[Any], processor: CLIPImageProcessorPil) -> None:
    """They must not stop a search that needs no labels."""
    picture = Image.new("RGB", (32, 32))
    rows = Dataset.from_dict({"image": [picture] * 3, "label": labels}).cast_column("image", ImageFeature())
    inputs = ImageInputs(rows, processor)
    assert inputs.labels() is None
    assert len(list(inputs.batches(2))) == 2
