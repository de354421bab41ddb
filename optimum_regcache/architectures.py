"""One table row per encoder family: the only file that knows module names.

To add a family, add a row to :data:`FAMILIES` (and a subclass in ``models/`` if it should be constructible by name).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn


@dataclass(frozen=True)
class EncoderFamily:
    """Where things are in one family. Names of block parts are relative to a block, others to the tower.

    Attributes:
        name: family name shown to users.
        towers: class names of the vision towers.
        blocks: the list of blocks.
        attention, query, key, value, out: the attention module, and its four projections relative to it.
        scaling, dropout: attribute names on the attention module.
        mlp_in, mlp_out: MLP projections, those that exist ("fc1"/"fc2", SwiGLU names).
        embeddings, patch_embedding: embedding module and the patch projection in it.
        head: linear layers of the pooling head on the tower.
        norms: the LayerNorm before attention and the one before the MLP.
        layer_scales: the LayerScale behind each of the two branches; empty if the family has none.
        cls_tokens: CLS and distillation tokens before the patches; trained registers come from the config.
        always_mask: deletion must keep the token count (the pooling head takes the input's padding mask).
    """

    name: str
    towers: tuple[str, ...]
    blocks: str
    attention: str
    out: str
    scaling: str
    dropout: str
    embeddings: str = "embeddings"
    patch_embedding: str = "embeddings.patch_embedding"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    mlp_in: tuple[str, ...] = ("mlp.fc1",)
    mlp_out: tuple[str, ...] = ("mlp.fc2",)
    head: tuple[str, ...] = ()
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    layer_scales: tuple[str, ...] = ()
    cls_tokens: int = 1
    always_mask: bool = False

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS plus trained registers: never deleted, never a register candidate."""
        return self.cls_tokens + int(getattr(config, "num_register_tokens", 0) or 0)


_MAP_HEAD = ("head.mlp.fc1", "head.mlp.fc2")
_DINO_MLP_IN = ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj", "mlp.weights_in")
_DINO_SCALES = ("layer_scale1", "layer_scale2")
_VIT_NORMS = ("layernorm_before", "layernorm_after")
_DINO_MLP_OUT = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out")

FAMILIES: tuple[EncoderFamily, ...] = (
    EncoderFamily(
        "CLIP", ("CLIPVisionModel",), "encoder.layers", "self_attn", "out_proj", "scale", "dropout"
    ),
    EncoderFamily(
        "SigLIP", ("SiglipVisionModel",), "encoder.layers", "self_attn", "out_proj", "scale", "dropout",
        head=_MAP_HEAD, cls_tokens=0,
    ),
    EncoderFamily(
        "SigLIP2", ("Siglip2VisionModel",), "encoder.layers", "self_attn", "out_proj", "scale", "dropout",
        head=_MAP_HEAD, cls_tokens=0, always_mask=True,
    ),
    EncoderFamily(
        "DINOv2", ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", "attention", "o_proj", "scaling",
        "attention_dropout", patch_embedding="embeddings.patch_embeddings.projection",
        mlp_in=_DINO_MLP_IN, mlp_out=_DINO_MLP_OUT, norms=("norm1", "norm2"), layer_scales=_DINO_SCALES,
    ),
    EncoderFamily(
        "DINOv2 with registers", ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), "encoder.layer",
        "attention", "o_proj", "scaling", "attention_dropout",
        patch_embedding="embeddings.patch_embeddings.projection", mlp_in=_DINO_MLP_IN, mlp_out=_DINO_MLP_OUT,
        norms=("norm1", "norm2"), layer_scales=_DINO_SCALES,
    ),
    EncoderFamily(
        "ViT", ("ViTModel",), "layers", "attention", "o_proj", "scaling", "attention_dropout",
        patch_embedding="embeddings.patch_embeddings.projection", head=("pooler.dense",),
        norms=_VIT_NORMS,
    ),
    EncoderFamily(
        "DeiT", ("DeiTModel",), "layers", "attention", "o_proj", "scaling", "attention_dropout",
        patch_embedding="embeddings.patch_embeddings.projection", head=("pooler.dense",),
        norms=_VIT_NORMS, cls_tokens=2,
    ),
)  # fmt: skip

# linear heads on the model around the tower
OUTER_HEADS = ("visual_projection", "classifier", "cls_classifier", "distillation_classifier")


