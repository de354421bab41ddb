"""Procedural scenes: reproducible, disjoint between splits, and showing what their labels and captions say."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from datasets import ClassLabel, Image

from optimum_regcache.data.scenes import (
    BACKGROUNDS,
    CLASS_NAMES,
    COLOURS,
    MASK_NAMES,
    MOST_SHAPES,
    SHAPES,
    SIZE,
    SPLITS,
    TEXTURES,
    WALL,
    Scene,
    Shapes,
    load_dataset,
    load_shapes,
    prompt,
    render,
    render_shapes,
)

CAPTION = re.compile(
    rf"(?P<article>an?) (?:(?P<size>large|small) )?(?P<name>(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
    r"(?: at the (?P<vertical>top|bottom) (?P<horizontal>left|right))?"
    rf"(?: on a (?P<texture>{'|'.join(TEXTURES)}) (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)

GOLDEN_CAPTIONS = [
    "a red square",
    "a yellow crescent on a shaded slate background",
    "a small red crescent on a striped beige background",
    "a green cross",
]
GOLDEN_LABELS = [1, 38, 56, 49, 14, 20, 28, 45]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scene.image)


def coloured(scene: Scene, colour: str) -> np.ndarray:
    """Where the pixel is some brightness (0.85 to 1.1) of ``colour``."""
    tones = np.linspace(0.85, 1.1, 26)[:, None] * np.asarray(COLOURS[colour])
    distance = np.abs(pixels(scene)[:, :, None, :].astype(float) - np.clip(tones, 0, 255)).max(-1).min(-1)
    return distance <= 4


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render("train", index) for index in range(120)]


def test_there_are_64_classes() -> None:
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == len(COLOURS) * len(SHAPES) == 64
    assert CLASS_NAMES[0] == "red circle"
    assert CLASS_NAMES[9] == "green square"


def test_prompts_use_the_right_article() -> None:
    assert prompt("red circle") == "a red circle"
    assert prompt("orange star") == "an orange star"


def test_the_same_arguments_give_the_same_scene() -> None:
    first, second = render("report", 5, seed=3), render("report", 5, seed=3)
    assert np.array_equal(pixels(first), pixels(second))
    assert (first.label, first.caption) == (second.label, second.caption)


def test_a_scene_does_not_depend_on_what_was_rendered_before(scenes: list[Scene]) -> None:
    assert np.array_equal(pixels(render("train", 7)), pixels(scenes[7]))


def test_streams_are_the_published_ones() -> None:
    """The encoder in the package was trained on these: another order of draws would make new images."""
    assert [render(split, 0).caption for split in SPLITS] == GOLDEN_CAPTIONS
    assert [render("train", index).label for index in range(8)] == GOLDEN_LABELS


def test_splits_seeds_and_positions_never_share_an_image() -> None:
    digests = [
        hashlib.sha256(pixels(render(split, index, seed=seed)).tobytes()).hexdigest()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(25)
    ]
    assert len(set(digests)) == len(digests) == 200


@pytest.mark.parametrize("size", [16, SIZE, 100])
def test_image_format(size: int) -> None:
    image = render("search", 0, size=size).image
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_a_larger_size_shows_the_same_scene() -> None:
    small, large = render("search", 2), render("search", 2, size=2 * SIZE)
    assert (small.label, small.caption) == (large.label, large.caption)


def test_classes_are_drawn_from_all_colours_and_shapes(scenes: list[Scene]) -> None:
    names = [CLASS_NAMES[scene.label].split(" ") for scene in scenes]
    assert {colour for colour, _ in names} == set(COLOURS)
    assert {shape for _, shape in names} == set(SHAPES)


def test_captions_name_the_class_and_follow_the_grammar(scenes: list[Scene]) -> None:
    found = set()
    for scene in scenes:
        match = CAPTION.fullmatch(scene.caption)
        assert match is not None, scene.caption
        assert match["name"] == CLASS_NAMES[scene.label]
        following = match["size"] or match["name"]
        assert match["article"] == ("an" if following[0] in "aeiou" else "a")
        found |= {part for part, text in match.groupdict().items() if text}
    assert found == set(CAPTION.groupindex)


def test_the_picture_shows_the_colour_of_the_label(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        areas = {colour: int(coloured(scene, colour).sum()) for colour in COLOURS}
        assert max(areas, key=areas.__getitem__) == CLASS_NAMES[scene.label].split(" ")[0], scene.caption
        assert max(areas.values()) > 0.01 * SIZE**2


def test_the_shape_is_where_the_caption_says(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        match = CAPTION.fullmatch(scene.caption)
        assert match is not None
        if match["vertical"] and "crescent" not in match["name"]:  # a crescent lies beside its centre
            y, x = np.nonzero(coloured(scene, match["name"].split(" ")[0]))
            centre_y, centre_x = (y.min() + y.max()) / 2, (x.min() + x.max()) / 2
            assert (centre_y < SIZE / 2 + 3) if match["vertical"] == "top" else (centre_y > SIZE / 2 - 3), scene.caption
            assert (centre_x < SIZE / 2 + 3) if match["horizontal"] == "left" else (centre_x > SIZE / 2 - 3), (
                scene.caption
            )
            checked += 1
    assert checked > 10


def test_unknown_split() -> None:
    expected = r"Unknown scene split 'test'; expected one of train, search, calibration, report\."
    with pytest.raises(ValueError, match=expected):
        render("test", 0)
    with pytest.raises(ValueError, match=expected):
        load_dataset("test", 1)


@pytest.mark.parametrize("count", [0, -3])
def test_data_set_needs_a_scene(count: int) -> None:
    with pytest.raises(ValueError, match=rf"num_samples must be at least 1, got {count}\."):
        load_dataset("train", count)


def test_data_set_holds_the_rendered_scenes(scenes: list[Scene]) -> None:
    dataset = load_dataset("train", 6)
    assert dataset.column_names == ["image", "label", "caption", "box", "mask", "depth"]
    assert isinstance(dataset.features["image"], Image)
    labels = dataset.features["label"]
    assert isinstance(labels, ClassLabel)
    assert labels.names == [prompt(name) for name in CLASS_NAMES]
    for row, scene in zip(dataset, scenes[:6], strict=True):
        assert np.array_equal(np.asarray(row["image"]), pixels(scene))  # stored without loss
        assert (row["label"], row["caption"]) == (scene.label, scene.caption)
        assert np.array_equal(np.asarray(row["mask"]), np.asarray(scene.mask))
        assert np.array_equal(np.asarray(row["depth"]), np.asarray(scene.depth))


def test_masks_and_depths_are_of_the_shape_that_is_seen(scenes: list[Scene]) -> None:
    for scene in scenes:
        colour, shape = CLASS_NAMES[scene.label].split(" ")
        mask, depth = np.asarray(scene.mask), np.asarray(scene.depth)
        assert set(np.unique(mask)) == {0, 1 + SHAPES.index(shape)}
        assert MASK_NAMES[mask.max()] == shape
        sure = coloured(scene, colour)  # pixels at the edge are mixed
        assert (mask[sure] > 0).mean() > 0.95 or colour == "orange"  # backgrounds of brown and beige come close
        assert sure[mask > 0].mean() > 0.7
        assert set(np.unique(depth[mask == 0])) == {WALL}
        (distance,) = np.unique(depth[mask > 0])
        assert 1000 <= distance <= 2308
        if shape == "circle":
            assert distance == pytest.approx(300 / (np.sqrt(mask.astype(bool).mean() / np.pi)), rel=0.06)


def test_data_set_passes_seed_and_size_on() -> None:
    row = load_dataset("search", 2, seed=4, size=20)[1]
    scene = render("search", 1, seed=4, size=20)
    assert np.array_equal(np.asarray(row["image"]), pixels(scene))
    assert row["caption"] == scene.caption


# pictures of several shapes


@pytest.fixture(scope="module")
def several() -> list[Shapes]:
    return [render_shapes("train", index) for index in range(60)]


def test_shapes_do_not_touch_and_fill_their_boxes(several: list[Shapes]) -> None:
    for found in several:
        numbers, image = np.asarray(found.instances), np.asarray(found.image)
        assert image.shape == (SIZE, SIZE, 3)
        assert len(found.categories) == len(found.boxes) == numbers.max() <= MOST_SHAPES
        for number, (left, top, width, height) in enumerate(found.boxes, 1):
            rows, columns = np.nonzero(numbers == number)
            assert left - 0.5 <= columns.min() <= left + 2
            assert left + width - 2 <= columns.max() + 1 <= left + width + 0.5
            assert top - 0.5 <= rows.min()
            assert rows.max() + 1 <= top + height + 0.5
            assert left >= 0
            assert left + width <= SIZE
    assert {len(found.categories) for found in several} == set(range(1, MOST_SHAPES + 1))
    assert {c for found in several for c in found.categories} == set(range(len(SHAPES)))


def test_pictures_of_shapes_are_reproducible_and_differ_between_splits(several: list[Shapes]) -> None:
    assert np.array_equal(np.asarray(render_shapes("train", 7).image), np.asarray(several[7].image))
    seen = {np.asarray(render_shapes(split, i).image).tobytes() for split in SPLITS for i in range(5)}
    assert len(seen) == 5 * len(SPLITS)
    assert not any(np.array_equal(np.asarray(render("train", i).image), np.asarray(several[i].image)) for i in range(5))


def test_the_data_set_of_shapes(several: list[Shapes]) -> None:
    data = load_shapes("train", 3)
    assert data[2]["objects"] == {
        "bbox": [list(box) for box in several[2].boxes],
        "category": list(several[2].categories),
    }
    assert data.features["objects"]["category"].feature.names == list(SHAPES)
    assert isinstance(data.features["instances"], Image)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        load_shapes("train", 0)
    with pytest.raises(ValueError, match="Unknown scene split 'test'"):
        render_shapes("test", 0)
