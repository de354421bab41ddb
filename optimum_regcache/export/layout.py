"""What lies in an exported directory: networks or weights, config and processor, the recipe, and ``export.json``."""

from __future__ import annotations

import copy
import json
import shutil
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_regcache.config.files import write_json

INFO = "export.json"
NETWORKS = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}  # unless export.json names another
COMPRESSED_TENSORS = "compressed-tensors"
_EXTRAS = {"openvino": "openvino", "compressed_tensors": "compressed-tensors"}  # of the others: onnx


def need(package: str) -> Any:
    """The imported ``package``.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    extra = _EXTRAS.get(package, "onnx")
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for exported encoders and could not be imported ({error}). "
            f'Install it: pip install "optimum-regcache[{extra}]"'
        ) from error


def require_float32(model: PreTrainedModel) -> None:
    """Refuse a model of other numbers.

    Raises:
        ValueError: with what to do.
    """
    if not all(p.dtype == torch.float32 for p in model.parameters()):
        raise ValueError(
            f"The export is made of float32, {type(model).__name__} holds {model.dtype}. Open it again with "
            "from_pretrained(..., dtype=torch.float32); transformers does not cast quantized models in memory."
        )


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages``."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def is_exported(directory: str | Path) -> bool:
    """Whether ``directory`` holds a network that an export wrote, and no weights that transformers opens."""
    return (Path(directory) / INFO).is_file() and not any(Path(directory).glob("*.safetensors"))


def read_info(directory: str | Path) -> dict[str, Any]:
    """``export.json`` of an exported directory.

    Raises:
        ValueError: it has none, or is of an unknown format.
    """
    path = Path(directory) / INFO
    if not path.is_file():
        raise ValueError(
            f"{directory} is no exported encoder: it has no {INFO}. Write one with `optimum-cli regcache export`."
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Export the model again.") from None
    if not isinstance(info, dict):
        raise ValueError(f"{path} must hold a mapping. Export the model again.")
    if info.get("format") not in (*NETWORKS, COMPRESSED_TENSORS):
        raise ValueError(f"{path}: unknown format {info.get('format')!r}; expected {' or '.join(NETWORKS)}.")
    return info


def write_info(directory: Path, info: dict[str, Any]) -> None:
    """Write ``export.json``."""
    write_json(directory / INFO, info)


def float_config(config: Any) -> Any:
    """A copy of a model's config that says nothing of this package: that of the float architecture."""
    new = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(new, name):
            delattr(new, name)
    return new


def copy_beside(source: Path, target: Path) -> None:
    """Copy what lies beside a network (config, processor, recipe) from one directory to another."""
    networks = (".onnx", ".data", ".bin", ".xml")
    for path in source.iterdir():
        if path.is_file() and path.suffix not in networks and path.name != INFO:
            shutil.copy2(path, target / path.name)
