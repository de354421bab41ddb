"""One table row per encoder family: the only file that knows module names.

To add a family, add a row to :data:`FAMILIES` (and a subclass in ``models/`` if it should be constructible by name).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class EncoderFamily:
    """Where things are in one family. Names of block parts are relative to a block, others to the tower.

    A family whose layout differs between releases of transformers has one row for each layout; the row whose names exist in
    the model at hand is taken.

    Attributes:
        name: family name shown to users.
        towers: class names of the vision towers.
        blocks: the list of blocks.
        attention: the attention module. Registers need nothing but this: they are injected where it calls transformers'
            attention interface (`optimum_regcache.registers.attention`).
        out: output projection of attention, relative to it.
        embeddings, patch_embedding: embedding module and the patch projection in it.
        projections: query, key and value projection relative to the attention module, or the one that computes all three.
        mlp_in, mlp_out: MLP projections, those that exist ("fc1"/"fc2", SwiGLU names).
        head: linear layers of the pooling head on the tower.
        norms: the norm before attention and the one before the MLP.
        layer_scales: the LayerScale parameter behind each of the two branches; empty if the family has none.
        key_norm: norm of the keys of all heads, relative to the attention module, if the family has one (or an Identity).
        cls_tokens: CLS and distillation tokens before the patches; trained registers come from the config.
        trailing: config entry with the number of tokens behind the patches, if the family has some (detection tokens).
        queries: config entry with the number of tokens that join before all others at the last ``num_blocks`` blocks, if the
            family has some.
        always_mask: deletion must keep the token count (the pooling head takes the input's padding mask).
        rotary: query and key of patches are rotated by their position before the attention interface is called.
        packed: the patches of all images of a batch stand in one sequence [N, D], their grids in ``image_grid_thw``.
        padding_mask: the tower's argument for the padding mask, if it takes one.
    """

    name: str
    towers: tuple[str, ...]
    blocks: str
    attention: str
    out: str
    embeddings: str = "embeddings"
    patch_embedding: str = "embeddings.patch_embedding"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp_in: tuple[str, ...] = ("mlp.fc1",)
    mlp_out: tuple[str, ...] = ("mlp.fc2",)
    head: tuple[str, ...] = ()
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    layer_scales: tuple[str, ...] = ()
    key_norm: str = ""
    cls_tokens: int = 1
    trailing: str = ""
    queries: str = ""
    always_mask: bool = False
    rotary: bool = False
    packed: bool = False
    padding_mask: str = "pixel_attention_mask"

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS plus trained registers: never deleted, never a register candidate."""
        return self.cls_tokens + int(getattr(config, "num_register_tokens", 0) or 0)

    def num_trailing_tokens(self, config: Any) -> int:
        """Tokens behind the patches: never deleted, never a register candidate either."""
        return int(getattr(config, self.trailing)) if self.trailing else 0

    def num_queries(self, config: Any) -> int:
        """Tokens that join before all others at a later block."""
        return int(getattr(config, self.queries)) if self.queries else 0

    def adds_positions(self, config: Any) -> bool:
        """Whether the encoder adds position embeddings of all tokens between its blocks."""
        return bool(getattr(config, "use_mid_position_embeddings", False))

    @property
    def fused_projections(self) -> bool:
        """Whether one linear layer computes query, key and value."""
        return len(self.projections) == 1

    def normalizes_keys(self, attention: nn.Module) -> bool:
        """Whether the attention module of a block changes keys after their projection, other than by rotation."""
        return bool(self.key_norm) and not isinstance(attention.get_submodule(self.key_norm), nn.Identity)

    def fits(self, tower: nn.Module) -> bool:
        """Whether the names of this row exist in ``tower``."""
        blocks = submodule(tower, self.blocks)
        first = next(iter(blocks.children()), None) if blocks is not None else None
        if first is None:
            return False
        attention = submodule(first, self.attention)
        names = (*self.projections, self.out)
        return attention is not None and all(submodule(attention, name) is not None for name in names)

    def current_name(self, path: str) -> str:
        """What the newest layout of this family calls the module ``path`` (relative to the tower). Patterns are matched with
        that name, so that a recipe or checkpoint means the same with every release of transformers."""
        newest = self.newest_layout
        if newest is self or not path.startswith(f"{self.blocks}."):
            return path
        number, _, rest = path.removeprefix(f"{self.blocks}.").partition(".")
        here, there = self._block_parts(), newest._block_parts()
        return f"{newest.blocks}.{number}.{dict(zip(here, there, strict=True)).get(rest, rest)}"

    @property
    def newest_layout(self) -> EncoderFamily:
        """The row of this family for the newest release of transformers."""
        return next(row for row in FAMILIES if row.name == self.name)

    def _block_parts(self) -> tuple[str, ...]:
        attention = (f"{self.attention}.{name}" for name in (*self.projections, self.out))
        return (*attention, *self.mlp_in, *self.mlp_out)


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module called ``path`` in ``module``, None if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


_CLIP: dict[str, Any] = {"blocks": "encoder.layers", "attention": "self_attn", "out": "out_proj"}
_MAP_HEAD = ("head.mlp.fc1", "head.mlp.fc2")
_DINO_MLP_IN = ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj", "mlp.weights_in")
_DINO_SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")
_DINO_MLP_OUT = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out")
_DINOV2: dict[str, Any] = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "mlp_in": _DINO_MLP_IN,
    "mlp_out": _DINO_MLP_OUT,
    "norms": ("norm1", "norm2"),
    "layer_scales": _DINO_SCALES,
}
_VIT: dict[str, Any] = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "head": ("pooler.dense",),
    "norms": ("layernorm_before", "layernorm_after"),
}
_OLD_PROJECTIONS = ("attention.query", "attention.key", "attention.value")
_OLD_VIT: dict[str, Any] = {
    **_VIT,
    "projections": _OLD_PROJECTIONS,
    "mlp_in": ("intermediate.dense",),
    "mlp_out": ("output.dense",),
}
_YOLOS: dict[str, Any] = {**_OLD_VIT, "head": ()}
_QWEN: dict[str, Any] = {
    "projections": ("qkv",),
    "embeddings": "patch_embed",
    "patch_embedding": "patch_embed.proj",
    "norms": ("norm1", "norm2"),
    "cls_tokens": 0,
    "rotary": True,
    "packed": True,
}

