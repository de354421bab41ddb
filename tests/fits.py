"""Fits of tiny models that many tests ask for alike: each is made once in a process, and everyone gets a copy.

Fitting takes about six times as long as copying. What is kept is never handed out, so no test can change it for another;
`changed` says whether one did all the same, and the end of every session asks it (`conftest.py`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
_KEPT: dict[Hashable, tuple[Any, str]] = {}


def once(key: Hashable, make: Callable[[], T]) -> T:
    """A copy of what ``make`` gives; it is called for the first of equal keys only."""
    if key not in _KEPT:
        made = make()
        _KEPT[key] = (made, fingerprint(made))
    return copy.deepcopy(_KEPT[key][0])


def fingerprint(made: Any) -> str:
    """Of all tensors of a model, or of the models of a fit."""
    digest = hashlib.sha256()
    for model in (made,) if isinstance(made, nn.Module) else (made.model, made.float_model):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(
                tensor.detach().flatten()
            )  # whatever its strides
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def changed() -> list[Hashable]:
    """Keys of what is no longer as it was made."""
    return [key for key, (made, before) in _KEPT.items() if fingerprint(made) != before]
