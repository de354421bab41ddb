"""What can be done with an opened model: other registers, another deletion, back to float; and quantizing while opening."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import CLIP_CLASSIFIER, COMPOSITES, MODELS, TOWERS, quantized, random_cache
from torch import nn
from transformers import AutoModel

from optimum_regcache import (
    DeletionConfig,
    RegCacheConfig,
    RegCacheQuantizer,
    get_registers,
    set_deletion,
    set_registers,
)
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.methods import quantize_with, resolve

NO_IMAGES = RegCacheConfig.from_preset("w8a8-dynamic").replace(registers={"mode": "none"})
CLIP = TOWERS["clip"]


def test_registers_of_an_opened_model_can_be_read_and_changed(tmp_path: Path) -> None:
    quantized(CLIP).save_pretrained(tmp_path / "old")
    model = AutoModel.from_pretrained(tmp_path / "old")
    cache = get_registers(model)
    assert cache is not None
    assert (cache.blocks, cache.num_copies) == ((2, 3), 2.0)
    other = random_cache((1, 2, 3), registers=2, num_copies=5.0, seed=4)
    set_registers(model, other)
    set_deletion(model, DeletionConfig(block=1, count=3))
    config = model.config.quantization_config
    assert (config.registers.blocks, config.registers.num_registers, config.registers.num_copies) == ((1, 2, 3), 2, 5.0)
    assert config.deletion == DeletionConfig(block=1, count=3)
    model.save_pretrained(tmp_path / "new")
    again = AutoModel.from_pretrained(tmp_path / "new")
    assert torch.equal(CLIP.run(again), CLIP.run(model))
    set_registers(again, None)
    set_deletion(again, DeletionConfig())
    assert get_registers(again) is None
    again.save_pretrained(tmp_path / "none")
    assert torch.equal(CLIP.run(AutoModel.from_pretrained(tmp_path / "none")), CLIP.run(again))
    assert not torch.equal(CLIP.run(again), CLIP.run(model))


def test_registers_of_a_float_model_and_of_a_part() -> None:
    model = CLIP.build()
    set_registers(model, random_cache((1,)))
    assert get_registers(model).blocks == (1,)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="register cache is for 7 blocks, this encoder has 4"):
        set_registers(model, random_cache((1,), num_blocks=7))
    dual = quantized(COMPOSITES["clip_dual"])
    with pytest.raises(
        ValueError, match=r"is a part of a quantized model.*Pass the model that was opened or quantized"
    ):
        set_registers(dual.vision_model.encoder.layers, None)


@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip2", "clip_dual", "vit_classifier"])
def test_dynamic_quantization_while_opening_equals_the_quantizer(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    model.save_pretrained(tmp_path / "float")
    config = NO_IMAGES.replace(modules={"patch_embedding": True}, deletion={"block": 2, "count": 2})
    opened = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    expected = RegCacheQuantizer(model).quantize(quantization_config=config, progress=False)
    ours, theirs = opened.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(tiny.run(opened), tiny.run(expected))
    assert opened.config.quantization_config == expected.config.quantization_config
    opened.save_pretrained(tmp_path / "quantized")
    assert torch.equal(tiny.run(type(model).from_pretrained(tmp_path / "quantized")), tiny.run(expected))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (RegCacheConfig.from_preset("w8a8-dynamic"), r"registers\.mode='search'"),
        (NO_IMAGES.replace(registers={"mode": "fixed", "blocks": [1]}), r"registers\.mode='fixed'"),
        (RegCacheConfig(registers={"mode": "none"}), "static activations"),
        (NO_IMAGES.replace(methods=["smoothquant"]), "methods smoothquant"),
        (NO_IMAGES.replace(attention={"quantize": True}), "quantized attention products"),
        (NO_IMAGES.replace(modules={"mixed_precision": ["mlp.fc2"]}), r"modules\.mixed_precision"),
    ],
)
def test_what_needs_images_is_refused_while_opening(config: RegCacheConfig, reason: str, tmp_path: Path) -> None:
    CLIP.build(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"needs calibration images \({reason}\).*Use RegCacheQuantizer"):
        AutoModel.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match=r"activations\.observer='mse' has no effect: dynamic scales"):
        AutoModel.from_pretrained(tmp_path, quantization_config=NO_IMAGES.replace(activations={"observer": "mse"}))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "clip_dual", "dinov2_swiglu"])
def test_a_dequantized_model_is_a_float_model_with_the_values_of_the_codes(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model, original = quantized(tiny, bits=4, modules={"patch_embedding": True}), tiny.build()
    weights = {n: m.dequantized_weight() for n, m in quant_linears(model)}
    with torch.no_grad():
        for layer, weight in weights.items():
            target = original.get_submodule(layer.removesuffix(".linear") if "patch" in layer else layer)
            target.weight.copy_(weight.reshape(target.weight.shape))
    result = model.dequantize()
    assert type(result) is type(original)
    assert not any(True for _ in quant_linears(result))
    assert get_registers(result) is None
    assert torch.equal(tiny.run(result), tiny.run(original))
    assert {n for n, _ in result.named_parameters()} == {n for n, _ in original.named_parameters()}
    result.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(tiny.run(type(original).from_pretrained(tmp_path)), tiny.run(original))


def test_dequantizing_takes_the_offset_of_noisyquant_out_again() -> None:
    methods = [{"name": "noisyquant", "shifts": 8, "draws": 2, "ranges": 4, "max_tokens": 40}]
    config = RegCacheConfig(registers={"mode": "none"}, methods=methods)
    model = quantize_with(CLIP.build(), resolve(config), None, [CLIP.inputs(seed=2)], progress=False).model
    assert any(bool((m.input_offset != 0).any()) for _, m in quant_linears(model) if m.input_offset is not None)
    cosine = torch.cosine_similarity(CLIP.run(model.dequantize()), CLIP.run(CLIP.build()), dim=-1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"methods": ["rotation"]}, "its residual stream is rotated"),
        ({"activations": {"mlp_out_hadamard": True}}, "its MLP output projections read a Hadamard transform"),
        ({"methods": ["test_time_registers"]}, "registers took over what silenced MLP units did"),
    ],
)
def test_what_cannot_be_dequantized_is_said_so(parts: dict, reason: str) -> None:
    model = quantized(CLIP, **parts)
    before = CLIP.run(model)
    with pytest.raises(ValueError, match=f"cannot be dequantized: {reason}.*Open the float original instead"):
        model.dequantize()
    assert torch.equal(CLIP.run(model), before)


def test_a_dequantized_classifier_keeps_its_head() -> None:
    model = quantized(CLIP_CLASSIFIER, modules={"head": True})
    assert isinstance(model.dequantize().classifier, nn.Linear)
    assert model.dtype == torch.float32


def test_the_config_of_an_opened_model_opens_it_again(tmp_path: Path) -> None:
    quantized(CLIP).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(CLIP.run(type(model).from_pretrained(tmp_path, config=model.config)), CLIP.run(model))
    assert model.config.quantization_config.get("quant_method") == "regcache"
    assert model.config.quantization_config.get("load_in_8bit", False) is False
