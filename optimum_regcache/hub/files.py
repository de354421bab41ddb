"""What lies in a model's folder is looked at before it is opened: downloads that went wrong, and configs of something else."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, cast

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

_AGAIN = "Download the model again."


def check_files(folder: Path) -> None:
    """Look at config, processor and weights of a model's folder. Reads headers only.

    Raises:
        ValueError: a file that is no config or no weights: a Git LFS pointer, a web page, cut off, empty; or a config whose
            fields are of the wrong kind.
        FileNotFoundError: no config.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: no model was saved there.")
    values = _read_json(config)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    kind, architectures = values.get("model_type"), values.get("architectures")
    if not (isinstance(kind, str) and ("AutoConfig" in (values.get("auto_map") or ()) or _is_known(kind))):
        raise ValueError(f"{config}: model_type {kind!r} is not known to transformers {transformers.__version__}.")
    names = cast("list[Any]", architectures or [])
    if not isinstance(architectures, (list, type(None))) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{config}: architectures must be a list of class names, got {architectures!r}.")
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".index.json"):
            _read_json(path)
        elif path.suffix in (".safetensors", ".bin") and path.is_file():
            _check_weights(path)


def _is_known(model_type: str) -> bool:
    try:
        cast("Any", AutoConfig).for_model(model_type)
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    _refuse_stand_in(path, content[:64])
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). {_AGAIN}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(values).__name__}. {_AGAIN}")
    return cast("dict[str, Any]", values)


def _refuse_stand_in(path: Path, head: bytes) -> None:
    """Raise ``ValueError`` for what a server or git puts in the place of a file."""
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull`, or download it again.")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page. {_AGAIN}")
    if not head:
        raise ValueError(f"{path} is empty. {_AGAIN}")


def _check_weights(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    _refuse_stand_in(path, head)
    if path.suffix == ".bin":
        if head.startswith(b"PK") and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is cut off. {_AGAIN}")
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}). {_AGAIN}") from None
