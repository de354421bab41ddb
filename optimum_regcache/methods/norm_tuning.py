"""Norm tuning (docs/method.md 11.15): what stays float is trained through the quantized model; no code and no scale changes."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, ImageRange, batch_sizes, count_images, encode, image_features
from optimum_regcache.encoders.tower import Tower, find_tower, named_modules
from optimum_regcache.evaluation.objective import CosineObjective
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.methods.base import Method, PipelineState
from optimum_regcache.registers import RegisterCache, get_register_cache, set_registers
from optimum_regcache.registers.replay import lending
from optimum_regcache.registers.trained import TrainedRows

EVALUATE_EVERY = 10  # iterations


@dataclass(frozen=True)
class NormTuning(Method):
    """Adam on ``1 - cos`` between the features of the quantized model and those of the float original, no labels: weight and
    bias of every norm of the encoder, LayerScale, and keys, values and logit bias of installed registers.

    The last images are held out. The best state on them is installed if its gain, image by image, exceeds the
    standard error, else the start. A fit that is interrupted here begins again.

    Attributes:
        iterations: largest number of steps; the held-out images are scored every 10 steps.
        batch: largest number of images of a step.
        learning_rate: of Adam, in units of the root mean square of what a norm puts out, of a LayerScale, of the keys or the
            values of a block; of the logit bias itself. Falls linearly to a tenth.
        norms, layer_scale, registers: what is trained.
        holdout: share of the images that is held out; at least two images.
        patience: scores in a row without improvement that end the training.
        seed: of the order of the batches.
    """

    iterations: int = 200
    batch: int = 8
    learning_rate: float = 0.002
    norms: bool = True
    layer_scale: bool = True
    registers: bool = True
    holdout: float = 0.25
    patience: int = 5
    seed: int = 0
    name: ClassVar[str] = "norm_tuning"
    paper: ClassVar[str] = "after norm tweaking (arXiv 2309.02784); registers after CushionCache (arXiv 2406.12016)"
    cache_effect: ClassVar[str] = "keys, values and tau are trained"
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "batch", "patience"):
            require(getattr(self, name) >= 1, f"norm_tuning.{name} must be at least 1, got {getattr(self, name)}.")
        require(
            0 < self.learning_rate < math.inf,
            f"norm_tuning.learning_rate must be > 0 and finite, got {self.learning_rate}.",
        )
        require(0 < self.holdout < 1, f"norm_tuning.holdout must be between 0 and 1, got {self.holdout}.")
        require(
            self.norms or self.layer_scale or self.registers,
            "norm_tuning trains nothing: norms, layer_scale and registers are all false. Leave one true, or leave it out.",
        )

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        if config.registers.mode != "none":
            return {}
        if not (self.norms or self.layer_scale):
            return {"norms": "without registers nothing is left to train"}
        return {"registers": "registers.mode is 'none'"}

    def select(self, fit: PipelineState) -> None:
        """Refuse what cannot be trained before anything is fitted."""
        tower, images = fit.tower, count_images(fit.training)
        require(
            images >= 3,
            f"norm_tuning needs at least 3 calibration images, one to train on and two to judge by; got {images}. Give "
            "more, or raise data.num_samples or data.calibration_fraction.",
        )
        scales = any(tower.layer_scales(block) for block in range(len(tower.blocks)))
        require(
            self.layer_scale or scales,
            f"norm_tuning.layer_scale=False has no effect: {tower.family.name} has no LayerScale. Leave it out.",
        )
        require(
            self.norms or self.registers or scales,
            f"norm_tuning has nothing to train: {tower.family.name} has no LayerScale, and norms and registers are false. "
            "Leave one of these true.",
        )

    def tune(self, fit: PipelineState) -> None:
        tensors = _FloatTensors(fit.result, self)
        if not tensors.counts:
            fit.measured[self.name] = {"note": "nothing to train: no registers are installed"}
            return
        images = count_images(fit.training)
        first = images - min(max(2, round(self.holdout * images)), images - 1)
        train = _small_batches(ImageRange(fit.training, first), self.batch)
        held_out = CosineObjective(fit.original, ImageRange(fit.training, first=first))
        with torch.inference_mode(False):
            record = _Training(self, fit.original, tensors, train, held_out).run(fit.progress)
        for _, layer in quant_linears(fit.result):
            layer.release_runtime()  # float32 weights that only gradients need
        cache = get_register_cache(fit.result)
        if cache is not None:
            fit.config = fit.config.replace(registers={"num_copies": cache.num_copies})
        fit.measured[self.name] = {"tensors": tensors.counts, "trained_on": first, "held_out": images - first, **record}


def _small_batches(batches: Sequence[Batch], size: int) -> list[Batch]:
    """``batches`` in parts of at most ``size`` images."""
    return [
        ImageRange([batch], start + size, start)[0]
        for batch, images in zip(batches, batch_sizes(batches), strict=True)
        for start in range(0, images, size)
    ]


class _FloatTensors:
    """The float tensors of a quantized model that are trained.

    Args:
        model: quantized; has tensors of its own in its encoder.
        method: which of them.

    Attributes:
        counts: what -> number of tensors, what there is none of left out.
        groups: for Adam: float32 leaves and their learning rates.
    """

    def __init__(self, model: Any, method: NormTuning) -> None:
        self.model, tower, rate = model, find_tower(model), method.learning_rate
        sized = [*(_norm_parameters(tower) if method.norms else ())]
        norms = len(sized)
        if method.layer_scale:
            scales = [scale for block in range(len(tower.blocks)) for scale in tower.layer_scales(block)]
            sized += [(scale, _size(scale)) for scale in scales]
        self.parameters = [parameter for parameter, _ in sized]
        self._exact = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self._installed = get_register_cache(model) if method.registers else None
        self.rows = None if self._installed is None else TrainedRows(self._installed, next(model.parameters()).device)
        leaves = [] if self.rows is None else self.rows.leaves()
        counts = {"norms": norms, "layer_scale": len(sized) - norms, "registers": len(leaves)}
        self.counts = {what: count for what, count in counts.items() if count}
        sizes = [*(size for _, size in sized), *(_size(leaf) if leaf.ndim else 1.0 for leaf in leaves)]
        self.groups = [
            {"params": [leaf], "lr": rate * size} for leaf, size in zip((*self._exact, *leaves), sizes, strict=True)
        ]

    @contextmanager
    def recorded(self) -> Generator[list[torch.Tensor], None, None]:
        """Inside, autograd follows passes of the model to what it yields."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self.rows is not None:
                stack.enter_context(lending(self.model, self.rows.live()))
            for parameter in self.parameters:
                stack.callback(parameter.requires_grad_, False)
                parameter.requires_grad_(True)
            yield [*self.parameters, *([] if self.rows is None else self.rows.leaves())]

    def step(self, optimizer: torch.optim.Optimizer, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Move the leaves, and the model with them; whether they are all finite."""
        leaves = [group["params"][0] for group in self.groups]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = None if gradient is None else gradient.to(leaf.dtype)
        optimizer.step()
        for parameter, exact in zip(self.parameters, self._exact, strict=True):
            parameter.data.copy_(exact)
        return all(bool(p.isfinite().all()) for p in self.parameters) and (self.rows is None or self.rows.finite())

    def install_registers(self) -> None:
        """Store the registers in the model, as they are now."""
        if self.rows is not None:
            self._installed = self.rows.frozen()
            set_registers(self.model, self._installed)

    def snapshot(self) -> tuple[list[torch.Tensor], RegisterCache | None]:
        """What the model holds now."""
        return [p.detach().clone() for p in self.parameters], self._installed

    def restore(self, values: list[torch.Tensor], cache: RegisterCache | None) -> None:
        """Let the model hold what :meth:`snapshot` gave."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)
        if self.rows is not None:
            set_registers(self.model, cache)


def _norm_parameters(tower: Tower) -> list[tuple[nn.Parameter, float]]:
    """Weight and bias of every norm of the tower that has some, each with the size of what the norm puts out."""
    known = {id(tower.norm(block, number)) for block in range(len(tower.blocks)) for number in (0, 1)}
    found: list[tuple[nn.Parameter, float]] = []
    for _, module in named_modules(tower.module):
        if id(module) in known or isinstance(module, nn.LayerNorm):
            own = [getattr(module, name, None) for name in ("weight", "bias")]
            parameters = [p for p in own if isinstance(p, nn.Parameter)]
            size = math.hypot(*map(_mean_square_root, parameters)) or 1.0
            found += [(parameter, size) for parameter in parameters]
    return found


def _mean_square_root(tensor: torch.Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())


def _size(tensor: torch.Tensor) -> float:
    """What a learning rate is relative to."""
    return _mean_square_root(tensor) or 1.0


class _Training:
    """One run of `NormTuning` over a quantized model."""

    def __init__(
        self,
        method: NormTuning,
        original: nn.Module,
        tensors: _FloatTensors,
        train: list[Batch],
        held_out: CosineObjective,
    ) -> None:
        self.method, self.tensors, self.batches, self.held_out = method, tensors, train, held_out
        reference = F.normalize(encode(original, train), dim=-1)
        self.references = [part.clone() for part in torch.split(reference, batch_sizes(train))]  # no inference tensors
        self.optimizer = torch.optim.Adam(tensors.groups, foreach=False)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, progress: bool) -> dict[str, Any]:
        """Train, leave the best state or the start in the model, and say how it went; JSON-compatible."""
        m, tensors = self.method, self.tensors
        start = top = self.held_out.scores(tensors.model)
        require(
            bool(start.isfinite().all()),
            "norm_tuning: the quantized model or the float original gives features that are not finite for a calibration "
            "image. Take the image out.",
        )
        first = best = tensors.snapshot()
        best_iteration, since, made, stopped = 0, 0, 0, "iterations"
        order = self._order()
        for iteration in bar(range(1, m.iterations + 1), "norm tuning", unit="step", shown=progress):
            made = iteration
            if not self._step(iteration, next(order)):
                stopped = "not finite"
                break
            if iteration % EVALUATE_EVERY and iteration != m.iterations:
                continue
            tensors.install_registers()
            scores = self.held_out.scores(tensors.model)
            since += 1
            if float(scores.mean()) > float(top.mean()):  # nan never is
                best, best_iteration, top, since = tensors.snapshot(), iteration, scores, 0
            if since >= m.patience:
                stopped = "patience"
                break
        gain, error = float((top - start).mean()), float((top - start).std()) / math.sqrt(len(start))
        installed = gain > error
        tensors.restore(*(best if installed else first))
        return {
            "start": float(start.mean()),
            "end": float((top if installed else start).mean()),
            "gain": gain,
            "gain_error": error,
            "installed": installed,
            "iterations": made,
            "best_iteration": best_iteration,
            "stopped": stopped,
        }

    def _order(self) -> Generator[int, None, None]:
        generator = torch.Generator().manual_seed(self.method.seed)
        while True:
            yield from torch.randperm(len(self.batches), generator=generator).tolist()

    def _step(self, iteration: int, number: int) -> bool:
        """One step on one batch; whether all was finite. Nothing moves where loss or gradient are not."""
        for group, first in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = first * (1.0 - 0.9 * (iteration - 1) / self.method.iterations)
        with self.tensors.recorded() as leaves:
            features = F.normalize(image_features(self.tensors.model, self.batches[number]), dim=-1)
            loss = 1.0 - (features * self.references[number].to(features)).sum(-1).mean()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        finite = bool(loss.isfinite()) and all(g is None or bool(g.isfinite().all()) for g in gradients)
        return finite and self.tensors.step(self.optimizer, gradients)
