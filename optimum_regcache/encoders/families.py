"""One table row per encoder family: the only file that knows module names.

To add a family, add a row to :data:`FAMILIES` (and a subclass in ``models/`` if it should be constructible by name).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def supported_encoders() -> str:
    """Readable list for messages."""
    return "; ".join(f"{f.name} ({', '.join(f.towers)})" for f in FAMILIES)
