"""Checks shared by the configuration dataclasses. Every refusal names the field, what was expected and what came."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_Part = TypeVar("_Part")
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether ``value`` is a dict, as JSON and YAML hold them."""
    return isinstance(value, dict)


def plain(value: Any) -> Any:
    """What JSON and YAML hold in place of ``value``: a list for a tuple."""
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value


def one_of(owner: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    require(value in allowed, f"{owner}.{name} must be one of {', '.join(allowed)}; got {value!r:.80}.")


def build_part(cls: type[_Part], values: _Part | dict[str, Any] | None, owner: str) -> _Part:
    """Build the dataclass ``cls`` from a mapping, naming every key it does not know.

    Raises:
        ValueError: an unknown key, with the keys that exist.
        TypeError: ``values`` is neither a mapping nor a ``cls``.
    """
    if values is None:
        return cls()
    if isinstance(values, cls):
        return values
    if not is_mapping(values):
        raise TypeError(f"{owner} must be a mapping or a {cls.__name__}, got {type(values).__name__}.")
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known, key=str)
    require(
        not unknown,
        f"Unknown key{'s' if len(unknown) > 1 else ''} in {owner}: {', '.join(map(str, unknown))}. "
        f"Known keys: {', '.join(sorted(known))}.",
    )
    return cls(**values)


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_types(part: Any, owner: str) -> None:
    """Compare the fields of a frozen dataclass with their annotations; lists become tuples.

    Knows int, float, str, bool, an optional of these, tuples of one of them, and one of them or a tuple of it.

    Raises:
        TypeError: a field of another type.
    """
    hints = get_type_hints(cast("type[Any]", type(part)))
    for name in (f.name for f in fields(part)):
        value, hint = getattr(part, name), hints[name]
        choices: tuple[Any, ...] = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
        lists = next((c for c in choices if get_origin(c) is tuple), None)
        if lists is not None and not isinstance(value, (list, tuple)):
            good, expected = _is(value, choices[0]), f"{_NAMES[choices[0]]}, or a list of such"
        elif get_origin(hint) is tuple or lists is not None:
            kind = get_args(lists or hint)[0]
            items = cast("list[Any]", value) if isinstance(value, (list, tuple)) else None
            good = items is not None and all(_is(v, kind) for v in items)
            expected = f"a list, each {_NAMES[kind]}"
            if good:
                object.__setattr__(part, name, tuple(items or ()))
        else:
            kind = choices[0] if choices else hint
            good = _is(value, kind) or (bool(choices) and value is None)
            expected = _NAMES[kind] + (" or null" if choices else "")
        if not good:
            raise TypeError(f"{owner}.{name} must be {expected}, got {value!r:.80}.")


def check_bits(owner: str, bits: object, sixteen: bool = False) -> None:
    """Raise ``ValueError`` unless ``bits`` is an integer from 2 to 8, or 16 where ``sixteen`` allows it."""
    good = isinstance(bits, int) and (2 <= bits <= 8 or (sixteen and bits == 16))
    require(good, f"{owner}.bits must be an integer from 2 to 8{' or 16' if sixteen else ''}, got {bits!r:.80}.")
