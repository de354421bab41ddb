"""The one door for models that are to be measured or quantized."""

from __future__ import annotations

from typing import Any

from torch import nn

from optimum_regcache.encoders.tower import find_tower, named_modules
from optimum_regcache.layers.linear import quant_linears

_FOREIGN = (
    "bitsandbytes", "torchao", "auto_gptq", "gptqmodel", "optimum.quanto", "awq", "hqq", "eetq",
    "compressed_tensors", "auto_round", "neural_compressor", "quark", "torch.ao.nn.", "torch.nn.quantized",
)  # fmt: skip


def require_float(model: Any) -> None:
    """Make sure that a model is what quantization starts from: a float encoder, whole and in memory, without adapters.

    Raises:
        TypeError: no PyTorch model.
        ValueError: no supported encoder, one that is quantized already, has adapters, is wrapped, or lies on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A model is needed, got {type(model).__name__}. Pass a transformers model, or a directory or Hub id to "
            "RegCacheQuantizer.from_pretrained."
        )
    name = type(model).__name__
    inner = getattr(model, "_orig_mod", None) or (getattr(model, "module", None) if "Parallel" in name else None)
    if inner is not None:
        attribute = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise ValueError(f"This is a {name} around a model; pass model.{attribute}, and wrap or compile the result.")
    if _has_adapters(model):
        raise ValueError(
            f"This {name} carries adapters (LoRA or others). Merge them first: "
            "peft.PeftModel.from_pretrained(model, adapter).merge_and_unload() gives a plain model; save it, start from that."
        )
    if getattr(model, "is_quantized", False) or any(True for _ in quant_linears(model)) or _foreign_layers(model):
        raise ValueError(f"{name} is already quantized; start from the float model.")
    tower = find_tower(model)
    missing = [n for n, tensor in tower.module.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(
            f"{missing[0]} of the encoder is not in memory (offloaded, or on the meta device). Load the model without "
            "device_map, or with its vision tower on one device."
        )


def _has_adapters(model: nn.Module) -> bool:
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    return any(type(module).__module__.startswith("peft.") for _, module in named_modules(model))


def _foreign_layers(model: nn.Module) -> bool:
    modules = [module for _, module in named_modules(model)]
    parameters = (p for module in modules for p in module.parameters(recurse=False))
    return any(type(x).__module__.startswith(_FOREIGN) for x in (*modules, *parameters))
