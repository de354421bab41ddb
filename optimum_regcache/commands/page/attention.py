"""Attention to the registers of a saved model, measured for the page where model and images are at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optimum_regcache.commands.page.parts import LeftOut
from optimum_regcache.commands.page.runs import QUANTIZE, Run
from optimum_regcache.commands.sources import open_model, open_source, saved_recipe
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reading import store_batches
from optimum_regcache.evaluation.attention import register_attention
from optimum_regcache.registers import get_register_cache
from optimum_regcache.search.plan import space_of


@dataclass(frozen=True)
class Measured:
    """Share of the attention that registers get.

    Attributes:
        share: float32 [blocks, heads].
        blocks: those with registers.
        images, dataset: what was measured on, unseen by the search.
    """

    share: torch.Tensor
    blocks: tuple[int, ...]
    images: int
    dataset: str


def measure_attention(run: Run, dataset: str | None, count: int) -> Measured:
    """Open the model in the folder of ``run`` and measure on ``count`` images that reports use.

    Args:
        run: a result.
        dataset: images; None for those of the embedded encoder that the model was made of.
        count: number of images.

    Raises:
        LeftOut: no model, no registers, or no images; the text says which.
    """
    if run.kind != QUANTIZE or not (run.folder / "config.json").is_file():
        raise LeftOut("there is no model in the folder")
    recipe = saved_recipe(str(run.folder))
    if recipe.quantization.registers.mode == "none":
        raise LeftOut("no registers are installed")
    embedded = recipe.model in reference.names() and recipe.dataset is None
    if dataset is None and not embedded:
        raise LeftOut("the images are not in the folder; give them with --dataset")
    try:
        opened = open_model(str(run.folder), {})
        cache = get_register_cache(opened[0])
        if cache is None:
            raise LeftOut("no registers are installed")
        # images of a search are not read; the weights of all blocks are there at once, so one image at a time
        data: DataConfig = replace(recipe.data, num_samples=4, num_report=count, batch_size=1)
        source = open_source(
            recipe.model if dataset is None else str(run.folder), dataset,
            replace(recipe, model=None, dataset=None, revision=None, data=data), opened=opened,
        )  # fmt: skip
        inputs = ImageInputs(source.report_images, source.processor)
        share = register_attention(source.model, store_batches(inputs, data, space_of(data)))
    except (
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a model of others may fail in any way
        raise LeftOut(" ".join(f"the model or the images do not open or run: {error}".split())) from error
    return Measured(share, cache.blocks, len(inputs), source.images_title)
