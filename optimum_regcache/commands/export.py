"""The job behind `optimum-cli regcache export`: write, open again, compare with the model in PyTorch."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_regcache.commands.sources import Hub, open_model, saved_recipe
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import LOCAL, recorded_name
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs, collate, load_images
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.export.compressed import export_compressed_tensors
from optimum_regcache.export.layout import COMPRESSED_TENSORS, NETWORKS, need, read_info, write_info
from optimum_regcache.export.onnx import EncoderOutputs, export_onnx, pixel_size
from optimum_regcache.export.openvino import export_openvino
from optimum_regcache.export.runner import ExportedEncoder
from optimum_regcache.export.transformers_js import LAYOUT, export_transformers_js
from optimum_regcache.hub.loading import load_model

logger = logging.get_logger(__name__)

LEAST_COSINE = 0.999  # below, the export is not the same model; ties of rounding stay far above
FORMATS = (*NETWORKS, COMPRESSED_TENSORS)
LAYOUTS = ("flat", LAYOUT)
_SIZED = {"onnx": export_onnx, "openvino": export_openvino}


def export_job(  # noqa: PLR0913 (the options of the command)
    model_dir: str,
    export_format: str,
    output: str | Path,
    image_size: list[int] | None = None,
    dataset: str | None = None,
    num_images: int = 8,
    *,
    layout: str = "flat",
    overwrite: bool = False,
    hub: Hub | None = None,
) -> tuple[dict[str, Any], str]:
    """Export a saved model, check it, and write the comparison into ``export.json``.

    Args:
        model_dir: directory, Hub id or reference name.
        export_format: ``onnx``, ``openvino`` or ``compressed-tensors``.
        output: directory.
        image_size: side, or height and width; default: the processor's.
        dataset: images of the check; default: those of the embedded encoder that the recipe names, else random pixels.
        num_images: images of the check.
        layout: ``flat``, or ``transformers.js`` of the format ``onnx``.
        overwrite: ``output`` may hold another result.
        hub: for `load_model` and `load_processor`.

    Returns:
        (``export.json``, table as text).

    Raises:
        ValueError: a model that cannot be exported, impossible options, or an output that may not be written.
        OSError: a name that leads nowhere, or an output that cannot be written.
        ImportError: a package is missing.
    """
    if export_format not in FORMATS:
        raise ValueError(f"Unknown export format {export_format!r}; expected {', '.join(FORMATS)}.")
    if layout not in LAYOUTS or (layout != "flat" and export_format != "onnx"):
        raise ValueError(f"The layout {layout!r} is none of the format {export_format}; leave --layout out.")
    if image_size is not None and len(image_size) not in (1, 2):
        raise ValueError(f"image_size takes the side, or height and width; got {len(image_size)} numbers.")
    if image_size is not None and export_format == COMPRESSED_TENSORS:
        raise ValueError(
            f"image_size has no effect: {COMPRESSED_TENSORS} keeps the model's code. Leave --image-size out."
        )
    if num_images < 1:
        raise ValueError(f"The check needs at least one image, got num_images={num_images}.")
    if export_format == COMPRESSED_TENSORS:
        need("compressed_tensors")  # the check opens what was written
    begun = time.perf_counter()
    size = None if image_size is None else (image_size[0], image_size[-1])
    what, check = [model_dir, (hub or {}).get("revision")], [dataset, num_images]
    written = [export_format, size] if layout == "flat" else [export_format, size, layout]
    job = {"kind": "export", "model": what, "format": written, "check": check}
    out = Output(output, job, overwrite=overwrite, models=[model_dir], dataset=dataset)
    (model, processor), recipe = open_model(model_dir, hub or {}), saved_recipe(model_dir, hub)
    with out:
        if export_format == COMPRESSED_TENSORS:
            path = export_compressed_tensors(model, out.stage, processor=processor)
        else:
            write = _SIZED[export_format] if layout == "flat" else export_transformers_js
            path = write(model, out.stage, processor=processor, image_size=size)
        if recipe.model or recipe.dataset:
            recipe.portable(reference.names()).save(path / "recipe.yaml")
        info = read_info(path)
        shape = info.get("image_size") or list(pixel_size(find_tower(model), processor, None))
        pixels, images = _check_images(dataset, recipe.model or model_dir, processor, num_images, shape)
        info["parity"] = {"images": images, "outputs": compare(model, _opened(path, info), pixels)}
        networks = (".onnx", ".data", ".xml", ".bin", ".safetensors")
        info["bytes"] = sum(p.stat().st_size for p in path.rglob("*") if p.suffix in networks)
        info["seconds"] = round(time.perf_counter() - begun, 1)
        write_info(path, info)
    worst = min(row["cosine"] for row in info["parity"]["outputs"].values())
    if not worst >= LEAST_COSINE:
        logger.warning(f"The exported encoder differs from the model: cosine {worst:.4f}. Do not use {output}.")
    return info, _render(info, out.path)


def _check_images(
    dataset: str | None, origin: str, processor: Any, count: int, size: list[int]
) -> tuple[torch.Tensor, str]:
    """Pixels [count, 3, H, W] and what they are."""
    images, name = None, dataset
    if dataset is not None:
        if processor is None:
            raise ValueError(f"The images of {dataset} need the model's processor; none is saved beside the model.")
        images, name = load_images(dataset, num_samples=count), recorded_name(dataset).removeprefix(LOCAL)
    elif origin in reference.names() and processor is not None:
        images, name = reference.load(origin).dataset("report", count, 0), f"{origin} (embedded images)"
    if images is not None:
        inputs = ImageInputs(images, processor)
        pixels = collate([{"pixel_values": inputs[i]["pixel_values"]} for i in range(len(inputs))])["pixel_values"]
        if list(pixels.shape[-2:]) == list(size):
            return pixels, f"{len(pixels)} of {name}"
        logger.warning(f"The processor gives {list(pixels.shape[-2:])} pixels, the export takes {size}: random pixels.")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *size, generator=generator), f"{count} of random pixels"


def _opened(path: Path, info: dict[str, Any]) -> ExportedEncoder | PreTrainedModel:
    """What was written, opened by the library that is to run it."""
    return load_model(path) if info["format"] == COMPRESSED_TENSORS else ExportedEncoder.from_pretrained(path)


@torch.inference_mode()
def compare(
    model: PreTrainedModel, encoder: ExportedEncoder | PreTrainedModel, pixels: torch.Tensor
) -> dict[str, dict[str, float]]:
    """The outputs of the export against those of the model in PyTorch.

    Returns:
        output name -> ``max_difference`` (largest absolute difference / largest absolute value), ``mean_difference``
        (likewise) and ``cosine`` (smallest over the images, of the flattened output).
    """
    ours = _outputs(model, pixels)
    if isinstance(encoder, ExportedEncoder):
        chunks = pixels.split(len(pixels) if encoder.info["dynamic_batch"] else 1)
        parts = [encoder(chunk) for chunk in chunks]
        theirs = {name: torch.cat([getattr(part, name) for part in parts]) for name in encoder.info["outputs"]}
    else:
        theirs = _outputs(encoder, pixels)
    rows = {}
    for name, found in theirs.items():
        found, expected = found.flatten(1).double(), ours[name].flatten(1).double()
        difference, largest = (found - expected).abs(), expected.abs().max().clamp(min=1e-30)
        rows[name] = {
            "max_difference": float(difference.max() / largest),
            "mean_difference": float(difference.mean() / largest),
            "cosine": float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).min()),
        }
    return rows


def _outputs(model: PreTrainedModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs by name of a model in PyTorch."""
    return EncoderOutputs(model, find_tower(model), (pixels.shape[-2], pixels.shape[-1])).eval().named(pixels)


def _render(info: dict[str, Any], path: Path) -> str:
    """The comparison for a terminal."""
    text = ""
    if "text" in info:
        text = f"text tower: weights {info['text']['weights']}, cosine {info['text']['cosine']:.5f}\n"
    table = Table(title=f"{info['format']} against PyTorch, {info['parity']['images']}", title_justify="left")
    table.add_column("output")
    for heading in ("max difference", "mean difference", "cosine"):
        table.add_column(heading, justify="right")
    for name, row in info["parity"]["outputs"].items():
        table.add_row(name, f"{row['max_difference']:.1e}", f"{row['mean_difference']:.1e}", f"{row['cosine']:.6f}")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    layers = f"{info['quantized_layers']} quantized layers" if info["quantization"] else "float"
    return (
        f"{console.export_text()}differences are relative to the largest value\n{text}"
        f"saved to {path}: {layers}, {info['bytes'] / 1e6:.1f} MB, in {info['seconds']:.0f} s"
    )
