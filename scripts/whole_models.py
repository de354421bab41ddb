"""Tiny random models that hold a vision tower, one per family of docs/reference/supported-models.md, with inputs for them."""
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

IMAGE, PATCH, WIDTH, VOCABULARY = 32, 8, 32, 64
IMAGE_TOKEN = 60
Inputs = dict[str, torch.Tensor]

_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Whole:
    """A model around a vision tower.

    Attributes:
        family: name in the table.
        model_class: transformers class.
        config: makes its config.
        tokens: image tokens of one picture in the prompt; 0 where there is no text to generate.
        crops: crops into which its processor cuts a picture, as an axis of ``pixel_values``.
        extra: what its forward takes beside pixels and ids, for one picture.
        text: ids that its forward needs, for models that compare pictures with texts.
        note: of the table.
    """

    family: str
    model_class: str
    config: Callable[[], Any]
    tokens: int = 0
    crops: int = 0
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    text: bool = False
    note: str = ""

    def missing(self) -> str | None:
        """Why the transformers installed here cannot build it."""
        return None if hasattr(hf, self.model_class) else f"transformers {hf.__version__} has no {self.model_class}"

    def build(self) -> Any:
        """The model in evaluation mode, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(hf, self.model_class)(self.config()).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():  # wider than at first: attention far from uniform
                    if parameter.ndim > 1 and "lm_head" not in name:
                        parameter.mul_(4.0 if float(parameter.std()) < 0.05 else 1.0)
        if hasattr(model, "attn_mask_probs"):
            model.attn_mask_probs.zero_()  # as trained models have it
        if self.tokens:
            model.generation_config.eos_token_id = None  # three tokens, whatever they are
        return model

    @property
    def packed(self) -> bool:
        """Whether patches stand in one sequence (Qwen-VL)."""
        return "image_grid_thw" in self.extra

    def picture(self, seed: int) -> Inputs:
        """What the tower gets of one picture: an item of a data set."""
        generator = torch.Generator().manual_seed(seed)
        shape = (16, 3 * 2 * PATCH**2) if self.packed else (3, IMAGE, IMAGE)
        pixels = {"pixel_values": torch.rand(shape, generator=generator) * 2 - 1}
        return {**pixels, "image_grid_thw": self.extra["image_grid_thw"]} if self.packed else pixels

    def inputs(self, seed: int = 1) -> Inputs:
        """What the whole model gets of one picture and a prompt."""
        found = {**self.picture(seed), **self.extra}
        if not self.packed:
            pixels = found["pixel_values"][None]
            found["pixel_values"] = pixels[:, None].repeat(1, self.crops, 1, 1, 1) if self.crops else pixels
        if self.text:
            found["input_ids"] = torch.tensor([[1, 5, 6, 7, 2]])
        if self.tokens:
            ids = torch.tensor([[1, *[IMAGE_TOKEN] * self.tokens, 7, 8]])
            found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self.packed or self.family in ("Gemma 3", "PaliGemma"):
                name = "mm_token_type_ids" if self.packed else "token_type_ids"
                found[name] = (ids == IMAGE_TOKEN).long()
        return found


def _llava(vision: Any, name: str = "Llava", **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        return getattr(hf, f"{name}Config")(
            vision_config=vision(**_VISION), text_config=hf.LlamaConfig(**_TEXT), image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN, **options,
        )  # fmt: skip

    return config


def _dense(name: str, vision: str = "Dinov2", **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        stages = [f"stage{i}" for i in range(1, 5)]
        size = {k: v for k, v in _VISION.items() if k != "intermediate_size"}
        backbone = getattr(hf, f"{vision}Config")(**size, mlp_ratio=2, out_features=stages, reshape_hidden_states=False)
        return getattr(hf, f"{name}Config")(backbone_config=backbone, **options)

    return config


def _upernet() -> Any:
    size = {k: v for k, v in _VISION.items() if k != "intermediate_size"}
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = hf.Dinov2Config(**size, mlp_ratio=2, out_features=stages)
    return hf.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_channels=8, num_labels=3
    )


def _dual(name: str, text: dict[str, Any]) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{name}Config")(text_config=text, vision_config=_VISION, projection_dim=WIDTH)


def _tower(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{name}Config")(**{**_VISION, **options})


def _idefics(name: str) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{name}Config")(
        vision_config=_VISION, text_config=hf.LlamaConfig(**_TEXT).to_dict(), scale_factor=2, image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
    )  # fmt: skip


def _qwen(name: str, **vision: Any) -> Callable[[], Any]:
    size = {"depth": 4, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 4, "patch_size": PATCH}
    special = {
        "image_token_id": IMAGE_TOKEN,
        "vision_start_token_id": 61,
        "vision_end_token_id": 62,
        "video_token_id": 63,
    }
    text = {**_TEXT, "rope_parameters": _MROPE, "head_dim": 8}
    return lambda: getattr(hf, f"{name}Config")(vision_config={**size, **vision}, text_config=text, **special)


_DINO = {"mlp_ratio": 2}
_EOMT = {"mlp_ratio": 2, "num_register_tokens": 2, "num_blocks": 1, "num_queries": 3, "num_labels": 3}
_YOLOS: dict[str, Any] = {
    "image_size": [IMAGE, IMAGE],
    "num_detection_tokens": 3,
    "use_mid_position_embeddings": False,
    "num_labels": 3,
}
_GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
_SIZE = {"image_sizes": torch.tensor([[IMAGE, IMAGE]])}
_GENERATE = "ForConditionalGeneration"

WHOLES: tuple[Whole, ...] = (
    Whole("LLaVA (CLIP)", f"Llava{_GENERATE}", _llava(hf.CLIPVisionConfig), 16),
    Whole(
        "LLaVA (SigLIP)", f"Llava{_GENERATE}",
        _llava(hf.SiglipVisionConfig, vision_feature_select_strategy="full", vision_feature_layer=-1), 16,
    ),
    Whole(
        "LLaVA-NeXT", f"LlavaNext{_GENERATE}",
        _llava(hf.CLIPVisionConfig, "LlavaNext", image_grid_pinpoints=[[IMAGE, IMAGE]]), 36, 2, _SIZE,
    ),
    Whole(
        "LLaVA-OneVision", f"LlavaOnevision{_GENERATE}",
        _llava(
            hf.SiglipVisionConfig, "LlavaOnevision", vision_feature_select_strategy="full", vision_feature_layer=-1,
            image_grid_pinpoints=[[IMAGE, IMAGE]],
        ), 36, 2, _SIZE,
    ),
    Whole(
        "PaliGemma", f"PaliGemma{_GENERATE}",
        lambda: hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**_VISION, projection_dim=WIDTH, vision_use_head=False),
            text_config=hf.GemmaConfig(**_TEXT, head_dim=8), image_token_index=IMAGE_TOKEN, projection_dim=WIDTH,
        ), 16,
    ),
    Whole(
        "Gemma 3", f"Gemma3{_GENERATE}",
        lambda: hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
            text_config=hf.Gemma3TextConfig(**_TEXT, head_dim=8), mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN,
        ), 4,
    ),
    Whole("Idefics3", f"Idefics3{_GENERATE}", _idefics("Idefics3"), 4, 1),
    Whole("SmolVLM", f"SmolVLM{_GENERATE}", _idefics("SmolVLM"), 4, 1),
    Whole(
        "InternVL", f"InternVL{_GENERATE}",
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**_VISION), text_config=hf.Qwen2Config(**_TEXT),
            image_token_id=IMAGE_TOKEN, image_seq_length=4,
        ), 4,
    ),
    Whole(
        "Qwen2-VL", f"Qwen2VL{_GENERATE}",
        _qwen("Qwen2VL", embed_dim=WIDTH, mlp_ratio=2), 4, 0, _GRID,
    ),
    Whole(
        "Qwen2.5-VL", f"Qwen2_5_VL{_GENERATE}",
        _qwen("Qwen2_5_VL", out_hidden_size=WIDTH, window_size=32, fullatt_block_indexes=[1, 3]), 4, 0, _GRID,
    ),
    Whole(
        "Qwen3-VL", f"Qwen3VL{_GENERATE}",
        _qwen("Qwen3VL", out_hidden_size=WIDTH, num_position_embeddings=16, deepstack_visual_indexes=[0]), 4, 0, _GRID,
    ),
    Whole("CLIP", "CLIPModel", _dual("CLIP", _BERT), text=True),
    Whole("MetaCLIP 2", "MetaClip2Model", _dual("MetaClip2", _BERT), text=True),
    Whole("AltCLIP", "AltCLIPModel", _dual("AltCLIP", {**_BERT, "project_dim": WIDTH}), text=True),
    Whole("ChineseCLIP", "ChineseCLIPModel", _dual("ChineseCLIP", _BERT), text=True),
    Whole("SigLIP", "SiglipModel", _dual("Siglip", {**_BERT, "projection_size": WIDTH}), text=True),
    Whole("DINOv2 with registers", "Dinov2WithRegistersModel", _tower("Dinov2WithRegisters", **_DINO)),
    Whole("DINOv3 ViT", "DINOv3ViTModel", _tower("DINOv3ViT", num_register_tokens=4)),
    Whole("ViT classifier", "ViTForImageClassification", _tower("ViT", num_labels=3)),
    Whole("DPT (DINOv2)", "DPTForDepthEstimation", _dense("DPT", neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)),
    Whole(
        "Depth Anything", "DepthAnythingForDepthEstimation",
        _dense(
            "DepthAnything", reassemble_hidden_size=WIDTH, patch_size=PATCH, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
            head_hidden_size=8,
        ),
    ),
    Whole("UPerNet (DINOv2)", "UperNetForSemanticSegmentation", _upernet),
    Whole("YOLOS", "YolosForObjectDetection", _tower("Yolos", **_YOLOS)),
    Whole(
        "YOLOS (positions in every block)", "YolosForObjectDetection", 
        _tower("Yolos", **_YOLOS | {"use_mid_position_embeddings": True}),
    ),
    Whole("EoMT", "EomtForUniversalSegmentation", _tower("Eomt", **_EOMT)),
    Whole(
        "SegFormer", "SegformerForSemanticSegmentation",
        lambda: hf.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1]),
        note="hierarchical: each stage merges patches and shortens keys, so no token keeps its place",
    ),
    Whole(
        "Mistral 3 (Pixtral)", f"Mistral3{_GENERATE}",
        lambda: hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(**{**_VISION, "head_dim": 8}), text_config=hf.MistralConfig(**_TEXT),
            image_token_index=IMAGE_TOKEN,
        ),
        note="packs all images into one sequence behind a block-diagonal mask, without `image_grid_thw`",
    ),
)  # fmt: skip
