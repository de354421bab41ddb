"""The methods and their pipeline on tiny models: registry, refusals, exactness, round trips, integer execution."""
# pyright: reportArgumentType=false, reportOptionalOperand=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from models import COMPOSITES, TOWERS, TinyModel, random_cache
from transformers import AutoModel, CLIPVisionModel

from optimum_regcache import RegCacheConfig, set_backend
from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.data.reference import planted
from optimum_regcache.kernels.onednn import machine_reason
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.methods import METHODS, build_methods, quantize_with, resolve
from optimum_regcache.methods._search.scale import LayerGroup, SearchSpace, search_scales
from optimum_regcache.methods.base import linear_groups
from optimum_regcache.methods.mixed_precision import MixedPrecision
from optimum_regcache.registers import get_register_cache, prepare_tower, set_deletion, set_registers

CLIP, DINOV2, SIGLIP = TOWERS["clip"], TOWERS["dinov2"], TOWERS["siglip"]
QUICK: dict[str, dict[str, Any]] = {
    "ptq4vit": {"candidates": 8, "rounds": 2, "draws": 1, "max_images": 4, "max_tokens": 40, "product_images": 2},
    "output_mse": {"candidates": 8, "max_tokens": 40},
    "noisyquant": {"shifts": 8, "draws": 2, "ranges": 4, "max_tokens": 40},
    "smoothquant": {"alphas": [0.5, 0.8], "max_tokens": 40},
    **{name: {"iterations": 2, "batch": 4} for name in ("reconstruction", "light", "glf_q")},
    "norm_tuning": {"iterations": 2, "batch": 2},
    "aiqvit": {"ranks": [2, 8], "search_iterations": 2, "iterations": 2, "batch": 4},
}
PIPELINES = [
    *([{"name": name, **QUICK.get(name, {})}] for name in METHODS if name != "test_time_registers"),
    [{"name": "test_time_registers", "variant": "kv", "top_k": 2}],
    [{"name": "test_time_registers", "variant": "token", "top_k": 2}],
    [{"name": "ptq4vit", **QUICK["ptq4vit"]}, {"name": "gptq"}, {"name": "noisyquant", **QUICK["noisyquant"]}],
    [{"name": "repq_vit"}, {"name": "gptq"}, {"name": "bias_correction"}],
    [{"name": "rotation"}, {"name": "smoothquant", **QUICK["smoothquant"]}, {"name": "gptq"}],
]


def label(pipeline: Any) -> str:
    return "+".join(m["name"] + str(m.get("variant", "")) for m in pipeline)


every_pipeline = pytest.mark.parametrize("pipeline", PIPELINES, ids=label)


