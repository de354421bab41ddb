"""Reconstruction (docs/method.md 11.13): weights and scales trained block by block against the float model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.validation import one_of, require
from optimum_regcache.methods._reconstruction import train
from optimum_regcache.methods._reconstruction.parametrise import FullWeight, LowRank, Parametrisation, RoundingOffsets
from optimum_regcache.methods._reconstruction.resume import train_blocks
from optimum_regcache.methods.base import Method, PipelineState
from optimum_regcache.methods.gptq import WeightGrid


@dataclass(frozen=True)
class Reconstruction(Method):
    """Each quantized block learns to give what the float model's block gives, behind the quantized blocks before it. Teacher
    and student have the same registers; a token counts where both kept it.

    One calibration image in eight judges: of a block the best of five states is kept, and where none is better than the
    start, the block stays as it was.

    Attributes:
        parametrisation: ``full``: weights and their scales through straight-through rounding; ``low_rank``: ``Q(W0 + B A)``,
            merged at the end; ``adaround``: which way each weight is rounded.
        rank: of ``B A``.
        loss: ``block``: squared error of the block's output; ``block_and_feature``: twice that, and the squared error of the
            final features behind the float rest of the encoder, each in units of its start.
        activation_scales: learn static scales of inputs, and of query, key and value where these are quantized.
        iterations: steps of Adam for each block, falling to 0 by a cosine.
        batch: images of a step.
        learning_rate: for weights, in units of the layer's root mean square weight (10 for rounding offsets).
        scale_learning_rate: for the logarithm of scales.
        seed: of the images' order, and of A.
    """

    parametrisation: str = "full"
    rank: int = 16
    loss: str = "block_and_feature"
    activation_scales: bool = True
    iterations: int = 500
    batch: int = 16
    learning_rate: float = 1e-3
    scale_learning_rate: float = 1e-3
    seed: int = 0
    name: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = (
        "BRECQ and GLF-Q style reconstruction (arXiv 2102.05426, 2203.05740), AdaRound (2004.10568), AIQViT"
    )
    provides: ClassVar[str] = "weight codes"
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.name, "parametrisation", self.parametrisation, ("full", "low_rank", "adaround"))
        one_of(self.name, "loss", self.loss, ("block", "block_and_feature"))
        for field in ("rank", "iterations", "batch"):
            require(getattr(self, field) >= 1, f"{self.name}.{field} must be at least 1, got {getattr(self, field)}.")
        for field in ("learning_rate", "scale_learning_rate"):
            value = getattr(self, field)
            require(0 < value < math.inf, f"{self.name}.{field} must be > 0 and finite, got {value}.")

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        found: dict[str, str] = {}
        fixed = config.activations.mode == "dynamic" and not config.attention.quantize
        if self.parametrisation != "low_rank":
            found["rank"] = f"parametrisation={self.parametrisation!r} has no rank"
        if fixed:
            found["activation_scales"] = "dynamic activations have no scale to learn"
        if (fixed or not self.activation_scales) and self.parametrisation != "full":
            found["scale_learning_rate"] = "no scale is learned"
        return found

    def round(self, fit: PipelineState) -> None:
        settings = train.Settings(
            self.loss == "block_and_feature",
            self.activation_scales,
            self.iterations,
            self.batch,
            self.learning_rate,
            self.scale_learning_rate,
            self.seed,
        )
        with torch.inference_mode(False):
            train_blocks(self, train.Reconstruction(fit, settings, self.parametrise))

    def parametrise(self, weight: torch.Tensor, grid: WeightGrid, block: int, number: int) -> Parametrisation:
        """What is trained of ``weight`` [out, in], the layer ``number`` of ``block``."""
        if self.parametrisation == "full":
            return FullWeight(weight, grid)
        if self.parametrisation == "adaround":
            return RoundingOffsets(weight, grid)
        generator = torch.Generator().manual_seed(self.seed + 1000 * block + number)
        return LowRank(weight, grid, self.rank, generator)


@dataclass(frozen=True)
class Light(Reconstruction):
    """`Reconstruction` in fewer and smaller steps: half a minute on two cores for an encoder of 6 x 128."""

    iterations: int = 100
    batch: int = 8
    name: ClassVar[str] = "light"


@dataclass(frozen=True)
class GLFQ(Reconstruction):
    """`Reconstruction` with the losses and the length of GLF-Q. Its Hadamard rotation is the method ``rotation``; its change
    from GELU to ReLU is left out."""

    iterations: int = 3000
    batch: int = 32
    name: ClassVar[str] = "glf_q"
