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
from optimum_regcache.export.layout import NETWORKS, read_info, write_info
from optimum_regcache.export.onnx import EncoderOutputs, export_onnx
from optimum_regcache.export.openvino import export_openvino
from optimum_regcache.export.runner import ExportedEncoder

logger = logging.get_logger(__name__)

LEAST_COSINE = 0.999  # below, the export is not the same model; ties of rounding stay far above


def export_job(  # noqa: PLR0913 (the options of the command)
    model_dir: str,
    export_format: str,
    output: str | Path,
    image_size: list[int] | None = None,
    dataset: str | None = None,
    num_images: int = 8,
    *,
    overwrite: bool = False,
    hub: Hub | None = None,
) -> tuple[dict[str, Any], str]:
    """Export a saved model, check it, and write the comparison into ``export.json``.

    Args:
        model_dir: directory, Hub id or reference name.
        export_format: ``onnx`` or ``openvino``.
        output: directory.
        image_size: side, or height and width; default: the processor's.
        dataset: images of the check; default: those of the embedded encoder that the recipe names, else random pixels.
        num_images: images of the check.
        overwrite: ``output`` may hold another result.
        hub: for `load_model` and `load_processor`.

    Returns:
        (``export.json``, table as text).

    Raises:
        ValueError: a model that cannot be exported, impossible options, or an output that may not be written.
        OSError: a name that leads nowhere, or an output that cannot be written.
        ImportError: a package is missing.
    """
    if export_format not in NETWORKS:
        raise ValueError(f"Unknown export format {export_format!r}; expected {' or '.join(NETWORKS)}.")
    if image_size is not None and len(image_size) not in (1, 2):
        raise ValueError(f"image_size takes the side, or height and width; got {len(image_size)} numbers.")
    if num_images < 1:
        raise ValueError(f"The check needs at least one image, got num_images={num_images}.")
    begun = time.perf_counter()
    size = None if image_size is None else (image_size[0], image_size[-1])
    what, check = [model_dir, (hub or {}).get("revision")], [dataset, num_images]
    job = {"kind": "export", "model": what, "format": [export_format, size], "check": check}
    out = Output(output, job, overwrite=overwrite, models=[model_dir], dataset=dataset)
    (model, processor), recipe = open_model(model_dir, hub or {}), saved_recipe(model_dir, hub)
    write = {"onnx": export_onnx, "openvino": export_openvino}[export_format]
    with out:
        path = write(model, out.stage, processor=processor, image_size=size)
        if recipe.model or recipe.dataset:
            recipe.portable(reference.names()).save(path / "recipe.yaml")
        info = read_info(path)
        pixels, images = _check_images(dataset, recipe.model or model_dir, processor, num_images, info["image_size"])
        info["parity"] = {"images": images, "outputs": compare(model, ExportedEncoder.from_pretrained(path), pixels)}
        info["bytes"] = sum(p.stat().st_size for p in path.iterdir() if p.suffix in (".onnx", ".data", ".xml", ".bin"))
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


@torch.inference_mode()
def compare(model: PreTrainedModel, encoder: ExportedEncoder, pixels: torch.Tensor) -> dict[str, dict[str, float]]:
    """The outputs of the export against those of the model in PyTorch.

    Returns:
        output name -> ``max_difference`` (largest absolute difference / largest absolute value), ``mean_difference``
        (likewise) and ``cosine`` (smallest over the images, of the flattened output).
    """
    height, width = encoder.info["image_size"]
    ours = EncoderOutputs(model, find_tower(model), (height, width)).eval().named(pixels)
    chunks = pixels.split(len(pixels) if encoder.info["dynamic_batch"] else 1)
    parts = [encoder(chunk) for chunk in chunks]
    rows = {}
    for name, expected in ours.items():
        found = torch.cat([getattr(part, name) for part in parts]).flatten(1).double()
        expected = expected.flatten(1).double()
        difference, largest = (found - expected).abs(), expected.abs().max().clamp(min=1e-30)
        rows[name] = {
            "max_difference": float(difference.max() / largest),
            "mean_difference": float(difference.mean() / largest),
            "cosine": float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).min()),
        }
    return rows


def _render(info: dict[str, Any], path: Path) -> str:
    """The comparison for a terminal."""
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
        f"{console.export_text()}differences are relative to the largest value\n"
        f"saved to {path}: {layers}, {info['bytes'] / 1e6:.1f} MB, in {info['seconds']:.0f} s"
    )
