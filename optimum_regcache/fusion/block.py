"""A transformer block as a short row of fused operations: what runs instead of the native forward after `fuse`.

LayerNorm and quantization in one pass, one product for query, key and value, int8 attention, the activation function in the
epilogue of the MLP's first product with u8 output, residual additions in the epilogues, LayerScale folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from optimum_regcache.encoders.compat import attention_weights_wanted
from optimum_regcache.encoders.families import EncoderFamily
from optimum_regcache.fusion.gemm import Activation, PackedGemm, UnfusableError, fused_activation, input_codes
from optimum_regcache.kernels import fused_ops as ops
from optimum_regcache.kernels import native as native_ops
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.registers.attention import active_registers, widen_mask
from optimum_regcache.registers.cache import RegisterLayer
from optimum_regcache.registers.neuron_activation import RegisterNeuronActivation

logger = logging.get_logger(__name__)

MAX_HEAD_DIM, MAX_REGISTERS = 128, 16  # of the native attention operator


@dataclass(frozen=True)
class FusionSettings:
    """How fused blocks run.

    Attributes:
        activation: transformers' name of the MLP's activation function.
        heads: of attention.
        attention: "int8" where the input allows it, "float32", or "simulated int8" by its plain form in float32.
        native: use the C++ operators of this machine; int8 attention needs them.
    """

    activation: str
    heads: int
    attention: str
    native: bool


class _Projections:
    """LayerNorm, quantization and the layers that read it (query, key, value; or the MLP's input layers)."""

    def __init__(self, norm: nn.LayerNorm, linears: Sequence[QuantLinear], native: bool, **gemm: Any) -> None:
        self.norm, self.native = norm, native
        found = [input_codes(linear) for linear in linears]
        groups = [list(linears)] if len(set(found)) == 1 else [[linear] for linear in linears]
        self.gemms = [PackedGemm(group, codes, **gemm) for group, codes in zip(groups, found, strict=False)]

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """float32 [B, N, D] -> the output of every product."""
        if len(self.gemms) == 1:
            return [self.gemms[0](ops.layer_norm_quantize(x, self.norm, self.gemms[0].codes, self.native))]
        y = self.norm(x)
        return [gemm(ops.quantize(y, gemm.codes, self.native)) for gemm in self.gemms]


class _Parts:
    """Everything derived from the state of a block."""

    def __init__(self, block: Any, family: EncoderFamily, settings: FusionSettings) -> None:
        if family.rotary or family.fused_projections:
            raise UnfusableError("rotary positions and packed sequences have no fused attention.")
        if block.acts_inside:
            raise UnfusableError(f"deletion.action={block.regcache.deletion.action!r} takes tokens within this block.")
        attention = block.get_submodule(family.attention)
        norms = [block.get_submodule(name) for name in family.norms]
        if family.normalizes_keys(attention) or not all(isinstance(norm, nn.LayerNorm) for norm in norms):
            raise UnfusableError("RMSNorm and norms of query and key have no fused form.")
        if attention.products is not None:
            raise UnfusableError("the attention products are simulated (attention.quantize).")
        self.attention, self.native, self.heads = attention, settings.native, settings.heads
        linears = [_linear(attention, name) for name in family.projections]
        head_dim = linears[0].out_features // self.heads
        self.scaling = head_dim**-0.5
        self.int8_attention = settings.attention == "int8" and head_dim <= MAX_HEAD_DIM
        self.simulated_attention = settings.attention == "simulated int8"
        self.qkv = _Projections(norms[0], linears, self.native)
        scales = [block.get_parameter(name) for name in family.layer_scales] or [None, None]
        out_linear = _linear(attention, family.out)
        self.out = PackedGemm([out_linear], input_codes(out_linear), channel_scale=scales[0])
        self.mlp = _Mlp(block, family, norms[1], scales[1], settings)
        whole = self.native and self.int8_attention and native_ops.blocks_reason() is None
        self.whole = _whole(self, norms) if whole else None


class _Mlp:
    """Both layers of the MLP with the activation function; SwiGLU: ``silu(gate) * up`` in float between them."""

    def __init__(
        self, block: Any, family: EncoderFamily, norm: nn.LayerNorm, scale: Any, settings: FusionSettings
    ) -> None:
        if any(isinstance(module, RegisterNeuronActivation) for module in block.modules()):
            raise UnfusableError("the MLP moves activations to a test-time register.")
        self.native = settings.native
        last = _linear(block, _present(block, family.mlp_out)[0])
        codes = input_codes(last)
        first = [_linear(block, name) for name in _present(block, family.mlp_in)]
        self.gated = len(first) > 1 or first[0].out_features != last.in_features
        activation = Activation() if self.gated else fused_activation(settings.activation)
        direct = codes if not self.gated and codes.is_byte else None
        self.first = _Projections(norm, first, self.native, activation=activation, out_codes=direct)
        self.last = PackedGemm([last], codes, channel_scale=scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.first(x)
        hidden = outputs[0]
        if self.gated:
            gate, up = hidden.chunk(2, -1) if len(outputs) == 1 else outputs
            hidden = F.silu(gate) * up
        if hidden.dtype != torch.uint8:
            hidden = ops.quantize(hidden, self.last.codes, self.native)
        return self.last.add(hidden, x)


class FusedBlock:
    """Runs a block that belongs to it (`BlockMixin.fused`). Derived data is built on first use and never copied or pickled.

    Args:
        family: names in the block.
        settings: how to run.
    """

    def __init__(self, family: EncoderFamily, settings: FusionSettings) -> None:
        self.family, self.settings = family, settings
        self._parts: _Parts | None = None
        self._built_for: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None, "_built_for": ()}

    def build(self, block: Any) -> None:
        """Pack the weights of ``block``.

        Raises:
            UnfusableError: a form of quantization that has no fused execution.
        """
        if self.settings.native and native_ops.unavailable_reason() is not None:  # made on another machine
            attention = "float32" if self.settings.attention == "int8" else self.settings.attention
            self.settings = replace(self.settings, attention=attention, native=False)
        self._parts = _Parts(block, self.family, self.settings)
        self._built_for = _generations(block)
        for module in block.modules():
            if isinstance(module, QuantLinear):
                module.release_runtime()  # its own packed copy; built again if the block runs unfused

    def applies(self, block: Any, hidden: torch.Tensor) -> bool:
        """Whether this call runs fused: float32 on the CPU, evaluation mode, neither attention weights nor gradients asked for,
        and weights of a form that has a fused execution (they may have changed since `fuse`).

        Raises:
            RuntimeError: nothing is packed yet while `torch.compile` is tracing.
        """
        plain = hidden.dtype == torch.float32 and hidden.device.type == "cpu"
        if not plain or block.training or attention_weights_wanted() or _recorded(block, hidden):
            return False
        if self._built_for != _generations(block):
            if torch.compiler.is_compiling():
                raise RuntimeError("This fused model has no packed weights yet. Run it once before torch.compile.")
            try:
                self.build(block)
            except UnfusableError as error:
                self._parts, self._built_for = None, _generations(block)
                logger.warning(f"Block {block.block_index} does not run fused any more: {error}")
        return self._parts is not None

    def __call__(self, block: Any, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Block input [B, N, D] float32 -> output of the same shape."""
        parts: Any = self._parts
        layer, copies = active_registers(parts.attention)
        scaling = parts.scaling
        int8_attention = parts.int8_attention and mask is None and layer.get_seq_length() <= MAX_REGISTERS
        rows = (layer.keys, layer.values)
        if int8_attention and parts.whole is not None:
            return torch.ops.regcache.block(hidden, *parts.whole, *rows, parts.heads, scaling, math.log(copies))
        x = hidden.contiguous()
        qkv = parts.qkv(x)
        q, k, v = qkv[0].chunk(3, -1) if len(qkv) == 1 else qkv
        if int8_attention:
            context = ops.int8_attention(q, k, v, rows, math.log(copies), parts.heads, scaling, parts.out.codes)
        elif parts.simulated_attention and mask is None:
            context = ops.int8_attention_reference(q, k, v, rows, math.log(copies), parts.heads, scaling)
            context = ops.quantize(context, parts.out.codes, parts.native)
        else:
            context = ops.quantize(_float_attention(parts, q, k, v, layer, copies, mask), parts.out.codes, parts.native)
        return parts.mlp(parts.out.add(context, x))


def _recorded(block: Any, hidden: torch.Tensor) -> bool:
    """Whether autograd records this call; fused operations have no gradients."""
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in block.parameters()))


def _float_attention(
    parts: _Parts, q: Any, k: Any, v: Any, layer: RegisterLayer, copies: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Scaled dot product attention of [B, N, H * d] with register rows before the image tokens, float32 [B, N, H * d]."""
    q, k, v = (t.unflatten(-1, (parts.heads, -1)).transpose(1, 2) for t in (q, k, v))
    if layer.get_seq_length():
        mask = widen_mask(mask, layer.get_seq_length(), math.log(copies), q)
        k, v = layer.update(k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=parts.scaling).transpose(1, 2).flatten(2)


def _whole(parts: _Parts, norms: Sequence[nn.LayerNorm]) -> tuple[Any, ...] | None:
    """The arguments of the operator for a whole block, between the block's input and the registers; None where the block
    is not of the common form (one product for query, key and value, 8 bits, activation function in the epilogue)."""
    gemms = [*parts.qkv.gemms, parts.out, *parts.mlp.first.gemms, parts.mlp.last]
    hidden = parts.mlp.first.gemms[0].epilogue
    common = len(gemms) == 4 and hidden.as_codes and all(gemm.codes.is_byte for gemm in gemms)
    tensors = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    if not common or any(tensor is None for tensor in tensors):
        return None
    return (
        tensors,
        [norm.eps for norm in norms],
        [gemm.weight.packed for gemm in gemms],
        [gemm.weight.scale for gemm in gemms],
        [gemm.weight.zero_point for gemm in gemms],
        [gemm.weight.bias for gemm in gemms],
        [gemm.codes.scale for gemm in gemms],
        [gemm.codes.zero_point for gemm in gemms],
        [gemm.codes.inverse for gemm in gemms],
        hidden.out_scale,
        hidden.out_zero_point,
        hidden.post,
        hidden.algorithm,
    )


def _generations(block: nn.Module) -> tuple[int, ...]:
    """Changes whenever quantized weights or scales of the block change."""
    return tuple(module.generation for module in block.modules() if isinstance(module, QuantLinear))


def _linear(parent: nn.Module, name: str) -> QuantLinear:
    module = parent.get_submodule(name)
    if not isinstance(module, QuantLinear):
        raise UnfusableError(f"{name} is not quantized.")
    return module


def _present(block: nn.Module, names: Sequence[str]) -> list[str]:
    known = {name for name, _ in block.named_modules()}
    return [name for name in names if name in known]
