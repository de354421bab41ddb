"""Registers tuned by gradients: K, V and the logit bias are trained through the quantized model, its weights stay as they are
(docs/method.md 4; after CushionCache, arXiv 2406.12016, which trains a prefix of language models)."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, batch_sizes, image_features
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.visiting import patch_span
from optimum_regcache.evaluation.objective import CosineObjective, Objective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.registers.replay import Recorded, lending, replaying
from optimum_regcache.registers.state import BlockInput
from optimum_regcache.registers.trained import TrainedRows
from optimum_regcache.search.trials import TrialRunner


@dataclass(frozen=True)
class TuningSettings:
    """How registers are tuned.

    Attributes:
        steps: largest number of steps; each looks at one training batch.
        learning_rate: of Adam for K and V, in units of the root mean square of a block's starting rows.
        bias_learning_rate: of Adam for the logit bias; both rates fall linearly to a tenth.
        recalibrate_every: steps between calibrations; the activation scales are fixed within them.
        evaluate_every: steps between scores on the held-out images, each after a calibration.
        patience: scores in a row without improvement that end the tuning.
        norm_weight: weight of ``log sum exp`` of the tokens' l_inf norms behind the deletion block (of the first register
            block if nothing is deleted) in the loss, leading tokens left out.
        seed: of the order of the batches.
    """

    steps: int = 300
    learning_rate: float = 0.02
    bias_learning_rate: float = 0.05
    recalibrate_every: int = 10
    evaluate_every: int = 20
    patience: int = 5
    norm_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "recalibrate_every", "evaluate_every", "patience"):
            require(getattr(self, name) >= 1, f"tuning.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "bias_learning_rate", "norm_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"tuning.{name} must be >= 0 and finite, got {value}.")


@dataclass(frozen=True)
class TuningRecord:
    """What a tuning did.

    Attributes:
        losses: of each step, on its training batch.
        held_out: (step, mean held-out score) after calibration, step 0 being the start.
        best_step: step of the registers that were returned; 0 is the start.
        steps: that were made.
        stopped: ``steps``, ``patience``, or ``not finite`` (the loss, its gradient or a score was not a number).
        seconds: duration.
    """

    losses: list[float]
    held_out: list[tuple[int, float]]
    best_step: int
    steps: int
    stopped: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return asdict(self)


def tuning_loss(
    model: nn.Module, cache: RegisterCache, batch: Batch, reference: torch.Tensor, known: Recorded | None = None
) -> torch.Tensor:
    """``1 - cos`` of the features of ``model`` with the rows of ``cache``, mean over the batch, 0-dim, with gradients.

    Args:
        model: prepared; quantized or float.
        cache: takes the place of the stored registers.
        batch: images.
        reference: features of the float model, [B, D], each of length 1.
        known: the input of a block for this one batch; earlier blocks are skipped.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(lending(model, cache))
        if known is not None:
            stack.enter_context(replaying(model, known.block, known.states))
        features = F.normalize(image_features(model, batch), dim=-1)
        return 1.0 - (features * reference.to(features)).sum(-1).mean()


def tune_registers(
    runner: TrialRunner,
    cache: RegisterCache,
    deletion: DeletionConfig,
    train: CosineObjective | Sequence[Batch],
    held_out: Objective,
    settings: TuningSettings | None = None,
    *,
    progress: bool = True,
) -> tuple[RegisterCache, TuningRecord]:
    """Train K, V and logit bias of every block of ``cache`` with Adam, through the quantized model.

    The loss is ``1 - cos(f_quantized, f_float)`` on one training batch a step. Rounding is passed straight through (arXiv
    1308.3432); activation scales are constants within a step and calibrated anew between steps. What is returned was scored
    on the held-out images as every trial is: after calibration, with real rounding. The same arguments give the same bits.

    Args:
        runner: holds the float and the quantized model and the calibration images. Its models' weights do not change; the
            quantized one is left with the scales and registers of the last score.
        cache: start, mined for example.
        deletion: what is deleted meanwhile.
        train: images to train on; their order within the objective or list makes the batches.
        held_out: decides when to stop and what is returned; images that are not trained on.
        settings: default: `TuningSettings()`.
        progress: show a progress bar.

    Returns:
        (registers, record). The registers are those of the best held-out score, ``cache`` itself if none was better.

    Raises:
        ValueError: a cache without rows, no training images, or a start whose held-out score is not a number.
    """
    require(bool(cache.blocks), "There are no registers to tune: the cache has no rows.")
    settings = TuningSettings() if settings is None else settings
    with torch.inference_mode(False):
        return _Tuning(runner, cache, deletion, train, held_out, settings).run(progress)


