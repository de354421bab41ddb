"""From a float model to a quantized module tree: which modules are replaced, and the checks around it."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import BLOCKS, COMPOSITES, MODELS, TOWERS, TinyModel, random_cache
from torch import nn

from optimum_regcache import DeletionConfig, RegCacheConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.structure import check_complete, install_structure, validate_positions
from optimum_regcache.layers.install import assign_input_qparams, config_sites, quantize_modules
from optimum_regcache.layers.linear import QuantLinear, quant_linears
from optimum_regcache.layers.patch_embedding import QuantPatchEmbedding
from optimum_regcache.registers import get_register_cache, prepare_tower, set_registers

CLIP = TOWERS["clip"]
ONE, ZERO = torch.tensor(0.1), torch.tensor(0)
every_model = pytest.mark.parametrize("tiny", MODELS.values(), ids=lambda t: t.name)


def config(**parts: Any) -> RegCacheConfig:
    return RegCacheConfig(**{"registers": {"mode": "none"}, **parts})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_model
def test_sites_are_replaced_and_nothing_else(tiny: TinyModel, device: str) -> None:
    settings = config(modules={"patch_embedding": True, "head": True, "ignore": ("layer*.0.*",)})
    model = tiny.build().to(device)
    sites = {site.name: site.kind for site in config_sites(model, settings)}
    before = dict(model.named_modules())
    quantize_modules(model, settings)
    kinds = {"linear": QuantLinear, "patch_embedding": QuantPatchEmbedding}
    for name, module in model.named_modules():
        if name in sites:
            assert type(module) is kinds[sites[name]]
        elif name in before:
            assert module is before[name]
    assert len(list(quant_linears(model))) == len(sites)
    blocks = {site.block for site in config_sites(model, config(modules={"ignore": ("layer*.0.*",)}))}
    assert blocks == {1, 2, 3}
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device}


def test_qparams_reach_every_layer() -> None:
    settings = config(modules={"patch_embedding": True})
    model = CLIP.build()
    names = [site.name for site in config_sites(model, settings)]
    quantize_modules(model, settings)
    qparams = {name: (torch.tensor(0.1 + i), torch.tensor(i)) for i, name in enumerate(names)}
    assign_input_qparams(model, qparams)
    for name, layer in quant_linears(model):
        scale, zero_point = qparams[name.removesuffix(".linear")]
        assert torch.equal(layer.input_scale, scale)
        assert int(layer.input_zero_point) == int(zero_point)
    assert CLIP.run(model).isfinite().all()


def test_missing_qparams_are_an_error_unless_dynamic() -> None:
    model = CLIP.build()
    quantize_modules(model, config())
    message = (
        r"No activation statistics for (vision_model\.)?encoder\.layers\.0\.mlp\.fc2: the calibration batches never reached "
        r"it\. Check "
        r"modules\.ignore and the calibration data\."
    )
    with pytest.raises(ValueError, match=message):
        assign_input_qparams(model, {n: (ONE, ZERO) for n, _ in quant_linears(model) if not n.endswith("0.mlp.fc2")})
    dynamic = CLIP.build()
    quantize_modules(dynamic, config(activations={"mode": "dynamic"}))
    assign_input_qparams(dynamic, {})
    assert CLIP.run(dynamic).isfinite().all()


def test_validate_positions() -> None:
    model = CLIP.build()
    validate_positions(model, config(registers={"mode": "fixed", "blocks": (0, BLOCKS - 1)}))
    message = (
        r"registers\.mode='search' describes a model that is still to be searched\. Run RegCacheQuantizer\.quantize with a "
        r"calibration dataset, or set registers\.mode to 'fixed' or 'none'\."
    )
    with pytest.raises(ValueError, match=message):
        validate_positions(model, RegCacheConfig())
    with pytest.raises(ValueError, match=r"registers\.blocks=\[1, 4\], but the encoder has blocks 0 to 3\."):
        validate_positions(model, config(registers={"mode": "fixed", "blocks": (1, BLOCKS)}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_model
def test_structure_has_room_for_the_registers(tiny: TinyModel, device: str) -> None:
    settings = config(
        registers={"mode": "fixed", "blocks": (1, 3), "num_registers": 2, "num_copies": 3.0},
        deletion={"block": 2, "count": 1},
    )
    model = tiny.build().to(device)
    install_structure(model, settings)
    cache = get_register_cache(model)
    assert (cache.blocks, cache.num_registers, cache.num_copies) == ((1, 3), 2, 3.0)
    assert {t.device.type for t in cache.rows(1)} == {device}
    assert prepare_tower(model).deletion == DeletionConfig(block=2, count=1)
    if device == "cpu":
        assert all(t.isnan().all() for t in cache.rows(3)), "empty rows must not pass for real ones"
    install_structure(model, config())
    assert get_register_cache(model) is None
    assert not prepare_tower(model).deletion.active


def test_structure_checks_positions() -> None:
    with pytest.raises(ValueError, match=r"registers\.mode='search' describes"):
        install_structure(CLIP.build(), RegCacheConfig())
    with pytest.raises(ValueError, match=r"deletion\.block=7, but the encoder"):
        install_structure(CLIP.build(), config(deletion={"block": 7, "count": 1}))


def test_check_complete_names_what_is_wrong() -> None:
    model = COMPOSITES["clip_dual"].build()
    set_registers(model, random_cache((1,)))
    quantize_modules(model, config())
    with pytest.raises(
        ValueError, match=r"damaged: (vision_model\S+input_scale,? ){8}and 16 more missing or not finite"
    ):
        check_complete(model)
    assign_input_qparams(model, {name: (ONE, ZERO) for name, _ in quant_linears(model)})
    check_complete(model)
    layer = find_tower(model).blocks[2].mlp.fc1
    layer.weight_scale[5] = -1.0
    find_tower(model).attention(1).register_value[0, 0, 3] = float("nan")
    names = (
        r"vision_model\.encoder\.layers\.1\.self_attn\.register_value, "
        r"vision_model\.encoder\.layers\.2\.mlp\.fc1\.weight_scale"
    )
    with pytest.raises(
        ValueError, match=rf"The checkpoint is incomplete or damaged: {names} missing or not finite\. Down"
    ):
        check_complete(model)


def test_unsupported_models_are_refused() -> None:
    for function in (quantize_modules, install_structure, validate_positions):
        with pytest.raises(ValueError, match="Linear contains no supported vision encoder"):
            function(nn.Linear(2, 2), config())
