"""A vision tower found in a model, with its row of the family table."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from optimum_regcache.encoders.families import FAMILIES, EncoderFamily, submodule, supported_encoders


@dataclass(frozen=True)
class PatchSpan:
    """Which tokens of a sequence are patches: all but the first ``lead`` and the last ``trail``. The only place that tells."""

    lead: int
    trail: int = 0

    @property
    def positions(self) -> slice:
        """Of the patches, in a sequence of any length."""
        return slice(self.lead, -self.trail if self.trail else None)

    @property
    def protected(self) -> int:
        """Tokens that are no patches."""
        return self.lead + self.trail

    def count(self, tokens: int) -> int:
        """Patches among ``tokens``."""
        return tokens - self.protected

    def mask(self, tokens: int, device: torch.device) -> torch.Tensor:
        """bool [tokens], true at patches."""
        position = torch.arange(tokens, device=device)
        return (position >= self.lead) & (position < tokens - self.trail)


@dataclass(frozen=True)
class Tower:
    """A vision tower found in a model, with its table row.

    Attributes:
        module: the tower (for example a `CLIPVisionModel`).
        name: its name within the model, "" if it is the model.
        family: the table row.
    """

    module: nn.Module
    name: str
    family: EncoderFamily

    @property
    def config(self) -> Any:
        """The tower's transformers config."""
        return self.module.config

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.module.get_submodule(self.family.blocks).children())

    @property
    def num_prefix_tokens(self) -> int:
        """Leading tokens that are not patches."""
        return self.family.num_prefix_tokens(self.config)

    @property
    def num_trailing_tokens(self) -> int:
        """Tokens behind the patches (detection tokens), which the heads read."""
        return self.family.num_trailing_tokens(self.config)

    @property
    def num_queries(self) -> int:
        """Tokens that join before all others at block :attr:`first_with_queries`; the heads read them and the patches."""
        return self.family.num_queries(self.config)

    @property
    def first_with_queries(self) -> int:
        """The first block that computes on queries; the number of blocks where there are none."""
        depth = len(self.blocks)
        return depth - int(self.config.num_blocks) if self.num_queries else depth

    def patches_at(self, block: int) -> PatchSpan:
        """Which tokens are patches in a block, without a test-time register: `visiting.patch_span` knows of that."""
        joined = self.num_queries if block >= self.first_with_queries else 0
        return PatchSpan(self.num_prefix_tokens + joined, self.num_trailing_tokens)

    @property
    def patches(self) -> PatchSpan:
        """Which tokens of its output are patches."""
        return self.patches_at(len(self.blocks))

    @property
    def keeps_places(self) -> bool:
        """Whether tokens must keep their places from block to block: deletion masks them then."""
        return self.family.always_mask or self.is_backbone or self.family.adds_positions(self.config)

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """Pixels (h, w) of a patch, None if the config has none."""
        patch: Any = getattr(self.config, "patch_size", None)
        return (patch, patch) if isinstance(patch, int) else patch and (int(patch[0]), int(patch[1]))

    @property
    def is_backbone(self) -> bool:
        """Whether every hidden state is reshaped to a grid (``*Backbone`` classes)."""
        return any(c.__name__.endswith("Backbone") for c in type(self.module).__mro__)

    def attention(self, block: int) -> nn.Module:
        """Attention module of a block."""
        return self.blocks[block].get_submodule(self.family.attention)

    @property
    def num_heads(self) -> int:
        """Attention heads of every block."""
        config = self.config
        return int(config.num_attention_heads if hasattr(config, "num_attention_heads") else config.num_heads)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        projection: Any = self.projections(0)[0]
        return projection.out_features // (self.num_heads * (3 if self.family.fused_projections else 1))

    def projections(self, block: int) -> list[nn.Module]:
        """Query, key and value projection of a block, or the one layer that computes all three."""
        attention = self.attention(block)
        return [attention.get_submodule(name) for name in self.family.projections]

    def key_value(self, block: int) -> tuple[tuple[nn.Module, slice], tuple[nn.Module, slice]]:
        """For key and for value: the layer whose output they are, and their columns in it."""
        found = self.projections(block)
        if len(found) == 3:
            key = self.attention(block).get_submodule(self.family.key_norm) if self.family.key_norm else found[1]
            return (key, slice(None)), (found[2], slice(None))
        width = self.num_heads * self.head_dim
        return (found[0], slice(width, 2 * width)), (found[0], slice(2 * width, None))

    def is_gated(self, block: int) -> bool:
        """Whether the MLP multiplies two branches (SwiGLU)."""
        first: Any = self.norm_consumers(block, 1)
        last: Any = self.mlp_out(block)
        return len(first) > 1 or first[0].out_features != last.in_features

    def block_linears(self, block: int) -> dict[str, nn.Module]:
        """Linear layers of a block by their name relative to the block, in module order."""
        return {name: m for name, m in named_modules(self.blocks[block]) if hasattr(m, "in_features")}

    def layer_scales(self, block: int) -> list[nn.Parameter]:
        """LayerScale [D] behind attention and behind the MLP; empty if there is none."""
        return [self.blocks[block].get_parameter(name) for name in self.family.layer_scales]

    def norm(self, block: int, number: int) -> nn.LayerNorm:
        """The LayerNorm before attention (0) or before the MLP (1)."""
        return self.blocks[block].get_submodule(self.family.norms[number])  # type: ignore[return-value]

    def norm_consumers(self, block: int, number: int) -> list[nn.Linear]:
        """The linear layers that read the output of :meth:`norm`, all of them: query, key, value, or the MLP inputs."""
        if number == 0:
            return self.projections(block)  # type: ignore[return-value]
        found = [submodule(self.blocks[block], path) for path in self.family.mlp_in]
        return [m for m in found if m is not None]  # type: ignore[misc]

    def mlp_out_name(self, block: int) -> str:
        """Name, relative to the block, of the MLP output projection (fc2)."""
        for path in self.family.mlp_out:
            if submodule(self.blocks[block], path) is not None:
                return path
        raise ValueError(f"Block {block} of {type(self.module).__name__} has none of {', '.join(self.family.mlp_out)}.")

    def mlp_out(self, block: int) -> nn.Module:
        """MLP output projection (fc2) of a block."""
        return self.blocks[block].get_submodule(self.mlp_out_name(block))

    def block_name(self, block: int) -> str:
        """Name of a block relative to the tower."""
        return f"{self.family.blocks}.{block}"

    def block_of(self, name: str) -> int:
        """The block that holds the module called ``name`` in the model around the tower; the last one for what is behind."""
        inside = name.removeprefix(f"{self.name}.") if self.name else name
        number = inside.removeprefix(f"{self.family.blocks}.").partition(".")[0]
        return int(number) if inside.startswith(f"{self.family.blocks}.") else len(self.blocks) - 1


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, which torch gives no type."""
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def find_tower(model: nn.Module) -> Tower:
    """The vision tower of ``model``, which may be the tower itself or contain it (`CLIPModel`, `...ForImageClassification`).

    Raises:
        ValueError: no supported tower; the message lists the supported encoders.
    """
    for name, module in named_modules(model):
        for cls in type(module).__mro__:
            if not cls.__module__.startswith("transformers."):
                continue
            for family in FAMILIES:
                if cls.__name__ in family.towers and family.fits(module):
                    return Tower(module, name, family)
    raise ValueError(
        f"{type(model).__name__} contains no supported vision encoder. Supported: {supported_encoders()}. "
        "They may also be the vision tower of a larger model."
    )


def takes_mask(block: nn.Module) -> bool:
    """Whether the forward of a block has an argument ``attention_mask``."""
    return "attention_mask" in inspect.signature(block.forward).parameters


def reads_patches(model: nn.Module, tower: Tower) -> bool:
    """Whether ``model`` is more than its tower and reads the tower's patch tokens: all but classifiers, models that compare a
    pooled image with a text, and detectors that read the tokens behind the patches."""
    return (
        bool(tower.name)
        and not tower.num_trailing_tokens
        and [name for name, _ in model.named_children()] != [tower.name]
        and not (has_classifier(model) or hasattr(model, "get_text_features"))
    )


def has_boxes(model: nn.Module) -> bool:
    """Whether the model itself gives boxes of objects and their classes."""
    return type(model).__name__.endswith("ForObjectDetection")


def has_classifier(model: nn.Module) -> bool:
    """Whether the model itself predicts classes; an exported encoder says so (``classifies``)."""
    names = ("ForImageClassification", "ForImageClassificationWithTeacher")
    return bool(getattr(model, "classifies", False)) or type(model).__name__.endswith(names)
