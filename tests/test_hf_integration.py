"""Quantized models as ordinary transformers checkpoints: saving, every way of loading, pipelines."""
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import (
    CLIP_CLASSIFIER,
    COMPOSITES,
    DINOV2_BACKBONE,
    MODELS,
    TOWER_PREFIX,
    TOWERS,
    TinyModel,
    pixels,
    quantized,
    random_cache,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification

from optimum_regcache import RegCacheConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.hf_quantizer import attach_quantizer, register
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.layers.patch_embedding import QuantPatchEmbedding
from optimum_regcache.math import uniform
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.registers import get_register_cache, prepare_tower

AUTO_CLASSES = {
    "clip_dual": AutoModelForZeroShotImageClassification,
    "siglip_dual": AutoModelForZeroShotImageClassification,
    "dinov2_classifier": AutoModelForImageClassification,
    "vit_classifier": AutoModelForImageClassification,
    "clip_classifier": AutoModelForImageClassification,
}
every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=lambda t: t.name)
CLIP, VIT, CLIP_DUAL = TOWERS["clip"], TOWERS["vit"], COMPOSITES["clip_dual"]
EVERYTHING = {"patch_embedding": True, "head": True}


def assert_same(tiny: TinyModel, loaded: Any, saved: Any) -> None:
    """Same class, state dict, outputs, registers and deletion, bit for bit."""
    assert type(loaded) is type(saved)
    a, b = loaded.state_dict(), saved.state_dict()
    assert list(a) == list(b)
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
    for x, y in zip(quant_linears(loaded), quant_linears(saved), strict=True):
        assert x[1].extra_repr() == y[1].extra_repr()
    assert prepare_tower(loaded).deletion == prepare_tower(saved).deletion
    assert prepare_tower(loaded).num_copies == prepare_tower(saved).num_copies
    assert torch.equal(tiny.run(loaded.eval()), tiny.run(saved))


def saved_config(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 6, 4])
@every_model
def test_round_trip_is_bit_exact(tiny: TinyModel, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    modules = EVERYTHING if bits == 6 else {}
    saved = quantized(tiny, bits, dtype, modules=modules)
    assert (saved.dtype, saved.is_quantized, saved.quantization_method) == (dtype, True, "regcache")
    saved.save_pretrained(tmp_path)
    loaded = AUTO_CLASSES.get(tiny.name, AutoModel).from_pretrained(tmp_path)
    assert_same(tiny, loaded, saved)
    assert isinstance(loaded.config.quantization_config, RegCacheConfig)
    assert loaded.config.quantization_config.to_dict() == saved.config.quantization_config.to_dict()
    assert loaded.is_quantized
    patches = [m for m in loaded.modules() if isinstance(m, QuantPatchEmbedding)]
    assert len(patches) == (1 if modules else 0)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("clip", {"activations": {"mode": "dynamic", "granularity": "per_token"}}),
        ("dinov2", {"activations": {"symmetric": False}}),
        ("vit", {"weights": {"granularity": "per_tensor"}, "registers": {"mode": "none", "blocks": ()}}),
        ("siglip2", {"modules": {"ignore": ("mlp.fc2",)}, "deletion": {"rule": "threshold", "kappa": 2.0}}),
        ("dinov2_registers", {"registers": {"num_registers": 3, "num_copies": 0.5}, "deletion": {"fill": "none"}}),
        ("clip_classifier", {"modules": EVERYTHING}),
    ],
)
def test_round_trip_of_other_settings(name: str, parts: dict[str, Any], tmp_path: Path) -> None:
    tiny = CLIP_CLASSIFIER if name == "clip_classifier" else MODELS[name]
    saved = quantized(tiny, **parts)
    saved.save_pretrained(tmp_path)
    assert_same(tiny, AUTO_CLASSES.get(name, AutoModel).from_pretrained(tmp_path), saved)


def test_two_bit_weights(tmp_path: Path) -> None:
    saved = quantized(CLIP, 2)
    saved.save_pretrained(tmp_path)
    assert_same(CLIP, AutoModel.from_pretrained(tmp_path), saved)


