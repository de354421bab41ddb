"""Pictures of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimum_regcache.commands.sources import EMBEDDED_IMAGES, Source
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.norms import TokenNorms
from optimum_regcache.evaluation.outliers import REPORTED_RATIO
from optimum_regcache.search.mining import mine_tokens


def draw_report(
    source: Source,
    norms: dict[str, TokenNorms],
    sensitivity: dict[int, float],
    objective: str,
    folder: Path,
    photos: bool,
    block: int | None = None,
) -> None:
    """``analysis.png`` and ``outliers.png``.

    Args:
        source: model and images.
        norms: name -> norms; the first is the float model with nothing installed.
        sensitivity: block -> drop.
        objective: name of what drops.
        folder: where they go.
        photos: show images of the user's own.
        block: whose outlier tokens are drawn; default: the one with the largest ratio of largest to median norm.
    """
    plot_analysis(folder / "analysis.png", sensitivity, norms, source.title, objective)
    first = next(iter(norms.values()))
    peak = int((first.max_block_input / first.median_block_input).argmax()) if block is None else block
    _draw_outliers(source, peak, folder / "outliers.png", photos or source.dataset_name.endswith(EMBEDDED_IMAGES))


def _draw_outliers(source: Source, block: int, path: Path, photos: bool, count: int = 12) -> None:
    """The outlier tokens (as `measure_outliers` counts them) of the first report images at the input of ``block``, and the
    largest other tokens up to three an image; on grey sheets without ``photos``: a folder that is uploaded shows none."""
    tower = find_tower(source.model)
    images = ImageInputs(source.report_images.select(range(min(count, len(source.report_images)))), source.processor)
    pictures, outliers, others, grid = [], [], [], 0
    for index in range(len(images)):
        batch = next(images.subset([index]).batches(1))
        if batch["pixel_values"].ndim != 4 or tower.patch_size is None:
            return  # SigLIP2: patches of varying grids
        every = mine_tokens(source.model, [batch], [block], top=10**6, per_image=10**6, progress=False)[block]
        number = int((every.norms >= REPORTED_RATIO * every.norms.median()).sum())
        pixels = batch["pixel_values"][0]
        pictures.append(_to_picture(pixels if photos else torch.ones_like(pixels)))
        outliers.append(every.position[:number].tolist())
        others.append(every.position[number:3].tolist())
        grid = batch["pixel_values"].shape[-1] // tower.patch_size[1]
    draw_outliers(path, pictures, outliers, others, tower.num_prefix_tokens, grid)


def _to_picture(pixels: torch.Tensor) -> Any:
    """Model input [3, H, W] as a picture, contrast stretched; light grey if it is of one value."""
    from PIL import Image

    low, high = pixels.amin(), pixels.amax()
    scaled = (pixels - low) / (high - low) * 255 if high > low else torch.full_like(pixels, 235)
    return Image.fromarray(scaled.byte().permute(1, 2, 0).cpu().numpy())


def require_plots() -> type[Any]:
    """The class of matplotlib's figures.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'optimum-regcache[plots]'.") from error
    return Figure


def plot_analysis(
    path: str | Path, sensitivity: dict[int, float], norms: dict[str, TokenNorms], title: str, objective: str
) -> None:
    """Sensitivity per block over token norms per block, as a picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = require_plots()(figsize=(8, 7.5), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    blocks = sorted(sensitivity)
    top.bar(blocks, [sensitivity[b] for b in blocks], color="#b0413e")
    top.set_ylabel(f"drop of {objective}")
    top.set_title(f"{title}\nlargest drop when one layer of the block is quantized", fontsize=10)
    for axis, site, label in ((middle, "block_input", "block input"), (bottom, "fc2_input", "fc2 input")):
        for number, (name, values) in enumerate(norms.items()):
            peak = getattr(values, f"max_{site}")
            size = 9 - 4 * number  # equal curves stay visible: the first has larger, open markers
            fill = "none" if number == 0 else "full"
            axis.plot(range(len(peak)), peak, marker="o", markersize=size, fillstyle=fill, label=f"{name}: max")
        median = getattr(next(iter(norms.values())), f"median_{site}")
        axis.plot(range(len(median)), median, linestyle="--", color="grey", label="median")
        axis.set_yscale("log")
        axis.set_ylabel(f"token l_inf, {label}")
        axis.legend(fontsize=8)
    bottom.set_xlabel("block")
    bottom.set_xticks(range(len(median)))
    figure.savefig(path, dpi=130)


def draw_outliers(
    path: str | Path, images: list[Any], outliers: list[list[int]], others: list[list[int]], lead: int, grid: int
) -> None:
    """Images with their outlier tokens framed (thick, magenta), and large tokens that are none (thin, grey).

    Args:
        path: PNG to write.
        images: PIL images as the model saw them (square).
        outliers, others: token positions per image (prefix tokens counted).
        lead: number of prefix tokens.
        grid: patches per side.
    """
    from PIL import Image, ImageDraw

    side, columns = 192, min(6, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 8)), "white")
    cell = side / grid
    for number, image in enumerate(images):
        picture = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(picture)
        for tokens, colour, width in ((others[number], (128, 128, 128), 1), (outliers[number], (255, 0, 200), 3)):
            for token in tokens:
                row, column = divmod(token - lead, grid)
                box = (column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1)
                draw.rectangle(box, outline=colour, width=width)
        sheet.paste(picture, ((number % columns) * (side + 8) + 4, (number // columns) * (side + 8) + 4))
    sheet.save(path)
