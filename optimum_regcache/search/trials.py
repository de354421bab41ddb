"""A float model and its quantized twin, so that one configuration after another can be calibrated and scored.

What a configuration does not change is computed once: registers and deletion act from some block on, so everything before it
(activation scales, block inputs) is that of "nothing installed", recorded on first use and shared by all configurations. The
scores are bit-identical to those without the record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from optimum_regcache.calibration.calibrate import QParams, calibrate
from optimum_regcache.config import DeletionConfig, RegCacheConfig
from optimum_regcache.encoders.passes import Batch, count_images, states_read
from optimum_regcache.encoders.sharing import shared_copy
from optimum_regcache.encoders.store import TensorSpace
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.layers.install import assign_input_qparams, quantize_modules
from optimum_regcache.registers import RegisterCache, prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.replay import Recorded, record_block_inputs, replaying
from optimum_regcache.registers.state import BlockInput
from optimum_regcache.search.progress import current


class BlockInputs:
    """What arrives at the blocks of one model for one list of batches, recorded when asked for.

    Args:
        model: wired for registers.
        batches: images.
        space: where the states are kept.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], space: TensorSpace | None = None) -> None:
        self.model, self.batches, self.space = model, batches, space
        self._recorded: dict[int, Recorded] = {}

    def at(self, block: int) -> Sequence[BlockInput]:
        """One state per batch; whatever is installed in the model must change nothing before ``block``."""
        if block not in self._recorded:
            known = self._recorded.get(self._nearest(block))
            self._recorded[block] = Recorded(
                block, record_block_inputs(self.model, self.batches, block, known, self.space)
            )
        return self._recorded[block].states

    def cost(self, block: int) -> int:
        """Images times blocks that `at` has to compute."""
        return count_images(self.batches) * (block - max(self._nearest(block), 0))

    def _nearest(self, block: int) -> int:
        """The last recorded block up to ``block``, -1 if there is none."""
        return max((b for b in self._recorded if b <= block), default=-1)


def setting_digest(cache: RegisterCache | None, deletion: DeletionConfig) -> str:
    """Identity of registers, bit by bit, and deletion."""
    digest = hashlib.sha256(repr(deletion).encode())
    if cache is not None:
        for block in cache.blocks:
            digest.update(f"{block} {cache.copies(block)!r}".encode())
            for rows in cache.rows(block):
                content = rows.detach().cpu().float().contiguous().numpy().tobytes()
                digest.update(str(tuple(rows.shape)).encode() + content)
    return digest.hexdigest()


