"""What labels say about a search that did not look at them: top-1 of its leaders on the confirmation images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum_regcache.commands.sources import Source
from optimum_regcache.config import DeletionConfig
from optimum_regcache.evaluation.objective import AccuracyObjective
from optimum_regcache.evaluation.registry import OBJECTIVES
from optimum_regcache.evaluation.targets import accuracy_targets
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.fit import FitResult
from optimum_regcache.search.setups import Setup, mean_and_error
from optimum_regcache.search.trials import TrialRunner

_Leader = tuple[Setup, RegisterCache | None, DeletionConfig]


@dataclass(frozen=True)
class LabelledChoice:
    """Top-1 of the leaders of a label-free search, and what it says about the choice between them.

    Attributes:
        objective: name of the objective that the search maximised.
        images: confirmation images.
        accuracies: kind (``nothing``, ``prefix``, ``delete``, ``both``) -> (what is installed, top-1).
        chosen, best: the kinds that the search chose and that labels would have chosen.
        difference, noise: top-1 of the best less that of the chosen one, image by image, and its standard error, None for a
            single image.
        quantizer: what the leaders were quantized with.
    """

    objective: str
    images: int
    accuracies: dict[str, tuple[str, float]]
    chosen: str
    best: str
    difference: float
    noise: float | None
    quantizer: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "objective": self.objective,
            "images": self.images,
            "quantizer": self.quantizer,
            "top-1": {kind: {"installed": text, "accuracy": value} for kind, (text, value) in self.accuracies.items()},
            "chosen": self.chosen,
            "by labels": self.best,
            "difference": self.difference,
            "standard_error": self.noise,
        }

    def describe(self) -> str:
        """One line for the report."""
        values = ", ".join(f"{kind} {100 * value:.2f} %" for kind, (_, value) in self.accuracies.items())
        line = f"labels: top-1 on the {self.images} confirmation images ({self.quantizer}): {values}; they "
        if self.best == self.chosen:
            return f"{line}choose {self.chosen} as {self.objective} did"
        gain = f"{100 * self.difference:+.2f}{'' if self.noise is None else f' +- {100 * self.noise:.2f}'} points"
        return f"{line}would have chosen {self.best} ({self.accuracies[self.best][0]}): {gain} over {self.chosen}"


def labelled_choice(source: Source, fit: FitResult, runner: TrialRunner) -> LabelledChoice | None:
    """Score the leaders of ``fit`` by labels: nothing, and the best prefix, deletion and pair, at most four evaluations.

    The best by labels is the one of highest top-1; of equals the chosen one, then the simplest.

    Args:
        source: model and processor.
        fit: the search.
        runner: quantizes with round to nearest, calibrated as in the search.

    Returns:
        None where the search read labels itself, tried nothing, or where there are no labels that the model can predict.
    """
    if OBJECTIVES[fit.settings.objective].labels_read != "none" or not fit.variants:
        return None
    part = fit.parts.confirmation
    targets = accuracy_targets(source.model, source.processor, fit.parts.everything, source.template, warn=False)
    labels = targets.labels(part)
    if labels is None:
        return None
    accuracy = AccuracyObjective(fit.parts.batches("confirmation"), labels, targets.text_features)
    scores = {kind: runner.score(c, d, accuracy) for kind, (_, c, d) in _leaders(fit).items()}
    chosen = fit.search.chosen.kind
    best = max(scores, key=lambda kind: (float(scores[kind].mean()), kind == chosen))
    difference, noise = mean_and_error(scores[best] - scores[chosen])
    return LabelledChoice(
        OBJECTIVES[fit.settings.objective].name,
        len(labels),
        {kind: (leader[0].describe(), float(scores[kind].mean())) for kind, leader in _leaders(fit).items()},
        chosen,
        best,
        difference,
        noise if len(labels) > 1 else None,
        f"round to nearest, {runner.config.label}",
    )


def _leaders(fit: FitResult) -> dict[str, _Leader]:
    """Kind -> what is installed; what was chosen stands for its kind, whatever was the best on the selection images."""
    found: dict[str, _Leader] = {"nothing": (Setup(), None, DeletionConfig())}
    tried = {"prefix only": fit.search.best_prefix, "delete only": fit.search.best_delete, "both": fit.search.best_both}
    for name, trial in tried.items():
        if trial is not None:
            found[trial.setup.kind] = (trial.setup, *fit.variants[name])
    if fit.search.chosen != Setup():
        found[fit.search.chosen.kind] = (fit.search.chosen, fit.cache, fit.config.deletion)
    return found
