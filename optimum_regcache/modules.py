"""Quantized replacements of float modules. Their state dict is the checkpoint; everything else is derived from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache import numerics
from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels import LinearBackend, LinearState, select_backend

_FLOAT32_STATE = ("weight_scale", "input_scale")


class QuantLinear(nn.Module):
    """A linear layer with quantized weight and quantized input.

    State (all plain tensors, saved as they are):
        weight: int32 [out, ceil(in / (32 // bits))], packed codes. The shape differs from the float layer's on purpose:
            loading such a checkpoint without this package is a size mismatch, not silent garbage.
        weight_scale: float32 [out] or [1].
        bias: [out] in the model dtype, or None.
        input_scale, input_zero_point: float32 [] and int32 [] when activations are static; NaN means not calibrated.

    Scales stay float32 when the model is cast (``model.half()``).
    """

    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None

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
        words = -(-in_features // numerics.codes_per_word(weights.bits))
        scales = out_features if weights.granularity == "per_channel" else 1
        self.weight = nn.Buffer(torch.zeros(out_features, words, dtype=torch.int32, device=device))
        self.weight_scale = nn.Buffer(torch.full((scales,), float("nan"), dtype=torch.float32, device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        static = activations.mode == "static"
        self.register_buffer(
            "input_scale", torch.tensor(float("nan"), dtype=torch.float32, device=device) if static else None
        )
        self.register_buffer("input_zero_point", torch.tensor(0, dtype=torch.int32, device=device) if static else None)

    @classmethod
    def empty_like(cls, module: nn.Linear, weights: WeightsConfig, activations: ActivationsConfig) -> QuantLinear:
        """A layer of the same shape without weights, to load a checkpoint into."""
        weight = module.weight
        return cls(
            weight.shape[1], weight.shape[0], module.bias is not None, weights, activations, weight.device, weight.dtype
        )

    @classmethod
    def from_float(cls, module: nn.Linear, weights: WeightsConfig, activations: ActivationsConfig) -> QuantLinear:
        """Round-to-nearest quantization of a float layer; static activations still need :meth:`set_input_qparams`."""
        new = cls.empty_like(module, weights, activations)
        new.set_float_weight(module.weight.detach())
        if new.bias is not None:
            new.bias.data = module.bias.detach().clone()
        return new

    def set_float_weight(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` [out, in] into the packed codes and scales.

        Raises:
            ValueError: a weight that is not finite.
        """
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError("The float weight to quantize is not finite; the float model is damaged.")
        scale = numerics.weight_qparams(weight, self.weights.bits, self.weights.granularity, self.weights.observer)
        column = scale.reshape(-1, 1)
        codes = numerics.quantize(weight, column, torch.zeros_like(column), self.weights.bits, True)
        self.weight = numerics.pack_codes(codes, self.weights.bits)
        self.weight_scale = scale
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

    def codes(self) -> torch.Tensor:
        """int8 weight codes [out, in]."""
        return numerics.unpack_codes(self.weight, self.weights.bits, self.in_features)

    def dequantized_weight(self) -> torch.Tensor:
        """float32 weight [out, in] that the codes stand for."""
        return self.codes().float() * self.weight_scale.reshape(-1, 1)

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
        return LinearState(
            self.codes(), self.weight_scale, self.bias, self.activations, self.input_scale, self.input_zero_point
        )

    def runtime(self) -> LinearBackend:
        """The prepared backend, built on first use."""
        if self._runtime is None:
            state = self.state()
            self._runtime = select_backend(self.backend, state)(state)
        return self._runtime

    def reset_runtime(self) -> None:
        """Forget derived data after a change of state or of ``backend``."""
        self._runtime = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.runtime()(x)

    def extra_repr(self) -> str:
        a = self.activations
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weights=int{self.weights.bits} {self.weights.granularity}, "
            f"activations=int{a.bits} {a.mode} {a.granularity}, backend={self.backend}"
        )

    # derived data never travels: packed oneDNN weights can be neither copied nor pickled
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runtime": None}

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


class QuantPatchEmbedding(nn.Module):
    """A patch embedding (convolution with kernel = stride, or linear over ready patches) as a `QuantLinear`.

    The flattened weight is [out, channels * kernel_h * kernel_w]. ``weight`` is an empty tensor: the models read its dtype
    to cast the pixels.
    """

    weight: torch.Tensor

    def __init__(self, linear: QuantLinear, kernel_size: tuple[int, int] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.kernel_size = kernel_size
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=linear.weight.device), persistent=False)

    @classmethod
    def empty_like(
        cls, module: nn.Module, weights: WeightsConfig, activations: ActivationsConfig
    ) -> QuantPatchEmbedding:
        """The same shape without weights. Raises `TypeError` as :meth:`from_float`."""
        flat, kernel = _flat_linear(module)
        return cls(QuantLinear.empty_like(flat, weights, activations), kernel, flat.weight.dtype)

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: WeightsConfig, activations: ActivationsConfig
    ) -> QuantPatchEmbedding:
        """Quantize an `nn.Linear`, or an `nn.Conv2d` whose stride equals its kernel.

        Raises:
            TypeError: any other module.
        """
        flat, kernel = _flat_linear(module)
        return cls(QuantLinear.from_float(flat, weights, activations), kernel, flat.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolution: [B, C, H, W] -> [B, out, H / kernel_h, W / kernel_w]; linear: [..., in] -> [..., out]."""
        if self.kernel_size is None:
            return self.linear(x)
        height, width = x.shape[-2] // self.kernel_size[0], x.shape[-1] // self.kernel_size[1]
        y = self.linear(unfold_patches(x, self.kernel_size))
        return y.transpose(1, 2).reshape(x.shape[0], -1, height, width)


def _is_special(module: nn.Conv2d) -> bool:
    padded = module.padding not in ((0, 0), 0, "valid")
    return padded or tuple(module.dilation) != (1, 1) or module.groups != 1


def _flat_linear(module: nn.Module) -> tuple[nn.Linear, tuple[int, int] | None]:
    """The patch embedding as a linear layer over unfolded patches, and its kernel size (None if it is linear)."""
    if isinstance(module, nn.Linear):
        return module, None
    plain = isinstance(module, nn.Conv2d) and tuple(module.stride) == tuple(module.kernel_size)
    if not isinstance(module, nn.Conv2d) or not plain or _is_special(module):
        raise TypeError(
            "Only a patch embedding that is a linear layer, or a Conv2d with stride equal to its kernel, can be "
            "quantized. Set modules.patch_embedding=False for this model."
        )
    flat = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
    flat.weight = nn.Parameter(module.weight.detach().flatten(1), requires_grad=False)
    if module.bias is not None:
        flat.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return flat, (module.kernel_size[0], module.kernel_size[1])


def unfold_patches(x: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
    """[B, C, H, W] -> [B, patches, C * kernel_h * kernel_w]."""
    return F.unfold(x, kernel_size, stride=kernel_size).transpose(1, 2)


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Names and modules of all quantized layers."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose how the quantized layers run: ``auto``, ``simulated``, ``reference`` or ``onednn``.

    Raises:
        ValueError: unknown backend, or one that cannot run a layer on this machine.
    """
    for _, module in quant_linears(model):
        if module.weight.device.type != "meta":
            select_backend(backend, module.state())
        module.backend = backend
        module.reset_runtime()
