"""Nearest neighbours and linear probe against a few lines of numpy."""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from optimum_regcache.evaluation import probes
from optimum_regcache.evaluation.probes import LinearProbe, neighbour_predictions


def clouds(seed: int, count: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count, 6] of three classes, numbered 2, 5 and 7, around one centre each."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (count,), generator=generator)
    features = 1.5 * torch.eye(3, 6)[classes] + spread * torch.randn(count, 6, generator=generator)
    return features, torch.tensor([2, 5, 7])[classes]


def votes(train: torch.Tensor, labels: torch.Tensor, feature: torch.Tensor, k: int, temperature: float | None) -> int:
    cosines = (F.normalize(train, dim=-1) @ F.normalize(feature, dim=-1)).double().numpy()
    nearest = np.argsort(-cosines)[:k]
    weights = np.ones(k) if temperature is None else np.exp(cosines[nearest] / temperature)
    totals = {c: weights[labels.numpy()[nearest] == c].sum() for c in (2, 5, 7)}
    return max(totals, key=lambda c: totals[c])


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_neighbours_vote_as_in_a_plain_loop(temperature: float | None) -> None:
    train, labels = clouds(0, 61)
    features, _ = clouds(1, 40)
    found = neighbour_predictions(train, labels, features, weighted=temperature is not None)
    expected = [votes(train, labels, f, 20, temperature) for f in features]
    assert found.tolist() == expected
    assert found.tolist() != [votes(train, labels, f, 20, 0.07 if temperature is None else None) for f in features]


def test_the_weights_decide_between_near_and_many() -> None:
    """One neighbour at cosine 1 outweighs three at 0.9, whose exp(-0.1 / 0.07) is 0.24 each; plainly the three win."""
    away = torch.tensor([0.9, (1 - 0.81) ** 0.5])
    train, labels = torch.stack([torch.tensor([1.0, 0.0]), away, away, away]), torch.tensor([0, 1, 1, 1])
    query = torch.tensor([[3.0, 0.0]])
    assert neighbour_predictions(train, labels, query, weighted=True).tolist() == [0]
    assert neighbour_predictions(train, labels, query, weighted=False).tolist() == [1]


def test_the_probe_is_logistic_regression_on_standardised_features() -> None:
    """At its optimum the gradient of 1/2 |W|^2 + sum of cross entropies is zero, which the predictions show by their scores."""
    train, labels = clouds(0, 90)
    features, truth = clouds(1, 200)
    probe = LinearProbe(train * torch.tensor([1.0, 10, 100, 1, 1, 1]) + 3, labels)
    scale = (train.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    targets = torch.tensor([[2, 5, 7].index(int(v)) for v in labels])
    weight, bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (weight**2).sum() + F.cross_entropy(scale @ weight + bias, targets, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    moved = (features.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    expected = torch.tensor([2, 5, 7])[(moved @ weight + bias).argmax(1)]
    found = probe.predictions(features * torch.tensor([1.0, 10, 100, 1, 1, 1]) + 3)
    assert float(found.eq(expected).float().mean()) >= 0.99
    assert float(found.eq(truth).float().mean()) > 0.6


def test_features_that_are_no_numbers_are_wrong_and_no_training() -> None:
    train, labels = clouds(0, 30)
    features, _ = clouds(1, 4)
    features[2, 0] = float("nan")
    assert neighbour_predictions(train, labels, features, weighted=True)[2] == -1
    assert LinearProbe(train, labels).predictions(features)[2] == -1
    assert (LinearProbe(train, labels).predictions(torch.full((2, 6), float("inf"))) == -1).all()
    train[4] = float("inf")
    for call in (
        lambda: LinearProbe(train, labels),
        lambda: neighbour_predictions(train, labels, features, weighted=True),
    ):
        with pytest.raises(
            ValueError, match=r"no numbers for 1 of 30 training images\. Look at them, or open the model in"
        ):
            call()
    with pytest.raises(
        ValueError, match=r"The 30 training images are of one class\. Take more of them \(--num-samples\)"
    ):
        LinearProbe(clouds(0, 30)[0], torch.ones(30, dtype=torch.int64))


def test_a_probe_that_did_not_converge_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probes, "STEPS", 2)
    LinearProbe(*clouds(0, 90))
    assert "The linear probe did not converge within 2 steps: its figures are not its best." in caplog.text


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'scikit-learn is needed .*: pip install "optimum-regcache\[eval\]"'):
        probes.need_scikit_learn()
