"""Quantized replacements of float modules. Their state dict is the checkpoint; everything else is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels import BACKENDS, LinearBackend, LinearState, select_backend
from optimum_regcache.math import uniform
from optimum_regcache.math.hadamard import block_hadamard, block_order, rotate_mlp_input_weight
from optimum_regcache.math.nonuniform import twin_signed

TokenChoice = Callable[[torch.Tensor], torch.Tensor | None]
_FLOAT32_STATE = ("weight_scale", "input_scale", "input_negative_scale", "input_offset")


class QuantLinear(nn.Module):
    """A linear layer with quantized weight and quantized input.

    State (all plain tensors, saved as they are):
        weight: int32 [out, ceil(in / (32 // bits))], packed codes. The shape differs from the float layer's on purpose:
            loading such a checkpoint without this package is a size mismatch, not silent garbage.
        weight_scale: float32 [out] or [1].
        weight_zero_point: int32 of the same shape; None when weights are symmetric.
        bias: [out] in the model dtype, or None.
        input_scale, input_zero_point: float32 [] and int32 [] when activations are static; NaN means not calibrated.
        input_negative_scale: float32 [], step of negative inputs of a twin quantizer, else None.
        input_offset: float32 [in], added to the input before it is quantized (NoisyQuant), else None.

    With ``activations.mlp_out_hadamard`` the input is transformed by a block Hadamard matrix first, and the weight holds the
    inverse. Scales stay float32 when the model is cast (``model.half()``).
    """

    weight_zero_point: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    input_negative_scale: torch.Tensor | None
    input_offset: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weights: WeightsConfig,
        activations: ActivationsConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activations = weights, activations
        self.backend = "auto"
        self._runtime: LinearBackend | None = None
        self._for_gradients: LinearBackend | None = None
        self._own_scales: TokenChoice | None = None
        self.generation = 0  # changes with the state, for data derived elsewhere
        words = -(-in_features // uniform.codes_per_word(weights.bits))
        scales = out_features if weights.granularity == "per_channel" else 1
        self.weight = nn.Buffer(torch.zeros(out_features, words, dtype=torch.int32, device=device))
        self.weight_scale = nn.Buffer(torch.full((scales,), float("nan"), dtype=torch.float32, device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        static, twin = activations.mode == "static", activations.post_activation == "twin"
        self.hadamard_order = block_order(in_features) if activations.mlp_out_hadamard else 1
        unknown, zero = torch.tensor(float("nan"), device=device), torch.tensor(0, dtype=torch.int32, device=device)
        unknown = unknown.float()  # the default dtype may be another one while a checkpoint is loaded
        self.register_buffer("weight_zero_point", None if weights.symmetric else zero.repeat(scales))
        self.register_buffer("input_scale", unknown.clone() if static else None)
        self.register_buffer("input_zero_point", zero if static else None)
        self.register_buffer("input_negative_scale", unknown.clone() if twin else None)
        offset = torch.zeros(in_features, dtype=torch.float32, device=device) if activations.mlp_out_offset else None
        self.register_buffer("input_offset", offset)

    @property
    def own_scales(self) -> TokenChoice | None:
        """Input [B, N, in] -> bool [B, N], the tokens that get a scale of their own where the static one does not reach
        (``deletion.action="per_token"``); None from it means any token. None: the config alone decides."""
        return self._own_scales

    @own_scales.setter
    def own_scales(self, choose: TokenChoice | None) -> None:
        self._own_scales = choose
        self.reset_runtime()

    @classmethod
    def empty_like(cls, module: nn.Linear, weights: WeightsConfig, activations: ActivationsConfig) -> QuantLinear:
        """A layer of the same shape without weights, to load a checkpoint into."""
        weight = module.weight
        return cls(
            weight.shape[1], weight.shape[0], module.bias is not None, weights, activations, weight.device, weight.dtype
        )

    @classmethod
    def from_float(cls, module: nn.Linear, weights: WeightsConfig, activations: ActivationsConfig) -> QuantLinear:
        """Round-to-nearest quantization of a float layer; static activations still need `set_input_qparams`."""
        new = cls.empty_like(module, weights, activations)
        new.weight = new.weight.new_empty(0)  # gives its memory back before the real words need some
        new.set_float_weight(module.weight.detach())
        if new.bias is not None:
            new.bias.data = module.bias.detach().clone()
        return new

    def set_float_weight(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` [out, in] into the packed codes and scales.

        Raises:
            ValueError: a weight that is not finite.
        """
        if not weight.is_meta and not bool(
            torch.isfinite(torch.stack(torch.aminmax(weight))).all()
        ):  # nan is both ends
            raise ValueError("The float weight to quantize is not finite; the float model is damaged.")
        weight, w = self.rotated_weight(weight), self.weights
        self.set_weight(weight, *uniform.weight_qparams(weight, w.bits, w.granularity, w.observer, w.symmetric))

    def rotated_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The float ``weight`` [out, in] with the inverse of the online Hadamard transform, if the layer has one; float32."""
        weight = weight.detach().float()
        return weight if self.hadamard_order == 1 else rotate_mlp_input_weight(weight, self.hadamard_order)

    def set_weight(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> None:
        """Quantize ``weight`` [out, in] with given qparams (`uniform.weight_qparams`); the online Hadamard transform, if the
        layer has one, must be folded into it already.

        Raises:
            ValueError: scales that are not positive and finite, or of another shape than ``weight_scale``.
        """
        scale = scale.detach().float()
        good = scale.is_meta or bool((torch.isfinite(scale) & (scale > 0)).all())
        if not good or scale.shape != self.weight_scale.shape:
            raise ValueError(f"Weight scales must be positive, finite and of shape {tuple(self.weight_scale.shape)}.")
        zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point.to(torch.int32)
        if self.weight_zero_point is not None:
            self.weight_zero_point = zero.clone()
        elif not zero.is_meta and bool((zero != 0).any()):
            raise ValueError("This layer has symmetric weights; their zero points must be 0.")
        self.weight_scale = scale.clone()
        self.weight = uniform.packed_weight(weight.detach(), scale, zero, self.weights.bits)
        self.reset_runtime()

    def set_codes(self, codes: torch.Tensor) -> None:
        """Store signed weight codes [out, in] (whole numbers) for the scales that the layer has."""
        self.weight = uniform.pack_codes(codes, self.weights.bits)
        self.reset_runtime()

    def set_input_qparams(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Store the static activation scale (0-dim, > 0) and zero point.

        Raises:
            ValueError: activations are dynamic, or the scale is not a positive finite number.
        """
        if self.input_scale is None:
            raise ValueError("This layer computes its activation scale from each input (mode='dynamic').")
        if not bool(torch.isfinite(scale) & (scale > 0)):
            raise ValueError(f"An activation scale must be positive and finite, got {float(scale)}.")
        self.input_scale = scale.detach().to(self.weight.device, torch.float32).clone()
        self.input_zero_point = zero_point.detach().to(self.weight.device, torch.int32).clone()
        self.reset_runtime()

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        """What is quantized: ``x`` plus the offset, transformed by the Hadamard matrix."""
        if self.input_offset is not None:
            x = x + self.input_offset.to(x.dtype)
        return x if self.hadamard_order == 1 else block_hadamard(x, self.hadamard_order)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """The values that the layer multiplies in place of the input ``x`` [..., in], float32."""
        x, state, a = self.prepare_input(x.float()), self.state(), self.activations
        scale, zero = state.input_qparams(x)
        if self.input_negative_scale is not None:
            return twin_signed(x, scale, self.input_negative_scale, a.bits)
        return uniform.fake_quantize(x, scale, zero, a.bits, a.symmetric)

    def codes(self) -> torch.Tensor:
        """int8 weight codes [out, in]; they may be the memory of ``weight``."""
        return uniform.unpack_codes(self.weight, self.weights.bits, self.in_features)

    def dequantized_weight(self) -> torch.Tensor:
        """float32 weight [out, in] that the codes stand for."""
        zero = 0 if self.weight_zero_point is None else self.weight_zero_point.reshape(-1, 1)
        return (self.codes().float() - zero) * self.weight_scale.reshape(-1, 1)

    def state(self) -> LinearState:
        """Everything a backend needs.

        Raises:
            ValueError: static activations that were never calibrated, or weights that were never set.
        """
        if not bool(torch.isfinite(self.weight_scale).all()):
            raise ValueError("This QuantLinear has no weights yet: weight_scale is not finite.")
        if self.input_scale is not None and not bool(torch.isfinite(self.input_scale)):
            raise ValueError(
                "This QuantLinear has static activations but was never calibrated. Quantize through "
                "RegCacheQuantizer.quantize(calibration_dataset=...), or use the preset 'w8a8-dynamic'."
            )
        a = self.activations if self.own_scales is None else replace(self.activations, outlier_tokens="per_token")
        return LinearState(
            self.codes(),
            self.weight_scale,
            self.bias,
            a,
            self.input_scale,
            self.input_zero_point,
            self.weight_zero_point,
            self.input_negative_scale,
        )

    def runtime(self) -> LinearBackend:
        """The prepared backend, built on first use.

        Raises:
            RuntimeError: not built yet while `torch.compile` is tracing.
        """
        if self._runtime is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("The quantized weights are not packed yet. Run the model once before torch.compile.")
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves calls with gradients too
                state = self.state()
                self._runtime = select_backend(self.backend, state)(state)
        return self._runtime

    def _differentiable_runtime(self) -> LinearBackend:
        """What computes a call that autograd records.

        Raises:
            RuntimeError: a backend without gradients was chosen.
        """
        runtime = self.runtime()
        if runtime.differentiable:
            return runtime
        if self.backend != "auto":
            raise RuntimeError(
                f"The backend {self.backend!r} has no gradients. For gradients call set_backend(model, 'simulated') or "
                "set_backend(model, 'auto'); without need of them run the model under torch.no_grad()."
            )
        if self._for_gradients is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "Nothing is prepared for gradients yet. Run the model once with them before torch.compile."
                )
            with torch.inference_mode(False), torch.no_grad():
                self._for_gradients = BACKENDS["simulated"](self.state())
        return self._for_gradients

    def release_runtime(self) -> None:
        """Free the prepared backend; the next call builds it again."""
        self._runtime = self._for_gradients = None

    def reset_runtime(self) -> None:
        """Forget derived data after a change of state or of ``backend``."""
        self._runtime = self._for_gradients = None
        self.generation += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out].

        With ``backend="auto"``, a call that autograd records is simulated, whatever computes the others: integer kernels have
        no gradients.

        Raises:
            RuntimeError: such a call with another backend than ``auto`` and ``simulated``.
        """
        trains = self.bias is not None and self.bias.requires_grad
        recorded = torch.is_grad_enabled() and (x.requires_grad or trains)
        runtime = self._differentiable_runtime() if recorded else self.runtime()
        prepared = self.prepare_input(x)
        y = runtime(self._clipped(x, prepared) if runtime.rounds_input else prepared)
        if self.activations.mode == "dynamic" and self.activations.granularity == "per_tensor":
            y = y + (x - x).sum(-1, keepdim=True)  # nan stays nan, so that the next layer leaves it out of its scale
        return y

    def _clipped(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """``prepared`` within the static range but for the tokens of ``own_scales``; a backend scales by the range alone."""
        chosen = None if self.own_scales is None else self.own_scales(x)
        if chosen is None or self.input_scale is None:
            return prepared
        limit = self.input_scale * (2 ** (self.activations.bits - 1) - 1)
        return torch.where(chosen.unsqueeze(-1), prepared, prepared.clamp(-limit, limit))

    def extra_repr(self) -> str:
        a = self.activations
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weights=int{self.weights.bits} {self.weights.granularity}, "
            f"activations=int{a.bits} {a.mode} {a.granularity}, backend={self.backend}"
        )

    # derived data never travels: packed oneDNN weights can be neither copied nor pickled
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runtime": None, "_for_gradients": None}

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        exact = {name: getattr(self, name) for name in _FLOAT32_STATE}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if before is not None and after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        self.reset_runtime()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset_runtime()


def shift_bias(module: Any, delta: torch.Tensor) -> torch.Tensor:
    """Add ``delta`` [out] to the bias of a linear layer (quantized or not) or a norm.

    Returns:
        What was really added, after rounding to the bias's dtype; float32 [out].
    """
    before = module.bias.detach()
    module.bias = nn.Parameter((before.float() + delta).to(before.dtype), requires_grad=False)
    if isinstance(module, QuantLinear):
        module.reset_runtime()
    return module.bias.detach().float() - before.float()


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Names and modules of all quantized layers."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose how the quantized layers run: ``auto``, ``simulated``, ``reference``, ``onednn`` or ``int_mm``.

    Raises:
        ValueError: unknown backend, or one that cannot run a layer on this machine.
    """
    for _, module in quant_linears(model):
        if module.weight.device.type != "meta":
            select_backend(backend, module.state())
        module.backend = backend
        module.reset_runtime()


@contextmanager
def running_as(model: nn.Module, backend: type[LinearBackend]) -> Iterator[None]:
    """All quantized layers run as ``backend`` inside the ``with`` block; prepared at its start, so that it can be traced."""
    for _, module in quant_linears(model):
        with torch.inference_mode(False), torch.no_grad():
            module._runtime = backend(module.state())
    try:
        yield
    finally:
        for _, module in quant_linears(model):
            module.reset_runtime()


@contextmanager
def training_as(backends: Mapping[QuantLinear, LinearBackend]) -> Iterator[None]:
    """These layers run as the given backends, which have gradients, inside the ``with`` block."""
    for module, backend in backends.items():
        module._runtime = backend
    try:
        yield
    finally:
        for module in backends:
            module.reset_runtime()
