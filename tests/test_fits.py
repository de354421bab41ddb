"""The copies that `fits.once` hands out: equal, independent, and watched."""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import fits
import pytest
import torch
from models import TOWERS, quantized
from torch import nn

CLIP = TOWERS["clip"]


def test_a_copy_computes_what_a_fit_of_its_own_computes() -> None:
    first, second = quantized(CLIP), quantized(CLIP, cached=False)
    assert type(first) is type(second)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(CLIP.run(first), CLIP.run(second))
    assert first.config.quantization_config == second.config.quantization_config


def test_changing_a_copy_changes_no_other() -> None:
    before = fits.fingerprint(quantized(CLIP))
    spoiled = quantized(CLIP)
    with torch.no_grad():
        for tensor in spoiled.state_dict().values():
            tensor.zero_()
    spoiled.config.hidden_size = 1
    assert fits.fingerprint(spoiled) != before
    again = quantized(CLIP)
    assert fits.fingerprint(again) == before
    assert again.config.hidden_size != 1
    assert fits.changed() == []


def test_other_settings_are_other_fits() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"bits": 6},
        {"dtype": torch.bfloat16},
        {"weights": {"granularity": "per_tensor"}},
    ]
    assert len({fits.fingerprint(quantized(CLIP, **s)) for s in settings}) == len(settings)


def test_a_change_of_what_is_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "_KEPT", {})
    made = nn.Linear(2, 2)
    copied = fits.once("here", lambda: made)
    assert copied is not made
    assert fits.once("here", lambda: nn.Linear(3, 3)).in_features == 2
    assert fits.changed() == []
    with torch.no_grad():
        made.bias += 1
    assert fits.changed() == ["here"]
