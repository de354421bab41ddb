"""Fast execution of quantized encoders: `fuse` and `unfuse`. Module tree, state dict and checkpoint stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers.utils import logging

from optimum_regcache.encoders.passes import is_fused, unfuse, unfused
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.fusion.block import FusedBlock, FusionSettings
from optimum_regcache.fusion.gemm import UnfusableError
from optimum_regcache.kernels import native as native_ops
from optimum_regcache.kernels.onednn import kernel_reason
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.registers import prepare_tower

__all__ = ["FusionReport", "UnfusableError", "fuse", "is_fused", "unfuse", "unfused"]

logger = logging.get_logger(__name__)

ATTENTION = ("auto", "int8", "float32", "simulated")


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did.

    Attributes:
        fused: blocks that run fused.
        skipped: block -> why it runs as before.
        attention: "int8", "float32" or "simulated int8", for the fused blocks.
        native_reason: why the C++ operators are not used, None if they are.
    """

    fused: tuple[int, ...]
    skipped: dict[int, str] = field(default_factory=dict)
    attention: str = "float32"
    native_reason: str | None = None

    def __str__(self) -> str:
        total = len(self.fused) + len(self.skipped)
        text = f"{len(self.fused)} of {total} blocks fused, {self.attention} attention"
        if self.native_reason is not None:
            text += f", without C++ operators: {self.native_reason}"
        reasons: dict[str, list[int]] = {}
        for block, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(block)
        return "\n".join([text, *(f"blocks {blocks} not fused: {reason}" for reason, blocks in reasons.items())])


def fuse(model: nn.Module, *, attention: str = "auto", native: bool | None = None) -> FusionReport:
    """Make the blocks of a quantized encoder run as fused int8 operations on the CPU, in place.

    Modules, parameters, ``state_dict`` and `save_pretrained` stay the same, and `unfuse` undoes it. Copies and pickles
    of the model are fused too. A block whose form of quantization has no fused execution runs as before, and so does every
    block when attention weights are asked for (``output_attentions=True``), in training mode, and in other dtypes than
    float32. Hooks on modules inside a fused block do not fire; hooks on blocks do.

    Args:
        model: a quantized encoder, or a model around it.
        attention: "int8" computes the attention products in int8 with scales taken from the tensors at hand; it costs a
            little accuracy beyond the linear layers (docs/results/performance.md). "float32" keeps scaled dot product
            attention. "simulated" is int8 attention computed in float32, on every machine: slow, to measure its accuracy.
            "auto" is int8 where the C++ operators can be built.
        native: use the C++ operators; None uses them where they can be built, False never.

    Returns:
        What was done, and for what was not, why.

    Raises:
        ValueError: no quantized encoder, or something asked for that this machine cannot do.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}.")
    tower = find_tower(model)
    if not any(True for _ in quant_linears(model)):
        raise ValueError(
            "fuse() is for quantized encoders; this model is float. Quantize it with RegCacheQuantizer first."
        )
    if kernel_reason() is not None:
        raise ValueError(f"fuse() cannot run int8 on this machine: {kernel_reason()} The model stays as it is.")
    reason = "native=False." if native is False else native_ops.unavailable_reason()
    if native and reason is not None:
        raise ValueError(f"native=True: {reason}")
    if attention == "int8" and reason is not None:
        raise ValueError(f"attention='int8' needs the C++ operators: {reason} Use attention='auto'.")
    used = {"auto": "float32" if reason else "int8", "simulated": "simulated int8"}.get(attention, attention)
    settings = FusionSettings(tower.config.hidden_act, tower.num_heads, used, native=reason is None)
    prepare_tower(model)
    fused, skipped = [], {}
    for index, block in enumerate(tower.blocks):
        runner = FusedBlock(tower.family, settings)
        try:
            runner.build(block)
        except UnfusableError as error:
            skipped[index] = str(error)
            block.fused = None  # type: ignore[assignment]
        else:
            fused.append(index)
            block.fused = runner  # type: ignore[assignment]
    report = FusionReport(tuple(fused), skipped, used, reason)
    (logger.warning if skipped else logger.info)(str(report))
    return report
