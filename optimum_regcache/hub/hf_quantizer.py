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

from optimum_regcache.config import QUANT_METHOD, RegCacheConfig
from optimum_regcache.config.effects import require_effect
from optimum_regcache.encoders.compat import accept_bare_names, loaded_key_names, mark_quantized
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.versions import TESTED_TRANSFORMERS, check_environment, requirement
from optimum_regcache.hub.dequantize import dequantize_modules
from optimum_regcache.hub.structure import check_complete, install_structure, validate_positions
from optimum_regcache.layers.install import quantize_modules
from optimum_regcache.registers import prepare_tower, set_deletion

_OWN_STATE = (
    "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "input_negative_scale", "input_offset",
    "register_key", "register_value", "rotation", "scale", "zero_point",
)  # fmt: skip


class RegCacheHfQuantizer(HfQuantizer):
    """Rebuilds the quantized module tree before the weights are loaded and checks it afterwards.

    A float model is quantized after its weights are loaded, if its config needs no images: dynamic activations, no registers
    to be searched or mined, no methods.
    """

    requires_calibration = True
    quantization_config: RegCacheConfig
    pre_quantized: bool
    _shapes: dict[str, torch.Size] = {}  # noqa: RUF012 (replaced, never changed)

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
        quantize_modules(model, self.quantization_config, empty=True)
        install_structure(model, self.quantization_config)
        accept_bare_names(model, find_tower(model).name)
        _check_files(_checkpoint_files(model, kwargs), model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            _check_shapes(model, self._shapes)
        else:
            validate_positions(model, self.quantization_config)
            prepare_tower(model)
            quantize_modules(model, self.quantization_config)
            set_deletion(model, self.quantization_config.deletion)
        check_complete(model)
        model.requires_grad_(False)
        _share_with_vision_config(model, self.quantization_config)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """A float model of the same class; see `optimum_regcache.hub.dequantize`."""
        dequantize_modules(model, self.quantization_config, dtype or model.dtype)
        vision_config = getattr(model.config, "vision_config", None)
        if vision_config is not None and hasattr(vision_config, "quantization_config"):
            del vision_config.quantization_config
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

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
    """The safetensors files that are about to be loaded; empty where the weights come from elsewhere.

    Args:
        model: that is being loaded.
        given: keyword arguments of the hook. transformers 5.4 to 5.24 pass ``checkpoint_files``; a release that does not is
            no reason to skip the check, so the checkpoint's own folder is looked up then.

    Raises:
        ValueError: the files cannot be found, so that damage could not be noticed.
    """
    if "checkpoint_files" in given:
        return [Path(f) for f in given["checkpoint_files"] or () if str(f).endswith(".safetensors")]
    folder = Path(str(getattr(model.config, "_name_or_path", "") or ""))
    found = sorted(folder.glob("*.safetensors")) if folder.name and folder.is_dir() else []
    if not found:
        raise ValueError(
            "The checkpoint cannot be checked for missing tensors: this release of transformers does not say which files it "
            "loads. Download the checkpoint and give from_pretrained the folder, or install a tested release: "
            f'pip install "{requirement("transformers")}" (tested: {" to ".join(TESTED_TRANSFORMERS)}).'
        )
    return found


def _check_files(paths: list[Path], model: Any) -> None:
    """Compare the names in the checkpoint with those that the config promises, after transformers' own renaming.

    Transformers would only warn about a missing tensor and initialise it at random.

    Raises:
        ValueError: a tensor of the encoder is missing, or one of ours is stored that the config does not describe.
    """
    from safetensors import safe_open

    if not paths:
        return
    names: list[str] = []
    for path in paths:
        with cast("Any", safe_open(path, framework="pt")) as handle:
            names += list(handle.keys())
    stored, expected = loaded_key_names(model, names), set(model.state_dict())
    modules = dict(model.named_modules())
    for kind in _OWN_STATE:
        wanted = {n for n in expected if n.rpartition(".")[2] == kind}
        missing = sorted(wanted - stored)
        extra = sorted(
            n
            for n in stored - wanted
            if n.endswith(f".{kind}") and (n.rpartition(".")[0] in modules or ".products." in n)
        )
        if missing or extra:
            found = sum(n.rpartition(".")[2] == kind for n in names)
            example = f"{missing[0]} is missing" if missing else f"{extra[0]} is not described"
            raise ValueError(
                f"The checkpoint holds {found} '{kind}' tensors, its quantization config needs {len(wanted)} (for example "
                f"{example}). The model would be wrong. Download it again, or quantize the model again."
            )
    tower = find_tower(model)
    prefix = f"{tower.name}." if tower.name else ""
    optional = tuple(f"{prefix}{part}." for part in ("pooler", "head"))  # a head that the checkpoint never had
    missing = sorted(n for n in expected - stored if n.startswith(prefix) and not n.startswith(optional))
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ValueError(
            f"The checkpoint is incomplete: {', '.join(missing[:8])}{more} missing. Download it again, or quantize the model "
            "again."
        )


def _check_shapes(model: Any, shapes: dict[str, torch.Size]) -> None:
    """Most releases of transformers load a tensor of any shape into a quantized model.

    Raises:
        ValueError: a tensor has not the shape that the config promises.
    """
    bad = [(name, t.shape) for name, t in model.state_dict().items() if name in shapes and t.shape != shapes[name]]
    if bad:
        name, found = bad[0]
        raise ValueError(
            f"The checkpoint is damaged or belongs to another config: {', '.join(n for n, _ in bad[:8])}"
            f"{f' and {len(bad) - 8} more' if len(bad) > 8 else ''} of another shape ({name}: expected "
            f"{list(shapes[name])}, got {list(found)}). Download it again, or quantize the model again."
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
