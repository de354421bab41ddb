"""float32 linear layers on the CPU through oneDNN instead of MKL, which PyTorch asks by itself and which is half as fast on AMD
(docs/results/performance.md); the same to float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_USABLE = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, x [..., in] -> [..., out]; by oneDNN where that computes it: float32 on the CPU, without
    tracing, and with autograd only inside `fast_linears`."""
    if torch.is_grad_enabled() or not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def _suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        _USABLE
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and type(x) is torch.Tensor
        and x.numel() > 0
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@once_differentiable
def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needed, gradient = ctx.needs_input_grad, gradient.contiguous()
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        _onednn(gradient, weight.T.contiguous(), None) if needed[0] else None,
        _onednn(rows.T.contiguous(), x.reshape(len(rows), -1).T.contiguous(), None) if needed[1] else None,
        rows.sum(0) if needed[2] else None,
    )


class _Trained(torch.autograd.Function):
    """`_onednn` with gradients of first order, which oneDNN computes too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    backward: Any = staticmethod(_gradients)


_trained = cast("Callable[..., torch.Tensor]", _Trained.apply)  # pyright: ignore[reportUnknownMemberType]


class _FastLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or not _suits(*args):
            return func(*args, **(kwargs or {}))
        operands: Any = args if len(args) == 3 else (*args, None)
        return _trained(*operands) if torch.is_grad_enabled() else _onednn(*operands)


@contextmanager
def fast_linears() -> Generator[None, None, None]:
    """Inside the ``with`` block, or the function it decorates, oneDNN computes every ``F.linear`` that it can, its gradients
    too; no module changes."""
    with _FastLinears():
        yield