class TrialRunner:
    """Calibrates and scores configurations that share their weights.

    Weights are quantized once; activation scales are found anew for every configuration (docs/method.md 8), as far as it can
    change them.

    Args:
        model: the float model; not changed. Its tensors are shared, not copied.
        config: weights, activations and modules.
        calibration: batches for the activation scales.
        reuse: record what configurations have in common; without it, or with quantized attention products, every configuration
            is computed from the pixels on.
        space: where the record is kept; in the memory of the model's device by default.
        scales: of configurations that another runner of the same model, config and images calibrated; new ones are added.

    Attributes:
        float_model: float copy, wired for registers.
        quantized: quantized copy, wired the same way.
        block_forwards: images times blocks that were computed so far, in both models.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RegCacheConfig,
        calibration: Sequence[Batch],
        *,
        reuse: bool = True,
        space: TensorSpace | None = None,
        scales: dict[str, QParams] | None = None,
    ) -> None:
        self.config, self.calibration, self.space = config, calibration, space
        self.scales: dict[str, QParams] = {} if scales is None else scales
        # calibration computes the attention products in other steps than a recording pass: not the same bits
        self.reuse = reuse and not config.attention.quantize
        self.float_model = shared_copy(model).eval()
        prepare_tower(self.float_model)
        self.quantized = shared_copy(self.float_model)
        quantize_modules(self.quantized, config)
        tower = find_tower(self.float_model)
        self.depth = len(tower.blocks)
        self._last_start = max(0, min(states_read(self.float_model, tower)) - 1)  # states before a replay do not exist
        self.block_forwards = 0
        self._plain: dict[int, QParams] = {}  # scales with nothing installed, by calibration list
        self._float: dict[int, BlockInputs] = {}  # by list of batches
        self._quantized: dict[tuple[int, int], BlockInputs] = {}  # by calibration list and scored list

    def _count(self, batches: Sequence[Batch], first: int) -> None:
        work = count_images(batches) * (self.depth - first)
        self.block_forwards += work
        current().advance(work)

    def _inputs(self, known: BlockInputs, block: int) -> Sequence[BlockInput]:
        self.block_forwards += known.cost(block)
        return known.at(block)

    def first_change(self, cache: RegisterCache | None, deletion: DeletionConfig) -> int | None:
        """The earliest block that is not as with nothing installed; None if there is none."""
        changed = list(cache.blocks) if cache is not None else []
        if deletion.active:
            changed.append(int(deletion.block or 0))
        return min(changed, default=None)

    def install(
        self, cache: RegisterCache | None, deletion: DeletionConfig, calibration: Sequence[Batch] | None = None
    ) -> None:
        """Put registers and deletion into both models and recalibrate the quantized one.

        Args:
            cache, deletion: the configuration.
            calibration: in place of the runner's; the same list object for the same images.
        """
        calibration = self.calibration if calibration is None else calibration
        plain = self.plain_scales(calibration) if self.reuse else {}
        for model in (self.float_model, self.quantized):
            set_registers(model, cache)
            set_deletion(model, deletion)
        first = self.first_change(cache, deletion)
        if not self.reuse:
            self._count(calibration, 0)
            qparams = calibrate(self.float_model, self.config, calibration)
        elif first is None or not plain:  # dynamic scales need no calibration
            qparams = plain
        else:
            qparams = {**plain, **self._changed_qparams(cache, deletion, first, calibration)}
        assign_input_qparams(self.quantized, qparams)

    def _changed_qparams(
        self, cache: RegisterCache | None, deletion: DeletionConfig, first: int, calibration: Sequence[Batch]
    ) -> QParams:
        """The scales from block ``first`` on, of what is installed."""
        name = setting_digest(cache, deletion)
        if calibration is self.calibration and name in self.scales:
            return self.scales[name]
        known = Recorded(first, self._inputs(self._float[id(calibration)], first))
        self._count(calibration, first)
        found = calibrate(self.float_model, self.config, calibration, known)
        if calibration is self.calibration:
            self.scales[name] = found
        return found

    def plain_scales(self, calibration: Sequence[Batch] | None = None) -> QParams:
        """The scales with nothing installed; ``calibration`` as for `install`."""
        calibration = self.calibration if calibration is None else calibration
        key, nothing = id(calibration), setting_digest(None, DeletionConfig())
        if key not in self._plain:
            found = self.scales.get(nothing) if calibration is self.calibration else None
            if found is None:
                self.reset()
                self._count(calibration, 0)
                found = calibrate(self.float_model, self.config, calibration)
            if calibration is self.calibration:
                self.scales[nothing] = found
            self._plain[key] = found
            self._float[key] = BlockInputs(self.float_model, calibration, self.space)  # keeps the list, and so its id
        return self._plain[key]

    def reset(self) -> None:
        """Remove registers and deletion from the float model."""
        set_registers(self.float_model, None)
        set_deletion(self.float_model, DeletionConfig())

    def score(
        self,
        cache: RegisterCache | None,
        deletion: DeletionConfig,
        objective: Objective,
        calibration: Sequence[Batch] | None = None,
    ) -> torch.Tensor:
        """Install, recalibrate and score; float32 [n]. Arguments as for `install`."""
        calibration = self.calibration if calibration is None else calibration
        self.install(cache, deletion, calibration)
        with self.starting(cache, deletion, objective.batches, calibration):
            scores = objective.scores(self.quantized)
        self.reset()
        return scores

    def starting(
        self,
        cache: RegisterCache | None,
        deletion: DeletionConfig,
        batches: Sequence[Batch],
        calibration: Sequence[Batch] | None = None,
    ) -> AbstractContextManager[None]:
        """Inside it the quantized model, run over ``batches`` once, starts at the first block that what is installed changes;
        arguments as for `install`."""
        calibration = self.calibration if calibration is None else calibration
        known = self._known(self.first_change(cache, deletion), batches, calibration)
        self._count(batches, 0 if known is None else known.block)
        return nullcontext() if known is None else replaying(self.quantized, known.block, known.states)

    def float_inputs(
        self, cache: RegisterCache | None, deletion: DeletionConfig, batches: Sequence[Batch]
    ) -> Recorded | None:
        """As `quantized_inputs`, of the float model; None also where the configuration changes nothing."""
        first = self.first_change(cache, deletion)
        if not self.reuse or not first:
            return None
        if id(batches) not in self._float:
            self._float[id(batches)] = BlockInputs(self.float_model, batches, self.space)
        return Recorded(first, self._inputs(self._float[id(batches)], first))

    def quantized_inputs(
        self, cache: RegisterCache | None, deletion: DeletionConfig, batches: Sequence[Batch]
    ) -> Recorded | None:
        """What arrives at the first block of the quantized model that a configuration changes, for passes that are to start
        there (`replaying`). Something must have been installed, with the runner's calibration.

        Args:
            cache, deletion: the configuration.
            batches: the same list object for the same images.

        Returns:
            One state per batch, made in inference mode; None where passes start at the pixels.
        """
        return self._known(self.first_change(cache, deletion), batches, self.calibration)

    def _known(self, first: int | None, batches: Sequence[Batch], calibration: Sequence[Batch]) -> Recorded | None:
        start = 0 if not self.reuse or first is None else min(first, self._last_start)
        if start == 0:
            return None
        key = (id(calibration), id(batches))
        if key not in self._quantized:
            self._quantized[key] = BlockInputs(self.quantized, batches, self.space)
        return Recorded(start, self._inputs(self._quantized[key], start))
