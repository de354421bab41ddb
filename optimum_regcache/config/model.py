"""`RegCacheConfig`: what a quantized checkpoint is made of. Plain data, no tensors.

The parts are frozen dataclasses that refuse unknown keys, impossible combinations and out-of-range values. A config
travels as ``quantization_config`` inside ``config.json`` and, with the search settings, as a YAML recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_regcache.config.files import write_text
from optimum_regcache.config.parts import (
    ActivationsConfig,
    AttentionConfig,
    DeletionConfig,
    ModulesConfig,
    RegistersConfig,
    RewritesConfig,
    WeightsConfig,
)
from optimum_regcache.config.validation import build_part, require

__all__ = [
    "FORMAT_VERSION",
    "PRESETS",
    "QUANT_METHOD",
    "ActivationsConfig",
    "AttentionConfig",
    "DeletionConfig",
    "ModulesConfig",
    "RegCacheConfig",
    "RegistersConfig",
    "RewritesConfig",
    "WeightsConfig",
]

QUANT_METHOD = "regcache"
FORMAT_VERSION = 1


@dataclass
class RegCacheConfig(QuantizationConfigMixin):
    """Configuration of a RegCache-quantized encoder (arXiv 2510.04547), stored as ``quantization_config``.

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

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    registers: RegistersConfig = field(default_factory=RegistersConfig)
    deletion: DeletionConfig = field(default_factory=DeletionConfig)
    modules: ModulesConfig = field(default_factory=ModulesConfig)
    rewrites: RewritesConfig = field(default_factory=RewritesConfig)
    methods: tuple[dict[str, Any], ...] = ()
    version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]

    def __init__(
        self,
        weights: WeightsConfig | dict | None = None,
        activations: ActivationsConfig | dict | None = None,
        attention: AttentionConfig | dict | None = None,
        registers: RegistersConfig | dict | None = None,
        deletion: DeletionConfig | dict | None = None,
        modules: ModulesConfig | dict | None = None,
        rewrites: RewritesConfig | dict | None = None,
        methods: Sequence[str | dict[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        require(
            not unknown,
            f"Unknown key{'s' if len(unknown) > 1 else ''} in RegCacheConfig: {', '.join(sorted(map(str, unknown)))}. "
            f"Known keys: {', '.join(sorted((*PARTS, 'methods')))}.",
        )
        require(
            quant_method == QUANT_METHOD,
            f"This is a RegCacheConfig (quant_method 'regcache'); got quant_method {quant_method!r}.",
        )
        require(
            version == FORMAT_VERSION,
            f"RegCacheConfig format version {version} is not supported (this release reads version {FORMAT_VERSION}). "
            "Upgrade optimum-regcache, or quantize the model again.",
        )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version
        given = {
            "weights": weights,
            "activations": activations,
            "attention": attention,
            "registers": registers,
            "deletion": deletion,
            "modules": modules,
            "rewrites": rewrites,
        }
        for name, cls in PARTS.items():
            setattr(self, name, build_part(cls, given[name], name))
        self.methods = _method_list(methods)
        require(
            not (self.registers.mode == "search" and self.deletion.active),
            "deletion.count is found by the search when registers.mode='search'. Set registers.mode to 'fixed' or 'none' "
            "to use your own deletion.",
        )

    @classmethod
    def from_preset(cls, name: str) -> RegCacheConfig:
        """One of :data:`PRESETS`: ``w8a8``, ``w6a6``, ``w4a4`` (static per tensor), ``w8a8-dynamic`` (per token).

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
            if isinstance(value, dict) and name in PARTS:
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
        """Which matrix products are quantized; numbers under different protocols are not comparable (methods 0.3)."""
        return "linear layers and attention products" if self.attention.quantize else "linear layers"

    @property
    def simulated_reason(self) -> str | None:
        """Why the result is no plain set of scales and weights, so that (a part of) it is simulated in float everywhere;
        None if every quantized product can run in integers."""
        reasons = []
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
            data[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()}
        data["methods"] = [dict(m) for m in self.methods]
        return data

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything, defaults included: a checkpoint must not change meaning when a default does."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_yaml(self, path: str | Path | None = None) -> str:
        """YAML text; written to ``path`` as well if given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> RegCacheConfig:
        """Read a config written by :meth:`to_yaml`; ``source`` is a file.

        Raises:
            ValueError: not a mapping, or not a valid config.
        """
        data = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        require(isinstance(data, dict), f"{source} does not hold a mapping of RegCacheConfig fields.")
        return cls(**data)


PARTS: dict[str, type] = {
    "weights": WeightsConfig,
    "activations": ActivationsConfig,
    "attention": AttentionConfig,
    "registers": RegistersConfig,
    "deletion": DeletionConfig,
    "modules": ModulesConfig,
    "rewrites": RewritesConfig,
}


def _method_list(methods: Sequence[str | dict[str, Any]] | None) -> tuple[dict[str, Any], ...]:
    """Each method as a mapping with ``name``."""
    if isinstance(methods, (str, dict)):
        methods = [methods]
    found = []
    for entry in methods or ():
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise TypeError(f"methods must be a list of names or of mappings with 'name', got {entry!r}.")
        found.append(dict(entry))
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
