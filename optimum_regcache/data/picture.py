"""One picture of a data set: read with its name, and handed to the model's processor as deployment would."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optimum_regcache.config.validation import require

if TYPE_CHECKING:
    from PIL.Image import Image

# what the vision models take; whatever else a processor gives, or a data set has, stays behind
MODEL_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_grid_thw")
_CUTS = (
    "do_image_splitting",
    "crop_to_patches",
    "do_pan_and_scan",
)  # settings of processors that cut pictures into crops
_SKIP = "--skip-broken (DataConfig.skip_broken) leaves such images out."


def picture_name(value: Any, row: int) -> str:
    """How errors call the picture: by its file if it has one, else by its row."""
    path = value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)
    return f"Image {path} (row {row})" if path else f"The image of row {row}"


def read_picture(value: Any, row: int, mode: str | None = None) -> Image:
    """Decode what a data set stores for an image. The orientation in its EXIF data is applied, as `datasets` does.

    Args:
        value: mapping with ``bytes`` or ``path``, or a PIL image.
        row: for errors.
        mode: of the data set's feature: convert to this.

    Raises:
        ValueError: no image, or a file that cannot be decoded; with its name.
    """
    from datasets import Image as ImageFeature

    name = picture_name(value, row)
    require(value is not None, f"Row {row} of the data has no image. {_SKIP}")
    try:
        if isinstance(value, dict) and value.get("bytes") is None and Path(value.get("path") or "").is_file():
            value = {**value, "bytes": Path(value["path"]).read_bytes()}  # Pillow leaves a damaged file open
        picture = ImageFeature(mode=mode).decode_example(value)
        picture.load()
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {error}. Repair or remove it. {_SKIP}") from error
    return picture


def model_inputs(picture: Image, processor: Any, name: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Tensors of one image, without the axis of images.

    The processor gets the picture as it is and decides what becomes of transparency, palettes and grey values. A processor
    that does not convert to RGB (``do_convert_rgb`` not set, for example ViT's) would hand one, two or four channels to the
    model; it gets what transformers' `load_image` gives: ``picture.convert("RGB")``, or grey where its ``image_mean`` has one
    value. 16-bit grey values are divided by 257, so that 65535 becomes 255, the inverse of how 8 bits are widened to 16.

    Where it would cut the picture into crops (LLaVA-NeXT, Idefics3, InternVL), it is taken as a whole: uncut if the processor
    can be told so, else the first crop, which is the whole picture.

    Args:
        picture: any mode but I and F.
        processor: image processor or processor.
        name: for errors.
        settings: of the processor, in place of its own.

    Raises:
        ValueError: pictures of a single pixel's height or width, padded by the processor, or values without a known range.
    """
    processor = getattr(processor, "image_processor", processor)
    width, height = picture.size
    require(min(width, height) > 1, f"{name} is {width} x {height} pixels, too small for a picture. Remove it.")
    picture = _eight_bits(picture, name)
    if not getattr(processor, "do_convert_rgb", False):
        mean = getattr(processor, "image_mean", None)
        grey = isinstance(mean, (list, tuple)) and len(mean) == 1
        picture = picture.convert("L" if grey else "RGB")
    whole = {setting: False for setting in _CUTS if getattr(processor, setting, None)}
    inputs = processor(images=picture, return_tensors="pt", **whole, **settings)
    packed = ("pixel_values",) if "image_grid_thw" in inputs else ()  # no axis of images
    single = {k: v if k in packed else v[0] for k, v in inputs.items() if k in MODEL_INPUTS}
    if single["pixel_values"].ndim == 4:  # crops
        single = {k: v[0] for k, v in single.items()}
    return without_pixel_mask(single, name)


def without_pixel_mask(inputs: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Inputs of one image without a mask of its pixels (Idefics3, SmolVLM), which must be true everywhere; a mask of its
    patches (SigLIP2) stays.

    Raises:
        ValueError: some pixels are padding.
    """
    mask = inputs.get("pixel_attention_mask")
    if mask is None or mask.shape != inputs["pixel_values"].shape[-2:]:
        return inputs
    require(
        bool(mask.all()),
        f"{name} is padded: {int((mask == 0).sum())} of its {mask.numel()} pixels are masked. Resize pictures to the whole "
        "input (do_pad=False, or a square size), or leave the mask and the padding out.",
    )
    return {k: v for k, v in inputs.items() if k != "pixel_attention_mask"}


def _eight_bits(picture: Image, name: str) -> Image:
    from PIL import Image

    # Pillow before 11 opens 16-bit PNG files in mode I
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return Image.fromarray(np.rint(np.asarray(picture).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    require(picture.mode != "LAB", f"{name} has mode LAB and cannot be converted to RGB. Store it as RGB.")
    if picture.mode in ("I", "F"):
        low, high = picture.getextrema()
        raise ValueError(
            f"{name} holds values of 32 bits (mode {picture.mode}, from {low} to {high}), and nothing says which of them is "
            "white. Scale it to 0 to 255 and store it in 8 bits, for example dataset.map with "
            "Image.fromarray((255 * array).astype('uint8'))."
        )
    return picture