def config(
    pipeline: Any, bits: int = 4, registers: bool = True, attention: bool = False, **parts: Any
) -> RegCacheConfig:
    if not attention:  # a setting that nothing reads is refused
        pipeline = [
            {k: v for k, v in dict(m).items() if k != "product_images"} if isinstance(m, dict) else m for m in pipeline
        ]
    base = RegCacheConfig.from_preset(f"w{bits}a{bits}").replace(
        methods=tuple(pipeline), attention={"quantize": attention, "bits": bits if attention else 8}
    )
    if registers:
        positions = {"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}
        base = base.replace(registers=positions, deletion={"block": 2, "count": 2})
    else:
        base = base.replace(registers={"mode": "none"})
    return base.replace(**parts)


def fitted(tiny: TinyModel, c: RegCacheConfig, model: Any = None) -> Any:
    """The fit of ``model``; without one a copy of a fit that is made once."""
    if model is None:
        return fits.once(("methods", tiny, repr(c)), lambda: fitted(tiny, c, tiny.build()))
    cache = random_cache((2, 3), num_copies=2.0) if c.registers.mode == "fixed" else None
    batches = [tiny.inputs(seed=2, batch=4), tiny.inputs(seed=3, batch=2)]
    return quantize_with(model, resolve(c), cache, batches, progress=False)


# registry and configuration


def test_every_method_says_what_it_implements_and_has_a_name_of_its_own() -> None:
    for name, cls in METHODS.items():
        assert cls.name == name
        assert cls.paper
        assert (cls.__doc__ or "").strip()
        assert set(cls.excludes) <= set(METHODS)
        method = cls()
        assert build_methods(RegCacheConfig(methods=[method.to_dict()])) == [method]


@every_pipeline
def test_configuring_again_changes_nothing(pipeline: Any) -> None:
    once = resolve(config(pipeline)).config
    assert resolve(once).config == once
    assert RegCacheConfig(**once.to_dict()) == once


REFUSED = [
    (["nothing"], {}, "Unknown method 'nothing'; expected one of rtn, percentile"),
    ([{"name": "gptq", "dampng": 1.0}], {}, "Unknown key in method gptq: dampng. Known keys: damping"),
    ([{"name": "gptq", "damping": -1.0}], {}, "gptq.damping must be > 0"),
    (["rtn", "rtn"], {}, "Method given twice: rtn"),
    (["rtn", "mse"], {}, "rtn and mse both decide the input scales"),
    (["ptq4vit", "repq_vit"], {}, "ptq4vit and repq_vit both decide the input scales"),
    (
        ["dynamic", "noisyquant"],
        {},
        "noisyquant fit something to stored activation scales, but activations are dynamic",
    ),
    (
        ["smoothquant", "repq_vit"],
        {},
        "repq_vit cannot be combined with smoothquant: both rescale the LayerNorm outputs",
    ),
    (
        ["rotation", "ptq4vit"],
        {},
        "cannot be combined with ptq4vit: the Hadamard transform mixes the channels after GELU",
    ),
    (["rotation", "test_time_registers"], {}, "register neurons are columns of the MLP"),
    (["oracle", "noisyquant"], {}, "noisyquant cannot be combined with oracle: tokens with a scale of their own"),
]


@pytest.mark.parametrize(("methods", "parts", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_senseless_combinations_are_refused_with_the_reason(methods: Any, parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        resolve(RegCacheConfig(methods=methods, **parts))


def test_methods_need_images_and_an_mlp_that_fits() -> None:
    with pytest.raises(ValueError, match="The methods mse need calibration images"):
        quantize_with(CLIP.build(), resolve(config(["mse"], registers=False)), None, [])
    swiglu = TOWERS["dinov2_swiglu"]
    with pytest.raises(ValueError, match=r"multiplies it by a second branch \(SwiGLU\)"):
        fitted(swiglu, config([{"name": "ptq4vit", **QUICK["ptq4vit"]}]))


# what the steps may and may not change


@pytest.mark.parametrize("tiny", [CLIP, SIGLIP, DINOV2], ids=lambda t: t.name)
@pytest.mark.parametrize("pipeline", [p for p in PIPELINES if "test_time" not in label(p)], ids=label)
def test_the_float_model_behind_the_result_computes_what_it_did(tiny: TinyModel, pipeline: Any) -> None:
    """All rewrites preserve the function, registers and deletion included."""
    result = fitted(tiny, config(pipeline))
    reference = tiny.build()
    prepare_tower(reference)
    set_registers(reference, random_cache((2, 3), num_copies=2.0))
    set_deletion(reference, result.config.deletion)
    torch.testing.assert_close(tiny.run(result.float_model), tiny.run(reference), atol=1e-3, rtol=1e-4)


@every_pipeline
def test_the_given_model_is_not_touched(pipeline: Any) -> None:
    model = CLIP.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fitted(CLIP, config(pipeline), model)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "all-points"])
@pytest.mark.parametrize("tiny", [CLIP, DINOV2], ids=lambda t: t.name)
@every_pipeline
def test_round_trip_is_bit_exact(tiny: TinyModel, pipeline: Any, attention: bool, tmp_path: Path) -> None:
    saved = fitted(tiny, config(pipeline, attention=attention))
    saved.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    a, b = loaded.state_dict(), saved.model.state_dict()
    assert list(a) == list(b)
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
    assert torch.equal(tiny.run(loaded), tiny.run(saved.model))
    assert loaded.config.quantization_config.to_dict() == saved.config.to_dict()
    assert loaded.config.quantization_config.protocol == (
        "linear layers and attention products" if attention else "linear layers"
    )


@every_pipeline
def test_plain_scales_and_weights_run_in_integers_and_the_others_say_so(pipeline: Any) -> None:
    result = fitted(CLIP, config(pipeline, bits=8, deletion={"block": None, "count": 0}))
    set_backend(result.model, "simulated")
    simulated = CLIP.run(result.model)
    if result.config.simulated_reason is not None:
        assert "no integer kernel" in result.config.simulated_reason
        with pytest.raises(ValueError, match="cannot run this layer"):
            set_backend(result.model, "reference")
        return
    for backend in ["reference", "int_mm"] + (["onednn"] if machine_reason() is None else []):
        set_backend(result.model, backend)
        difference = (CLIP.run(result.model) - simulated).norm() / simulated.norm()
        assert (
            difference < 0.02
        )  # float32 sums differ in the last bit, and now and then a code of a later layer with them


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "all-points"])
@pytest.mark.parametrize("pipeline", PIPELINES[6:], ids=label)
def test_compiled_in_one_graph_equals_eager(pipeline: Any, attention: bool) -> None:
    model = fitted(CLIP, config(pipeline, attention=attention)).model
    expected = CLIP.run(model)
    torch.compiler.reset()
    assert torch.equal(CLIP.run(torch.compile(model, fullgraph=True, backend="eager")), expected)


