"""What a builder of the CPU benchmark gets (`Job`) and what it returns (`Runner`)."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_regcache import RegCacheConfig
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.search.mining import mine_tokens

DELETED_TOKENS = 4


class Skipped(Exception):  # noqa: N818 - it is no error
    """A contender cannot run here; the text says why and appears in table and JSON."""


@dataclass(frozen=True)
class Settings:
    """What the builders need to know of the command line.

    Attributes:
        threads: of every contender.
        tau: copies of the register; 1 needs no mask.
        trials: runs per setting where a contender tries several (OpenVINO); 0 takes the first setting.
    """

    threads: int = 1
    tau: float = 4.0
    trials: int = 3


class Runner:
    """A contender ready to run.

    Attributes:
        variant: how it runs, for the table.
        details: more of that, for the JSON.
        module: the model, where PyTorch runs it.
    """

    variant = ""
    module: nn.Module | None = None

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}

    def prepare(self, batch: Batch) -> None:
        """Called before a batch size is timed; later batches have the same shape."""

    def settle(self) -> None:
        """No other batch size will follow: drop what only :meth:`prepare` needs."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Pooled output [B, D], float32."""
        raise NotImplementedError

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(last hidden state [B, N, D], pooled output [B, D]), float32."""
        raise NotImplementedError


class TorchRunner(Runner):
    """Any module that takes a batch and returns a transformers output."""

    def __init__(self, module: nn.Module, call: Any = None, variant: str = "torch") -> None:
        super().__init__()
        self.module, self.variant = module, variant
        self.call = module if call is None else call

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> torch.Tensor:
        return pooled(self.call(**batch))

    @torch.inference_mode()
    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.call(**batch)
        return output.last_hidden_state, pooled(output)


def pooled(output: Any) -> torch.Tensor:
    """The pooled output of a tower, the first token if it has none."""
    found = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if found is None else found


@dataclass
class Job:
    """One float model with everything that contenders derive from it, each thing built once.

    Attributes:
        model: the float tower, never changed.
        calibration: batches of one image.
        workdir: directory for exported files; files that are there are used again.
        settings: of the run.
    """

    model: PreTrainedModel
    calibration: list[Batch]
    workdir: Path
    settings: Settings = field(default_factory=Settings)

    @cached_property
    def plain(self) -> PreTrainedModel:
        """Static W8A8 without registers."""
        return build_quantized(self.model, self._config, None, self.calibration)

    @cached_property
    def prefixed(self) -> PreTrainedModel:
        """Static W8A8 with one register in the upper half of the blocks, and four tokens deleted at the first of them."""
        depth = len(find_tower(self.model).blocks)
        upper, tau = tuple(range(depth // 2, depth)), self.settings.tau
        config = self._config.replace(
            registers={"mode": "fixed", "blocks": upper, "num_copies": tau},
            deletion={"block": upper[0], "count": DELETED_TOKENS},
        )
        mined = mine_tokens(self.model, self.calibration, [upper[0]], progress=False)[upper[0]]
        cache = mined.average(upper, depth).restricted(upper, tau)
        return build_quantized(self.model, config, cache, self.calibration)

    @property
    def _config(self) -> RegCacheConfig:
        return RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})

    def file(self, name: str, write: Any) -> Path:
        """``workdir / name``, made by ``write(path)`` if it is not there; an interrupted write leaves nothing behind."""
        path = self.workdir / name
        if not path.exists():
            self.workdir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"tmp-{name}")
            write(temporary)
            os.replace(temporary, path)
        return path

    def pixels(self) -> list[torch.Tensor]:
        """Calibration images, [1, 3, H, W] each.

        Raises:
            Skipped: the model takes more than pixels.
        """
        if any(set(batch) != {"pixel_values"} for batch in self.calibration):
            raise Skipped("the exported graph takes pixel_values only, this model's batches have more")
        return [batch["pixel_values"] for batch in self.calibration]

    def copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy that a builder may change."""
        return copy.deepcopy(model)
