"""What a quantization method is, and what the steps of one fit share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import check_types
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.sites import Site
from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.layers.install import config_sites, site_activations
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.registers.replay import Recorded, capture_inputs, walk_blocks


@dataclass
class PipelineState:
    """State of one run of the pipeline.

    Attributes:
        config: what the result is made of; once the modules are replaced, steps may change nothing of it but tau.
        methods: all methods of the pipeline.
        original: the caller's float model; nothing writes into it.
        model: float copy with registers and deletion installed; rewrites change it, later steps read it.
        batches: calibration images.
        training: what methods that train learn from: the calibration images, and those that ranked configurations where the
            caller has some.
        quantized: the quantized copy, once the modules are replaced.
        input_qparams: module name -> (scale, zero_point) that a step fixed before calibration.
        measured: method name -> what it found, JSON-compatible.
        progress: show progress bars.
        work_dir: where steps that take minutes keep what they have finished; nowhere if None.
    """

    config: RegCacheConfig
    methods: Sequence[Method]
    original: PreTrainedModel
    model: PreTrainedModel
    batches: Sequence[Batch]
    quantized: PreTrainedModel | None = None
    input_qparams: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    progress: bool = True
    work_dir: Path | None = None
    training: Sequence[Batch] = ()

    def __post_init__(self) -> None:
        self.training = self.training or self.batches

    @property
    def tower(self) -> Tower:
        """Vision tower of the float model."""
        return find_tower(self.model)

    @property
    def result(self) -> PreTrainedModel:
        """The quantized model.

        Raises:
            RuntimeError: the modules are not replaced yet.
        """
        if self.quantized is None:
            raise RuntimeError("The modules are replaced after the rewrites; this step came too early.")
        return self.quantized

    def walk(self, model: nn.Module, description: str | None) -> Iterator[tuple[Recorded, Group]]:
        """The groups of ``model`` (the float or the quantized one) in the order in which they run, each with the inputs of its
        block in the model as it is by then, so that a loop may change one group after the other.

        Args:
            model: walked over.
            description: of the progress bar; no bar if None.
        """
        groups, blocks = linear_groups(model, self.config), len(find_tower(model).blocks)
        shown = description is not None and self.progress
        for known in bar(walk_blocks(model, self.batches), description or "", total=blocks, shown=shown):
            yield from ((known, group) for group in groups if group.block == known.block)

    def inputs(self, model: nn.Module, group: Group, known: Recorded, limit: int) -> torch.Tensor:
        """What ``group`` reads in ``model``, at most ``limit`` tokens: float32 [tokens, in]."""
        name = group.names[0]
        return capture_inputs(model, [name], self.batches, known, limit)[name]

    def norm_of(self, group: Group) -> int | None:
        """Number of the LayerNorm that feeds ``group``, if all that read it are quantized in the same group; else None."""
        if group.role not in ("norm1", "norm2"):
            return None
        number = int(group.role == "norm2")
        return number if len(group.names) == len(self.tower.norm_consumers(group.block, number)) else None

    def float_linear(self, name: str) -> nn.Linear:
        """A layer of the float model."""
        return self.model.get_submodule(name)  # type: ignore[return-value]

    def quant_linear(self, name: str) -> QuantLinear:
        """The same layer, quantized."""
        return self.result.get_submodule(name)  # type: ignore[return-value]


@dataclass(frozen=True)
class Group:
    """Quantized linear layers that read the same tensor: query, key and value, or one layer.

    Attributes:
        block: 0-based block.
        role: `Site.role`.
        names: module names.
    """

    block: int
    role: str
    names: tuple[str, ...]


def linear_groups(model: nn.Module, config: RegCacheConfig) -> list[Group]:
    """The groups of the blocks, in the order in which they run."""
    sites = [site for site in config_sites(model, config) if site.block is not None]
    order = {"norm1": 0, "attention": 1, "norm2": 2, "activation": 3}
    found: dict[tuple[int, int, int], list[Site]] = {}
    for site in sites:  # layers whose input has other bits read another quantized tensor
        bits = site_activations(config, site).bits
        found.setdefault((int(site.block or 0), order[site.role], bits), []).append(site)
    return [Group(key[0], found[key][0].role, tuple(s.name for s in found[key])) for key in sorted(found)]


@dataclass(frozen=True)
class Method:
    """A quantization method; its fields are its parameters. One file, one subclass, one line in the registry.

    A method takes part in the stages of `optimum_regcache.methods.pipeline` whose function it overrides.

    Attributes:
        name: in configs, recipes and on the command line.
        paper: what it implements.
        provides: what only one method of a pipeline may decide: ``input scales``, ``weight codes``, or "" for neither.
        cache_effect: what it does to stored registers.
        excludes: name of another method -> why the two make no sense together.
        finds: (part, field) of the config that it fills in from the images.
        needs_images: it looks at calibration images.
        needs_static: it fits something to stored activation scales, so dynamic ones cannot be used.
        trains: it takes minutes, so that a search judges registers and deletion without it, and may learn from the images
            that ranked them.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    provides: ClassVar[str] = ""
    cache_effect: ClassVar[str] = "none"
    excludes: ClassVar[dict[str, str]] = {}
    finds: ClassVar[tuple[tuple[str, str], ...]] = ()
    needs_images: ClassVar[bool] = True
    needs_static: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, JSON-compatible."""
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        """Parameters that have no effect under ``config``, each with the reason."""
        del config
        return {}

    # stages, in the order in which they run

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        """What the method asks of the config; needs no data."""
        return config

    def select(self, fit: PipelineState) -> None:
        """Choose layers or units by looking at the float model; may change ``fit.config``."""

    def rewrite(self, fit: PipelineState) -> None:
        """Function-preserving changes of the float model and its registers that need no statistics."""

    def smooth(self, fit: PipelineState) -> None:
        """Function-preserving changes that are fitted to activations."""

    def scales(self, fit: PipelineState) -> None:
        """Choose scales of weights and activations of the quantized model."""

    def round(self, fit: PipelineState) -> None:
        """Choose weight codes."""

    def noise(self, fit: PipelineState) -> None:
        """Add offsets to inputs."""

    def correct(self, fit: PipelineState) -> None:
        """Correct biases."""

    def tune(self, fit: PipelineState) -> None:
        """Train what stays float, through the quantized model."""
