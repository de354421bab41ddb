"""Execution backends of a quantized linear layer behind one dispatch function.

Every backend computes the same codes; they differ in how the product is accumulated (see the modules' docstrings).
"""

from __future__ import annotations

from transformers.utils import logging

from optimum_regcache.kernels import int_mm, onednn, reference, simulated
from optimum_regcache.kernels.base import LinearBackend, LinearState

logger = logging.get_logger(__name__)

__all__ = ["BACKENDS", "LinearBackend", "LinearState", "select_backend"]

BACKENDS: dict[str, type[LinearBackend]] = {
    "int_mm": int_mm.IntMMLinear,
    "onednn": onednn.OneDNNLinear,
    "reference": reference.ReferenceLinear,
    "simulated": simulated.SimulatedLinear,
}


_warned: list[str] = []  # one warning in a process


def select_backend(name: str, state: LinearState) -> type[LinearBackend]:
    """The backend class called ``name``; ``auto`` takes `torch._int_mm` on CUDA and oneDNN on the CPU where they can run
    the layer, else simulation. Where that is the machine's fault, and not the layer's, one warning says so.

    Raises:
        ValueError: unknown name, or a backend that cannot run this layer on this machine (with the reason).
    """
    if name == "auto":
        chosen = automatic_backend(state)
        on_cpu = chosen is simulated.SimulatedLinear and state.codes.device.type == "cpu"
        if on_cpu and onednn.OneDNNLinear.layer_reason(state) is None:
            _warn_of_simulation(onednn.OneDNNLinear.unsupported_reason(state) or "")
        return chosen
    if name not in BACKENDS:
        raise ValueError(f"Unknown execution backend {name!r}; expected one of auto, {', '.join(BACKENDS)}.")
    reason = BACKENDS[name].unsupported_reason(state)
    if reason is not None:
        raise ValueError(f"Execution backend {name!r} cannot run this layer: {reason} Use backend 'auto'.")
    return BACKENDS[name]


def automatic_backend(state: LinearState) -> type[LinearBackend]:
    """What ``auto`` stands for, without a word."""
    if state.codes.is_cuda and int_mm.IntMMLinear.unsupported_reason(state) is None:
        return int_mm.IntMMLinear
    if onednn.OneDNNLinear.unsupported_reason(state) is not None:
        return simulated.SimulatedLinear
    return onednn.OneDNNLinear


def _warn_of_simulation(reason: str) -> None:
    if _warned:
        return
    _warned.append(reason)
    logger.warning(
        f"Quantized layers are simulated in float32, without the speed of int8: {reason} "
        "optimum_regcache.backend_report(model) lists the layers; "
        "set_backend(model, 'simulated') chooses simulation without this warning."
    )