def test_the_command_line_quantizes_with_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum.commands.optimum_cli import main

    def command(*extra: str) -> None:
        sizes = ("--num-samples", "48", "--num-report", "32", "--batch-size", "16")
        options = ("--model", "planted-outlier", "--preset", "w8a8", *sizes)
        limits = ("--set", "search.num_copies=[1]", "--set", "search.max_delete=4", "--set", "search.blocks_before=0")
        monkeypatch.setattr("sys.argv", ["optimum-cli", "regcache", "quantize", *options, *limits, *extra])
        main()

    with pytest.raises(SystemExit):
        command("--help")
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in METHODS)
    command("--method", "mse", "gptq", "--quantize-attention", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    assert "mse + gptq, alone" in printed
    assert "quantized: linear layers and attention products" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [m["name"] for m in results["methods"]] == ["mse", "gptq"]
    assert results["protocol"] == "linear layers and attention products"
    assert results["simulated"] == "the attention products are simulated"
    assert RegCacheConfig(**results["recipe"]["quantization"]).methods == tuple(results["methods"])
    with pytest.raises(SystemExit):
        command("--method", "mse", "rtn", "--output", str(tmp_path / "other"))
    assert "rtn and mse both decide the input scales" in capsys.readouterr().err


def test_mixed_precision_layers_of_a_dual_model_are_found_in_its_tower_alone(tmp_path: Path) -> None:
    dual = COMPOSITES["clip_dual"]
    result = fitted(dual, config(["mixed_precision"], bits=8))
    assert all(name.startswith("encoder.layers.") for name in result.config.modules.mixed_precision)
    result.model.save_pretrained(tmp_path)
    tower = CLIPVisionModel.from_pretrained(tmp_path)
    bits = {module.activations.bits for _, module in quant_linears(tower)}
    assert bits == {8, 16}


def test_layers_of_one_group_with_other_bits_keep_their_own_scale() -> None:
    mixed = {"mixed_precision": ["self_attn.k_proj"]}
    plain = fitted(CLIP, config(["rtn"], bits=8, modules=mixed))
    for name in ("output_mse", "repq_vit"):
        result = fitted(CLIP, config([{"name": name, **QUICK.get(name, {})}], bits=8, modules=mixed))
        for (_, a), (_, b) in zip(quant_linears(plain.model), quant_linears(result.model), strict=True):
            if a.activations.bits == 16:
                torch.testing.assert_close(b.input_scale, a.input_scale)


def test_without_importance_the_whole_range_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 8, generator=generator), torch.randn(3, 8, generator=generator)
    importance = torch.ones(20, 3)
    importance[:, 1] = 0
    found = search_scales(
        LayerGroup(x, [weight], [importance]), WeightsConfig(4), ActivationsConfig(bits=4), SearchSpace(count=20)
    )
    assert found.weight_scales is not None
    assert float(found.weight_scales[0][1]) == pytest.approx(float(weight[1].abs().max()) / 7.5, rel=1e-5)


# single methods


def test_gptq_lowers_the_error_of_the_layer_output_that_rtn_leaves() -> None:
    plain = fitted(CLIP, config(["rtn"]))
    better = fitted(CLIP, config(["rtn", "gptq"]))
    target = CLIP.run(plain.float_model)
    assert (CLIP.run(better.model) - target).norm() < (CLIP.run(plain.model) - target).norm()
    for (name, a), (_, b) in zip(quant_linears(plain.model), quant_linears(better.model), strict=True):
        assert torch.equal(a.weight_scale, b.weight_scale), name
        assert not torch.equal(a.weight, b.weight), name


def test_bias_correction_takes_the_mean_error_out_of_the_last_layer() -> None:
    results = {name: fitted(CLIP, config(list(name))) for name in (("rtn",), ("rtn", "bias_correction"))}
    name = linear_groups(results["rtn",].float_model, config(["rtn"]))[-1].names[0]
    errors = {}
    for key, result in results.items():
        outputs: list[torch.Tensor] = []
        for model in (result.model, result.float_model):
            handle = model.get_submodule(name).register_forward_hook(lambda m, i, o, kept=outputs: kept.append(o))
            CLIP.run(model, CLIP.inputs(seed=2, batch=4))
            handle.remove()
        errors[key] = float((outputs[0] - outputs[1]).mean((0, 1)).norm())
    assert errors["rtn", "bias_correction"] < 0.5 * errors["rtn",]