_CURRENT: tuple[EncoderFamily, ...] = (
    EncoderFamily("CLIP", ("CLIPVisionModel",), **_CLIP),
    EncoderFamily("MetaCLIP 2", ("MetaClip2VisionModel",), **_CLIP),
    EncoderFamily("AltCLIP", ("AltCLIPVisionModel",), **_CLIP),
    EncoderFamily("ChineseCLIP", ("ChineseCLIPVisionModel",), **_CLIP),
    EncoderFamily("SigLIP", ("SiglipVisionModel",), **_CLIP, head=_MAP_HEAD, cls_tokens=0),
    EncoderFamily("SigLIP2", ("Siglip2VisionModel",), **_CLIP, head=_MAP_HEAD, cls_tokens=0, always_mask=True),
    EncoderFamily("Idefics3", ("Idefics3VisionTransformer",), **_CLIP, cls_tokens=0, padding_mask="patch_attention_mask"),
    EncoderFamily("SmolVLM", ("SmolVLMVisionTransformer",), **_CLIP, cls_tokens=0, padding_mask="patch_attention_mask"),
    EncoderFamily(
        "DINOv2", ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", "attention", "o_proj", **_DINOV2
    ),
    EncoderFamily(
        "DINOv2 with registers", ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), "encoder.layer",
        "attention", "o_proj", **_DINOV2,
    ),
    EncoderFamily(
        "DINOv3", ("DINOv3ViTModel", "DINOv3ViTBackbone"), "model.layer", "attention", "o_proj", rotary=True,
        patch_embedding="embeddings.patch_embeddings", mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out=("mlp.down_proj",), norms=("norm1", "norm2"), layer_scales=_DINO_SCALES,
    ),
    EncoderFamily("ViT", ("ViTModel",), "layers", "attention", "o_proj", **_VIT),
    EncoderFamily("DeiT", ("DeiTModel",), "layers", "attention", "o_proj", **_VIT, cls_tokens=2),
    EncoderFamily(
        "YOLOS", ("YolosModel",), "encoder.layer", "attention", "output.dense", **_YOLOS,
        trailing="num_detection_tokens",
    ),
    EncoderFamily(
        "EoMT", ("EomtForUniversalSegmentation",), "layers", "attention", "out_proj", **_DINOV2, queries="num_queries",
    ),
    EncoderFamily(
        "InternVL", ("InternVLVisionModel",), "encoder.layer", "attention", "projection_layer",
        patch_embedding="embeddings.patch_embeddings.projection", norms=_VIT["norms"],
        layer_scales=("lambda_1", "lambda_2"), key_norm="k_norm",
    ),
    EncoderFamily(
        "Qwen2-VL", ("Qwen2VisionTransformerPretrainedModel",), "blocks", "attn", "proj", **_QWEN,
        head=("merger.mlp.0", "merger.mlp.2"),
    ),
    EncoderFamily(
        "Qwen2.5-VL", ("Qwen2_5_VisionTransformerPretrainedModel",), "blocks", "attn", "proj", **_QWEN,
        mlp_in=("mlp.gate_proj", "mlp.up_proj"), mlp_out=("mlp.down_proj",), head=("merger.mlp.0", "merger.mlp.2"),
    ),
    EncoderFamily(
        "Qwen3-VL", ("Qwen3VLVisionModel",), "blocks", "attn", "proj", **_QWEN,
        mlp_in=("mlp.linear_fc1",), mlp_out=("mlp.linear_fc2",), head=("merger.linear_fc1", "merger.linear_fc2"),
    ),
)  # fmt: skip

