"""Other quantizers at the same bits beside what was made, judged on the images that confirm a search (docs/method.md 9)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]
from transformers import PreTrainedModel

from optimum_regcache.config import ActivationsConfig, DeletionConfig, RegCacheConfig, RegistersConfig, WeightsConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.evaluation.targets import Targets, objective_targets
from optimum_regcache.methods import without_methods
from optimum_regcache.search.fit import FitResult
from optimum_regcache.search.objectives import bank_of, objective_on
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.run import run_plan
from optimum_regcache.search.search import corrected_sigmas
from optimum_regcache.search.setups import mean_and_error


@dataclass(frozen=True)
class Scheme:
    """A quantizer worth a try where another one leaves something to gain.

    Attributes:
        name: for reports.
        methods: of `optimum_regcache.methods`, with their defaults.
        registers: whether it is tried with the registers and the deletion of the result, without, or both; where the result
            has none, once. A scale of its own for each token leaves them nothing to repair; a scale that covers all tokens
            needs them where round to nearest does.
        most_bits: it is tried where weights or activations have at most so many bits; where rounding is finer, others do as
            well for less.
    """

    name: str
    methods: tuple[str, ...]
    registers: tuple[bool, ...]
    most_bits: int = 8


SCHEMES = (
    Scheme("dynamic per token", ("dynamic",), (False,)),
    Scheme("percentile", ("percentile",), (False, True)),
    Scheme("mse", ("mse",), (True,)),
    Scheme("smoothquant + gptq", ("smoothquant", "gptq"), (True,)),
    Scheme("rotation + mse", ("rotation", "mse"), (False, True)),
    Scheme("rotation + mse + gptq", ("rotation", "mse", "gptq"), (True,), most_bits=4),
)


@dataclass(frozen=True)
class Alternative:
    """One of `SCHEMES`, with or without the registers of the result, as it did on the confirmation images.

    Attributes:
        name: for reports.
        scheme: what it is.
        registers: whether registers and deletion of the result are installed.
        recipe: makes it: ``run_plan`` and ``RegCacheQuantizer.quantize(recipe=...)`` take it, with the same fit and images.
        score: mean of the objective; None if it cannot be used.
        gain, standard_error: paired, over the result; None if it cannot be used.
        needed: the gain from which on it is clearly better.
        reason: why it cannot be used here; None if it can.
        seconds: that it took to make and score.
    """

    name: str
    scheme: Scheme
    registers: bool
    recipe: Recipe
    score: float | None = None
    gain: float | None = None
    standard_error: float | None = None
    needed: float | None = None
    reason: str | None = None
    seconds: float = 0.0

    @property
    def options(self) -> tuple[str, ...]:
        """How the command line is asked for it."""
        return (*(() if self.registers else ("--no-registers",)), "--method", *self.scheme.methods)

    @property
    def clearly_better(self) -> bool:
        """Whether its gain is what it needs to be."""
        return self.gain is not None and self.needed is not None and self.gain >= self.needed

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible, without the recipe."""
        return {
            "name": self.name,
            "options": " ".join(self.options),
            **{name: _finite(getattr(self, name)) for name in ("score", "gain", "standard_error", "needed")},
            "clearly_better": self.clearly_better,
            "not_applicable": self.reason,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Recommendation:
    """What else was tried.

    Attributes:
        objective: name of what was maximised.
        images: confirmation images.
        ceiling: mean score of the float model.
        score: mean score of the result; an image whose features are no numbers counts -1.
        min_gain: ``search.min_gain``: a result that loses less has nothing to gain, and nothing is tried.
        alternatives: best first, those that cannot be used last; empty where nothing was tried.
    """

    objective: str
    images: int
    ceiling: float
    score: float
    min_gain: float
    alternatives: list[Alternative] = field(default_factory=list)

    @property
    def better(self) -> Alternative | None:
        """The best of those that are clearly better than the result; None if none is."""
        return next((a for a in self.alternatives if a.clearly_better), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "objective": self.objective,
            "images": self.images,
            "float": self.ceiling,
            "score": self.score,
            "min_gain": self.min_gain,
            "better": self.better and self.better.name,
            "alternatives": [a.to_dict() for a in self.alternatives],
        }


def find_alternatives(
    model: PreTrainedModel,
    quantized: nn.Module,
    recipe: Recipe,
    images: ReferenceImages,
    *,
    known: FitResult | None = None,
    least_loss: float | None = None,
    progress: bool = True,
) -> Recommendation:
    """Make `SCHEMES` at the bits of ``quantized`` and compare them with it, image by image, on the confirmation images.

    One of them is clearly better if its mean gain reaches ``search.min_gain`` and ``search.noise_sigmas`` paired standard
    errors, the latter corrected for how many were tried (Bonferroni). For a result that loses less than ``least_loss`` nothing
    is tried. At most eight runs of the methods.

    Args:
        model: the float model, unchanged.
        quantized: what was made of it.
        recipe: of ``quantized``, with its config; ``data`` and ``search.seed`` divide the images as they did for it.
        images: those that it was made with.
        known: its fit, which holds its registers; without one they are mined again.
        least_loss: of ``quantized`` against the float model, for which it is worth looking; default ``search.min_gain``.
        progress: show a progress bar.

    Raises:
        ValueError: ``search.objective="accuracy"`` for images without usable labels.
    """
    config, search = recipe.quantization, recipe.search
    objective = _confirmation(model, recipe, images)
    made, ceiling = objective.scores(quantized).nan_to_num(nan=-1.0), objective.ceiling(model)
    found = Recommendation(objective.name, len(made), ceiling, float(made.mean()), search.min_gain)
    if found.ceiling - found.score < (search.min_gain if least_loss is None else least_loss):
        return found
    scores: list[torch.Tensor | None] = []
    tried: list[Alternative] = []
    candidates = [a for a in _candidates(recipe) if not _is(a.recipe, config)]
    for candidate in bar(candidates, "alternatives", shown=progress):
        begun, reason, values = time.perf_counter(), None, None
        try:
            plan = QuantizationPlan.of(candidate.recipe)
            run = run_plan(model, images, plan, known=known, progress=False)
            values = objective.scores(run.quantized.model)
            if not bool(values.isfinite().all()):
                values, reason = None, "its features are no numbers"
        except (ValueError, TypeError, LinAlgError) as error:  # a method that cannot work on this model
            reason = str(error)
        scores.append(values)
        tried.append(replace(candidate, reason=reason, seconds=time.perf_counter() - begun))
    sigmas = corrected_sigmas(search.noise_sigmas, sum(values is not None for values in scores))
    judged = [
        _judged(a, v, made, search.min_gain, sigmas) if v is not None else a for a, v in zip(tried, scores, strict=True)
    ]
    return replace(
        found, alternatives=sorted(judged, key=lambda a: -math.inf if a.score is None else a.score, reverse=True)
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _judged(
    candidate: Alternative, scores: torch.Tensor, made: torch.Tensor, min_gain: float, sigmas: float
) -> Alternative:
    gain, error = mean_and_error(scores - made)
    score, needed = float(scores.mean()), max(min_gain, sigmas * error)
    return replace(candidate, score=score, gain=gain, standard_error=error, needed=needed)


def _candidates(recipe: Recipe) -> list[Alternative]:
    """`SCHEMES` at the bits and under the protocol of ``recipe``; with what it installs, if it does."""
    config = recipe.quantization
    plain, a, w = without_methods(config), config.activations, config.weights
    plain = plain.replace(
        weights=WeightsConfig(bits=w.bits, granularity=w.granularity, symmetric=w.symmetric),
        activations=ActivationsConfig(bits=a.bits, symmetric=a.symmetric),
    )
    nothing = plain.replace(registers=RegistersConfig(mode="none"), deletion=DeletionConfig())
    installs = config.registers.mode != "none" or config.deletion.active
    installed = plain.replace(registers=config.registers, deletion=config.deletion)
    found: list[Alternative] = []
    for scheme in (scheme for scheme in SCHEMES if min(w.bits, a.bits) <= scheme.most_bits):
        for registers in scheme.registers if installs else (False,):
            name = f"{scheme.name} with registers" if registers else scheme.name
            made = (installed if registers else nothing).replace(methods=scheme.methods)
            found.append(Alternative(name, scheme, registers, replace(recipe, quantization=made, notes="")))
    return found


def _is(recipe: Recipe, config: RegCacheConfig) -> bool:
    """Whether ``recipe`` makes what ``config`` describes."""
    try:
        return QuantizationPlan.of(recipe).resolved.config == config
    except ValueError:
        return False


def _confirmation(model: PreTrainedModel, recipe: Recipe, images: ReferenceImages) -> Objective:
    """What the search maximises, on the confirmation images."""
    parts = images.split(recipe.data, recipe.search.seed)
    kind = recipe.search.objective
    targets = objective_targets(kind, model, images.processor, parts.everything, images.template) or Targets(False)
    return objective_on("confirmation", kind, model, parts, targets, bank_of(kind, model, parts, targets))
