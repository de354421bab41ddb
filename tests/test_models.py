"""The RegCache* model classes: thin, exact, and savable."""
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import BLOCKS, TOWERS, TinyModel, random_cache
from safetensors.torch import load_file
from transformers import AutoModel, Cache, DynamicCache

import optimum_regcache
from optimum_regcache import DeletionConfig, RegCacheConfig, RegisterCache
from optimum_regcache.models import RegCacheMixin
from optimum_regcache.quantizer import build_quantized

CLASSES = {
    "clip": optimum_regcache.RegCacheCLIPVisionModel,
    "siglip": optimum_regcache.RegCacheSiglipVisionModel,
    "siglip2": optimum_regcache.RegCacheSiglip2VisionModel,
    "dinov2": optimum_regcache.RegCacheDinov2Model,
    "dinov2_swiglu": optimum_regcache.RegCacheDinov2Model,
    "dinov2_registers": optimum_regcache.RegCacheDinov2WithRegistersModel,
    "dinov3": optimum_regcache.RegCacheDINOv3ViTModel,
    "vit": optimum_regcache.RegCacheViTModel,
    "deit": optimum_regcache.RegCacheDeiTModel,
}
every_tower = pytest.mark.parametrize("tiny", TOWERS.values(), ids=lambda t: t.name)


def build(tiny: TinyModel) -> Any:
    return tiny.build(cls=CLASSES[tiny.name])


@every_tower
def test_without_registers_they_are_their_parents(tiny: TinyModel) -> None:
    native, model = tiny.build(), build(tiny)
    assert isinstance(model, tiny.model_class)
    assert isinstance(model, RegCacheMixin)
    assert torch.equal(tiny.run(model), tiny.run(native))
    for m in (native, model):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        a, b = (m(**tiny.inputs(), output_hidden_states=True, output_attentions=True) for m in (native, model))
    assert len(b.hidden_states) == BLOCKS + 1
    for field in ("hidden_states", "attentions"):
        assert all(torch.equal(x, y) for x, y in zip(a[field], b[field], strict=True))


@every_tower
def test_properties_install_and_remove(tiny: TinyModel) -> None:
    model, cache, deletion = build(tiny), random_cache(num_copies=2.0), DeletionConfig(block=2, count=2)
    plain = tiny.run(model)
    assert model.register_cache is None
    assert model.token_deletion == DeletionConfig()
    model.register_cache = cache
    assert (model.register_cache.blocks, model.register_cache.num_copies) == ((1, 3), 2.0)
    assert torch.equal(model.register_cache.rows(3)[0], cache.rows(3)[0])
    with_cache = tiny.run(model)
    model.token_deletion = deletion
    assert model.token_deletion == deletion
    outputs = [plain, with_cache, tiny.run(model)]
    for i, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-2 for other in outputs[:i])
    model.register_cache = None
    model.token_deletion = DeletionConfig()
    assert torch.equal(tiny.run(model), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_tower
def test_past_key_values_take_the_place_of_stored_registers(tiny: TinyModel, implementation: str) -> None:
    stored, passed = random_cache((0, 1, 3), num_copies=3.0), random_cache((1, 2), registers=2, seed=5)
    model, other, bare = build(tiny), build(tiny), build(tiny)
    for m in (model, other, bare):
        m.set_attn_implementation(implementation)
    model.register_cache, other.register_cache = stored, passed
    before, expected = tiny.run(model), tiny.run(other)
    assert (before - expected).abs().max() > 1e-2
    assert torch.equal(tiny.run(model, past_key_values=passed), expected)
    assert torch.equal(tiny.run(bare, past_key_values=passed), expected)
    nothing = RegisterCache({}, {}, BLOCKS)
    assert torch.equal(tiny.run(model, past_key_values=nothing), tiny.run(bare))
    assert torch.equal(tiny.run(model, past_key_values=None), before)
    assert torch.equal(tiny.run(model), before)
    assert [layer.get_seq_length() for layer in passed.layers] == [0, 2, 2, 0]


def test_gradients_reach_passed_registers() -> None:
    tiny = TOWERS["dinov2"]
    cache = random_cache((1,), num_copies=2.0)
    rows = [t.requires_grad_() for t in cache.rows(1)]
    build(tiny)(**tiny.inputs(), past_key_values=cache).last_hidden_state.square().mean().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in rows)