@pytest.mark.parametrize("tiny", [VIT, CLIP_DUAL], ids=lambda t: t.name)
def test_saving_again_and_in_shards(tiny: TinyModel, tmp_path: Path) -> None:
    quantized(tiny).save_pretrained(tmp_path / "one")
    first = type(tiny.build()).from_pretrained(tmp_path / "one")
    first.save_pretrained(tmp_path / "two")
    first.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two")]
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    for folder in ("two", "shards"):
        assert saved_config(tmp_path / folder) == first.config.quantization_config.to_dict()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(tiny, type(first).from_pretrained(tmp_path / "shards"), first)


def test_checkpoint_is_small_and_self_describing(tmp_path: Path) -> None:
    quantized(CLIP, 4).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    weight = state[f"{TOWER_PREFIX}encoder.layers.0.mlp.fc1.weight"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.int32, (128, 64 // 8))
    assert tuple(state[f"{TOWER_PREFIX}encoder.layers.2.self_attn.register_key"].shape) == (4, 1, 16)
    config = saved_config(tmp_path)
    assert (config["quant_method"], config["version"], config["weights"]["bits"]) == ("regcache", 1, 4)
    assert config["registers"]["blocks"] == [2, 3]
    assert RegCacheConfig(**config).to_dict() == config


@pytest.mark.parametrize("name", ["vit", "siglip_dual"])
def test_loaded_encoders_are_frozen_like_quantized_ones(name: str, tmp_path: Path) -> None:
    """What is around them is not. Not only for order: the attention of SigLIP's pooling head rounds differently when its
    weights want gradients."""
    saved = quantized(MODELS[name])
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    towers = [find_tower(model).module for model in (saved, loaded)]
    assert {p.requires_grad for tower in towers for p in tower.parameters()} == {False}
    inside = {id(p) for p in towers[1].parameters()} | {id(m.bias) for _, m in quant_linears(loaded)}
    assert all(p.requires_grad for p in loaded.parameters() if id(p) not in inside)


def test_loading_does_not_quantize_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes come from the file; searching scales for a module tree without weights takes very long."""
    saved = quantized(CLIP, weights={"observer": "mse"})
    saved.save_pretrained(tmp_path)

    def refuse(*args: Any) -> None:
        raise AssertionError("weight scales were computed while loading")

    monkeypatch.setattr(uniform, "weight_qparams", refuse)
    assert_same(CLIP, AutoModel.from_pretrained(tmp_path), saved)


def test_scales_stay_float32_when_loaded_in_another_dtype(tmp_path: Path) -> None:
    saved = quantized(CLIP)
    saved.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    blocks: list[Any] = [find_tower(m).blocks[0] for m in (loaded, saved)]
    layer, original = (block.mlp.fc1 for block in blocks)
    assert torch.equal(layer.weight_scale, original.weight_scale)
    assert torch.equal(layer.input_scale, original.input_scale)
    assert layer.bias.dtype == get_register_cache(loaded).rows(2)[0].dtype == torch.bfloat16


# other models in the same checkpoint


@pytest.mark.parametrize("modules", [{}, EVERYTHING], ids=["blocks", "everything"])
@pytest.mark.parametrize(
    ("whole", "part"),
    [("clip_dual", "clip"), ("siglip_dual", "siglip"), ("dinov2_classifier", "dinov2")],
)
def test_the_tower_opens_alone(whole: str, part: str, modules: dict[str, bool], tmp_path: Path) -> None:
    """`CLIPVisionModel.from_pretrained(full_clip)` reads ``vision_config`` only."""
    saved, tiny = quantized(MODELS[whole], modules=modules), TOWERS[part]
    saved.save_pretrained(tmp_path)
    loaded, tower = tiny.model_class.from_pretrained(tmp_path).eval(), MODELS[whole].tower_of(saved)
    assert isinstance(loaded.config.quantization_config, RegCacheConfig)
    inside = tiny.tower_of(loaded).state_dict()
    for name, value in tower.state_dict().items():
        assert torch.equal(inside[name], value), name
    with torch.no_grad():
        a, b = (m(pixels(4, 2)) for m in (loaded, tower))
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    assert torch.equal(a.pooler_output, b.pooler_output)
    loaded.save_pretrained(tmp_path / "alone")
    assert_same(tiny, AutoModel.from_pretrained(tmp_path / "alone"), loaded)


def test_tower_and_projection_open_without_the_text_tower(tmp_path: Path) -> None:
    saved = quantized(CLIP_DUAL, modules=EVERYTHING)
    saved.save_pretrained(tmp_path)
    loaded = hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    assert len(list(quant_linears(loaded))) == len(list(quant_linears(saved)))
    with torch.no_grad():
        expected = saved.get_image_features(pixels(4, 2)).pooler_output
        assert torch.equal(loaded(pixels(4, 2)).image_embeds, expected)


def test_the_tower_opens_alone_whatever_was_ignored_outside(tmp_path: Path) -> None:
    """The pattern names a module of the whole model, which the tower alone does not have."""
    modules = {"head": True, "ignore": ("visual_projection", "mlp.fc2")}
    saved = quantized(CLIP_DUAL, modules=modules)
    saved.save_pretrained(tmp_path)
    loaded = hf.CLIPVisionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        a, b = (m(pixels(4, 2)).last_hidden_state for m in (loaded, saved.vision_model))
    assert torch.equal(a, b)


def test_a_dinov2_checkpoint_opens_as_backbone(tmp_path: Path) -> None:
    saved = quantized(TOWERS["dinov2"])
    saved.save_pretrained(tmp_path)
    backbone = hf.Dinov2Backbone.from_pretrained(tmp_path, out_features=["stage4"])
    (features,) = DINOV2_BACKBONE.run(backbone.eval())
    tokens = TOWERS["dinov2"].run(saved)[:, 1:]
    torch.testing.assert_close(features, tokens.transpose(1, 2).unflatten(2, (4, 4)), rtol=1e-5, atol=1e-4)


def test_a_quantized_part_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    """A ViT classifier has no pooler; with ``head=True`` a bare `ViTModel` would need a quantized one."""
    quantized(COMPOSITES["vit_classifier"], modules=EVERYTHING).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pooler\.dense"):
        AutoModel.from_pretrained(tmp_path)


# refusals

WITHOUT_PACKAGE = """
import sys
from transformers import AutoModel, CLIPVisionModel, logging

logging.set_verbosity(logging.CRITICAL)
for path in sys.argv[1:]:
    for cls in (AutoModel, CLIPVisionModel) if "clip" in path else (AutoModel,):
        try:
            cls.from_pretrained(path)
        except Exception as error:
            print(type(error).__name__)
        else:
            sys.exit(f"{path} was loaded by {cls.__name__}")
assert not [name for name in sys.modules if name.startswith("optimum_regcache")]
"""


def test_without_the_package_no_checkpoint_loads(tmp_path: Path) -> None:
    folders = []
    for name, bits in (("clip_dual", 8), ("clip", 6), ("vit", 4), ("siglip2", 8), ("dinov2", 2)):
        folders.append(str(tmp_path / f"{name}-{bits}"))
        quantized(MODELS[name], bits).save_pretrained(folders[-1])
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *folders], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 7
    assert set(result.stdout.split()) <= {"RuntimeError", "ValueError"}


def test_float_models_are_not_quantized_by_from_pretrained(tmp_path: Path) -> None:
    CLIP.build().save_pretrained(tmp_path)
    message = (
        r"RegCache needs calibration images \(registers.mode='search'\), so a float model cannot be quantized by "
        r"from_pretrained\(quantization_config=RegCacheConfig\(...\)\). Use RegCacheQuantizer.from_pretrained\("
    )
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path, quantization_config=RegCacheConfig())


def test_config_and_cache_must_agree() -> None:
    config = RegCacheConfig(registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0})
    model, batches = CLIP.build(), [CLIP.inputs()]
    with pytest.raises(ValueError, match=r"registers\.mode='fixed' and the register cache disagree"):
        build_quantized(model, config, None, batches)
    with pytest.raises(ValueError, match=r"registers\.mode='none' and the register cache disagree"):
        build_quantized(model, RegCacheConfig(registers={"mode": "none"}), random_cache(), batches)
    for wrong in (
        random_cache((1, 3), num_copies=2.0),
        random_cache((2, 3), num_copies=1.0),  # tau is saved in the config, not with the rows
        random_cache((2, 3), registers=2, num_copies=2.0),
    ):
        with pytest.raises(ValueError, match=r"disagree \(blocks, num_registers or num_copies\)"):
            build_quantized(model, config, wrong, batches)


def test_registration_and_quantizer_flags() -> None:
    register()  # a second time: nothing happens
    quantizer = quantized(CLIP).hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_compileable
    assert quantizer.requires_calibration
    model = CLIP.build()
    config = RegCacheConfig(registers={"mode": "none"})
    attach_quantizer(model, config)
    assert model.config.quantization_config is config
    assert model.hf_quantizer.quantization_config is config
