"""Copies of a model that use its tensors instead of copying them: conversion must not hold the float weights twice.

The rule that makes it safe: nothing in this package writes into the tensors of a model that it converts. What changes a
parameter gives it new storage (`replace_value`), so that a copy gets tensors of its own when, and only where, it is changed.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def shared_copy(model: AnyModule) -> AnyModule:
    """Deep copy of ``model`` without gradients whose parameters and buffers share the storage of those of ``model``.

    Parameters are objects of their own: casting, moving or freezing the copy leaves ``model`` alone. Writing into a tensor
    in place would change both. Tied parameters stay tied. ``copy.deepcopy`` of the result shares nothing.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo)


def own_tensors(module: nn.Module, other: nn.Module) -> None:
    """Give every parameter and buffer of ``module`` that shares storage with ``other`` storage of its own, in place."""
    shared = {t.untyped_storage().data_ptr() for t in chain(other.parameters(), other.buffers())}
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.untyped_storage().data_ptr() in shared:
            replace_value(tensor, tensor)


@torch.no_grad()
def replace_value(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.copy_(value)`` into new storage: ``tensor`` (a parameter or buffer) keeps shape, dtype and device, and what
    shared its storage keeps its values."""
    fresh = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    tensor.data = fresh.copy_(value)
