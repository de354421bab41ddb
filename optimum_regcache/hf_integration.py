"""Registration as a transformers quantization method: `from_pretrained` and `save_pretrained` of quantized models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from optimum_regcache.config import QUANT_METHOD, RegCacheConfig
from optimum_regcache.hf_private import mark_quantized
from optimum_regcache.surgery import check_complete, install_structure, quantize_modules

_OWN_STATE = ("weight_scale", "input_scale", "input_zero_point", "register_key", "register_value")


class RegCacheHfQuantizer(HfQuantizer):
    """Rebuilds the quantized module tree before the weights are loaded and checks it afterwards."""

    requires_calibration = True
    quantization_config: RegCacheConfig

    def __init__(self, quantization_config: RegCacheConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "RegCache needs calibration images, so a float model cannot be quantized by from_pretrained("
                "quantization_config=RegCacheConfig(...)). Use RegCacheQuantizer.from_pretrained(model).quantize("
                "calibration_dataset=...), or `optimum-cli regcache quantize`."
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        quantize_modules(model, self.quantization_config)
        install_structure(model, self.quantization_config)
        self._expected = {name for name in model.state_dict() if _is_own(name)}
        _check_files(kwargs.get("checkpoint_files"), model, self._expected)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_complete(model)
        _share_with_vision_config(model, self.quantization_config)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _is_own(name: str) -> bool:
    return name.rpartition(".")[2] in _OWN_STATE


def _check_files(files: Any, model: nn.Module, expected: set[str]) -> None:
    """Compare the tensors of ours that the checkpoint holds with those the config promises.

    Only counts per kind of tensor are compared, because transformers may store modules under other names.

    Raises:
        ValueError: tensors are missing, or more are stored than the config describes.
    """
    from safetensors import safe_open

    paths = [Path(f) for f in files or () if str(f).endswith(".safetensors")]
    if not paths:
        return
    stored: dict[str, list[str]] = {kind: [] for kind in _OWN_STATE}
    for path in paths:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if _is_own(name):
                    stored[name.rpartition(".")[2]].append(name)
    for kind, names in stored.items():
        wanted = sorted(n for n in expected if n.endswith(f".{kind}"))
        if len(names) < len(wanted):
            raise ValueError(
                f"The checkpoint holds {len(names)} '{kind}' tensors, its quantization config needs {len(wanted)} "
                f"(for example {wanted[0]}). Missing or renamed tensors would leave the model wrong. Download it again, "
                "or quantize the model again."
            )


def _share_with_vision_config(model: Any, config: RegCacheConfig) -> None:
    """`CLIPVisionModel.from_pretrained(full_clip)` reads only ``vision_config``: it must know about the quantization."""
    vision_config = getattr(model.config, "vision_config", None)
    if vision_config is not None:
        vision_config.quantization_config = config.to_dict()


def attach_quantizer(model: PreTrainedModel, config: RegCacheConfig) -> None:
    """Make a model quantized in memory equal to a loaded one, for `save_pretrained` and `push_to_hub`."""
    model.config.quantization_config = config
    mark_quantized(model, RegCacheHfQuantizer(config))
    _share_with_vision_config(model, config)


def register() -> None:
    """Register with transformers; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(RegCacheConfig)
        register_quantizer(QUANT_METHOD)(RegCacheHfQuantizer)
