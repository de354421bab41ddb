"""`RegCacheConfig`: what a quantized checkpoint is made of. Plain data, no tensors.

The parts are frozen dataclasses that refuse unknown keys, impossible combinations and out-of-range values. A config
travels as ``quantization_config`` inside ``config.json`` and, with the search settings, as a YAML recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from typing import Any, Generic, TypeVar, cast, overload

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_regcache.config.migrate import complete_part, migrate_method, migrate_part
from optimum_regcache.config.parts import (
    ActivationsConfig,
    AttentionConfig,
    DeletionConfig,
    ModulesConfig,
    RegistersConfig,
    RewritesConfig,
    WeightsConfig,
)
from optimum_regcache.config.validation import build_part, is_mapping, plain, require

QUANT_METHOD = "regcache"
FORMAT_VERSION = 1

_T = TypeVar("_T")


class _Part(Generic[_T]):
    """A field of `RegCacheConfig` that takes a part or a mapping, and gives the part."""

    def __init__(self, cls: type[_T]) -> None:
        self.cls, self.name = cls, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> None: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...
    def __get__(self, instance: object | None, owner: type) -> _T | None:
        return None if instance is None else instance.__dict__[self.name]  # None: the default of the dataclass field

    def __set__(self, instance: object, value: _T | dict[str, Any] | None) -> None:
        instance.__dict__[self.name] = build_part(self.cls, migrate_part(self.name, value), self.name)


class _Methods:
    """The field ``methods``: takes names and mappings, gives mappings with ``name``."""

    @overload
    def __get__(self, instance: None, owner: type) -> None: ...
    @overload
    def __get__(self, instance: object, owner: type) -> tuple[dict[str, Any], ...]: ...
    def __get__(self, instance: object | None, owner: type) -> tuple[dict[str, Any], ...] | None:
        return None if instance is None else instance.__dict__["methods"]

    def __set__(self, instance: object, value: Sequence[str | dict[str, Any]] | None) -> None:
        instance.__dict__["methods"] = _method_list(value)


@dataclass(kw_only=True)
class RegCacheConfig(QuantizationConfigMixin):
    """Configuration of a RegCache-quantized encoder (arXiv 2510.04547), stored as ``quantization_config``.

    It does not change; :meth:`replace` makes another one. Whether every setting has an effect is checked when a model is
    quantized, not here: a stored config opens whatever it holds beside what matters.

    Args:
        weights, activations, attention, registers, deletion, modules, rewrites: the parts, as dataclasses or mappings.
        methods: the quantization methods that fit the model, each a mapping with ``name`` and the method's parameters (a bare
            name stands for its defaults); empty for round to nearest with the observers of the parts. The order does not
            matter: `optimum_regcache.methods` sorts them into the pipeline.
        version: format version of the checkpoint.
        quant_method: always ``"regcache"``.

    Raises:
        ValueError: unknown keys, out-of-range values, impossible combinations, a newer format version.

    Example:
        >>> RegCacheConfig.from_preset("w4a4").weights.bits
        4
    """

    weights: _Part[WeightsConfig] = _Part(WeightsConfig)
    activations: _Part[ActivationsConfig] = _Part(ActivationsConfig)
    attention: _Part[AttentionConfig] = _Part(AttentionConfig)
    registers: _Part[RegistersConfig] = _Part(RegistersConfig)
    deletion: _Part[DeletionConfig] = _Part(DeletionConfig)
    modules: _Part[ModulesConfig] = _Part(ModulesConfig)
    rewrites: _Part[RewritesConfig] = _Part(RewritesConfig)
    methods: _Methods = _Methods()
    version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]

    def __new__(cls, *args: Any, **values: Any) -> RegCacheConfig:
        del args
        unknown = sorted(str(name) for name in values if name not in cls.__dataclass_fields__)
        require(
            not unknown,
            f"Unknown key{'s' if len(unknown) > 1 else ''} in RegCacheConfig: {', '.join(unknown)}. "
            f"Known keys: {', '.join(sorted((*PARTS, 'methods')))}.",
        )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        require(
            self.quant_method == QUANT_METHOD,
            f"This is a RegCacheConfig (quant_method 'regcache'); got quant_method {self.quant_method!r}.",
        )
        require(
            self.version == FORMAT_VERSION,
            f"RegCacheConfig format version {self.version} is not supported (this release reads version "
            f"{FORMAT_VERSION}). Upgrade optimum-regcache, or quantize the model again.",
        )
        require(
            not (self.registers.mode == "search" and self.deletion.active),
            "deletion.count is found by the search when registers.mode='search'. Set registers.mode to 'fixed' or 'none' "
            "to use your own deletion.",
        )
        a, deletion = self.activations, self.deletion
        plain = a.mode == "static" and a.symmetric and a.outlier_tokens == "clip" and a.post_activation == "uniform"
        require(
            plain or deletion.action != "per_token" or not (deletion.active or self.registers.mode == "search"),
            "deletion.action='per_token' gives a few tokens a scale of their own beside the static one. It needs "
            "activations.mode='static', symmetric=true, outlier_tokens='clip' and post_activation='uniform'; with other "
            "activations use deletion.action='delete'.",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name not in self.__dataclass_fields__:
            raise FrozenInstanceError(
                f"A RegCacheConfig does not change, {name} cannot be set. Make another one with "
                f"config.replace({name}=...)."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"A RegCacheConfig does not change, {name} cannot be deleted.")

    @classmethod
    def from_preset(cls, name: str) -> RegCacheConfig:
        """One of `PRESETS`: ``w8a8``, ``w6a6``, ``w4a4`` (static per tensor), ``w8a8-dynamic`` (per token).

        Raises:
            ValueError: unknown preset.
        """
        require(name in PRESETS, f"Unknown preset {name!r}; expected one of {', '.join(PRESETS)}.")
        return cls(**PRESETS[name])

    def replace(self, **parts: Any) -> RegCacheConfig:
        """A copy with some parts changed; a mapping changes only the given fields of a part.

        Example:
            >>> RegCacheConfig().replace(activations={"observer": "mse"}).activations.bits
            8
        """
        current = {f.name: getattr(self, f.name) for f in fields(self)}
        unknown = sorted(set(parts) - set(current))
        require(not unknown, f"Unknown part{'s' if len(unknown) > 1 else ''} of RegCacheConfig: {', '.join(unknown)}.")
        for name, value in parts.items():
            if value is None:
                continue
            if is_mapping(value) and name in PARTS:
                known = {f.name for f in fields(current[name])}
                bad = sorted(set(value) - known)
                require(not bad, f"Unknown key in {name}: {', '.join(bad)}. Known keys: {', '.join(sorted(known))}.")
                value = replace(current[name], **value)
            current[name] = value
        return RegCacheConfig(**current)

    @property
    def label(self) -> str:
        """Short name such as ``w8a8`` or ``w8a8-dynamic``."""
        suffix = "" if self.activations.mode == "static" else "-dynamic"
        return f"w{self.weights.bits}a{self.activations.bits}{suffix}"

    @property
    def protocol(self) -> str:
        """Which matrix products are quantized; numbers under different protocols are not comparable (docs/method.md 1)."""
        return "linear layers and attention products" if self.attention.quantize else "linear layers"

    @property
    def simulated_reason(self) -> str | None:
        """Why the result is no plain set of scales and weights, so that (a part of) it is simulated in float everywhere;
        None if every quantized product can run in integers."""
        reasons: list[str] = []
        if self.attention.quantize:
            reasons.append("the attention products are simulated")
        if self.activations.post_activation == "twin":
            reasons.append("twin quantizers after GELU have no integer kernel")
        if self.modules.mixed_precision:
            reasons.append("16-bit inputs have no integer kernel")
        return "; ".join(reasons) or None

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON-compatible mapping; ``RegCacheConfig(**d)`` restores the config."""
        data: dict[str, Any] = {"quant_method": self.quant_method, "version": self.version}
        for name in PARTS:
            part = asdict(getattr(self, name))
            data[name] = {k: plain(v) for k, v in part.items()}
        data["methods"] = [dict(m) for m in self.methods]
        return data

    def get(self, name: str, default: Any = None) -> Any:
        """Like that of a mapping: transformers reads the config of an opened model this way when it is passed on
        (``from_pretrained(folder, config=model.config)``)."""
        return getattr(self, name, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a stored config; unlike the constructor it takes no default for what is missing.

        Raises:
            ValueError: naming the keys that are missing.
        """
        complete: dict[str, Any] = cls().to_dict()
        missing: list[str] = []
        for name in (*PARTS, "methods"):
            stored = complete_part(name, config_dict.get(name))
            if stored is None:
                missing.append(name)
            elif is_mapping(stored):
                missing += [f"{name}.{field}" for field in complete[name] if field not in stored]
        require(
            not missing,
            f"The stored quantization_config lacks {', '.join(missing)}. A default would make it another model: write what the "
            "model was quantized with, or download or quantize the model again.",
        )
        read: Any = super().from_dict  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return read(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything, defaults included: a checkpoint must not change meaning when a default does."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


PARTS: dict[str, type[Any]] = {
    name: cast("_Part[Any]", f).cls for name, f in vars(RegCacheConfig).items() if isinstance(f, _Part)
}


def _method_list(methods: Any) -> tuple[dict[str, Any], ...]:
    """Each method as a mapping with ``name``."""
    if not isinstance(methods, (str, dict, list, tuple, type(None))):
        raise TypeError(f"methods must be a list of names or of mappings with 'name', got {methods!r:.80}.")
    entries = cast("Iterable[Any]", [methods] if isinstance(methods, (str, dict)) else methods or ())
    found: list[dict[str, Any]] = []
    for entry in entries:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not is_mapping(entry) or not isinstance(entry.get("name"), str):
            raise TypeError(f"methods must be a list of names or of mappings with 'name', got {entry!r:.80}.")
        found.append({**entry, "name": migrate_method(entry["name"])})
    return tuple(found)


PRESETS: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": {"bits": 8}, "activations": {"bits": 8}},
    "w6a6": {"weights": {"bits": 6}, "activations": {"bits": 6}},
    "w4a4": {"weights": {"bits": 4}, "activations": {"bits": 4}},
    "w8a8-dynamic": {
        "weights": {"bits": 8},
        "activations": {"bits": 8, "mode": "dynamic", "granularity": "per_token"},
    },
}
