"""What top-1 accuracy compares predictions with: the labels of a data set in the numbers of a model's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from optimum_regcache.config.validation import require
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.labels import is_generic, match_classes, readable_names, unknown_wordnet_ids
from optimum_regcache.encoders.tower import has_classifier
from optimum_regcache.evaluation.objective import DEFAULT_TEMPLATE, zero_shot_features, zero_shot_problem
from optimum_regcache.evaluation.registry import OBJECTIVES

logger = logging.get_logger(__name__)

NO_LABELS = "the data set has no labels"


@dataclass(frozen=True)
class Targets:
    """How the labels of a data set become classes that a model predicts; :func:`accuracy_targets` makes it.

    Attributes:
        available: whether there is an accuracy.
        note: why there is none, or that labels were taken as class numbers; None where names were matched.
        numbers: int64 [classes of the data set], the model's number of each; None where both number alike.
        text_features: float32 [classes, D] for zero-shot classification, None for models with a classifier.
    """

    available: bool
    note: str | None = None
    numbers: torch.Tensor | None = None
    text_features: torch.Tensor | None = None

    def needed(self, kind: str = "accuracy") -> Targets:
        """Itself, for the objective ``kind`` that cannot do without.

        Raises:
            ValueError: there is no accuracy.
        """
        require(self.available, f"objective={kind!r} is not possible: {self.note}. Use objective='cosine'.")
        return self

    def labels(self, *parts: ImageInputs) -> torch.Tensor | None:
        """int64 [n], the model's class of each image of ``parts``, one after the other; None without accuracy."""
        found = [part.labels() for part in parts] if self.available else [None]
        known = [labels for labels in found if labels is not None]
        if len(known) < len(found):
            return None
        labels = torch.cat(known)
        return labels if self.numbers is None else self.numbers[labels]


def objective_targets(
    kind: str, model: Any, processor: Any, inputs: ImageInputs, template: str = DEFAULT_TEMPLATE
) -> Targets | None:
    """What the objective ``kind`` reads of the labels of ``inputs``: classes of the model, the labels as they are (k-NN has
    classes of its own), or nothing.

    Raises:
        ValueError: it reads labels, and they cannot be used.
    """
    read = OBJECTIVES[kind].labels_read
    if read == "none":
        return None
    if read == "model":
        return accuracy_targets(model, processor, inputs, template, warn=False).needed(kind)
    reason = label_problem(inputs.label_values())
    return Targets(reason is None, reason).needed(kind)


def accuracy_targets(
    model: Any,
    processor: Any,
    inputs: ImageInputs,
    template: str | Sequence[str] = DEFAULT_TEMPLATE,
    *,
    warn: bool = True,
) -> Targets:
    """Match the classes of the data with those of the model.

    A model with a classifier is matched by the names in its config. Class numbers without names are used where the model's
    classes have no names either (``LABEL_0``), where the highest is the model's last class, and in ready ``pixel_values``
    items, whose labels are the model's. Other models classify zero-shot: the names of the data are the classes.

    Args:
        model, processor: of the reports.
        inputs: all images that labels will be asked for.
        template: zero-shot prompt, or several.
        warn: warn once where the data has labels that cannot be used.

    Raises:
        ValueError: zero-shot with a template without ``{}``.
    """
    values = inputs.label_values()
    names = inputs.class_names()
    reason = label_problem(values)
    if reason == NO_LABELS:
        return Targets(False, reason)
    if reason is None and has_classifier(model):
        targets = _of_classifier(model.config, inputs, names, values)
    elif reason is None:
        targets = _of_text_tower(model, processor, names, values, template)
    else:
        targets = Targets(False, reason)
    if warn and not targets.available:
        logger.warning_once(f"No top-1 accuracy: {targets.note}.")  # type: ignore[attr-defined]
    return targets


def label_problem(values: Sequence[Any]) -> str | None:
    """Why values of `ImageInputs.label_values` are no class numbers; None if they are."""
    if all(value is None for value in values):
        return NO_LABELS
    missing = sum(value is None for value in values)
    if missing:
        return f"{missing} of {len(values)} images have no label"
    wrong = next((value for value in values if not isinstance(value, int)), None)
    if wrong is not None:
        return (
            f"labels such as {str(wrong)[:40]!r} are no class numbers (name classes with "
            "dataset.class_encode_column(column))"
        )
    hidden = sum(value < 0 for value in values)
    if hidden:
        return f"{hidden} of {len(values)} labels are negative, as in test splits whose labels are hidden"
    return None


def _of_classifier(config: Any, inputs: ImageInputs, names: list[str] | None, values: Sequence[int]) -> Targets:
    id2label = {int(number): str(name) for number, name in config.id2label.items()}
    count, generic = len(id2label), is_generic(list(id2label.values()))
    if names is not None:
        if max(values) >= len(names):
            return Targets(False, f"label {max(values)} of the data set is none of its {len(names)} classes")
        found = match_classes(names, id2label, config.label2id or {})
        unknown = [name for name, number in zip(names, found, strict=True) if number is None]
        if not unknown:
            numbers = torch.tensor(found)
            return Targets(True, numbers=None if found == list(range(len(names))) else numbers)
        if not all(name.isdecimal() for name in names):
            if generic and len(names) == count:
                return Targets(True, "labels were taken as class numbers: the model's classes have no names")
            listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            theirs = ", ".join(map(repr, list(id2label.values())[:5]))
            return Targets(
                False,
                f"{len(unknown)} of {len(names)} classes of the data set are unknown to the model or stand for several of "
                f"its classes ({listed}; the model's {count} begin with {theirs}). Rename them after config.id2label",
            )
        numbers = torch.tensor([int(name) for name in names])  # folders "0", "1", "10", "2"
        highest = used = int(numbers.max())
    else:
        numbers, used = None, max(values)
        highest = inputs.highest_label()
        if highest is None:  # ready items: the model's own numbers
            highest = count - 1
    if used >= count:
        return Targets(False, f"label {used} is none of the {count} classes of the model")
    if generic or highest == count - 1:
        return Targets(True, "labels were taken as class numbers: the data set has no class names", numbers)
    return Targets(
        False,
        f"the labels are numbers without names, up to {highest}, and the model's {count} named classes may be numbered in "
        "another way. Name them: dataset.cast_column(column, ClassLabel(names=...))",
    )


def _of_text_tower(
    model: Any, processor: Any, names: list[str] | None, values: Sequence[int], template: str | Sequence[str]
) -> Targets:
    problem = zero_shot_problem(model, processor)
    if problem is not None:
        return Targets(False, problem)
    if names is None:
        return Targets(False, "the data set does not name its classes (a label column of type ClassLabel)")
    if max(values) >= len(names):
        return Targets(False, f"label {max(values)} of the data set is none of its {len(names)} classes")
    unknown = unknown_wordnet_ids(names)
    if unknown:
        return Targets(False, f"nothing is known of the WordNet id {unknown[0]}; give classes readable names")
    return Targets(True, text_features=zero_shot_features(model, processor, readable_names(names), template))
