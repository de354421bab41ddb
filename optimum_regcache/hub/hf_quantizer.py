"""Registration as a transformers quantization method: `from_pretrained` and `save_pretrained` of quantized models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,  # pyright: ignore[reportUnknownVariableType]
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from optimum_regcache.config import QUANT_METHOD, RegCacheConfig
from optimum_regcache.config.effects import require_effect
from optimum_regcache.encoders.compat import accept_bare_names, being_pushed, leave_uninitialized, mark_quantized
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.versions import TESTED_TRANSFORMERS, check_environment, requirement
from optimum_regcache.hub.checks import check_files
from optimum_regcache.hub.dequantize import dequantize_modules
from optimum_regcache.hub.remote_code import prepare_auto_map
from optimum_regcache.hub.stored import fingerprint
from optimum_regcache.hub.structure import check_complete, check_loaded, freeze, install_structure, validate_positions
from optimum_regcache.layers.install import quantize_modules
from optimum_regcache.registers import prepare_tower, set_deletion

logger = logging.get_logger(__name__)


class RegCacheHfQuantizer(HfQuantizer):
    """Rebuilds the quantized module tree before the weights are loaded and checks it afterwards.

    A float model is quantized after its weights are loaded, if its config needs no images: dynamic activations, no registers
    to be searched or mined, no methods.
    """

    requires_calibration = True
    quantization_config: RegCacheConfig
    pre_quantized: bool
    _forms: dict[str, tuple[torch.Size, torch.dtype]] = {}  # noqa: RUF012 (replaced, never changed)
    _as_saved = False
    _names_known = False

    def __init__(self, quantization_config: RegCacheConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            reason = _image_user(quantization_config)
            if reason is not None:
                raise ValueError(
                    f"RegCache needs calibration images ({reason}), so a float model cannot be quantized by from_pretrained("
                    "quantization_config=RegCacheConfig(...)). Use RegCacheQuantizer.from_pretrained(model).quantize("
                    "calibration_dataset=...), or `optimum-cli regcache quantize`; or the preset 'w8a8-dynamic' with "
                    "registers.mode='none', which needs none."
                )
            require_effect(quantization_config)
            self.requires_calibration = False
        super().__init__(quantization_config, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called before anything is loaded.

        Raises:
            ImportError: a package is missing or too old; names it and the pip command.
        """
        check_environment()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        _check_device_map(model, kwargs.get("device_map"))
        quantize_modules(model, self.quantization_config, empty=True)
        install_structure(model, self.quantization_config)
        accept_bare_names(model, find_tower(model).name)
        paths = _checkpoint_files(model, kwargs)
        self._names_known = bool(paths)
        if not paths:  # what is missing is named afterwards
            for block in find_tower(model).blocks:
                leave_uninitialized(block)
        self._as_saved = self._names_known and check_files(model, self.quantization_config, paths)
        self._forms = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            check_loaded(model, self._forms, self._names_known)
        else:
            validate_positions(model, self.quantization_config)
            prepare_tower(model)
            quantize_modules(model, self.quantization_config)
            set_deletion(model, self.quantization_config.deletion)
        check_complete(model, ranges=self.pre_quantized and not self._as_saved)
        freeze(model)
        _share_with_vision_config(model, self.quantization_config)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """A float model of the same class; see `optimum_regcache.hub.dequantize`."""
        dequantize_modules(model, self.quantization_config, dtype or model.dtype)
        vision_config = getattr(model.config, "vision_config", None)
        if vision_config is not None and hasattr(vision_config, "quantization_config"):
            del vision_config.quantization_config
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained` before it writes: the fingerprint for the files."""
        prepare_auto_map(model)
        if being_pushed():
            logger.warning(
                "push_to_hub of transformers uploads weights only: no processor, no recipe, an empty card. Use "
                "RegCacheQuantizer.push_to_hub(repo_id, model), or `optimum-cli regcache push FOLDER user/name`."
            )
        return None, fingerprint(model, self.quantization_config)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is quantized stays as it is; gradients pass through it to whatever else trains."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _image_user(config: RegCacheConfig) -> str | None:
    """What of ``config`` cannot be made without images; None if nothing."""
    if config.methods:
        return f"methods {', '.join(m['name'] for m in config.methods)}"
    if config.registers.mode != "none":
        return f"registers.mode={config.registers.mode!r}"
    if config.activations.mode == "static":
        return "static activations"
    if config.attention.quantize:
        return "quantized attention products"
    return "modules.mixed_precision" if config.modules.mixed_precision else None


def _checkpoint_files(model: Any, given: dict[str, Any]) -> list[Path]:
    """The files that are about to be loaded; empty where the weights come from elsewhere (``state_dict=``).

    Args:
        model: that is being loaded.
        given: keyword arguments of the hook. transformers 5.4 to 5.24 pass ``checkpoint_files``; a release that does not is
            no reason to skip the check, so the checkpoint's own folder is looked up then.

    Raises:
        ValueError: the files cannot be found, so that damage could not be noticed.
    """
    if "checkpoint_files" in given:
        return [Path(f) for f in given["checkpoint_files"] or ()]
    folder = Path(str(getattr(model.config, "_name_or_path", "") or ""))
    found = sorted(folder.glob("*.safetensors")) if folder.name and folder.is_dir() else []
    found = found or (sorted(folder.glob("pytorch_model*.bin")) if folder.name and folder.is_dir() else [])
    if not found:
        raise ValueError(
            "The checkpoint cannot be checked for missing tensors: this release of transformers does not say which files it "
            "loads. Download the checkpoint and give from_pretrained the folder, or install a tested release: "
            f'pip install "{requirement("transformers")}" (tested: {" to ".join(TESTED_TRANSFORMERS)}).'
        )
    return found


def _check_device_map(model: Any, device_map: Any) -> None:
    """The quantized encoder runs on one device.

    Raises:
        ValueError: a part of it would be on another one, on disk or nowhere.
    """
    if not isinstance(device_map, dict):
        return
    tower = find_tower(model)
    places = {str(where) for name, where in cast("dict[str, Any]", device_map).items() if _overlap(name, tower.name)}
    if len(places) > 1 or places & {"disk", "meta"}:
        raise ValueError(
            f"device_map puts the quantized encoder on {', '.join(sorted(places))}. It has to stay whole on one device: give "
            f"{tower.name or 'the model'!r} one entry, for example device_map={{{tower.name!r}: 'cpu', ...}}; other parts of a "
            "larger model may go elsewhere."
        )


def _overlap(name: str, tower: str) -> bool:
    """Whether an entry of a device map concerns the tower."""
    return not name or not tower or name == tower or name.startswith(f"{tower}.") or tower.startswith(f"{name}.")


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
