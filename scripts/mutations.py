"""Mutated checkpoints: what a bad disk, a half download, a careless edit or a mix-up makes of one. All seeded.

`mutate` writes the mutant of a number; `judge` opens it and says what came out. A mutant that opens without an error and gives
other outputs than the original is SILENT: the one outcome that must not exist.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
OUTCOMES = ("identical", "named error", "legitimate", "unhelpful error", "silent wrong")
OTHER_DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int8, torch.bool)


@dataclass
class Mutant:
    """A checkpoint being changed.

    Attributes:
        folder: holds it.
        state: its tensors.
        metadata: of its safetensors file.
        config: ``config.json``.
        rng: draws whatever is random.
        stranger: folder of an intact checkpoint of the same kind with other values.
    """

    folder: Path
    state: State
    metadata: dict[str, str]
    config: dict[str, Any]
    rng: random.Random
    stranger: Path

    def name(self, part: str = "") -> str:
        """A random tensor whose name holds ``part`` (any tensor if there is none such)."""
        return self.rng.choice(sorted(n for n in self.state if part in n) or sorted(self.state))

    def save(self) -> None:
        """As one safetensors file."""
        save_file(self.state, self.folder / "model.safetensors", metadata=self.metadata)


KINDS = (
    "weight_scale", "input_scale", "zero_point", "register_", "rotation", "weight", "bias", "norm", "embed", "head", "text",
    "logit_scale", "", "",
)  # fmt: skip


def _any(m: Mutant) -> str:
    return m.name(m.rng.choice(KINDS))


def flip(m: Mutant) -> str:
    """One bit of one tensor."""
    name = _any(m)
    flat = m.state[name].contiguous().clone().reshape(-1).view(torch.uint8)
    place = m.rng.randrange(len(flat))
    flat[place] ^= 1 << m.rng.randrange(8)
    m.state[name] = flat.view(m.state[name].dtype).reshape(m.state[name].shape)
    return f"bit flipped in {name}"


def drop(m: Mutant) -> str:
    name = _any(m)
    del m.state[name]
    return f"{name} dropped"


def rename(m: Mutant) -> str:
    name = _any(m)
    m.state[name + "_"] = m.state.pop(name)
    return f"{name} renamed"


def cast_one(m: Mutant) -> str:
    name, dtype = _any(m), m.rng.choice(OTHER_DTYPES)
    m.state[name] = m.state[name].to(dtype)
    return f"{name} cast to {dtype}"


def cast_all(m: Mutant) -> str:
    dtype = m.rng.choice((torch.float16, torch.bfloat16))
    m.state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in m.state.items()}
    return f"all floats cast to {dtype}"


def swap(m: Mutant) -> str:
    first = _any(m)
    same = [n for n in m.state if n != first and m.state[n].shape == m.state[first].shape]
    if not same:
        return flip(m)
    second = m.rng.choice(sorted(same))
    m.state[first], m.state[second] = m.state[second], m.state[first]
    return f"{first} and {second} swapped"


def reshape(m: Mutant) -> str:
    name = _any(m)
    tensor = m.state[name]
    m.state[name] = m.rng.choice(
        (tensor[None], torch.cat((tensor.reshape(-1), tensor.reshape(-1))), tensor.reshape(-1)[:1])
    )
    return f"{name} reshaped from {list(tensor.shape)} to {list(m.state[name].shape)}"


def overwrite(m: Mutant) -> str:
    """One tensor full of one value."""
    name = _any(m)
    tensor = m.state[name]
    floats = (0.0, -1.0, 1e30, float("nan"), float("inf"))
    value: Any = m.rng.choice(floats) if tensor.is_floating_point() else m.rng.choice((0, -1, 100000, -2147483648))
    m.state[name] = torch.full_like(tensor, min(value, 100) if tensor.dtype == torch.int8 else value)
    return f"{name} = {value}"


def foreign(m: Mutant) -> str:
    """One tensor of another checkpoint."""
    name = _any(m)
    m.state[name] = load_file(m.stranger / "model.safetensors")[name]
    return f"{name} of another checkpoint"


def foreign_file(m: Mutant) -> str:
    m.state = load_file(m.stranger / "model.safetensors")
    with safe_open(m.stranger / "model.safetensors", framework="pt") as handle:
        m.metadata = handle.metadata()
    m.config["quantization_config"] = {**m.config["quantization_config"]}
    return "the weights of another checkpoint, with their fingerprint"


def foreign_config(m: Mutant) -> str:
    m.config = json.loads((m.stranger / "config.json").read_text())
    return "the config of another checkpoint"


def no_fingerprint(m: Mutant) -> str:
    """As version 0.1.0 wrote it, and one of the other mutations on top that can be noticed without a fingerprint."""
    m.metadata = {"format": "pt"}
    return "no fingerprint; " + m.rng.choice((drop, rename, cast_one, cast_all, reshape, lose_key))(m)


def edit_config(m: Mutant) -> str:
    parts = [k for k, v in m.config["quantization_config"].items() if isinstance(v, dict) and v]
    part = m.rng.choice(sorted(parts))
    field = m.rng.choice(sorted(m.config["quantization_config"][part]))
    before = m.config["quantization_config"][part][field]
    value = _other(before, m.rng)
    m.config["quantization_config"][part][field] = value
    return f"quantization_config.{part}.{field} {before!r} -> {value!r}"


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, 10**6, str(value), None))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, float("1e30"), str(value), None))
    if isinstance(value, str):
        return rng.choice(("", "nothing", value.upper(), 3, None))
    if isinstance(value, list):
        return rng.choice(([*value, 0], value[:-1], [99], "x", None))
    return rng.choice((0, 1, "x"))


def lose_key(m: Mutant) -> str:
    config = m.config["quantization_config"]
    part = m.rng.choice(sorted(k for k in config if k not in ("quant_method", "version")))
    if isinstance(config[part], dict) and config[part] and m.rng.random() < 0.7:
        field = m.rng.choice(sorted(config[part]))
        del config[part][field]
        return f"quantization_config without {part}.{field}"
    del config[part]
    return f"quantization_config without {part}"


def pickled(m: Mutant) -> str:
    """PyTorch's own format, whole or with something missing."""
    text = m.rng.choice((drop, rename, cast_one, reshape, lambda _: "unchanged"))(m)
    torch.save(m.state, m.folder / "pytorch_model.bin")
    (m.folder / "model.safetensors").unlink()
    m.state = {}
    return f"pytorch_model.bin, {text}"