@every_tower
def test_past_key_values_errors(tiny: TinyModel) -> None:
    model = build(tiny)
    for wrong in (DynamicCache(), Cache(layers=[])):
        message = (
            f"past_key_values must be a RegisterCache, got {type(wrong).__name__}. Build one with "
            r"RegisterCache\(keys, values, num_blocks\)"
        )
        with pytest.raises(TypeError, match=message):
            model(**tiny.inputs(), past_key_values=wrong)
    with pytest.raises(ValueError, match="The register cache is for 6 blocks, this encoder has 4"):
        model(**tiny.inputs(), past_key_values=random_cache(num_blocks=6))


def test_package_exports_every_class_lazily() -> None:
    for cls in CLASSES.values():
        assert cls.__name__ in optimum_regcache.__all__
        assert cls.__name__ in dir(optimum_regcache)
    with pytest.raises(AttributeError, match="module 'optimum_regcache' has no attribute 'Nonsense'"):
        optimum_regcache.Nonsense  # noqa: B018


# saving


@every_tower
def test_float_models_reload_through_every_class(tiny: TinyModel, tmp_path: Path) -> None:
    """Checkpoints of the subclass, its parent and AutoModel are interchangeable (ViT and DINOv2 rename their keys)."""
    native, model = tiny.build(), build(tiny)
    native.save_pretrained(tmp_path / "native")
    model.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("native", "ours")]
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    for folder in ("native", "ours"):
        for cls in (CLASSES[tiny.name], AutoModel, tiny.model_class):
            loaded, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert torch.equal(tiny.run(loaded.eval()), tiny.run(native))


class Derived(optimum_regcache.RegCacheDinov2Model):
    """What a user may write."""


def test_classes_derived_from_ours_load_too(tmp_path: Path) -> None:
    tiny = TOWERS["dinov2"]
    tiny.build().save_pretrained(tmp_path)
    loaded, info = Derived.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(tiny.run(loaded.eval()), tiny.run(tiny.build()))


@pytest.mark.parametrize("part", ["registers", "deletion", "both"])
def test_float_registers_do_not_vanish_in_silence(part: str, tmp_path: Path) -> None:
    """A float checkpoint has no place for registers and deletion: saving refuses."""
    model = build(TOWERS["vit"])
    if part != "deletion":
        model.register_cache = random_cache(num_copies=2.0)
    if part != "registers":
        model.token_deletion = DeletionConfig(block=2, count=2)
    message = (
        r"A float checkpoint cannot describe registers or a deletion; they would be lost\. Remove them "
        r"\(model\.register_cache = None, model\.token_deletion = DeletionConfig\(\)\), or quantize the model"
    )
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.register_cache, model.token_deletion = None, DeletionConfig()
    model.save_pretrained(tmp_path)
    assert torch.equal(TOWERS["vit"].run(AutoModel.from_pretrained(tmp_path).eval()), TOWERS["vit"].run(model))


@every_tower
def test_quantized_models_reload_through_every_class(tiny: TinyModel, tmp_path: Path) -> None:
    cache = random_cache((2, 3), num_copies=2.0)
    config = RegCacheConfig.from_preset("w8a8").replace(
        registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}, deletion={"block": 2, "count": 2}
    )
    quantized = build_quantized(build(tiny), config, cache, [tiny.inputs(seed=2)])
    assert isinstance(quantized, CLASSES[tiny.name])
    quantized.save_pretrained(tmp_path)
    for cls in (CLASSES[tiny.name], AutoModel, tiny.model_class):
        loaded = cls.from_pretrained(tmp_path).eval()
        assert torch.equal(tiny.run(loaded), tiny.run(quantized))
        state = loaded.state_dict()
        assert all(torch.equal(state[k], v) for k, v in quantized.state_dict().items())
    loaded = CLASSES[tiny.name].from_pretrained(tmp_path)
    assert loaded.register_cache.blocks == (2, 3)
    assert loaded.token_deletion == config.deletion
    passed = random_cache((1,), seed=3)
    a, b = (tiny.run(m, past_key_values=passed) for m in (loaded, quantized))
    assert torch.equal(a, b)
    assert not torch.equal(a, tiny.run(quantized))
