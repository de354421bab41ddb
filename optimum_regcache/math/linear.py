"""float32 linear layers on the CPU through oneDNN instead of MKL, which PyTorch asks by itself and which is half as fast on AMD
(docs/results/performance.md); the same to float32 rounding."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_USABLE = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, x [..., in] -> [..., out]; by oneDNN where that computes it: float32 on the CPU,
    without autograd and tracing."""
    suits = (
        _USABLE
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and type(x) is torch.Tensor
        and x.numel() > 0
    )
    if not suits or (bias is not None and bias.dtype != torch.float32):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FastLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def fast_linears() -> Generator[None, None, None]:
    """Inside the ``with`` block, or the function it decorates, every ``F.linear`` is `linear`; no module changes."""
    with _FastLinears():
        yield
