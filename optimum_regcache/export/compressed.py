"""Export to compressed-tensors: a checkpoint of the float architecture that transformers opens without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_regcache.encoders.compat import divides_tensors
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.export.layout import COMPRESSED_TENSORS, float_config, require_float32, versions, write_info
from optimum_regcache.hub.dequantize import lasting_change
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import QuantLinear, quant_linears
from optimum_regcache.layers.patch_embedding import QuantPatchEmbedding
from optimum_regcache.registers import get_register_cache, prepare_tower

_ADVICE = "Quantize with --no-registers and static symmetric activations, for example the preset w8a8 without methods."


def export_compressed_tensors(model: PreTrainedModel, output_dir: str | Path, *, processor: Any = None) -> Path:
    """Write int8 codes, scales and a ``quantization_config`` of compressed-tensors, with processor and ``export.json``.

    The format has no registers and no token deletion: a model with either is refused, because without them it would be another
    one. Codes and scales are the model's own; below 8 bits the codes lie in int8.

    Args:
        model: quantized, in float32; unchanged.
        output_dir: made if it does not exist.
        processor: saved beside the model.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: a model that the format cannot describe, with the reason.
    """
    tower, bits = find_tower(model), _check(model)
    native: Any = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    config, layers = float_config(model.config), dict(quant_linears(model))
    with torch.device("meta"):
        plain = native(config).requires_grad_(False)
    state = model.state_dict()
    for name, layer in layers.items():
        state = {key: value for key, value in state.items() if key.rpartition(".")[0] != name}
        state |= _layer_state(plain.get_submodule(name), name, layer)
    try:
        plain.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{native.__name__} has no place for tensors of this model: {error} {_ADVICE}") from None
    floats = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    plain.config.quantization_config = _quantization_config(*bits, floats)
    plain.config.dtype = torch.float32
    path = Path(output_dir)
    path.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    info = {
        "format": COMPRESSED_TENSORS,
        "model_class": native.__name__,
        "num_prefix_tokens": tower.num_prefix_tokens,
        "quantization": model.config.quantization_config.label,
        "quantized_layers": len(layers),
        "versions": versions("optimum-regcache", "torch", "transformers", "compressed-tensors"),
    }
    write_info(path, info)
    return path


def _check(model: PreTrainedModel) -> tuple[int, int]:
    """Bits of weights and of activations, the same in all layers."""
    name, config = type(model).__name__, getattr(model.config, "quantization_config", None)
    layers = dict(quant_linears(model))
    if config is None or not layers:
        raise ValueError(f"{name} is not quantized; {COMPRESSED_TENSORS} holds quantized layers. Quantize it first.")
    reason = lasting_change(config)
    if get_register_cache(model) is not None or prepare_tower(model).deletion.active:
        reason = "it has registers or token deletion, without which it would be another model"
    elif any(True for _ in attention_products(model)):
        reason = "its attention products are quantized"
    elif any(isinstance(module, QuantPatchEmbedding) for module in model.modules()):
        reason = "its patch embedding is quantized as a product of patches"
    if reason is not None:
        raise ValueError(f"{name} cannot be written as {COMPRESSED_TENSORS}: {reason}. {_ADVICE}")
    if divides_tensors(model):
        raise ValueError(
            f"{name} cannot be written as {COMPRESSED_TENSORS}: transformers divides tensors of this type as it opens them, "
            "which fails for this format. Use the format onnx."
        )
    require_float32(model)
    for layer, module in layers.items():
        a, state = module.activations, module.state()
        plain = a.mode == "static" and a.symmetric and state.activations.outlier_tokens == "clip" and a.bits <= 8
        more = module.input_offset is not None or module.input_negative_scale is not None
        if not plain or more or module.weight_zero_point is not None:
            raise ValueError(
                f"Layer {layer} cannot be written as {COMPRESSED_TENSORS}, which holds one static symmetric step for each "
                f"input and symmetric weights. {_ADVICE}"
            )
    bits = {(module.weights.bits, module.activations.bits) for module in layers.values()}
    if len(bits) > 1:
        raise ValueError(
            f"The layers of {name} differ in bits {sorted(bits)}; this export writes one scheme. {_ADVICE}"
        )
    return bits.pop()


def _layer_state(target: nn.Module, name: str, layer: QuantLinear) -> dict[str, torch.Tensor]:
    """Tensors of a quantized layer under the names of compressed-tensors; ``target`` gets places for the scales."""
    state = layer.state()
    input_scale = cast("torch.Tensor", state.input_scale)  # static, as was checked
    scales = {
        "weight_scale": state.weight_scale.expand(layer.out_features).reshape(-1, 1).clone(),
        "input_scale": input_scale.reshape(1).clone(),
    }
    for key, value in scales.items():
        target.register_buffer(key, torch.empty_like(value, device="meta"))
    tensors = {"weight": state.codes.clone(), **scales}
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    return {f"{name}.{key}": value for key, value in tensors.items()}


def _quantization_config(weight_bits: int, activation_bits: int, floats: list[str]) -> dict[str, Any]:
    """For ``config.json``; the linear layers called ``floats`` are left as they are."""
    common = {"type": "int", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "num_bits": weight_bits, "strategy": "channel"},
        "input_activations": {**common, "num_bits": activation_bits, "strategy": "tensor"},
        "format": "int-quantized",
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": floats,
    }
