"""Which execution backend every quantized layer of a model gets, and why it gets no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

from optimum_regcache.kernels import BACKENDS, automatic_backend
from optimum_regcache.kernels.base import LinearState


@runtime_checkable
class _Layer(Protocol):
    """What is needed of a quantized layer."""

    backend: str

    def state(self) -> LinearState: ...


@dataclass(frozen=True)
class LayerBackend:
    """The backend of one layer.

    Attributes:
        name: of the module in the model.
        asked: what `set_backend` chose, ``auto`` by default.
        chosen: the backend that runs; None if the layer cannot run yet (``problem``).
        refused: backend -> why it cannot run this layer here.
        fused: the layer belongs to a block that `fuse` made one operation; ``chosen`` holds for calls that run unfused.
        problem: why the layer cannot run yet, such as missing calibration; else None.
    """

    name: str
    asked: str
    chosen: str | None
    refused: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class BackendReport:
    """The backends of all quantized layers, in the order of the model's modules."""

    layers: tuple[LayerBackend, ...]

    def __str__(self) -> str:
        """One line for all layers with the same backend and reasons."""
        if not self.layers:
            return "no quantized layers"
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for layer in self.layers:
            what = f"{layer.chosen or 'cannot run'}{', fused' if layer.fused else ''}"
            reasons = [f"not {name}: {reason}" for name, reason in layer.refused.items()]
            groups.setdefault((what, (*([layer.problem] if layer.problem else []), *reasons)), []).append(layer.name)
        lines = []
        for (what, reasons), names in groups.items():
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines += [f"{what}: {len(names)} of {len(self.layers)} layers ({some})", *(f"    {r}" for r in reasons)]
        return "\n".join(lines)


def backend_report(model: nn.Module) -> BackendReport:
    """Which backend each quantized layer of ``model`` gets, and why others were refused; ``print`` it.

    Nothing is packed or run. On a CPU without VNNI the C++ operators are built if they are not there yet.

    Args:
        model: a quantized encoder, a model around it, or one layer.
    """
    fused = [f"{name}." for name, module in model.named_modules() if _runs_fused(module)]
    return BackendReport(
        tuple(
            _layer(name, module, name.startswith(tuple(fused)))
            for name, module in model.named_modules()
            if isinstance(module, _Layer)
        )
    )


def _runs_fused(module: nn.Module) -> bool:
    return getattr(module, "fused", None) is not None and not getattr(module, "acts_inside", False)


def _layer(name: str, layer: _Layer, fused: bool) -> LayerBackend:
    try:
        state = layer.state()
    except (ValueError, RuntimeError) as error:  # not calibrated; without weights; on the meta device
        return LayerBackend(name, layer.backend, None, fused=fused, problem=str(error).splitlines()[0])
    reasons = {other: backend.unsupported_reason(state) for other, backend in BACKENDS.items()}
    chosen = layer.backend
    if chosen == "auto":
        automatic = automatic_backend(state)
        chosen = next(other for other, backend in BACKENDS.items() if backend is automatic)
    refused = {other: reason for other, reason in reasons.items() if reason is not None and other != chosen}
    return LayerBackend(name, layer.backend, chosen, refused, fused)
