"""Pictures of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_regcache.commands.sources import EMBEDDED_IMAGES, Source
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.norms import TokenNorms
from optimum_regcache.evaluation.places import are_outliers, patch_norms

if TYPE_CHECKING:
    from PIL.Image import Image


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
    images = ImageInputs(source.report_images.select(range(min(count, len(source.report_images)))), source.processor)
    framed = []
    for batch in images.batches(1):
        grid = patch_grid(source.model, batch)
        if grid is None:
            return  # SigLIP2: patches of varying grids
        pixels = batch["pixel_values"][0]
        picture = to_picture(pixels if photos else torch.ones_like(pixels))
        framed.append(frame_outliers(picture, patch_norms(source.model, batch)[block, 0], grid))
    draw_sheet(path, framed)


def patch_grid(model: Any, batch: Batch) -> tuple[int, int] | None:
    """(rows, columns) of the patches of the images of ``batch``; None where it holds patches instead of pixels."""
    size, pixels = find_tower(model).patch_size, batch["pixel_values"]
    if pixels.ndim != 4 or size is None:
        return None
    return pixels.shape[-2] // size[0], pixels.shape[-1] // size[1]


def to_picture(pixels: torch.Tensor) -> Image:
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


def frame_outliers(picture: Image, norms: torch.Tensor, grid: tuple[int, int], side: int = 192, most: int = 3) -> Image:
    """A picture with its outlier tokens framed (thick, magenta), its largest other ones (thin, grey) until ``most`` are framed,
    and those that are deleted crossed out.

    Args:
        picture: as the model saw it.
        norms: float [patches] of one block, as `patch_norms` gives them.
        grid: rows and columns of the patches.
        side: pixels of the height that it is drawn at.
        most: tokens framed, unless there are more outliers.
    """
    from PIL import Image, ImageDraw

    width = round(side * picture.width / picture.height)
    drawn = picture.convert("RGB").resize((width, side), Image.Resampling.NEAREST)
    draw, high, wide = ImageDraw.Draw(drawn), side / grid[0], width / grid[1]
    outliers = are_outliers(norms)

    def box(token: int) -> tuple[float, float, float, float]:
        row, column = divmod(token, grid[1])
        return column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1

    largest = norms.nan_to_num(-1.0).argsort(descending=True, stable=True)
    for token in reversed(largest[: max(most, int(outliers.sum()))].tolist()):  # outliers last, on top
        colour, thick = ((255, 0, 200), 3) if outliers[token] else ((128, 128, 128), 1)
        draw.rectangle(box(token), outline=colour, width=thick)
    for token in norms.isnan().nonzero().flatten().tolist():
        left, top, right, bottom = box(token)
        for line in ((left, top, right, bottom), (left, bottom, right, top)):
            draw.line(line, fill="white", width=5)
            draw.line(line, fill="black", width=2)
    return drawn


def draw_sheet(path: str | Path, pictures: list[Image], columns: int = 6) -> None:
    """Pictures of one size side by side, as a file."""
    from PIL import Image

    columns = min(columns, len(pictures))
    width, height = (length + 8 for length in pictures[0].size)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, ((number % columns) * width + 4, (number // columns) * height + 4))
    sheet.save(path)


def shade_patches(picture: Image, values: torch.Tensor, grid: tuple[int, int], side: int = 192) -> Image:
    """A picture that is red where ``values`` [patches], in the order of ``grid`` (rows, columns), are 1, unchanged where 0."""
    from PIL import Image

    width = round(side * picture.width / picture.height)
    drawn = picture.convert("RGB").resize((width, side), Image.Resampling.NEAREST)
    shares = (values.nan_to_num(1.0).clamp(0, 1) * 255).reshape(grid).byte().cpu().numpy()
    mask = Image.fromarray(shares).resize((width, side), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", drawn.size, (214, 0, 60)), drawn, mask)
