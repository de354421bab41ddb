"""Pictures of every mode reach the model as its processor would see them in deployment."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from optimum_regcache.data import ImageInputs

SIDE = 8
SQUARE = {"height": SIDE, "width": SIDE}
PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "siglip": SiglipImageProcessorPil(size=SQUARE, do_convert_rgb=True),
    "siglip without RGB": SiglipImageProcessorPil(size=SQUARE, do_convert_rgb=False),
    "vit": ViTImageProcessorPil(size=SQUARE),
}


def inputs_of(*images: Any, processor: str = "clip") -> ImageInputs:
    data = Dataset.from_dict({"image": list(images)}, features=Features({"image": ImageFeature()}))
    return ImageInputs(data, PROCESSORS[processor])


def logo(mode: str) -> Image.Image:
    """A red square on a transparent ground, where the mode has one."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[2:6, 2:6] = (200, 30, 30, 255)
    picture = Image.fromarray(pixels)
    if mode == "P":
        plain = picture.convert("RGB").convert("P")
        plain.info["transparency"] = plain.getpixel((0, 0))
        return plain
    return picture.convert(mode)


def as_png(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _reads_its_own_tiff(mode: str) -> bool:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).convert(mode).save(file, "TIFF")
    try:
        Image.open(file).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1", "YCbCr"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_processor_that_converts_decides(name: str, mode: str) -> None:
    if mode == "YCbCr" and not _reads_its_own_tiff(mode):
        pytest.skip(
            f"Pillow {PIL.__version__} cannot read the TIFF of mode {mode} that it writes, which datasets stores"
        )
    inputs = inputs_of(as_png(logo(mode)) if mode == "P" else logo(mode), processor=name)
    stored = inputs.source[0]["image"]
    theirs = PROCESSORS[name](images=stored, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(inputs[0]["pixel_values"], theirs)
    assert theirs.shape == (3, SIDE, SIDE)
    if mode in ("RGBA", "P", "LA"):  # transparent is white
        white = PROCESSORS[name](images=Image.new("RGB", (SIDE, SIDE), "white"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(theirs[:, 0, 0], white[:, 0, 0])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1"])
@pytest.mark.parametrize("name", ["siglip without RGB", "vit"])
def test_a_processor_that_does_not_convert_gets_rgb(name: str, mode: str) -> None:
    inputs = inputs_of(logo(mode), processor=name)
    rgb = inputs.source[0]["image"].convert("RGB")
    theirs = PROCESSORS[name](images=rgb, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(inputs[0]["pixel_values"], theirs)
    assert theirs.shape == (3, SIDE, SIDE)


def test_a_processor_of_one_channel_gets_grey() -> None:
    processor = ViTImageProcessorPil(size=SQUARE, image_mean=[0.5], image_std=[0.5])
    inputs = ImageInputs(inputs_of(logo("RGBA")).source, processor)
    assert torch.equal(
        inputs[0]["pixel_values"], processor(images=logo("RGBA").convert("L"), return_tensors="pt")["pixel_values"][0]
    )


@pytest.mark.parametrize("name", list(PROCESSORS))
@pytest.mark.parametrize("kind", ["<u2", ">u2", "png"])
def test_sixteen_bits_are_scaled_to_eight(name: str, kind: str) -> None:
    grey = np.linspace(0, 255, SIDE * SIDE).astype(np.uint8).reshape(SIDE, SIDE)
    wide = Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2" if kind == ">u2" else "<u2"))
    assert wide.mode.startswith("I;16")
    inputs = inputs_of(as_png(wide) if kind == "png" else wide, processor=name)
    expected = inputs_of(Image.fromarray(grey), processor=name)[0]["pixel_values"]
    assert torch.equal(inputs[0]["pixel_values"], expected)


@pytest.mark.parametrize(("mode", "kind"), [("I", np.int32), ("F", np.float32)])
def test_values_without_a_known_white_are_refused(mode: str, kind: type) -> None:
    picture = Image.fromarray(np.arange(SIDE * SIDE, dtype=kind).reshape(SIDE, SIDE))
    assert picture.mode == mode
    with pytest.raises(ValueError, match=rf"The image of row 1 holds values of 32 bits \(mode {mode}, from 0\S* to 63"):
        list(inputs_of(logo("RGB"), picture))
    with pytest.raises(ValueError, match=r"The image of row 0 has mode LAB and cannot be converted to RGB"):
        inputs_of(Image.new("LAB", (SIDE, SIDE)))[0]


def test_the_orientation_in_the_file_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = inputs_of(str(tmp_path / "turned.png"))[0]["pixel_values"]
    assert torch.equal(turned, inputs_of(picture.transpose(Image.Transpose.ROTATE_270))[0]["pixel_values"])


@pytest.mark.parametrize("size", [(1, SIDE), (SIDE, 1), (1, 1)])
def test_pictures_without_extent_are_named(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "line.png")
    with pytest.raises(
        ValueError, match=rf"line\.png \(row 0\) is {size[0]} x {size[1]} pixels, too small for a picture"
    ):
        inputs_of(str(tmp_path / "line.png"))[0]


@pytest.mark.parametrize("name", list(PROCESSORS))
@pytest.mark.parametrize("size", [(2, 3), (3, 2), (4, 3), (5, 4)])
def test_small_pictures_keep_rows_apart_from_channels(name: str, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (10, 200, 90))
    large = Image.new("RGB", (SIDE, SIDE), (10, 200, 90))
    pixels = [inputs_of(p, processor=name)[0]["pixel_values"] for p in (picture, large)]
    torch.testing.assert_close(pixels[0], pixels[1])


@pytest.mark.parametrize("fmt", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_a_truncated_file_is_named(fmt: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.{fmt}" for i in range(3)]
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for path in paths:
        Image.fromarray(noise).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    inputs = inputs_of(*map(str, paths))
    with pytest.raises(ValueError, match=rf"1\.{fmt} \(row 1\) cannot be read: .*Repair or remove it\. --skip-broken"):
        list(inputs.batches(2))
    good = inputs.readable()
    assert good.indices == [0, 2]
    assert len(good[1:]) == 1


def test_a_missing_image_is_named() -> None:
    inputs = inputs_of(logo("RGB"), None)
    with pytest.raises(ValueError, match=r"Row 1 of the data has no image\. --skip-broken"):
        list(inputs)
    assert len(inputs.readable()) == 1
    with pytest.raises(ValueError, match="The data set is empty"):
        inputs_of(None).readable()
