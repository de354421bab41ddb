"""Tiny random models of every supported encoder family, with matching inputs.

All have 4 blocks of width 64 with 4 heads and see 32 x 32 pixels in patches of 8 (16 patches). Their weights are drawn
much wider than transformers initialises them, so that attention is far from uniform and every change shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fits
import torch
import transformers as hf
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl
from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl
from transformers.models.smolvlm import modeling_smolvlm

from optimum_regcache import RegCacheConfig, RegisterCache, RegistersConfig
from optimum_regcache.encoders.sites import quantization_sites
from optimum_regcache.quantizer import build_quantized

BLOCKS, HEADS, WIDTH, HEAD_DIM, PIXELS, PATCH, PATCHES = 4, 4, 64, 16, 32, 8, 16
SIGLIP2_GRIDS = ((4, 4), (3, 4), (2, 3))  # rows, columns of the images of a batch, repeated

_COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
_VISION = {**_COMMON, "intermediate_size": 128}
_TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
    "vocab_size": 32,
    "max_position_embeddings": 8,
    "bos_token_id": 30,
    "eos_token_id": 31,
}

# before transformers 5.6 CLIPVisionModel and its relatives hold their tower under this name
TOWER_INSIDE = "vision_model" if hasattr(hf.models.clip.modeling_clip, "CLIPVisionTransformer") else ""
TOWER_PREFIX = f"{TOWER_INSIDE}." if TOWER_INSIDE else ""

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinyModel:
    """A model that the tests build.

    Attributes:
        name: key in `MODELS`.
        config: makes the transformers config from overrides.
        model_class: transformers class.
        make_inputs: (seed, batch size) -> keyword arguments of the model's forward.
        tower: name of the vision tower in the model, "" if it is the model.
        lead, trail: tokens before and behind the patches.
        output: field of the model's output to compare.
    """

    name: str
    config: Callable[..., Any]
    model_class: type[PreTrainedModel]
    make_inputs: Callable[[int, int], Inputs]
    tower: str = ""
    lead: int = 1
    output: str = "last_hidden_state"
    trail: int = 0

    def build(self, *, seed: int = 0, cls: type[PreTrainedModel] | None = None, **overrides: Any) -> Any:
        """The model in evaluation mode; the same seed gives the same weights, in a subclass ``cls`` too."""
        model = (cls or self.model_class)._from_config(self.config(**overrides), attn_implementation="sdpa")
        return randomize(model, seed)

    def inputs(self, seed: int = 1, batch: int = 3) -> Inputs:
        """Images (and texts) for the model."""
        return self.make_inputs(seed, batch)

    def run(self, model: Any, inputs: Inputs | None = None, **kwargs: Any) -> torch.Tensor:
        """The tensor to compare, without gradients."""
        inputs = inputs or self.inputs()
        if "image_grid_thw" in inputs:
            inputs = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
        with torch.no_grad():
            return getattr(model(**inputs, **kwargs), self.output)

    def tower_of(self, model: Any) -> Any:
        """The vision tower in ``model``."""
        return model.get_submodule(self.tower)


def randomize(model: Any, seed: int) -> Any:
    """Draw all weights anew, wide enough for uneven attention; norms and scalars stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:
                parameter.fill_(1.0)
            elif "norm" in name or "layrnorm" in name or "lambda" in name:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise)
            else:
                parameter.copy_((0.3 if "embedding" in name or "token" in name else 0.15) * noise)
    if hasattr(model, "attn_mask_probs"):
        model.attn_mask_probs.zero_()  # as trained models have it
    return model.eval()