_BY_NAME = {row.name: row for row in _CURRENT}

# layouts of earlier releases come after the current ones
FAMILIES: tuple[EncoderFamily, ...] = (
    *_CURRENT,
    # before 5.6 the tower is a part of its model
    replace(_BY_NAME["CLIP"], towers=("CLIPVisionTransformer",)),
    replace(_BY_NAME["MetaCLIP 2"], towers=("MetaClip2VisionTransformer",)),
    replace(_BY_NAME["AltCLIP"], towers=("AltCLIPVisionTransformer",)),
    replace(_BY_NAME["ChineseCLIP"], towers=("ChineseCLIPVisionTransformer",)),
    replace(_BY_NAME["SigLIP"], towers=("SiglipVisionTransformer",)),
    replace(_BY_NAME["SigLIP2"], towers=("Siglip2VisionTransformer",), padding_mask="attention_mask"),
    # before 5.18
    replace(_BY_NAME["DINOv2"], projections=_OLD_PROJECTIONS, out="output.dense"),
    replace(_BY_NAME["DINOv2 with registers"], projections=_OLD_PROJECTIONS, out="output.dense"),
    # before 5.9
    EncoderFamily("ViT", ("ViTModel",), "encoder.layer", "attention", "output.dense", **_OLD_VIT),
    EncoderFamily("DeiT", ("DeiTModel",), "encoder.layer", "attention", "output.dense", **_OLD_VIT, cls_tokens=2),
)

# linear heads on the model around the tower
OUTER_HEADS = ("visual_projection", "classifier", "cls_classifier", "distillation_classifier")


def supported_encoders() -> str:
    """Readable list for messages."""
    towers: dict[str, dict[str, None]] = {}
    for row in FAMILIES:
        towers.setdefault(row.name, {}).update(dict.fromkeys(row.towers))
    return "; ".join(f"{name} ({', '.join(classes)})" for name, classes in towers.items())
