"""AIQViT (arXiv 2502.04628): low-rank additions of searched ranks, trained block by block on images of growing difficulty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_regcache.config import AttentionConfig, RegCacheConfig
from optimum_regcache.config.validation import require
from optimum_regcache.kernels import LinearState
from optimum_regcache.kernels.simulated import SimulatedLinear
from optimum_regcache.layers.attention import attention_products, install_products
from optimum_regcache.layers.linear import training_as
from optimum_regcache.methods._reconstruction.curriculum import Curriculum
from optimum_regcache.methods._reconstruction.data import Sampler
from optimum_regcache.methods._reconstruction.parametrise import LowRank
from optimum_regcache.methods._reconstruction.rank_search import (
    RANKS,
    SearchedLinear,
    SearchSettings,
    candidate_ranks,
    search_ranks,
)
from optimum_regcache.methods._reconstruction.resume import train_blocks
from optimum_regcache.methods._reconstruction.train import BlockTraining, Reconstruction, Settings
from optimum_regcache.methods._search.gradients import squared_gradients
from optimum_regcache.methods._search.product import search_interval
from optimum_regcache.methods.base import Method, PipelineState
from optimum_regcache.methods.gptq import WeightGrid
from optimum_regcache.methods.ptq4vit import first_images

_INTERVAL_IMAGES = 16  # the start of the intervals of probabilities is searched on so many


@dataclass(frozen=True)
class AIQViT(Method):
    """`Q(W0 + B A)` with a rank for every layer, the loss of the block alone, and the dynamic focusing quantizer where
    attention products are quantized (docs/method.md 11.14). With ``repq_vit`` LayerNorm outputs are reparametrised before.

    One calibration image in eight judges, as in `Reconstruction`.

    Attributes:
        ranks: that are searched, capped at half the smaller side of a weight; of a single one nothing is searched.
        search_iterations: steps of the rank search for each block.
        drop_path: probability of a rank to be dropped for an image, in the search.
        first_fraction: of the images that training starts with, the easiest; 1 for all.
        iterations: steps of Adam for each block, falling to 0 by a cosine.
        batch: images of a step.
        learning_rate: for A, in units of the layer's root mean square weight, for B and for the search.
        scale_learning_rate: for the logarithm of scales and of the upper end of probabilities.
        seed: of the images' order, of A and of what is dropped.
    """

    ranks: tuple[int, ...] = RANKS
    search_iterations: int = 2000
    drop_path: float = 0.2
    first_fraction: float = 0.5
    iterations: int = 6000
    batch: int = 24
    learning_rate: float = 1e-3
    scale_learning_rate: float = 1e-3
    seed: int = 0
    name: ClassVar[str] = "aiqvit"
    paper: ClassVar[str] = "AIQViT (arXiv 2502.04628)"
    provides: ClassVar[str] = "weight codes"
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.ranks) and min(self.ranks) >= 1,
            f"{self.name}.ranks must be 1 or more each, got {list(self.ranks)}.",
        )
        for field in ("search_iterations", "iterations", "batch"):
            require(getattr(self, field) >= 1, f"{self.name}.{field} must be at least 1, got {getattr(self, field)}.")
        for field in ("learning_rate", "scale_learning_rate"):
            value = getattr(self, field)
            require(0 < value < math.inf, f"{self.name}.{field} must be > 0 and finite, got {value}.")
        require(0 <= self.drop_path < 1, f"{self.name}.drop_path must be at least 0 and below 1, got {self.drop_path}.")
        first = self.first_fraction
        require(0 < first <= 1, f"{self.name}.first_fraction must be above 0 and at most 1, got {first}.")

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        return config.replace(attention={"probabilities": "dfq"})

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        found: dict[str, str] = {}
        if len(set(self.ranks)) == 1:
            found = dict.fromkeys(("search_iterations", "drop_path"), "there is one rank, and nothing to search")
        if config.activations.mode == "dynamic" and not config.attention.quantize:
            found["scale_learning_rate"] = "dynamic activations have no scale to learn"
        return found

    def scales(self, fit: PipelineState) -> None:
        if (
            not fit.config.attention.quantize or "image_grid_thw" in fit.batches[0]
        ):  # packed images stay with calibration's
            return
        batches = first_images(fit.batches, _INTERVAL_IMAGES)
        install_products(fit.model, fit.config.attention, bypass=True)
        try:
            for name, products in attention_products(fit.result):
                parts = ("probabilities", "value", "output")
                names = [f"{name}.{part}" for part in parts]
                watched = squared_gradients(fit.model, names, batches, whole=True, seed=self.seed)
                search_interval(products, {part: watched[f"{name}.{part}"] for part in parts})
        finally:
            install_products(fit.model, AttentionConfig())

    def round(self, fit: PipelineState) -> None:
        settings = Settings(
            features=False,
            scales=True,
            iterations=self.iterations,
            batch=self.batch,
            learning_rate=self.learning_rate,
            scale_learning_rate=self.scale_learning_rate,
            seed=self.seed,
        )
        with torch.inference_mode(False):
            train_blocks(self, Reconstruction(fit, settings, self._parametrise, self._easy_first, self._search))

    def _parametrise(self, weight: torch.Tensor, grid: WeightGrid, block: int, number: int) -> LowRank:
        rank = candidate_ranks(len(weight), weight.shape[1], self.ranks)[0]  # the search may change it
        return LowRank(weight, grid, rank, self._generator(block, number))

    def _generator(self, block: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000 * block + number)

    def _easy_first(self, training: BlockTraining) -> Iterator[list[int]]:
        groups, seed = training.owner.images.training, self.seed + training.ours.block
        return iter(Curriculum(groups, self.batch, seed, self.iterations, training.image_losses, self.first_fraction))

    def _search(self, training: BlockTraining) -> None:
        """Give every layer of the block the rank that a search finds, where there are several."""
        block, layers = training.ours.block, training.trained.linears
        searched: dict[str, SearchedLinear] = {}
        backends = {}
        for number, (name, (layer, _)) in enumerate(layers.items()):
            ranks = candidate_ranks(layer.out_features, layer.in_features, self.ranks)
            if len(ranks) > 1:
                seed = self.seed + 1000 * block + number
                backends[layer] = _SearchedBackend(layer.state(), ranks, self.drop_path, seed)
                searched[name] = backends[layer].searched
        if not searched:
            return
        groups = training.owner.images.training
        size, seed = (1 if training.owner.images.packed else self.batch), self.seed + block
        halves = [Sampler([g for group in groups if (g := group[at::2] or group)], size, seed + at) for at in (0, 1)]
        settings = SearchSettings(self.search_iterations, self.learning_rate, self.learning_rate)
        with training_as(backends):
            found = search_ranks(
                searched, training.loss, iter(halves[0]), iter(halves[1]), settings, training.owner.fit.progress
            )
        for number, (name, (_, backend)) in enumerate(layers.items()):
            if name in found:
                start, grid = backend.trained.start, backend.trained.grid
                backend.trained = LowRank(start, grid, found[name], self._generator(block, number))


class _SearchedBackend(SimulatedLinear):
    """A layer under a rank search: its input is rounded as it is, its weight is a `SearchedLinear`."""

    def __init__(self, state: LinearState, ranks: tuple[int, ...], drop_path: float, seed: int) -> None:
        super().__init__(state)
        self.searched = SearchedLinear(self.weight(), state.bias, ranks, drop_path, seed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.searched(self.rounded(x)).to(x.dtype)