def _get(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


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
    def is_backbone(self) -> bool:
        """Whether every hidden state is reshaped to a grid (``*Backbone`` classes)."""
        return any(c.__name__.endswith("Backbone") for c in type(self.module).__mro__)

    def attention(self, block: int) -> nn.Module:
        """Attention module of a block."""
        return self.blocks[block].get_submodule(self.family.attention)

    def block_linears(self, block: int) -> dict[str, nn.Module]:
        """Linear layers of a block by their name relative to the block, in module order."""
        return {name: m for name, m in self.blocks[block].named_modules() if hasattr(m, "in_features")}

    def norm(self, block: int, number: int) -> nn.LayerNorm:
        """The LayerNorm before attention (0) or before the MLP (1)."""
        return self.blocks[block].get_submodule(self.family.norms[number])  # type: ignore[return-value]

    def norm_consumers(self, block: int, number: int) -> list[nn.Linear]:
        """The linear layers that read the output of :meth:`norm`, all of them: query, key, value, or the MLP inputs."""
        f = self.family
        if number == 0:
            return [self.attention(block).get_submodule(name) for name in (f.query, f.key, f.value)]  # type: ignore[misc]
        found = [_get(self.blocks[block], path) for path in f.mlp_in]
        return [m for m in found if m is not None]  # type: ignore[misc]

    def mlp_out_name(self, block: int) -> str:
        """Name, relative to the block, of the MLP output projection (fc2)."""
        for path in self.family.mlp_out:
            if _get(self.blocks[block], path) is not None:
                return path
        raise ValueError(f"Block {block} of {type(self.module).__name__} has none of {', '.join(self.family.mlp_out)}.")

    def mlp_out(self, block: int) -> nn.Module:
        """MLP output projection (fc2) of a block."""
        return self.blocks[block].get_submodule(self.mlp_out_name(block))

    def block_name(self, block: int) -> str:
        """Name of a block relative to the tower."""
        return f"{self.family.blocks}.{block}"


def supported_encoders() -> str:
    """Readable list for messages."""
    return "; ".join(f"{f.name} ({', '.join(f.towers)})" for f in FAMILIES)


def find_tower(model: nn.Module) -> Tower:
    """The vision tower of ``model``, which may be the tower itself or contain it (`CLIPModel`, `...ForImageClassification`).

    Raises:
        ValueError: no supported tower; the message lists the supported encoders.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if not cls.__module__.startswith("transformers."):
                continue
            for family in FAMILIES:
                if cls.__name__ in family.towers:
                    return Tower(module, name, family)
    raise ValueError(
        f"{type(model).__name__} contains no supported vision encoder. Supported: {supported_encoders()}. "
        "They may also be the vision tower of a larger model."
    )


@dataclass(frozen=True)
class Site:
    """A module that is to be quantized.

    Attributes:
        parent: name of its parent within the model ("" is the model itself).
        attribute: its name in the parent.
        kind: ``linear`` or ``patch_embedding``.
        block: 0-based block, None outside the blocks.
        role: what feeds it: ``norm1`` (query, key, value), ``attention`` (output projection), ``norm2`` (MLP input),
            ``activation`` (MLP output projection), ``other``.
        path: its name within the encoder; patterns match this.
    """

    parent: str
    attribute: str
    kind: str
    block: int | None
    role: str = "other"
    path: str = ""

    @property
    def name(self) -> str:
        """Full name within the model."""
        return f"{self.parent}.{self.attribute}" if self.parent else self.attribute


def quantization_sites(
    model: nn.Module, *, patch_embedding: bool = False, head: bool = False, ignore: tuple[str, ...] = ()
) -> list[Site]:
    """Modules to quantize, in model order; see `ModulesConfig` for the arguments.

    Raises:
        ValueError: an ``ignore`` pattern that matches nothing.
    """
    tower = find_tower(model)
    candidates: list[tuple[str, str, int | None]] = []  # (name relative to tower or model, kind, block)
    outer: list[str] = []
    if patch_embedding:
        candidates.append((tower.family.patch_embedding, "patch_embedding", None))
    for index in range(len(tower.blocks)):
        prefix = tower.block_name(index)
        candidates += [(f"{prefix}.{name}", "linear", index) for name in tower.block_linears(index)]
    if head:
        candidates += [(path, "linear", None) for path in tower.family.head if _get(tower.module, path) is not None]
        outer = [path for path in OUTER_HEADS if tower.name and hasattr(_get(model, path), "in_features")]
    unused = [
        p
        for p in ignore
        if not any(matches(c[0], p) for c in candidates)
        and not any(fnmatch(o, p) for o in (OUTER_HEADS if head else ()))
    ]
    if unused:
        raise ValueError(
            f"modules.ignore pattern{'s' if len(unused) > 1 else ''} {', '.join(unused)} match no module that would be "
            f"quantized. Examples of names: {', '.join(c[0] for c in candidates[-4:])}."
        )
    kept = [c for c in candidates if not any(matches(c[0], p) for p in ignore)]
    sites = []
    for path, kind, block in kept:
        full = f"{tower.name}.{path}" if tower.name else path
        parent, _, attribute = full.rpartition(".")
        sites.append(
            Site(parent, attribute, kind, block, "other" if block is None else _role(tower.family, path), path)
        )
    sites += [Site("", path, "linear", None, path=path) for path in outer if not any(fnmatch(path, p) for p in ignore)]
    return sites


def _role(family: EncoderFamily, path: str) -> str:
    """The `Site.role` of a linear layer of a block."""
    attention = f"{family.attention}."
    roles = {attention + family.out: "attention"}
    roles |= dict.fromkeys((attention + n for n in (family.query, family.key, family.value)), "norm1")
    roles |= dict.fromkeys(family.mlp_out, "activation")
    return next((role for name, role in roles.items() if path.endswith(f".{name}")), "norm2")


def matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}")


def iter_children(model: nn.Module, sites: list[Site]) -> Iterator[tuple[Site, nn.Module]]:
    """The modules behind ``sites``."""
    for site in sites:
        yield site, model.get_submodule(site.name)