def pixels(seed: int, batch: int, height: int = PIXELS, width: int = PIXELS) -> torch.Tensor:
    """[batch, 3, height, width] in [-1, 1]; image i depends on seed and i only."""
    images = [
        torch.rand(3, height, width, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(batch)
    ]
    return torch.stack(images) * 2 - 1


def image_inputs(seed: int, batch: int) -> Inputs:
    return {"pixel_values": pixels(seed, batch)}


def text_inputs(seed: int, batch: int) -> Inputs:
    ids = torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 31  # CLIP pools at the end-of-text token
    return {**image_inputs(seed, batch), "input_ids": ids}


def siglip2_inputs(seed: int, batch: int) -> Inputs:
    """Patches of images of several grids, padded to 16 with noise: nothing may depend on the padding."""
    grids = torch.tensor([SIGLIP2_GRIDS[i % len(SIGLIP2_GRIDS)] for i in range(batch)])
    patches = pixels(seed, batch).reshape(batch, 3, 4, PATCH, 4, PATCH).permute(0, 2, 4, 3, 5, 1)
    mask = torch.arange(PATCHES)[None] < grids.prod(1, keepdim=True)
    return {
        "pixel_values": patches.reshape(batch, PATCHES, 3 * PATCH * PATCH).contiguous(),
        "pixel_attention_mask": mask.to(torch.int64),
        "spatial_shapes": grids,
    }


def _config(cls: type, **fixed: Any) -> Callable[..., Any]:
    return lambda **overrides: cls(**{**fixed, **overrides})


def _clip_config(**overrides: Any) -> hf.CLIPConfig:
    return hf.CLIPConfig(
        text_config=_TEXT,
        vision_config={**_VISION, "projection_dim": WIDTH},
        projection_dim=WIDTH,
        **overrides,
    )


def _siglip_config(**overrides: Any) -> hf.SiglipConfig:
    return hf.SiglipConfig(text_config={**_TEXT, "projection_size": WIDTH}, vision_config=_VISION, **overrides)


_DINOV2 = {**_COMMON, "mlp_ratio": 2}
_LABELS = {"num_labels": 5}
_YOLOS = {**_VISION, "image_size": [PIXELS, PIXELS], "num_detection_tokens": 3, "use_mid_position_embeddings": False}

TOWERS: dict[str, TinyModel] = {
    m.name: m
    for m in (
        TinyModel("clip", _config(hf.CLIPVisionConfig, **_VISION), hf.CLIPVisionModel, image_inputs, TOWER_INSIDE),
        TinyModel(
            "siglip",
            _config(hf.SiglipVisionConfig, **_VISION),
            hf.SiglipVisionModel,
            image_inputs,
            TOWER_INSIDE,
            lead=0,
        ),
        TinyModel(
            "siglip2",
            _config(
                hf.Siglip2VisionConfig, **{k: v for k, v in _VISION.items() if k != "image_size"}, num_patches=PATCHES
            ),
            hf.Siglip2VisionModel,
            siglip2_inputs,
            TOWER_INSIDE,
            lead=0,
        ),
        TinyModel("dinov2", _config(hf.Dinov2Config, **_DINOV2), hf.Dinov2Model, image_inputs),
        TinyModel(
            "dinov2_swiglu", _config(hf.Dinov2Config, **_DINOV2, use_swiglu_ffn=True), hf.Dinov2Model, image_inputs
        ),
        TinyModel(
            "dinov2_registers",
            _config(hf.Dinov2WithRegistersConfig, **_DINOV2, num_register_tokens=4),
            hf.Dinov2WithRegistersModel,
            image_inputs,
            lead=5,
        ),
        TinyModel(
            "dinov3",
            _config(hf.DINOv3ViTConfig, **_VISION, num_register_tokens=4),
            hf.DINOv3ViTModel,
            image_inputs,
            lead=5,
        ),
        TinyModel("vit", _config(hf.ViTConfig, **_VISION), hf.ViTModel, image_inputs),
        TinyModel("deit", _config(hf.DeiTConfig, **_VISION), hf.DeiTModel, image_inputs, lead=2),
    )
}

# towers that come inside larger models and have no class of ours
INNER: dict[str, TinyModel] = {
    m.name: m
    for m in (
        TinyModel(
            "metaclip2",
            _config(hf.MetaClip2VisionConfig, **_VISION),
            hf.MetaClip2VisionModel,
            image_inputs,
            TOWER_INSIDE,
        ),
        TinyModel(
            "smolvlm",
            _config(hf.SmolVLMVisionConfig, **_VISION),
            modeling_smolvlm.SmolVLMVisionTransformer,
            image_inputs,
            lead=0,
        ),
        TinyModel("internvl", _config(hf.InternVLVisionConfig, **_VISION), hf.InternVLVisionModel, image_inputs),
        TinyModel("yolos", _config(hf.YolosConfig, **_YOLOS), hf.YolosModel, image_inputs, trail=3),
    )
}

COMPOSITES: dict[str, TinyModel] = {
    m.name: m
    for m in (
        TinyModel("clip_dual", _clip_config, hf.CLIPModel, text_inputs, "vision_model", 1, "logits_per_image"),
        TinyModel("siglip_dual", _siglip_config, hf.SiglipModel, text_inputs, "vision_model", 0, "logits_per_image"),
        TinyModel(
            "dinov2_classifier",
            _config(hf.Dinov2Config, **_DINOV2, **_LABELS),
            hf.Dinov2ForImageClassification,
            image_inputs,
            "dinov2",
            output="logits",
        ),
        TinyModel(
            "vit_classifier",
            _config(hf.ViTConfig, **_VISION, **_LABELS),
            hf.ViTForImageClassification,
            image_inputs,
            "vit",
            output="logits",
        ),
    )
}

# towers that pack the patches of all images into one sequence; no token of them can be deleted
_QWEN = {"depth": BLOCKS, "hidden_size": WIDTH, "intermediate_size": 128, "num_heads": HEADS, "patch_size": PATCH}
QWEN_GRIDS = ((1, 4, 4), (1, 4, 6), (1, 2, 4))  # frames, rows, columns of the images of a batch, repeated


def packed_inputs(seed: int, batch: int) -> Inputs:
    """Patches of images of several grids in one sequence [N, 3 * 2 * PATCH * PATCH], each pixel in two equal frames."""
    grids = torch.tensor([QWEN_GRIDS[i % len(QWEN_GRIDS)] for i in range(batch)])
    patches = [
        torch.rand(int(g.prod()), 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(100 * seed + i)) * 2 - 1
        for i, g in enumerate(grids)
    ]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grids}


