"""One block of the quantized model with what is trained in it: weights, and the scales of its inputs and attention operands."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.kernels import LinearState
from optimum_regcache.kernels.simulated import SimulatedLinear
from optimum_regcache.layers.attention import AttentionProducts, Operand
from optimum_regcache.layers.linear import QuantLinear, training_as
from optimum_regcache.math.nonuniform import focused_unit
from optimum_regcache.methods._reconstruction.parametrise import LowRank, Parametrisation
from optimum_regcache.methods._reconstruction.ste import LearnedScale, quantize_through
from optimum_regcache.methods.base import Group, PipelineState
from optimum_regcache.methods.gptq import WeightGrid

Snapshot = dict[str, torch.Tensor]
_LINEAR_STATE = ("weight", "weight_scale", "input_scale")


class TrainedLinear(SimulatedLinear):
    """A layer whose weight, and whose input scale if it has one, are trained.

    Attributes:
        hard: compute with the codes that the training would end with.
    """

    def __init__(self, state: LinearState, trained: Parametrisation, scale: LearnedScale | None) -> None:
        super().__init__(state)
        self.trained, self.scale, self.hard = trained, scale, False

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return super().rounded(x)
        a = self.state.activations
        return quantize_through(x.float(), self.scale.value(), self.scale.zero_point, a.bits, a.symmetric)

    def weight(self) -> torch.Tensor:
        return self.trained.weight(self.hard)


class TrainedOperand(nn.Module):
    """An attention operand whose scales are trained: query, key, value, or the upper end of probabilities on an interval."""

    def __init__(self, operand: Operand, scale: LearnedScale) -> None:
        super().__init__()
        self.operand, self.learned = operand, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, zero = self.operand.config, self.learned.zero_point.reshape(-1, 1, 1)
        scale = self.learned.value().reshape(-1, 1, 1)
        if self.operand.lower is not None:
            return focused_unit(x, zero, scale, c.bits).to(x.dtype)
        return quantize_through(x.float(), scale, zero, c.bits, c.symmetric).to(x.dtype)


class TrainedBlock:
    """The layers of one block of ``fit.result`` under training; nothing of them changes before :meth:`store`.

    Args:
        fit: the quantized model, and the float one whose weights are the start.
        groups: of the block.
        parametrise: (float32 weight [out, in], grid, number of the layer) -> what is trained of it.
        scales: train the static scales of inputs and of query, key and value. Where a token may have a scale of its own, or
            a range has two steps or 16 bits, they stay.
    """

    def __init__(
        self,
        fit: PipelineState,
        groups: Sequence[Group],
        parametrise: Callable[[torch.Tensor, WeightGrid, int], Parametrisation],
        scales: bool,
    ) -> None:
        self.linears: dict[str, tuple[QuantLinear, TrainedLinear]] = {}
        for group in groups:
            first = fit.quant_linear(group.names[0])
            shared = _input_scale(first) if scales else None  # layers that read one tensor round it alike
            for name in group.names:
                layer = fit.quant_linear(name)
                weight = layer.rotated_weight(fit.float_linear(name).weight)
                scale, zero = layer.weight_scale, layer.weight_zero_point
                zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
                trained = parametrise(
                    weight, WeightGrid(scale.clone(), zero.clone(), layer.weights.bits), len(self.linears)
                )
                self.linears[name] = layer, TrainedLinear(layer.state(), trained, shared)
        self.products: AttentionProducts | None = None
        self.operands: dict[str, TrainedOperand] = {}
        attention: Any = find_tower(fit.result).attention(groups[0].block)
        if attention.products is not None:
            self.products = attention.products
            for role, operand in attention.products.operands():
                offset = operand.zero_point if operand.lower is None else operand.lower
                if scales and offset is not None:
                    self.operands[role] = TrainedOperand(operand, LearnedScale(operand.scale, offset))

    def parameters(self) -> tuple[list[tuple[torch.Tensor, float]], list[torch.Tensor]]:
        """(weights with the units of their learning rates, scales)."""
        trained = [backend.trained for _, backend in self.linears.values()]
        inputs = {id(b.scale): b.scale.theta for _, b in self.linears.values() if b.scale is not None}
        scales = [s for t in trained for s in t.scales()] + list(inputs.values())
        return [p for t in trained for p in t.parameters()], scales + [o.learned.theta for o in self.operands.values()]

    def ranks(self) -> dict[str, int]:
        """Layer -> rank of what is added to its weight."""
        return {name: b.trained.rank for name, (_, b) in self.linears.items() if isinstance(b.trained, LowRank)}

    def penalty(self, progress: float) -> torch.Tensor | None:
        """Mean penalty of the weights."""
        found = [p for _, b in self.linears.values() if (p := b.trained.penalty(progress)) is not None]
        return torch.stack(found).mean() if found else None

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Within the context the model computes with what is trained."""
        with training_as(dict(self.linears.values())), _in_place(self.products, self.operands):
            yield

    @contextmanager
    def hard(self) -> Generator[None, None, None]:
        """Within the context weights are what :meth:`store` would store."""
        for _, backend in self.linears.values():
            backend.hard = True
        try:
            yield
        finally:
            for _, backend in self.linears.values():
                backend.hard = False

    @torch.no_grad()
    def store(self) -> None:
        """Write codes and scales into the layers."""
        for layer, backend in self.linears.values():
            codes, scale = backend.trained.merged()
            layer.weight_scale = scale.detach().clone()
            layer.set_codes(codes)
            if backend.scale is not None:
                layer.set_input_qparams(backend.scale.value(), backend.scale.zero_point)
        for trained in self.operands.values():
            trained.operand.set_qparams(trained.learned.value(), trained.learned.zero_point)

    def snapshot(self) -> Snapshot:
        """What :meth:`store` may change, by name, on the CPU."""
        found = {
            f"{name}.{key}": getattr(layer, key) for name, (layer, _) in self.linears.items() for key in _LINEAR_STATE
        }
        found |= {f"{role}.scale": trained.operand.scale for role, trained in self.operands.items()}
        return {name: t.detach().cpu().clone() for name, t in found.items() if t is not None}

    def restore(self, found: Mapping[str, torch.Tensor]) -> None:
        """The inverse of :meth:`snapshot`."""
        for name, (layer, _) in self.linears.items():
            for key in _LINEAR_STATE:
                if f"{name}.{key}" in found:
                    setattr(layer, key, found[f"{name}.{key}"].to(layer.weight.device).clone())
            layer.reset_runtime()
        for role, trained in self.operands.items():
            trained.operand.set_qparams(found[f"{role}.scale"], trained.learned.zero_point)


def _input_scale(layer: QuantLinear) -> LearnedScale | None:
    a, scale, zero = layer.activations, layer.input_scale, layer.input_zero_point
    if scale is None or zero is None or a.bits > 8 or a.outlier_tokens != "clip":
        return None
    return LearnedScale(scale, zero) if layer.own_scales is None and layer.input_negative_scale is None else None


@contextmanager
def _in_place(
    products: AttentionProducts | None, operands: Mapping[str, TrainedOperand]
) -> Generator[None, None, None]:
    for role, trained in operands.items():
        setattr(products, role, trained)
    try:
        yield
    finally:
        for role, trained in operands.items():
            setattr(products, role, trained.operand)
