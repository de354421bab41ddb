"""The tensors of a checkpoint as they lie in its files, and the fingerprint that says how they were saved."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.compat import stored_state

FINGERPRINT = "regcache"  # key in the metadata of safetensors files
AGAIN = "Download it again, or quantize the model again."

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint file.

    Attributes:
        dtype: as stored; float8 and others that no checkpoint of ours holds are `torch.uint8`.
        shape: as stored.
        place: file and its range of bytes; None in a pickle.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    place: tuple[Path, int, int] | None = None


@dataclass(frozen=True)
class Fingerprint:
    """What was saved: the quantization config, and a digest of every tensor under its name in the files."""

    config: dict[str, Any]
    tensors: dict[str, str]


def _head(dtype: torch.dtype, shape: Iterable[int]) -> int:
    return xxh3_64_intdigest(f"{str(dtype).removeprefix('torch.')} {list(shape)}".encode())


def content(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in order, uint8 [n], on the CPU; its own memory where that is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:  # a single value may have any stride
        flat = torch.empty(1, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    """XXH3 of dtype, shape and bytes: finds damage, edits and mix-ups, no forgery."""
    return xxh3_64(content(tensor).numpy().data, seed=_head(tensor.dtype, tensor.shape)).hexdigest()


def fingerprint(model: Any, config: RegCacheConfig) -> dict[str, str]:
    """Metadata for the files of a checkpoint.

    Raises:
        ValueError: tensors that another quantizer packed (torchao), which have no bytes of their own.
    """
    state = stored_state(model)
    foreign = [name for name, tensor in state.items() if hasattr(tensor, "__tensor_flatten__")]
    require(
        not foreign,
        f"{len(foreign)} tensors, {foreign[0] if foreign else ''} the first, were quantized by something else and cannot be "
        "stored in a RegCache checkpoint. Save the model before, and apply the other quantizer each time it was opened.",
    )
    tensors = {name: digest(tensor) for name, tensor in state.items()}
    return {FINGERPRINT: json.dumps({"config": config.to_dict(), "tensors": tensors}, sort_keys=True)}


def read_files(paths: list[Path]) -> tuple[dict[str, StoredTensor], Fingerprint | None]:
    """Every tensor by name, and the fingerprint if the files have one.

    Args:
        paths: safetensors files, or PyTorch's own.

    Raises:
        ValueError: a fingerprint that is damaged, or several different ones.
        Exception: whatever safetensors says about a file that is none.
    """
    stored: dict[str, StoredTensor] = {}
    texts: dict[str, Path] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            state = cast("dict[str, torch.Tensor]", torch.load(path, map_location="meta", weights_only=True))
            stored |= {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
            continue
        tensors, metadata = _read_safetensors(path)
        stored |= tensors
        if FINGERPRINT in metadata:
            texts[metadata[FINGERPRINT]] = path
    if len(texts) > 1:
        raise ValueError(f"The files of the checkpoint were saved at different times. {AGAIN}")
    return stored, next((_parse(text, path) for text, path in texts.items()), None)


def _read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    from safetensors import safe_open

    with cast("Any", safe_open(path, framework="pt")) as handle:  # checks the header
        metadata: dict[str, str] = handle.metadata() or {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = _DTYPES.get(entry["dtype"], torch.uint8)
            found[name] = StoredTensor(dtype, tuple(entry["shape"]), (path, begin, end))
    return found, metadata


def _parse(text: str, path: Path) -> Fingerprint:
    try:
        found = json.loads(text)
        return Fingerprint(dict(found["config"]), dict(found["tensors"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The fingerprint in {path.name} is damaged ({error}). {AGAIN}") from None


def file_digests(stored: dict[str, StoredTensor]) -> dict[str, str]:
    """The digests of all tensors that lie in files, name -> digest."""
    maps: dict[Path, memoryview] = {}
    for path in {tensor.place[0] for tensor in stored.values() if tensor.place is not None}:
        with path.open("rb") as file:
            maps[path] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    found: dict[str, str] = {}
    for name, tensor in stored.items():
        if tensor.place is not None:
            path, begin, end = tensor.place
            found[name] = xxh3_64(maps[path][begin:end], seed=_head(tensor.dtype, tensor.shape)).hexdigest()
    return found


def sort_metadata(folder: Path) -> None:
    """Write the metadata of every safetensors file in ``folder`` in alphabetical order, in place: the library uses any
    order, and equal models are to be equal files."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb+") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            if "__metadata__" in header:
                header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
                text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
                if len(text) <= length:  # spaces at the end belong to the format
                    file.seek(8)
                    file.write(text.ljust(length))
