"""What a checkpoint must be before its tensors are believed: complete, of the right dtypes and shapes, and as it was saved.

transformers initialises a missing tensor at random and takes any dtype into a quantized model, at most with a warning.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import logging

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.encoders.compat import leave_out, loaded_names, tied_names
from optimum_regcache.encoders.tower import find_tower, named_modules
from optimum_regcache.hub.stored import AGAIN, Fingerprint, StoredTensor, file_digests, read_files

State = dict[str, torch.Tensor]

logger = logging.get_logger(__name__)

_OWN = (
    "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "input_negative_scale", "input_offset",
    "register_key", "register_value", "rotation", "scale", "zero_point", "lower",
)  # fmt: skip
_FLOAT32 = ("weight_scale", "input_scale", "input_negative_scale", "input_offset", "scale", "lower")
_accept: ContextVar[bool] = ContextVar("accept_edits", default=False)


@contextmanager
def accept_edits() -> Generator[None, None, None]:
    """Inside the ``with`` block checkpoints open although their tensors or their quantization config were changed after they
    were saved. `save_pretrained` of the opened model makes the change official.

    What would be wrong in any case (missing tensors, other dtypes, values out of range) is still refused.

    Example:
        >>> with accept_edits():  # doctest: +SKIP
        ...     model = AutoModel.from_pretrained("edited")
        >>> model.save_pretrained("edited")  # doctest: +SKIP
    """
    token = _accept.set(True)
    try:
        yield
    finally:
        _accept.reset(token)


def check_files(model: Any, config: RegCacheConfig, paths: list[Path]) -> bool:
    """Compare what is about to be loaded with what the config promises and with what was saved.

    Args:
        model: with empty quantized modules.
        config: read from ``config.json``.
        paths: checkpoint files, safetensors or PyTorch's own.

    Returns:
        Whether every tensor is known to be as it was saved.

    Raises:
        ValueError: naming what is missing, not described, of another dtype or shape, or changed.
    """
    stored, saved = read_files(paths)
    targets, state = loaded_names(model, list(stored)), model.state_dict()
    _check_names(model, state, stored, targets)
    _check_forms(model, state, stored, targets)
    if not _is_saved_class(model):
        _leave_out_other_parts(model, state, targets)
    return saved is not None and check_saved(config, stored, saved)


def check_saved(config: RegCacheConfig, stored: dict[str, StoredTensor], saved: Fingerprint) -> bool:
    """Whether everything is as it was saved; False if an edit is accepted.

    Raises:
        ValueError: naming the settings and tensors that were changed.
    """
    found = file_digests(stored)
    changed = sorted(name for name, mark in found.items() if saved.tensors.get(name) != mark)
    kept = set(found.values())  # of tied tensors one is stored
    changed += sorted(name for name, mark in saved.tensors.items() if name not in stored and mark not in kept)
    settings = _changed_settings(saved.config, config)
    if not changed and not settings:
        return True
    if _accept.get():
        return False
    what = [*settings, *([f"tensors {listing(changed)}"] if changed else [])]
    raise ValueError(
        f"The checkpoint was changed after it was saved: {'; '.join(what)}. {AGAIN} If the change is yours, open it inside "
        "`with optimum_regcache.accept_edits():` and save it again."
    )


def listing(names: list[str]) -> str:
    """The first eight, and how many there are besides."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_names(model: Any, state: State, stored: dict[str, StoredTensor], targets: dict[str, list[str]]) -> None:
    found = {target for names in targets.values() for target in names}
    lost, more = sorted(state.keys() - found), sorted(found - state.keys())
    modules = {name for name, _ in named_modules(model)} if more else set[str]()
    for kind in _OWN if lost or more else ():
        wanted = {n for n in state if n.rpartition(".")[2] == kind}
        missing = [n for n in lost if n in wanted]
        extra = [n for n in more if n.endswith(f".{kind}") and (n.rpartition(".")[0] in modules or ".products." in n)]
        if missing or extra:
            count = sum(n.rpartition(".")[2] == kind for n in stored)
            example = f"{missing[0]} is missing" if missing else f"{extra[0]} is not described"
            raise ValueError(
                f"The checkpoint holds {count} '{kind}' tensors, its quantization config needs {len(wanted)} (for example "
                f"{example}). The model would be wrong. {_advice(model, missing + extra)}"
            )
    missing = sorted(missing_names(model, state, found)) if lost else []
    if missing:
        raise ValueError(f"The checkpoint is incomplete: {listing(missing)} missing. {_advice(model, missing)}")