class _Tuning:
    """One run of `tune_registers`."""

    def __init__(
        self,
        runner: TrialRunner,
        cache: RegisterCache,
        deletion: DeletionConfig,
        train: CosineObjective | Sequence[Batch],
        held_out: Objective,
        settings: TuningSettings,
    ) -> None:
        self.runner, self.start, self.deletion = runner, cache, deletion
        self.held_out, self.settings = held_out, settings
        if not isinstance(train, CosineObjective):
            require(bool(train), "There are no images to tune registers on.")
            runner.reset()
            train = CosineObjective(runner.float_model, train)
        self.batches = train.batches
        sizes = batch_sizes(self.batches)
        self.references = [part.clone() for part in torch.split(train.reference, sizes)]  # no inference tensors
        self.rows = TrainedRows(cache, next(runner.quantized.parameters()).device)

    def run(self, progress: bool) -> tuple[RegisterCache, TuningRecord]:
        begun, s = time.perf_counter(), self.settings
        best, best_step = self.start, 0
        top = self._score(self.start)
        require(not math.isnan(top), "The registers to tune have a held-out score that is not a number.")
        curve, losses, since, stopped = [(0, top)], list[float](), 0, "steps"
        states, optimizer, order = self._states(), self._optimizer(), self._order()
        for step in bar(range(1, s.steps + 1), "tuning registers", shown=progress):
            self._slow_down(optimizer, step)
            loss = self._step(optimizer, next(order), states)
            losses.append(loss)
            if not (math.isfinite(loss) and self.rows.finite()):
                stopped = "not finite"
                break
            if step % s.evaluate_every == 0 or step == s.steps:
                found = self.rows.frozen()
                score = self._score(found)
                curve.append((step, score))
                if math.isnan(score):
                    stopped = "not finite"
                    break
                since += 1
                if score > top:
                    best, best_step, top, since = found, step, score, 0
                if since >= s.patience:
                    stopped = "patience"
                    break
            elif step % s.recalibrate_every == 0:
                self.runner.install(self.rows.frozen(), self.deletion)
                self.runner.reset()
        seconds = round(time.perf_counter() - begun, 3)
        return best, TuningRecord(losses, curve, best_step, len(losses), stopped, seconds)

    def _score(self, cache: RegisterCache) -> float:
        return float(self.runner.score(cache, self.deletion, self.held_out).mean())

    def _states(self) -> list[Recorded | None]:
        """The input of the first changed block for each batch, as tensors that autograd takes."""
        known = self.runner.quantized_inputs(self.start, self.deletion, self.batches)
        if known is None:
            return [None] * len(self.batches)
        return [Recorded(known.block, [BlockInput(s.hidden.clone(), s.selection, s.valid)]) for s in known.states]

    def _optimizer(self) -> torch.optim.Adam:
        s, groups = self.settings, list[dict[str, Any]]()
        for block in self.rows.blocks:
            for leaf in (self.rows.keys[block], self.rows.values[block]):
                size = float(leaf.detach().square().mean().sqrt()) or 1.0
                groups.append({"params": [leaf], "lr": s.learning_rate * size})
            groups.append({"params": [self.rows.biases[block]], "lr": s.bias_learning_rate})
        for group in groups:
            group["first"] = group["lr"]
        return torch.optim.Adam(groups, foreach=False)

    def _slow_down(self, optimizer: torch.optim.Adam, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (1.0 - 0.9 * (step - 1) / self.settings.steps)

    def _order(self) -> Generator[int, None, None]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        while True:
            yield from torch.randperm(len(self.batches), generator=generator).tolist()

    def _step(self, optimizer: torch.optim.Adam, number: int, states: list[Recorded | None]) -> float:
        """One step of Adam on one batch; its loss. Nothing moves where loss or gradient are not finite."""
        model, leaves = self.runner.quantized, self.rows.leaves()
        with self._norms(model) as norms:
            loss = tuning_loss(model, self.rows.live(), self.batches[number], self.references[number], states[number])
        if norms:
            loss = loss + self.settings.norm_weight * norms[0]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        if not all(g is None or bool(g.isfinite().all()) for g in gradients):
            return math.nan
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        if bool(loss.isfinite()):
            optimizer.step()
        return float(loss.detach())

    @contextmanager
    def _norms(self, model: nn.Module) -> Generator[list[torch.Tensor], None, None]:
        """Collects ``log sum exp`` of the l_inf norms, mean over the images, where it has a weight."""
        found: list[torch.Tensor] = []
        if self.settings.norm_weight == 0.0:
            yield found
            return
        tower = find_tower(model)
        block = self.start.blocks[0] if self.deletion.block is None else self.deletion.block
        places = patch_span(tower, block).positions

        def note(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found.append(states[..., places, :].abs().amax(-1).logsumexp(-1).mean())

        handle = tower.blocks[block].register_forward_hook(note)
        try:
            yield found
        finally:
            handle.remove()
