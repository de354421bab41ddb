"""What quantization refuses to start from."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import MODELS, TOWERS, quantized

from optimum_regcache import RegCacheQuantizer
from optimum_regcache.encoders.tower import find_tower


def adapters() -> Any:
    model = TOWERS["clip"].build()
    model._hf_peft_config_loaded = True
    return model


class Foreign(torch.nn.Linear):
    """A layer of another quantization library."""


Foreign.__module__ = "bitsandbytes.nn.modules"


def foreign() -> Any:
    model = TOWERS["clip"].build()
    block: Any = find_tower(model).blocks[0]
    block.mlp.fc1 = Foreign(64, 128)
    return model


def torch_dynamic() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return torch.ao.quantization.quantize_dynamic(TOWERS["clip"].build(), {torch.nn.Linear})


def on_meta() -> Any:
    model = TOWERS["clip"].build()
    find_tower(model).blocks[3].to("meta")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: quantized(TOWERS["clip"]),
            ValueError,
            "CLIPVisionModel is already quantized; start from the float model",
        ),
        (lambda: quantized(MODELS["clip_dual"]).vision_model, ValueError, "is already quantized"),
        (foreign, ValueError, "is already quantized"),
        (torch_dynamic, ValueError, "is already quantized"),
        (adapters, ValueError, r"carries adapters \(LoRA or others\)\. Merge them first"),
        (on_meta, ValueError, "is not in memory"),
        (lambda: torch.nn.DataParallel(TOWERS["clip"].build()), ValueError, r"pass model\.module"),
        (lambda: torch.compile(TOWERS["clip"].build()), ValueError, r"pass model\._orig_mod"),
        (lambda: "openai/clip-vit-base-patch16", TypeError, r"A model is needed, got str\. .*from_pretrained"),
        (lambda: None, TypeError, "A model is needed, got NoneType"),
    ],
)
def test_the_constructor_is_the_door(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RegCacheQuantizer(make())


@pytest.mark.filterwarnings("ignore")
def test_peft_models_are_recognised() -> None:
    peft = pytest.importorskip("peft")
    model = TOWERS["clip"].build()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries adapters"):
        RegCacheQuantizer(wrapped)
    assert RegCacheQuantizer(wrapped.merge_and_unload()).model is not None
