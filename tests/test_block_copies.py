"""tau per block: exact wherever registers go (docs/method.md 5)."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BLOCKS, MODELS, TOWERS, quantized, random_cache
from transformers import AutoModel

from optimum_regcache import (
    RegCacheCLIPVisionModel,
    RegCacheConfig,
    RegisterCache,
    RegistersConfig,
    fuse,
    get_registers,
    set_registers,
    unfuse,
)
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.export import ExportedEncoder, export_onnx, export_openvino
from optimum_regcache.kernels.onednn import machine_reason
from optimum_regcache.methods import resolve
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.search.fit import install_setup

TAU = {0: 3, 2: 1, 3: 5}  # block 1 has none
CLIP = TOWERS["clip"]
GAPS = {"mode": "fixed", "blocks": (0, 3), "num_copies": (0.25, 6.5)}


def per_block(registers: int = 1) -> RegisterCache:
    return random_cache(tuple(TAU), registers).restricted(tuple(TAU), TAU)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
def test_each_block_equals_its_row_repeated(name: str, implementation: str) -> None:
    """Block by block against attention over ``tau`` literal copies, written out here."""
    tiny, cache = TOWERS[name], per_block(2)
    biased, plain = tiny.build(), tiny.build()
    set_registers(biased, cache)
    for model in (biased, plain):
        model.set_attn_implementation(implementation)
    for block, tau in TAU.items():  # tau rows differ in number, so one cache cannot hold the three blocks
        only, many = tiny.build(), tiny.build()
        keys, values = cache.rows(block)
        set_registers(only, cache.restricted((block,)))
        set_registers(many, RegisterCache({block: keys.repeat(1, tau, 1)}, {block: values.repeat(1, tau, 1)}, BLOCKS))
        torch.testing.assert_close(tiny.run(only), tiny.run(many), rtol=1e-5, atol=1e-5)
    repeated = tiny.build()
    repeated.set_attn_implementation(implementation)
    set_registers(repeated, cache.restricted(tuple(TAU), 1.0))
    for block, tau in TAU.items():  # rows of any number, put into the modules themselves
        attention = find_tower(repeated).attention(block)
        attention.register_key, attention.register_value = (r.repeat(1, tau, 1) for r in cache.rows(block))
    output = tiny.run(biased)
    torch.testing.assert_close(output, tiny.run(repeated), rtol=1e-5, atol=1e-5)
    assert (output - tiny.run(plain)).abs().max() > 0.01


def test_equal_taus_are_one_tau_bit_for_bit() -> None:
    one = random_cache((0, 2), num_copies=2.5)
    for many in ({0: 2.5, 2: 2.5}, (2.5, 2.5), [2.5, 2.5]):
        same = one.restricted((0, 2), many)
        assert same.num_copies == 2.5
        assert same.logit_bias == one.logit_bias
        models = [CLIP.build() for _ in range(2)]
        for model, cache in zip(models, (one, same), strict=True):
            set_registers(model, cache)
        assert torch.equal(*map(CLIP.run, models))
    config = RegistersConfig("fixed", (0, 2), num_copies=(2.5, 2.5))
    assert config == RegistersConfig("fixed", (0, 2), num_copies=2.5)


def test_a_cache_tells_tau_of_each_block() -> None:
    cache = per_block()
    assert cache.num_copies == (3.0, 1.0, 5.0)
    assert cache.logit_bias == tuple(map(math.log, (3, 1, 5)))
    assert [cache.copies(b) for b in cache.blocks] == [3, 1, 5]
    assert cache.restricted((0, 3)).num_copies == (3.0, 5.0)
    assert cache.restricted((2,)).num_copies == 1.0
    assert cache.restricted((0, 2), 7.0).num_copies == 7.0
    assert cache.restricted((0, 2), (7.0, 8)).num_copies == (7.0, 8.0)
    with pytest.raises(KeyError, match="Block 1 has no registers"):
        cache.copies(1)
    assert RegisterCache({}, {}, BLOCKS, {}).num_copies == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({0: 1.0}, r"num_copies is given for blocks \[0\], but the registers are in blocks \[0, 2\]"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, r"is given for blocks \[0, 1, 2\], but the registers are in blocks \[0, 2\]"),
        ((1.0,), r"num_copies holds 1 values, but there are 2 register blocks \[0, 2\]"),
        ((), "num_copies holds 0 values, but there are 2 register blocks"),
        ({0: 1.0, 2: 0.0}, r"num_copies must be > 0 and finite in each block, got \[0\.0\]\. A block without register"),
        ((math.nan, math.inf), r"must be > 0 and finite in each block, got \[nan, inf\]"),
    ],
)
def test_taus_that_do_not_fit(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_cache((0, 2)).restricted((0, 2), given)


def test_the_config_holds_one_tau_for_each_block() -> None:
    assert RegistersConfig("fixed", (0, 3), num_copies=[2, 0.5]).num_copies == (2.0, 0.5)  # type: ignore[arg-type]
    assert RegistersConfig("fixed", (0, 3), num_copies=2).num_copies == 2
    config = RegCacheConfig(registers=GAPS)
    data = json.loads(config.to_json_string())
    assert data["registers"]["num_copies"] == [0.25, 6.5]
    assert RegCacheConfig.from_dict(data) == config
    recipe = Recipe.load("w8a8").override(
        [f"quantization.registers.{s}" for s in ("mode=fixed", "blocks=[0, 3]", "num_copies=[0.25, 6.5]")]
    )
    assert recipe.quantization.registers == config.registers
    for given, message in (
        ((1.0, 2.0, 3.0), r"registers\.num_copies holds 3 values, but there are 2 register blocks \[0, 3\]"),
        ((), r"registers\.num_copies holds 0 values"),
        ((1.0, -1.0), r"registers\.num_copies must be > 0 and finite in each block, got \[-1\.0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            RegistersConfig("fixed", (0, 3), num_copies=given)
    with pytest.raises(ValueError, match=r"holds 2 values, but there are 0 register blocks \[\]"):
        RegistersConfig(num_copies=(1.0, 2.0))
    for bad in ("2", None, True, {"0": 1.0}):
        with pytest.raises(TypeError, match=r"registers\.num_copies must be a number, or a list of such, got"):
            RegistersConfig(num_copies=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"registers\.num_copies must be a list, each a number, got \['2'\]"):
        RegistersConfig(num_copies=["2"])  # type: ignore[arg-type]


def test_the_fit_writes_what_the_cache_holds() -> None:
    resolved = resolve(RegCacheConfig(registers={"mode": "none"}))
    registers = install_setup(resolved, per_block(), DeletionConfig()).config.registers
    assert (registers.blocks, registers.num_copies) == ((0, 2, 3), (3.0, 1.0, 5.0))


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "clip_dual"])
def test_saved_and_opened_bit_for_bit(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = quantized(tiny, registers=GAPS)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    cache = get_registers(opened)
    assert cache is not None
    assert (cache.blocks, cache.num_copies) == ((0, 3), (0.25, 6.5))
    assert opened.config.quantization_config == model.config.quantization_config
    assert torch.equal(tiny.run(opened), tiny.run(model))
    assert not torch.equal(tiny.run(opened), tiny.run(quantized(tiny, registers={**GAPS, "num_copies": 6.5})))


def test_registers_of_an_opened_model_change_to_other_taus(tmp_path: Path) -> None:
    quantized(CLIP).save_pretrained(tmp_path / "old")
    model = AutoModel.from_pretrained(tmp_path / "old")
    set_registers(model, per_block())
    assert model.config.quantization_config.registers.num_copies == (3.0, 1.0, 5.0)
    model.save_pretrained(tmp_path / "new")
    again = AutoModel.from_pretrained(tmp_path / "new")
    assert torch.equal(CLIP.run(again), CLIP.run(model))
    stored = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["registers"]
    assert (stored["blocks"], stored["num_copies"]) == ([0, 2, 3], [3.0, 1.0, 5.0])
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(CLIP.run(twin), CLIP.run(model))


def test_a_config_of_other_taus_is_refused() -> None:
    config = RegCacheConfig(registers=GAPS)
    for taus in (1.0, (0.25, 6.0)):
        with pytest.raises(ValueError, match=r"disagree \(blocks, num_registers or num_copies\)"):
            build_quantized(CLIP.build(), config, random_cache((0, 3)).restricted((0, 3), taus), [CLIP.inputs()])


def test_a_passed_cache_equals_the_stored_one() -> None:
    stored, passed = CLIP.build(), CLIP.build()
    set_registers(stored, per_block())
    model = RegCacheCLIPVisionModel(passed.config)
    model.load_state_dict(passed.state_dict())
    model.eval()
    with torch.no_grad():
        given = model(**CLIP.inputs(), past_key_values=per_block()).last_hidden_state
        expected = stored(**CLIP.inputs()).last_hidden_state
    assert torch.equal(given, expected)


@pytest.mark.skipif(machine_reason() is not None, reason=f"int8 kernel: {machine_reason()}")
@pytest.mark.parametrize("mode", [{"native": False}, {"attention": "float32"}, {"attention": "auto"}], ids=str)
@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_fused_equals_unfused(name: str, mode: dict[str, Any]) -> None:
    tiny = TOWERS[name]
    model = quantized(tiny, registers=GAPS)
    expected = tiny.run(model)
    fuse(model, **mode)
    relative = float((tiny.run(model) - expected).norm() / expected.norm())
    assert relative < (0.06 if mode == {"attention": "auto"} else 0.02)
    unfuse(model)
    assert torch.equal(tiny.run(model), expected)


def test_export_computes_the_same(tmp_path: Path) -> None:
    config = RegCacheConfig(registers={"mode": "fixed", "blocks": (0, 2), "num_copies": (0.3, 9.0)})
    cache = random_cache((0, 2), num_blocks=3).restricted((0, 2), (0.3, 9.0))
    model = build_quantized(CLIP.build(num_hidden_layers=3), config, cache, [CLIP.inputs(seed=2)])
    export_onnx(model, tmp_path / "onnx")
    export_openvino(tmp_path / "onnx", tmp_path / "openvino")
    with torch.no_grad():
        expected = model(**CLIP.inputs()).pooler_output
    set_registers(model, cache.restricted((0, 2), (9.0, 0.3)))
    with torch.no_grad():
        swapped = model(**CLIP.inputs()).pooler_output
    for kind in ("onnx", "openvino"):
        encoder: Any = ExportedEncoder.from_pretrained(tmp_path / kind, num_threads=1)
        found = encoder(**CLIP.inputs()).pooler_output
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9999
        assert (found - expected).norm() < 0.2 * (swapped - expected).norm()
