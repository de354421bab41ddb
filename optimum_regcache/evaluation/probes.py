"""Frozen features judged by classifiers of scikit-learn: nearest neighbours, and a linear probe (docs/method.md 12)."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from optimum_regcache.config.validation import require
from optimum_regcache.evaluation.similarity import TEMPERATURE

logger = logging.get_logger(__name__)

NEIGHBOURS = 20  # of DINO's evaluation (arXiv 2104.14294)
STEPS = 2000


def need_scikit_learn(part: str = "") -> Any:
    """scikit-learn, or a ``part`` of it.

    Raises:
        ImportError: it is missing.
    """
    try:
        return import_module(f"sklearn{part}")
    except ImportError as error:
        raise ImportError(
            f"scikit-learn is needed for --task knn, linear_probe, segmentation and depth and could not be imported ({error}): "
            'pip install "optimum-regcache[eval]"'
        ) from error


def neighbour_predictions(
    train: torch.Tensor, labels: torch.Tensor, features: torch.Tensor, *, weighted: bool
) -> torch.Tensor:
    """The class that the 20 most similar training images (cosine) vote for.

    Args:
        train: float [m, D]; where m is below 20, all vote.
        labels: int64 [m].
        features: float [n, D].
        weighted: votes count ``exp(cosine / 0.07)`` instead of 1.

    Returns:
        int64 [n]; the smaller class of two with equal votes, -1 where a feature is no number.

    Raises:
        ValueError: training features that are no numbers, or one class only.
        ImportError: scikit-learn is missing.
    """
    _check(train, labels)
    weights: Any = (lambda distances: np.exp(-distances / TEMPERATURE)) if weighted else "uniform"
    model = need_scikit_learn(".neighbors").KNeighborsClassifier(
        min(NEIGHBOURS, len(train)), weights=weights, metric="cosine", algorithm="brute"
    )
    return _predict(_fit(model, train, labels), features)


class LinearProbe:
    """Logistic regression (L2, C = 1) on standardised features.

    Args:
        train: float [m, D].
        labels: int64 [m].
        weights: float64 [m], how much each counts, in the mean and the deviation too; all alike if None.
        what: rows of ``train`` are, for errors.

    Attributes:
        classes: int64 [classes], the labels that occur, in order.

    Raises:
        ValueError: training features that are no numbers, or one class only.
        ImportError: scikit-learn is missing.
    """

    def __init__(
        self, train: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None, what: str = "images"
    ) -> None:
        _check(train, labels, what)
        regression = need_scikit_learn(".linear_model").LogisticRegression(max_iter=STEPS)
        self._model = _fit(_standardised(regression), train, labels, weights)
        self.classes = torch.from_numpy(regression.classes_).long()
        if max(regression.n_iter_) >= STEPS:
            logger.warning(f"The linear probe did not converge within {STEPS} steps: its figures are not its best.")

    def predictions(self, features: torch.Tensor) -> torch.Tensor:
        """Classes of float [n, D], int64 [n]; -1 where a feature is no number."""
        return _predict(self._model, features)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of :attr:`classes` of float [n, D], float64 [n, classes]; nan where a feature is no number."""
        scores = _apply(self._model.decision_function, features, () if len(self.classes) == 2 else (len(self.classes),))
        return torch.stack([torch.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores


class RidgeProbe:
    """Ridge regression (alpha = 1) on standardised features.

    Args:
        train: float [m, D] of patches.
        values: float64 [m].
        weights: float64 [m], how much each counts.

    Raises:
        ValueError: training features that are no numbers.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, train: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> None:
        _check_numbers(train, "patches")
        regression = need_scikit_learn(".linear_model").Ridge(alpha=1.0)
        self._model = _fit(_standardised(regression), train, values, weights)

    def predictions(self, features: torch.Tensor) -> torch.Tensor:
        """Values of float [n, D], float64 [n]; nan where a feature is no number."""
        return _apply(self._model.predict, features)


def _check(train: torch.Tensor, labels: torch.Tensor, what: str = "images") -> None:
    _check_numbers(train, what)
    require(
        len(labels.unique()) > 1,
        f"The {len(train)} training {what} are of one class. Take more of them (--num-samples), or a data set of several.",
    )


def _check_numbers(train: torch.Tensor, what: str) -> None:
    broken = int((~train.isfinite().all(1)).sum())
    require(
        broken == 0,
        f"The model gives no numbers for {broken} of {len(train)} training {what}. Look at them, or open the model in float32.",
    )


def _standardised(regression: Any) -> Any:
    return need_scikit_learn(".pipeline").make_pipeline(
        need_scikit_learn(".preprocessing").StandardScaler(), regression
    )


def _fit(model: Any, train: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> Any:
    """``model``, fitted without the warnings that this module replaces, or that do not matter here."""
    given = {} if weights is None else {f"{step}__sample_weight": weights.numpy() for step, _ in model.steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", need_scikit_learn(".exceptions").ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than")
        return model.fit(_array(train), targets.numpy(), **given)


def _apply(call: Any, features: torch.Tensor, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """``call`` of the finite rows, float64 [n, *shape]; nan for the others."""
    finite = features.isfinite().all(1)
    found = torch.full((len(features), *shape), float("nan"), dtype=torch.float64)
    if finite.any():
        found[finite] = torch.from_numpy(call(_array(features[finite]))).double()
    return found


def _predict(model: Any, features: torch.Tensor) -> torch.Tensor:
    finite = features.isfinite().all(1)
    found = torch.full((len(features),), -1)
    if finite.any():
        found[finite] = torch.from_numpy(model.predict(_array(features[finite]))).long()
    return found


def _array(features: torch.Tensor) -> np.ndarray:
    return features.double().numpy()
