"""The objective of a search on a part of its reference images."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from optimum_regcache.evaluation.objective import Bank, Objective
from optimum_regcache.evaluation.registry import OBJECTIVES, bank_for, make_objective
from optimum_regcache.evaluation.targets import Targets
from optimum_regcache.search.plan import ReferenceParts


def bank_of(kind: str, float_model: nn.Module, parts: ReferenceParts, targets: Targets) -> Bank | None:
    """What images are compared with: the calibration and the selection images; None where nothing is.

    Args:
        kind: a name of `OBJECTIVES`.
        float_model: the reference.
        parts: images.
        targets: their labels.
    """
    if not OBJECTIVES[kind].needs_bank:
        return None
    known = targets.labels(parts.calibration, parts.selection)
    return bank_for(kind, float_model, parts.batches("calibration"), parts.batches("selection"), known)


def objective_on(
    name: str, kind: str, float_model: nn.Module, parts: ReferenceParts, targets: Targets, bank: Bank | None
) -> Objective:
    """The objective ``kind`` on the part called ``name`` (``selection`` or ``confirmation``), made once for a model.

    Args:
        name: of the part.
        kind: a name of `OBJECTIVES`.
        float_model: the reference.
        parts: images.
        targets: their labels, and the text features of the classes.
        bank: made by `bank_of`.

    Raises:
        ValueError: labels, a classifier or text features are missing.
    """
    key = (name, kind, next(float_model.parameters()).data_ptr())  # copies of the model share their tensors
    if key in parts.objectives:
        return parts.objectives[key]
    beside = bank if name == "selection" else bank and replace(bank, own=None)
    labels = targets.labels(getattr(parts, name))
    made = make_objective(kind, float_model, parts.batches(name), labels, targets.text_features, beside)
    return parts.objectives.setdefault(key, made)