PACKED: dict[str, TinyModel] = {
    m.name: m
    for m in (
        TinyModel(
            "qwen2_5_vl",
            _config(
                configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig,
                **_QWEN,
                out_hidden_size=48,
                window_size=32,
                fullatt_block_indexes=[1, 3],
            ),
            modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel,
            packed_inputs,
            lead=0,
            output="pooler_output",
        ),
        TinyModel(
            "qwen3_vl",
            _config(
                configuration_qwen3_vl.Qwen3VLVisionConfig,
                **_QWEN,
                out_hidden_size=48,
                num_position_embeddings=16,
                deepstack_visual_indexes=[1],
            ),
            modeling_qwen3_vl.Qwen3VLVisionModel,
            packed_inputs,
            lead=0,
            output="pooler_output",
        ),
    )
}

MODELS: dict[str, TinyModel] = {**TOWERS, **COMPOSITES}

# not part of the matrix over all models, but with special cases of their own
CLIP_CLASSIFIER = TinyModel(
    "clip_classifier",
    lambda **o: _clip_config(**_LABELS, **o),
    hf.CLIPForImageClassification,
    image_inputs,
    "vision_model",
    output="logits",
)
DINOV2_BACKBONE = TinyModel(
    "dinov2_backbone",
    _config(hf.Dinov2Config, **_DINOV2, out_features=["stage2", "stage4"]),
    hf.Dinov2Backbone,
    image_inputs,
    output="feature_maps",
)


def run_block(block: Any, states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Output of a block without a mask; not every release's blocks take one."""
    if "attention_mask" in inspect.signature(block.forward).parameters:
        kwargs["attention_mask"] = None
    return block(states, **kwargs)


def random_cache(
    blocks: tuple[int, ...] = (1, 3),
    registers: int = 1,
    num_copies: float | tuple[float, ...] = 1.0,
    seed: int = 0,
    num_blocks: int = BLOCKS,
) -> RegisterCache:
    """Register rows of about the size of the models' own keys and values."""
    generator = torch.Generator().manual_seed(seed)
    rows = {b: torch.randn(2, HEADS, registers, HEAD_DIM, generator=generator) * 1.5 for b in blocks}
    return RegisterCache({b: r[0] for b, r in rows.items()}, {b: r[1] for b, r in rows.items()}, num_blocks, num_copies)


def quantized(
    tiny: TinyModel,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    cls: type[PreTrainedModel] | None = None,
    cached: bool = True,
    **parts: dict[str, Any],
) -> Any:
    """The model quantized with registers in blocks 2 and 3 and two tokens deleted; ``parts`` change its config.

    A copy of a fit that is made once (`fits.once`), unless ``cached`` is false.
    """
    preset = RegCacheConfig.from_preset(f"w{bits}a{bits}" if bits != 2 else "w8a8")
    config = preset.replace(
        weights={"bits": bits},
        registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0},
        deletion={"block": 2, "count": 2},
    ).replace(**parts)
    if config.registers.mode == "none":
        config = config.replace(registers=RegistersConfig(mode="none"))

    def make() -> Any:
        return fit(cast(tiny.build(cls=cls), dtype), config, [tiny.inputs(seed=2)])

    return fits.once((tiny, dtype, cls, repr(config)), make) if cached else make()


def fit(model: Any, config: RegCacheConfig, batches: list[Inputs]) -> Any:
    """The quantized copy of ``model``, with random registers if ``config`` wants any."""
    if config.modules.head and all(site.block is not None for site in quantization_sites(model, head=True)):
        config = config.replace(modules={"head": False})  # refused where there is none
    r = config.registers
    cache = random_cache(r.blocks, r.num_registers, r.num_copies) if r.mode == "fixed" else None
    return build_quantized(model, config, cache, batches)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in ``dtype`` as `from_pretrained` gives it: rotary frequencies, which are not stored, stay float32."""
    kept = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, buffer in kept.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)
    return model