def _advice(model: Any, names: list[str]) -> str:
    """What to do about tensors that are missing or too many."""
    tower = find_tower(model)
    every = all(any(f".{block}.mlp." in name for name in names) for block in range(len(tower.blocks)))
    if not (every and tower.family.name == "DINOv2" and tower.is_gated(0)):
        return AGAIN
    return (
        "It seems to be written with another release of transformers, which stores the SwiGLU layers of DINOv2 in another form "
        "(those up to 5.20 and 5.24 differ): open it with that release, or quantize the model again with this one."
    )


def missing_names(model: Any, state: State, found: set[str]) -> set[str]:
    """Tensors that ``model`` needs and the checkpoint lacks.

    A part beside the encoder that the checkpoint has nothing of (a new classifier, or a pooling layer that was never saved) is
    no damage when a class opens what another one saved; transformers says that it is new.
    """
    tower = find_tower(model)
    prefix = f"{tower.name}." if tower.name else ""
    missing = state.keys() - found - tied_names(model)
    if _is_saved_class(model):
        return missing
    parts = {_part(name, prefix) for name in found}
    blocks = f"{prefix}{tower.family.blocks}."
    return {n for n in missing if n.startswith(blocks) or _part(n, prefix) in parts}


def _leave_out_other_parts(model: Any, state: State, targets: dict[str, list[str]]) -> None:
    """A part of a larger model is opened: what belongs to the others is no surprise, and one line says so."""
    other = [name for name, found in targets.items() if not state.keys() & set(found)]
    prefix = f"{find_tower(model).name}." if find_tower(model).name else ""
    if other:
        leave_out(model, [*other, *(target for name in other for target in targets[name])])
        parts = sorted({_part(name, prefix) for name in other})
        logger.info(f"{type(model).__name__} has no {listing(parts)}; these parts of the checkpoint stay behind.")


def _is_saved_class(model: Any) -> bool:
    """Whether the checkpoint was saved from this class, and so holds everything that it has."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or [])


def _part(name: str, prefix: str) -> str:
    """The part of a model that a tensor belongs to: a child of the encoder, or of the model around it."""
    inner = prefix if name.startswith(prefix) else ""
    return inner + name[len(inner) :].split(".")[0]


def _check_forms(model: Any, state: State, stored: dict[str, StoredTensor], targets: dict[str, list[str]]) -> None:
    """Dtypes and shapes, as far as one stored tensor becomes one of the model."""
    tower = find_tower(model)
    prefix = f"{tower.name}." if tower.name else ""
    whole = _is_saved_class(model)
    dtypes: list[str] = []
    shapes: list[str] = []
    for name, tensor in stored.items():
        for target in targets[name]:
            if target not in state:
                continue
            expected, kind = state[target], target.rpartition(".")[2]
            exact = not expected.is_floating_point() or (kind in _FLOAT32 and _is_ours(model, target))
            wanted = torch.float32 if exact and expected.is_floating_point() else expected.dtype
            good = tensor.dtype == wanted if exact else tensor.dtype.is_floating_point
            if not good:
                dtypes.append(f"{name} is {_word(tensor.dtype)}, not {_word(wanted) if exact else 'a float'}")
            ours = whole or target.startswith(prefix) or exact
            if len(targets[name]) == 1 and ours and tensor.shape != tuple(expected.shape):
                shapes.append(f"{name} is {list(tensor.shape)}, not {list(expected.shape)}")
    if dtypes:
        raise ValueError(f"The checkpoint was converted to other dtypes: {listing(dtypes)}. {AGAIN}")
    if shapes:
        raise ValueError(f"The checkpoint is damaged or belongs to another config: {listing(shapes)}. {AGAIN}")


def _is_ours(model: Any, name: str) -> bool:
    return type(model.get_submodule(name.rpartition(".")[0])).__module__.startswith("optimum_regcache.")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _changed_settings(saved: dict[str, Any], config: RegCacheConfig) -> list[str]:
    before, now = RegCacheConfig(**saved).to_dict(), config.to_dict()
    found: list[str] = []
    for part, values in now.items():
        if isinstance(values, dict):
            fields = cast("dict[str, Any]", values)
            found += [
                f"{part}.{k} was {before[part][k]!r}, is {v!r}" for k, v in fields.items() if before[part][k] != v
            ]
        elif before[part] != values:
            found.append(f"{part} was {before[part]!r}, is {values!r}")
    return found
