"""`RegCacheConfig`: what a quantized checkpoint is made of. Plain data, no tensors.

The parts are frozen dataclasses that refuse unknown keys, impossible combinations and out-of-range values. A config
travels as ``quantization_config`` inside ``config.json`` and, with the search settings, as a YAML recipe.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_regcache.files import write_text
from optimum_regcache.validation import build_part, check_bits, check_types, one_of, require

QUANT_METHOD = "regcache"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class WeightsConfig:
    """Weight quantization of the linear layers; codes are symmetric (methods: s = max|w| / (2^(b-1) - 1)).

    Attributes:
        bits: 2 to 8.
        granularity: ``per_channel`` (one scale per output row, shape [out]) or ``per_tensor`` (shape [1]).
        observer: ``minmax`` or ``mse`` (scale that minimises the squared weight error).
    """

    bits: int = 8
    granularity: str = "per_channel"
    observer: str = "minmax"

    def __post_init__(self) -> None:
        check_bits("weights", self.bits)
        check_types(self, "weights")
        one_of("weights", "granularity", self.granularity, ("per_channel", "per_tensor"))
        one_of("weights", "observer", self.observer, ("minmax", "mse"))


@dataclass(frozen=True)
class ActivationsConfig:
    """Quantization of the inputs of the linear layers.

    The presets are static, per tensor and symmetric with the absolute maximum: the protocol of the paper's "naive" rows.

    Attributes:
        bits: 2 to 8.
        mode: ``static`` (scale stored after calibration) or ``dynamic`` (computed for each input).
        granularity: ``per_tensor``; ``per_token`` (one scale per row, shape [..., 1]) needs ``mode="dynamic"``.
        symmetric: zero point fixed at 0, otherwise free.
        observer: static only: ``minmax``, ``moving_average``, ``percentile`` or ``mse``.
        percentile: upper percentile in percent kept by ``observer="percentile"``.
        momentum: weight of the past in ``observer="moving_average"``.
    """

    bits: int = 8
    mode: str = "static"
    granularity: str = "per_tensor"
    symmetric: bool = True
    observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_bits("activations", self.bits)
        check_types(self, "activations")
        one_of("activations", "mode", self.mode, ("static", "dynamic"))
        one_of("activations", "granularity", self.granularity, ("per_tensor", "per_token"))
        one_of("activations", "observer", self.observer, ("minmax", "moving_average", "percentile", "mse"))
        require(
            not (self.mode == "static" and self.granularity == "per_token"),
            "activations.granularity='per_token' needs activations.mode='dynamic': a stored scale cannot know how many "
            "tokens an input has. Use mode='dynamic', or granularity='per_tensor'.",
        )
        require(50.0 < self.percentile <= 100.0, f"activations.percentile must be in (50, 100], got {self.percentile}.")
        require(0.0 <= self.momentum < 1.0, f"activations.momentum must be in [0, 1), got {self.momentum}.")


@dataclass(frozen=True)
class RegistersConfig:
    """The prefixed register cache (RegCache A.6, A.7).

    Attributes:
        mode: ``search`` (to be found by `RegCacheQuantizer.fit`), ``fixed`` (positions below are final), ``none``
            (not "off", which YAML reads as false).
        blocks: 0-based blocks whose attention gets the prefix, ascending; ``fixed`` needs at least one.
        num_registers: distinct rows of K and V per block.
        num_copies: tau; copies of a row are one row with logit bias ln(tau) (A.7-1, exact), so it need not be an integer.
        kv_mode: ``in_context`` (K, V averaged over the images the tokens came from) or ``isolated`` (token run alone).
    """

    mode: str = "search"
    blocks: tuple[int, ...] = ()
    num_registers: int = 1
    num_copies: float = 1.0
    kv_mode: str = "in_context"

    def __post_init__(self) -> None:
        check_types(self, "registers")
        one_of("registers", "mode", self.mode, ("search", "fixed", "none"))
        one_of("registers", "kv_mode", self.kv_mode, ("in_context", "isolated"))
        require(
            list(self.blocks) == sorted(set(self.blocks)) and all(b >= 0 for b in self.blocks),
            f"registers.blocks must be distinct, ascending and >= 0, got {list(self.blocks)}.",
        )
        require(self.num_registers >= 1, f"registers.num_registers must be at least 1, got {self.num_registers}.")
        require(
            0 < self.num_copies < math.inf,
            f"registers.num_copies must be > 0 (its logarithm is the logit bias), got {self.num_copies}. "
            "To use no register set registers.mode='none'.",
        )
        require(
            self.mode != "fixed" or bool(self.blocks),
            "registers.mode='fixed' needs registers.blocks. Give the blocks, or use mode='search' or mode='none'.",
        )
        require(
            self.mode == "fixed" or not self.blocks,
            f"registers.blocks={list(self.blocks)} contradicts registers.mode={self.mode!r}. Use mode='fixed'.",
        )


@dataclass(frozen=True)
class DeletionConfig:
    """Deletion of the outlier tokens that still appear (RegCache A.7, step D).

    Attributes:
        block: 0-based block at whose input tokens are ranked by l_inf norm; None when nothing is deleted.
        count: k~, tokens deleted in each image (``topk``) or at most deleted (``threshold``).
        rule: ``topk``, or ``threshold``: only tokens with norm > ``kappa`` x the image's median norm.
        kappa: ratio for ``threshold``.
        fill: ``neighbour_mean`` puts the deleted positions back after the last block as the mean of their kept
            neighbours, so that the patch grid keeps its shape; ``none`` returns N - count tokens.
    """

    block: int | None = None
    count: int = 0
    rule: str = "topk"
    kappa: float = 5.0
    fill: str = "neighbour_mean"

    def __post_init__(self) -> None:
        check_types(self, "deletion")
        one_of("deletion", "rule", self.rule, ("topk", "threshold"))
        one_of("deletion", "fill", self.fill, ("neighbour_mean", "none"))
        require(self.count >= 0, f"deletion.count must be >= 0, got {self.count}.")
        require(
            self.count == 0 or self.block is not None,
            f"deletion.count={self.count} needs deletion.block, the block at whose input tokens are deleted.",
        )
        require(self.block is None or self.block >= 0, f"deletion.block must be >= 0, got {self.block}.")
        require(self.kappa > 1.0, f"deletion.kappa must be > 1 (a ratio to the median norm), got {self.kappa}.")
        require(
            not (self.rule == "threshold" and self.fill == "none"),
            "deletion.rule='threshold' removes a different number of tokens from each image, so the outputs of a batch "
            "only line up with fill='neighbour_mean'. Use that fill, or rule='topk'.",
        )

    @property
    def active(self) -> bool:
        """Whether any token can be deleted."""
        return self.count > 0


@dataclass(frozen=True)
class ModulesConfig:
    """Which modules are quantized besides the linear layers of the blocks.

    Attributes:
        patch_embedding: quantize the patch embedding too.
        head: quantize projection, classifier and pooling linears too (`nn.MultiheadAttention` of SigLIP's pooling head
            stays float).
        ignore: glob patterns of module names that stay float, matched against the name within the encoder
            (``encoder.layers.11.mlp.fc2``) and against its end (``mlp.fc2``).
    """

    patch_embedding: bool = False
    head: bool = False
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ignore, str):
            raise TypeError(f"modules.ignore must be a list of patterns, got the string {self.ignore!r}.")
        check_types(self, "modules")


@dataclass
class RegCacheConfig(QuantizationConfigMixin):
    """Configuration of a RegCache-quantized encoder (arXiv 2510.04547), stored as ``quantization_config``.

    Args:
        weights, activations, registers, deletion, modules: the parts, as dataclasses or mappings.
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
    registers: RegistersConfig = field(default_factory=RegistersConfig)
    deletion: DeletionConfig = field(default_factory=DeletionConfig)
    modules: ModulesConfig = field(default_factory=ModulesConfig)
    version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]

    def __init__(
        self,
        weights: WeightsConfig | dict | None = None,
        activations: ActivationsConfig | dict | None = None,
        registers: RegistersConfig | dict | None = None,
        deletion: DeletionConfig | dict | None = None,
        modules: ModulesConfig | dict | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        require(
            not unknown,
            f"Unknown key{'s' if len(unknown) > 1 else ''} in RegCacheConfig: {', '.join(sorted(map(str, unknown)))}. "
            "Known keys: activations, deletion, modules, registers, weights.",
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
        self.weights = build_part(WeightsConfig, weights, "weights")
        self.activations = build_part(ActivationsConfig, activations, "activations")
        self.registers = build_part(RegistersConfig, registers, "registers")
        self.deletion = build_part(DeletionConfig, deletion, "deletion")
        self.modules = build_part(ModulesConfig, modules, "modules")
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
            if isinstance(value, dict):
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

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON-compatible mapping; ``RegCacheConfig(**d)`` restores the config."""
        data: dict[str, Any] = {"quant_method": self.quant_method, "version": self.version}
        for name in ("weights", "activations", "registers", "deletion", "modules"):
            part = asdict(getattr(self, name))
            data[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()}
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


PRESETS: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": {"bits": 8}, "activations": {"bits": 8}},
    "w6a6": {"weights": {"bits": 6}, "activations": {"bits": 6}},
    "w4a4": {"weights": {"bits": 4}, "activations": {"bits": 4}},
    "w8a8-dynamic": {
        "weights": {"bits": 8},
        "activations": {"bits": 8, "mode": "dynamic", "granularity": "per_token"},
    },
}
