"""Sensitivity: which linear layer (or block) loses most when it alone is quantized (docs/method.md 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from optimum_regcache.calibration.calibrate import QParams, calibrate
from optimum_regcache.calibration.quantized_inputs import quantized_inputs
from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.encoders.passes import Batch, count_images
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.layers.install import config_sites
from optimum_regcache.registers.replay import Recorded, record_block_inputs, replaying
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.processes import spread, world_size
from optimum_regcache.search.progress import current


@dataclass(frozen=True)
class SensitivityReport:
    """Result of the scan.

    Attributes:
        drops: name of the layer (or ``block N``) -> drop of the objective against the float model.
        blocks: name -> block index.
        sensitive_block: l_q, block of the largest drop of a linear layer (of a block, if only blocks were scanned) on all
            images.
        objective: name of the objective.
    """

    drops: dict[str, float]
    blocks: dict[str, int]
    sensitive_block: int
    objective: str

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """The most sensitive linear layers (blocks, if only these were scanned); ties keep execution order."""
        linears = {name: drop for name, drop in self.drops.items() if name != _block_name(self.blocks[name])}
        return sorted((linears or self.drops).items(), key=lambda item: -item[1])[:count]

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


def scan_sensitivity(  # noqa: PLR0913 (exported: every argument has its name)
    float_model: nn.Module,
    config: RegCacheConfig,
    calibration: Sequence[Batch],
    objective: Objective,
    granularity: str = "linear",
    progress: bool = True,
    journal: Journal | None = None,
    scales: QParams | None = None,
) -> SensitivityReport:
    """Quantize one linear layer (or all of one block) at a time and measure the drop of ``objective``.

    Only activations are quantized: with per-channel weights the weight error would add a cause that registers cannot
    cure (docs/method.md 2).

    Args:
        float_model: the model, without registers.
        config: activations and modules.
        calibration: batches for the scales.
        objective: scored on its own batches.
        granularity: ``linear``, ``block``, or ``coarse``: on a quarter of the images blocks, then the linear layers of the
            worst, and of the second where it loses at least a quarter as much; the worst layer of each on all images.
        progress: show a progress bar.
        journal: finished steps.
        scales: of every layer, if they are known already.

    Raises:
        ValueError: everything in the blocks is ignored by ``config``.
    """
    sites = [site for site in config_sites(float_model, config) if site.block is not None]
    if not sites:
        raise ValueError("No linear layer of the blocks is left to quantize; shorten modules.ignore.")
    journal = Journal(None, "") if journal is None else journal  # an empty journal is false
    scan = _Scan(float_model, config, calibration, objective, journal)
    if scales:
        scan.qparams = scales
    few = scan.on(coarse_images(count_images(objective.batches))) if granularity == "coarse" else scan
    linears = {site.name: (int(site.block or 0), [site.name]) for site in sites}
    whole = {
        _block_name(block): (block, [site.name for site in sites if site.block == block])
        for block in sorted({int(site.block or 0) for site in sites})
    }
    first = linears if granularity == "linear" else whole
    worst = min(COARSE_BLOCKS, len(whole)) if granularity == "coarse" else 0
    steps = len(first) + round(worst * len(linears) / len(whole)) + worst
    with bar(name="sensitivity", total=steps, shown=progress) as shown:
        drops = decisive = few.drops(first, shown)
        if worst:
            suspects = {whole[name][0] for name in _suspects(drops, worst)}
            shown.total -= round((worst - len(suspects)) * (len(linears) / len(whole) + 1))
            layers = few.drops({name: entry for name, entry in linears.items() if entry[0] in suspects}, shown)
            tops = [max((n for n in layers if linears[n][0] == b), key=lambda n: layers[n]) for b in suspects]
            decisive = scan.drops({name: entry for name, entry in linears.items() if name in tops}, shown)
            drops = drops | layers | decisive
    blocks = {name: (linears | whole)[name][0] for name in drops}
    return SensitivityReport(drops, blocks, blocks[max(decisive, key=lambda name: decisive[name])], objective.name)


COARSE_BLOCKS, SUSPICION = 2, 0.25


def _suspects(drops: dict[str, float], most: int) -> list[str]:
    """The blocks of the largest drops, at most ``most``, without those whose drop is less than `SUSPICION` times the largest:
    the block that loses most is then the sensitive one, whichever of its layers is to blame."""
    ranked = sorted(drops, key=lambda name: -drops[name])[:most]
    least = SUSPICION * max(drops[ranked[0]], 0.0)
    return [name for name in ranked if drops[name] >= least or name == ranked[0]]


def coarse_images(images: int) -> int:
    """How many of the images the coarse scan looks at blocks with."""
    return min(images, max(16, images // 4))


def _block_name(block: int) -> str:
    return f"block {block}"


class _Scan:
    """Measures drops; blocks before the one that is scanned run as in the float model and are not run again."""

    def __init__(
        self,
        model: nn.Module,
        config: RegCacheConfig,
        calibration: Sequence[Batch],
        objective: Objective,
        journal: Journal,
    ) -> None:
        self.model, self.config, self.calibration = model, config, calibration
        self.objective, self.journal = objective, journal
        self.images = count_images(objective.batches)
        self._known: Recorded | None = None

    def on(self, images: int) -> _Scan:
        """The same with the first ``images`` of the objective; scales are those of this one."""
        part = _Scan(self.model, self.config, self.calibration, self.objective.first(images), self.journal)
        part.qparams = self.qparams
        return part

    def _step(self, name: str) -> str:
        return f"sensitivity {name} on {self.images}"

    @cached_property
    def qparams(self) -> QParams:
        """Scales of every layer."""
        return calibrate(self.model, self.config, self.calibration)

    @cached_property
    def reference(self) -> float:
        """Score of the float model."""
        found = self.objective.ceiling(self.model)
        if not math.isfinite(found):
            raise ValueError(
                "The float model's own features are not finite. Load it with dtype=torch.float32, and check its input "
                "images."
            )
        return found

    def drops(self, groups: dict[str, tuple[int, list[str]]], shown: Any) -> dict[str, float]:
        """Name -> drop, for groups of layers (block, names of its layers), by ascending block; processes share the blocks."""
        self._known = None
        missing: dict[int, list[str]] = {}
        for name, (block, _) in groups.items():
            if self.journal.get(self._step(name)) is None:
                missing.setdefault(block, []).append(name)
        shown.update(len(groups) - sum(map(len, missing.values())))
        blocks, size = list(missing), world_size()
        for start in range(0, len(blocks), size):
            wave, begun = blocks[start : start + size], shown.n
            measured = spread(wave, lambda block: [self._drop(n, *groups[n], shown) for n in missing[block]])
            for block, drops in zip(wave, measured, strict=True):
                for name, drop in zip(missing[block], drops, strict=True):
                    self.journal.put(self._step(name), [drop])
            shown.update(sum(map(len, measured)) - (shown.n - begun))
        return {name: (self.journal.get(self._step(name)) or [math.nan])[0] for name in groups}

    def _drop(self, name: str, block: int, layers: list[str], shown: Any) -> float:
        """The drop of one group; what arrives at its block is kept for the next one."""
        if self._known is None or self._known.block != block:
            states = record_block_inputs(self.model, self.objective.batches, block, self._known)
            self._known = Recorded(block, states)
        qparams, reference = self.qparams, self.reference
        with (
            quantized_inputs(self.model, layers, qparams, self.config),
            replaying(self.model, block, self._known.states),
        ):
            score = float(self.objective.scores(self.model).mean())
        current().advance(count_images(self.objective.batches) * (len(find_tower(self.model).blocks) - block))
        drop = reference - score if math.isfinite(score) else math.inf
        self.journal.put(self._step(name), [drop])
        shown.update()
        return drop
