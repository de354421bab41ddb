"""Sensitivity: which linear layer (or block) loses most when it alone is quantized (docs/method.md 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from optimum_regcache.calibration.calibrate import calibrate
from optimum_regcache.calibration.quantized_inputs import quantized_inputs
from optimum_regcache.config import RegCacheConfig
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.layers.install import config_sites
from optimum_regcache.registers.replay import record_block_inputs, replaying


@dataclass(frozen=True)
class SensitivityReport:
    """Result of the scan.

    Attributes:
        drops: name of the layer (or ``block N``) -> drop of the objective against the float model.
        blocks: name -> block index.
        sensitive_block: l_q, block of the largest drop.
        objective: name of the objective.
    """

    drops: dict[str, float]
    blocks: dict[str, int]
    sensitive_block: int
    objective: str

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """The most sensitive entries; ties keep execution order."""
        return sorted(self.drops.items(), key=lambda item: -item[1])[:count]

    def per_block(self) -> dict[int, float]:
        """Largest drop in each block."""
        result: dict[int, float] = {}
        for name, drop in self.drops.items():
            result[self.blocks[name]] = max(drop, result.get(self.blocks[name], float("-inf")))
        return result

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "objective": self.objective,
            "sensitive_block": self.sensitive_block,
            "top": [{"layer": name, "drop": drop} for name, drop in self.top()],
            "drops": self.drops,
            "per_block": {str(k): v for k, v in self.per_block().items()},
        }


def scan_sensitivity(
    float_model: nn.Module,
    config: RegCacheConfig,
    calibration: list[Batch],
    objective: Objective,
    granularity: str = "linear",
    progress: bool = True,
) -> SensitivityReport:
    """Quantize one linear layer (or all of one block) at a time and measure the drop of ``objective``.

    Only activations are quantized: with per-channel weights the weight error would add a cause that registers cannot
    cure (docs/method.md 2).

    Args:
        float_model: the model, without registers.
        config: activations and modules.
        calibration: batches for the scales.
        objective: scored on its own batches.
        granularity: ``linear`` or ``block``.
        progress: show a progress bar.

    Raises:
        ValueError: everything in the blocks is ignored by ``config``.
    """
    sites = [site for site in config_sites(float_model, config) if site.block is not None]
    if not sites:
        raise ValueError("No linear layer of the blocks is left to quantize; shorten modules.ignore.")
    qparams = calibrate(float_model, config, calibration)
    groups: dict[str, list[str]] = {}
    blocks: dict[str, int] = {}
    for site in sites:
        key = site.name if granularity == "linear" else f"block {site.block}"
        groups.setdefault(key, []).append(site.name)
        blocks[key] = int(site.block)  # type: ignore[arg-type]
    reference = float(objective.scores(float_model).mean())
    if not math.isfinite(reference):
        raise ValueError(
            "The float model's own features are not finite. Load it with dtype=torch.float32, and check its input images."
        )
    drops: dict[str, float] = {}
    recorded, states = -1, []
    for key, names in tqdm(groups.items(), desc="sensitivity", disable=not progress):
        if blocks[key] != recorded:  # blocks before this one run as in the float model: do not run them again
            recorded = blocks[key]
            states = record_block_inputs(float_model, objective.batches, recorded)
        with quantized_inputs(float_model, names, qparams, config), replaying(float_model, recorded, states):
            score = float(objective.scores(float_model).mean())
            drops[key] = reference - score if math.isfinite(score) else math.inf
    most = max(drops, key=lambda name: drops[name])
    return SensitivityReport(drops, blocks, blocks[most], objective.name)
