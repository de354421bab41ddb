"""Tiny models whose heads read tokens of their own: detection tokens behind the patches, queries that join before them."""
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers as hf
from models import INNER, TOWERS, TinyModel

YOLOS, DINOV2 = INNER["yolos"], TOWERS["dinov2"]


def _eomt(**overrides: Any) -> hf.EomtConfig:
    joining = {"num_register_tokens": 2, "num_blocks": 2, "num_queries": 3, "num_upscale_blocks": 1}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "mlp_ratio")
    size = {name: getattr(DINOV2.config(), name) for name in names}
    return hf.EomtConfig(**{**size, **joining, "num_labels": 5, **overrides})


def _yolos(**fixed: Any) -> Callable[..., Any]:
    return lambda **overrides: YOLOS.config(**{**fixed, **overrides})


# adds position embeddings of all tokens between its blocks
YOLOS_POSITIONS = replace(YOLOS, name="yolos_positions", config=_yolos(use_mid_position_embeddings=True))
DETECTOR = TinyModel(
    "yolos_detector",
    _yolos(num_labels=5),
    hf.YolosForObjectDetection,
    YOLOS.make_inputs,
    "vit",
    output="pred_boxes",
    trail=3,
)
# queries join before all other tokens at block 2
EOMT = TinyModel("eomt", _eomt, hf.EomtForUniversalSegmentation, DINOV2.make_inputs, lead=6)
