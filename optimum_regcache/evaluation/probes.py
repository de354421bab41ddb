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
            f"scikit-learn is needed for --task knn and linear_probe and could not be imported ({error}): "
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

    Raises:
        ValueError: training features that are no numbers, or one class only.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, train: torch.Tensor, labels: torch.Tensor) -> None:
        _check(train, labels)
        regression = need_scikit_learn(".linear_model").LogisticRegression(max_iter=STEPS)
        scaler = need_scikit_learn(".preprocessing").StandardScaler()
        self._model = _fit(need_scikit_learn(".pipeline").make_pipeline(scaler, regression), train, labels)
        if max(regression.n_iter_) >= STEPS:
            logger.warning(f"The linear probe did not converge within {STEPS} steps: its figures are not its best.")

    def predictions(self, features: torch.Tensor) -> torch.Tensor:
        """Classes of float [n, D], int64 [n]; -1 where a feature is no number."""
        return _predict(self._model, features)


def _check(train: torch.Tensor, labels: torch.Tensor) -> None:
    broken = int((~train.isfinite().all(1)).sum())
    require(
        broken == 0,
        f"The model gives no numbers for {broken} of {len(train)} training images. Look at them, or open the model in float32.",
    )
    require(
        len(labels.unique()) > 1,
        f"The {len(train)} training images are of one class. Take more of them (--num-samples), or a data set of several.",
    )


def _fit(model: Any, train: torch.Tensor, labels: torch.Tensor) -> Any:
    """``model``, fitted without the warnings that this module replaces, or that do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", need_scikit_learn(".exceptions").ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than")
        return model.fit(_array(train), labels.numpy())


def _predict(model: Any, features: torch.Tensor) -> torch.Tensor:
    finite = features.isfinite().all(1)
    found = torch.full((len(features),), -1)
    if finite.any():
        found[finite] = torch.from_numpy(model.predict(_array(features[finite]))).long()
    return found


def _array(features: torch.Tensor) -> np.ndarray:
    return features.double().numpy()