def truncated(m: Mutant) -> str:
    m.save()
    content = (m.folder / "model.safetensors").read_bytes()
    size = m.rng.randrange(len(content))
    (m.folder / "model.safetensors").write_bytes(content[:size])
    m.state = {}
    return f"file cut to {size} of {len(content)} bytes"


def garbled(m: Mutant) -> str:
    """One byte of the file, wherever it is."""
    m.save()
    content = bytearray((m.folder / "model.safetensors").read_bytes())
    place = m.rng.choice((m.rng.randrange(len(content)), m.rng.randrange(min(len(content), 4000))))
    content[place] ^= 1 << m.rng.randrange(8)
    (m.folder / "model.safetensors").write_bytes(bytes(content))
    m.state = {}
    return f"byte {place} of the file changed"


def not_weights(m: Mutant) -> str:
    text = m.rng.choice(
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"<!DOCTYPE html><html></html>",
            b"",
            b"{}",
        )
    )
    (m.folder / "model.safetensors").write_bytes(text)
    m.state = {}
    return f"a file of {text[:20]!r} in place of the weights"


MUTATIONS: tuple[Callable[[Mutant], str], ...] = (
    flip, drop, rename, cast_one, cast_all, swap, reshape, overwrite, foreign, foreign_file, foreign_config, no_fingerprint,
    edit_config, lose_key, pickled, truncated, garbled, not_weights,
)  # fmt: skip


def mutate(intact: Path, stranger: Path, folder: Path, number: int) -> str:
    """Write mutant ``number`` of a checkpoint into an empty ``folder``.

    Returns:
        What was done.
    """
    shutil.copytree(intact, folder, dirs_exist_ok=True)
    with safe_open(intact / "model.safetensors", framework="pt") as handle:
        metadata = handle.metadata()
    config = json.loads((intact / "config.json").read_text())
    mutant = Mutant(folder, load_file(intact / "model.safetensors"), metadata, config, random.Random(number), stranger)
    text = MUTATIONS[number % len(MUTATIONS)](mutant)
    if mutant.state:
        mutant.save()
    (folder / "config.json").write_text(json.dumps(mutant.config))
    return text


def judge(
    open_model: Callable[[Path], Any], run: Callable[[Any], torch.Tensor], folder: Path, text: str, intact: torch.Tensor
) -> tuple[str, str]:
    """Open a mutant.

    Args:
        open_model: opens a checkpoint.
        run: its output on fixed inputs.
        folder: the mutant.
        text: what `mutate` said.
        intact: output of the original.

    Returns:
        (one of `OUTCOMES`, details).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = run(open_model(folder))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            return ("named error" if helpful(error) else "unhelpful error"), f"{text}: {message[:300]}"
    if output.shape == intact.shape and torch.equal(output, intact):
        return "identical", text
    return ("legitimate" if legitimate(text) else "silent wrong"), text


OURS = (
    "Download it again",
    "quantize the model again",
    "Upgrade",
    "Use ",
    "must be",
    "Unknown key",
    "the encoder has blocks",
)
THEIRS = ("deserializing header", "Error(s) in loading", "is not a valid JSON file")


def helpful(error: Exception) -> bool:
    """Whether a message tells people what to do: one of ours, or of the library that owns the file format."""
    expected = isinstance(error, (ValueError, TypeError, OSError, RuntimeError))
    return (expected and any(words in str(error) for words in (*OURS, *THEIRS))) or type(
        error
    ).__name__ == "SafetensorError"


def legitimate(text: str) -> bool:
    """Mutants that are other models in good order."""
    return text.startswith("the weights of another checkpoint, with their fingerprint")
