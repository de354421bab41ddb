"""Block after block: the quantized block learns to give what the float model's gives, on inputs from the quantized ones before
it (docs/method.md 11.13)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import batch_sizes, encode, image_features, states_read
from optimum_regcache.encoders.store import TensorSpace
from optimum_regcache.methods._reconstruction.block import TrainedBlock
from optimum_regcache.methods._reconstruction.data import Images, Sampler, common_tokens
from optimum_regcache.methods._reconstruction.parametrise import Parametrisation
from optimum_regcache.methods.base import PipelineState, linear_groups
from optimum_regcache.methods.gptq import WeightGrid
from optimum_regcache.registers.replay import Recorded, block_output, record_block_inputs, replaying
from optimum_regcache.registers.state import BlockInput

_LOCAL_WEIGHT = 2.0  # of the block's own loss beside that of the features
_PENALTY_WEIGHT = 0.1  # of rounding offsets that are neither 0 nor 1; the losses start at about 1
_JUDGEMENTS = 5  # of one block, at equal steps
_GRADIENT_SCALE = 1024.0  # keeps gradients in the range of float16; Adam does not see it


@dataclass(frozen=True)
class Settings:
    """How every block is trained.

    Attributes:
        features: the loss has a part for the final features.
        scales: static scales of inputs and attention operands are trained.
        iterations: steps of a block.
        batch: images of a step.
        learning_rate, scale_learning_rate: of Adam, for weights in their units and for the logarithm of scales.
        seed: of the order of the images.
    """

    features: bool
    scales: bool
    iterations: int
    batch: int
    learning_rate: float
    scale_learning_rate: float
    seed: int


@dataclass(frozen=True)
class BlockRecord:
    """What became of one block.

    Attributes:
        block: 0-based.
        start, end: loss on the judging images before, and of what is stored; 1 and less by definition of the unit, unless
            nothing was to be learned (0 and 0).
        trained: whether the result of the training was stored; if not, the block stays as it was.
        iterations: steps that were made.
        seconds: duration.
        ranks: layer -> rank of what was added to its weight.
    """

    block: int
    start: float
    end: float
    trained: bool
    iterations: int
    seconds: float
    ranks: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return asdict(self)


class Reconstruction:
    """Trains the blocks of ``fit.result`` in order, in place.

    Args:
        fit: float and quantized model, calibration images.
        settings: how.
        parametrise: (float32 weight [out, in], grid, block, number of the layer in it) -> what is trained of it.
        sampler: (the training of a block) -> draws of training images without end; all of them in random order by default.
        prepare: called with the training of a block before its first step.
    """

    def __init__(
        self,
        fit: PipelineState,
        settings: Settings,
        parametrise: Callable[[torch.Tensor, WeightGrid, int, int], Parametrisation],
        sampler: Callable[[BlockTraining], Iterator[list[int]]] | None = None,
        prepare: Callable[[BlockTraining], None] | None = None,
    ) -> None:
        self.fit, self.settings, self.parametrise = fit, settings, parametrise
        self.sampler, self.prepare = sampler or shuffled, prepare
        self.images, self.space = Images(fit.training), TensorSpace(parent=fit.work_dir)
        self.depth = len(fit.tower.blocks)
        self.sizes = batch_sizes(fit.training)
        if settings.features:
            require(
                states_read(fit.model, fit.tower) == (self.depth,),
                f"loss='block_and_feature' compares features behind the last block, and {type(fit.model).__name__} reads "
                "states between the blocks. Use loss='block'.",
            )
        self.features = encode(fit.model, fit.training) if settings.features else torch.empty(0)

    def run(self, kept: Callable[[int, TrainedBlock, Callable[[], BlockRecord]], BlockRecord]) -> list[BlockRecord]:
        """Train all blocks.

        Args:
            kept: (number, block, trains it) -> its record; may restore a finished block in place of training it.
        """
        fit, found = self.fit, list[BlockRecord]()
        groups = linear_groups(fit.result, fit.config)
        ours: Recorded | None = None
        theirs: Recorded | None = None
        steps = self.settings.iterations
        with bar(name="reconstruction", total=self.depth * steps, unit="step", shown=fit.progress) as shown:
            for block in range(self.depth):
                ours = Recorded(block, record_block_inputs(fit.result, fit.training, block, ours, self.space))
                theirs = theirs or Recorded(0, record_block_inputs(fit.model, fit.training, 0, None, self.space))
                behind = self._behind(theirs)
                here = [group for group in groups if group.block == block]
                if here:
                    trained = TrainedBlock(fit, here, self._parametrise_of(block), self.settings.scales)
                    training = BlockTraining(self, trained, ours, behind)
                    found.append(kept(block, trained, lambda training=training: training.run(shown)))
                shown.update((block + 1) * steps - shown.n)  # it was restored, or ended early
                theirs = Recorded(block + 1, behind)
        return found

    def _parametrise_of(self, block: int) -> Callable[[torch.Tensor, WeightGrid, int], Parametrisation]:
        return lambda weight, grid, number: self.parametrise(weight, grid, block, number)

    def _behind(self, known: Recorded) -> Sequence[BlockInput]:
        """What the float block gives, one state per batch."""
        fit, block = self.fit, known.block
        if block + 1 < self.depth:
            return record_block_inputs(fit.model, fit.training, block + 1, known, self.space)
        with torch.inference_mode():
            states = zip(fit.training, known.states, strict=True)
            return [block_output(fit.model, batch, Recorded(block, [state]))[0] for batch, state in states]


class BlockTraining:
    """The training of one block.

    Args:
        owner: settings, models and images.
        trained: the block.
        ours: its inputs in the quantized model.
        wanted: what the float model's block gives for its own inputs, one state per batch.
    """

    def __init__(
        self, owner: Reconstruction, trained: TrainedBlock, ours: Recorded, wanted: Sequence[BlockInput]
    ) -> None:
        self.owner, self.trained, self.ours, self.wanted = owner, trained, ours, wanted
        self.unit = (1.0, 1.0)

    def run(self, shown: Any) -> BlockRecord:
        """Train, and store what judges better than the start, if anything does."""
        begun, trained = time.perf_counter(), self.trained
        self.unit = self._parts()
        total = self._total(*self.unit)
        if not total > 0.0:  # there is nothing to learn, or no number
            return BlockRecord(self.ours.block, total, total, False, 0, round(time.perf_counter() - begun, 3))
        start, before = self._judge(), trained.snapshot()
        if self.owner.prepare is not None:
            self.owner.prepare(self)
        with trained.running():
            steps = self._train(shown)
        trained.store()
        end = self._judge()
        if not end < start:
            trained.restore(before)
        shown.set_postfix_str(f"block {self.ours.block}: loss x {min(end, start) / start:.3f}")
        seconds = round(time.perf_counter() - begun, 3)
        ranks = trained.ranks() if end < start else {}
        return BlockRecord(self.ours.block, start, min(end, start), end < start, steps, seconds, ranks)

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        """Mean over these training images, in units of the start's parts, 0-dim, with gradients."""
        return self._total(*self.losses(items))

    @torch.no_grad()
    def image_losses(self, items: Sequence[int]) -> torch.Tensor:
        """Squared error of the block's output for each of these images, float32 [items]."""
        error, counts, *_ = self._compare(items)
        squares = error.float().square().mean(-1)
        if self.owner.images.packed:
            return squares.mean().reshape(1)
        counts = torch.ones_like(squares) if counts is None else counts.float()
        means = (squares * counts).sum(1) / counts.sum(1).clamp(min=1)
        return means[torch.tensor(items).argsort().argsort().to(means.device)]  # images run in ascending order

    def _train(self, shown: Any) -> int:
        """Leaves the trained tensors at the best of the judgements; the number of steps."""
        s = self.owner.settings
        weights, scales = self.trained.parameters()
        leaves = [t for t, _ in weights] + scales
        optimizer = torch.optim.Adam(
            [{"params": [t], "lr": s.learning_rate * unit} for t, unit in weights]
            + [{"params": [t], "lr": s.scale_learning_rate} for t in scales],
            foreach=False,
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        best, least, made = [t.detach().clone() for t in leaves], math.inf, 0
        every = max(1, math.ceil(s.iterations / _JUDGEMENTS))
        for step, items in enumerate(islice(self.owner.sampler(self), s.iterations)):
            progress = step / s.iterations
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * progress))
            if not self._step(optimizer, leaves, items, progress):
                break
            made += 1
            shown.update()
            if made % every == 0 or made == s.iterations:
                with self.trained.hard():
                    loss = self._judge()
                if loss < least:
                    best, least = [t.detach().clone() for t in leaves], loss
        with torch.no_grad():
            for leaf, value in zip(leaves, best, strict=True):
                leaf.copy_(value)
        return made

    def _step(self, optimizer: torch.optim.Adam, leaves: list[torch.Tensor], items: list[int], progress: float) -> bool:
        """One step of Adam; false, and nothing moves, where loss or gradient are not finite."""
        with torch.enable_grad():
            loss = self.loss(items)
            penalty = self.trained.penalty(progress)
            loss = loss if penalty is None else loss + _PENALTY_WEIGHT * penalty
            gradients = torch.autograd.grad(loss * _GRADIENT_SCALE, leaves, allow_unused=True)
        if not bool(loss.isfinite()) or not all(g is None or bool(g.isfinite().all()) for g in gradients):
            return False
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        return True

    def _judge(self) -> float:
        """Loss on the judging images, in units of the start's parts."""
        return self._total(*self._parts())

    def _total(self, local: Any, feature: Any) -> Any:
        local = local / (self.unit[0] or 1.0)
        return _LOCAL_WEIGHT * local + feature / (self.unit[1] or 1.0) if self.owner.settings.features else local

    @torch.no_grad()
    def _parts(self) -> tuple[float, float]:
        """Both losses on the judging images."""
        size, count, sums = self.owner.settings.batch, 0, [0.0, 0.0]
        for group in self.owner.images.judging:
            for first in range(0, len(group), size):
                items = group[first : first + size]
                for part, value in enumerate(self.losses(items)):
                    sums[part] += float(value) * len(items)
                count += len(items)
        return sums[0] / count, sums[1] / count

    def losses(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(squared error of the block's output, of the final features), means over these images."""
        owner = self.owner
        error, counts, got, batch, features = self._compare(items)
        local = _mean_square(error, counts)
        if not owner.settings.features:
            return local, torch.zeros(())
        if features is None:
            features = _through(owner.fit.model, self.ours.block + 1, got, batch)
        target = owner.images.features(owner.features, items, owner.sizes).to(features)
        return local, (features - target).square().mean()

    def _compare(
        self, items: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, BlockInput, dict[str, torch.Tensor], torch.Tensor | None]:
        """(error of the block's output, tokens that count or None for all, the output, the images, the final features where
        the block is the last one and they are needed)."""
        owner, block = self.owner, self.ours.block
        fit, images = owner.fit, owner.images
        batch, state = images.batch(items), images.states(self.ours.states, items)
        known, model = Recorded(block, [state]), fit.result
        last, features = block + 1 == owner.depth, None
        if owner.settings.features and last:
            got, features = block_output(model, batch, known, lambda: image_features(model, batch))
        else:
            got, _ = block_output(model, batch, known)
        mask = batch.get("pixel_attention_mask")
        padding = None if mask is None else mask.bool().to(got.hidden.device)
        wanted, counts = common_tokens(got, images.states(self.wanted, items), padding)
        return got.hidden - wanted.to(got.hidden.device), counts, got, batch, features


def shuffled(training: BlockTraining) -> Iterator[list[int]]:
    """Training images in random order."""
    settings = training.owner.settings
    return iter(Sampler(training.owner.images.training, settings.batch, settings.seed + training.ours.block))


def _mean_square(error: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that count."""
    squares = error.float().square().mean(-1)
    return squares.mean() if counts is None else (squares * counts).sum() / counts.sum().clamp(min=1)


def _through(model: nn.Module, block: int, state: BlockInput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Features of ``model`` whose ``block`` gets ``state``."""
    with replaying(model, block, [state]):
        return image_features(model, batch)
