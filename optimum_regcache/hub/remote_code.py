"""The few lines of code in a checkpoint's folder that let ``trust_remote_code=True`` stand for ``import optimum_regcache``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import transformers

from optimum_regcache.config.files import write_json

SHIM = Path(__file__).with_name("modeling_regcache.py")
_MAPPINGS = {
    "AutoModel": transformers.MODEL_MAPPING,
    "AutoModelForImageClassification": transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "AutoModelForZeroShotImageClassification": transformers.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    "AutoModelForObjectDetection": transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING,
    "AutoModelForUniversalSegmentation": transformers.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    "AutoModelForImageTextToText": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoBackbone": transformers.MODEL_FOR_BACKBONE_MAPPING,
}


def auto_map(config: Any) -> dict[str, str]:
    """What ``config.json`` says about remote code: Auto class -> class in the file."""
    found: dict[str, str] = {}
    for auto, mapping in _MAPPINGS.items():
        native: Any = cast("Any", mapping).get(type(config), None)
        if isinstance(native, type):
            found[auto] = f"{SHIM.stem}.{native.__name__}"
    return found


def add_remote_code(folder: Path, config: Any) -> None:
    """Copy the file into ``folder``, and name its classes in ``config.json`` there.

    Args:
        folder: holds a saved model.
        config: of the model.
    """
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**stored, "auto_map": auto_map(config)})
    shutil.copyfile(SHIM, folder / SHIM.name)


def prepare_auto_map(model: Any) -> None:
    """Before `save_pretrained`: a model that was opened through the file brings it along, and no other model names it."""
    known: dict[str, Any] = getattr(model.config, "auto_map", None) or {}
    ours = {auto for auto, place in known.items() if str(place).split("--")[-1].startswith(f"{SHIM.stem}.")}
    if not ours:
        return
    kept = {auto: place for auto, place in known.items() if auto not in ours}
    if type(model).__module__.endswith(f".{SHIM.stem}"):
        current = auto_map(model.config)
        kept |= current
        for auto, place in current.items():
            if place == f"{SHIM.stem}.{type(model).__name__}":
                model.register_for_auto_class(auto)  # the file is copied: early releases do not ask for it themselves
    model.config.auto_map = kept
    if not kept:
        del model.config.auto_map