def test_noisyquant_vectors_change_nothing_where_rounding_does_not() -> None:
    """With inputs that are hardly rounded, an installed vector leaves the output as it is: it is folded exactly."""
    from optimum_regcache.methods.base import PipelineState
    from optimum_regcache.methods.noisyquant import _install

    plain = config(
        [{"name": "noisyquant", **QUICK["noisyquant"]}], activations={"bits": 16}, deletion={"block": None, "count": 0}
    )
    result = fitted(CLIP, plain)
    for _, layer in quant_linears(result.model):  # room for the vector, and for what calibration did not see
        layer.set_input_qparams(layer.input_scale * 2, layer.input_zero_point)
    before = CLIP.run(result.model)
    fit = PipelineState(result.config, (), result.float_model, result.float_model, [], result.model)
    generator = torch.Generator().manual_seed(0)
    roles = set()
    for group in linear_groups(result.float_model, result.config):
        layers = [fit.quant_linear(n) for n in group.names]
        vector = (torch.rand(layers[0].in_features, generator=generator) - 0.5) * 0.2
        _install(fit, group, layers, vector)
        roles.add(group.role)
    assert roles == {"norm1", "attention", "norm2", "activation"}
    torch.testing.assert_close(CLIP.run(result.model), before, atol=5e-3, rtol=1e-3)
    assert not torch.equal(CLIP.run(result.model), before)


def test_mixed_precision_takes_the_planted_layer() -> None:
    model = planted.build_planted_model()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": planted_images(model, images)}
    c = RegCacheConfig.from_preset("w8a8").replace(
        registers={"mode": "none"}, methods=[MixedPrecision(layers=1).to_dict()]
    )
    result = quantize_with(model, resolve(c), None, [batch], progress=False)
    assert result.measured["mixed_precision"]["layers"] == ["vit." + result.config.modules.mixed_precision[0]]
    assert "layers.3.mlp.fc2" in result.config.modules.mixed_precision[0]
    assert "16-bit inputs" in (result.config.simulated_reason or "")


def planted_images(model: Any, fallback: torch.Tensor) -> torch.Tensor:
    size = model.config.image_size
    return torch.nn.functional.interpolate(fallback, size=(size, size))


def test_the_oracle_scales_outlier_tokens_by_themselves_and_no_other() -> None:
    result = fitted(CLIP, config(["oracle"], registers=False))
    _, layer = next(quant_linears(result.model))
    scale = float(layer.input_scale)
    x = torch.randn(1, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * scale
    x[0, 2] *= 100.0
    rounded = layer.rounded_input(x)
    assert (rounded[0, 2] - x[0, 2]).abs().max() <= x[0, 2].abs().max() / 7 / 2 * 1.001  # nothing is clipped
    normal = [0, 1, 3, 4]
    assert torch.equal(rounded[0, normal] / scale, (x[0, normal] / scale).round())


# attention products


@pytest.mark.parametrize("tiny", TOWERS.values(), ids=lambda t: t.name)
def test_products_that_pass_operands_on_equal_native_attention(tiny: TinyModel) -> None:
    from optimum_regcache.config import AttentionConfig
    from optimum_regcache.layers.attention import install_products

    model = tiny.build()
    prepare_tower(model)
    set_registers(model, random_cache((2, 3), registers=2, num_copies=3.0))
    expected = tiny.run(model)
    install_products(model, AttentionConfig(quantize=True), bypass=True)
    torch.testing.assert_close(tiny.run(model), expected, atol=2e-4, rtol=1e-4)
    install_products(model, AttentionConfig())
    assert torch.equal(tiny.run(model), expected)


def test_quantized_products_are_calibrated_per_head_and_leave_registers_alone() -> None:
    c = config(["rtn"], bits=8, attention=True).replace(attention={"granularity": "per_head"})
    result = fitted(CLIP, c)
    products = [p for _, p in attention_products(result.model)]
    assert len(products) == 4
    for product in products:
        assert product.query.scale.shape == (4,)
        assert product.probabilities.scale.shape == (1,)
    cache = get_register_cache(result.model)
    assert cache is not None
    assert torch.equal(cache.rows(2)[0], random_cache((2, 3), num_copies=2.0).rows(2)[0])
    linear_only = fitted(CLIP, config(["rtn"], bits=8))
    target = CLIP.run(result.float_model)
    assert (CLIP.run(result.model) - target).norm() > 0.5 * (CLIP.run(linear_only.model) - target).norm()
    products[0].query.scale.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"attention operand 'query' was never calibrated"):
        CLIP.run(result.model)
