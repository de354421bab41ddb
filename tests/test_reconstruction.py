"""Reconstruction on tiny models: exact forms and gradients, better than round to nearest on unseen images, compositions."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from models import MODELS, TOWERS, TinyModel, random_cache
from torch.nn import functional as F

from optimum_regcache import RegCacheConfig, set_backend
from optimum_regcache.encoders.passes import encode
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import QuantLinear, quant_linears
from optimum_regcache.math import uniform
from optimum_regcache.math.uniform import weight_qparams
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.methods._reconstruction.parametrise import FullWeight, LowRank, RoundingOffsets
from optimum_regcache.methods._reconstruction.ste import LearnedScale, quantize_through, round_through
from optimum_regcache.methods.gptq import WeightGrid
from optimum_regcache.methods.reconstruction import GLFQ, Light, Reconstruction

CLIP = TOWERS["clip"]
SHORT = {"name": "reconstruction", "iterations": 25, "batch": 8, "learning_rate": 2e-3}
PLACED = {"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}


def configured(methods: list[Any], registers: bool = True, **parts: Any) -> RegCacheConfig:
    base = RegCacheConfig.from_preset("w4a4").replace(methods=tuple(methods))
    if registers:
        return base.replace(registers=PLACED, deletion={"block": 2, "count": 2}).replace(**parts)
    return base.replace(registers={"mode": "none"}).replace(**parts)


def reconstructed(config: RegCacheConfig, tiny: TinyModel = CLIP, work_dir: Path | None = None) -> Any:
    """A fit on 24 images."""

    def make() -> Any:
        cache = random_cache((2, 3), num_copies=2.0) if config.registers.mode == "fixed" else None
        batches = [tiny.inputs(seed=2, batch=16), tiny.inputs(seed=3, batch=8)]
        return quantize_with(tiny.build(), resolve(config), cache, batches, False, work_dir)

    return make() if work_dir is not None else fits.once(("reconstruction", tiny.name, repr(config)), make)


def unseen_cosine(result: Any, tiny: TinyModel = CLIP) -> float:
    images = [tiny.inputs(seed=9, batch=32)]
    return float(F.cosine_similarity(encode(result.model, images), encode(result.float_model, images)).mean())


def records(result: Any, name: str = "reconstruction") -> list[dict[str, Any]]:
    return result.measured[name]["blocks"]


def grid_of(weight: torch.Tensor, bits: int = 4, symmetric: bool = True) -> WeightGrid:
    return WeightGrid(*weight_qparams(weight, bits, "per_channel", "minmax", symmetric), bits)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# forms


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_those_of_simulated_quantization(symmetric: bool) -> None:
    x, scale = drawn(50, 7) * 3, torch.tensor(0.31)
    zero = torch.tensor(0 if symmetric else 6, dtype=torch.int32)
    expected = uniform.fake_quantize(x, scale, zero, 4, symmetric)
    assert torch.equal(quantize_through(x, scale, zero, 4, symmetric), expected)
    assert torch.equal(LearnedScale(scale, zero).value(), scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scale_gets_the_gradient_of_a_rounding_error_that_stays(symmetric: bool) -> None:
    x, scale = drawn(60, seed=3).double() * 2, torch.tensor(0.27, dtype=torch.float64)
    zero = torch.tensor(0 if symmetric else 7)
    lowest, highest = uniform.code_range(4, symmetric)
    error = (x / scale).round() - x / scale  # straight through: a constant

    def value(s: torch.Tensor) -> torch.Tensor:
        return ((x / s + error + zero).clamp(lowest, highest) - zero) * s

    step = 1e-7
    numeric = (value(scale + step) - value(scale - step)) / (2 * step)
    leaf, inputs = scale.clone().requires_grad_(), x.clone().requires_grad_()
    found = quantize_through(inputs, leaf, zero, 4, symmetric)
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(found[i], leaf, retain_graph=True)
        code = float((x[i] / scale).round() + zero)
        if code not in (lowest, highest):  # the surrogate has a kink there
            assert float(gradient) == pytest.approx(float(numeric[i]), rel=1e-4, abs=1e-6)
    (through,) = torch.autograd.grad(found.sum(), inputs)
    raw = (x / scale).round() + zero
    assert torch.equal(through, ((raw >= lowest) & (raw <= highest)).double())
    assert ((raw < lowest) | (raw > highest)).any()


def test_rounding_passes_its_gradient_on() -> None:
    x = drawn(5).requires_grad_()
    (3 * round_through(x)).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_merged_low_rank_is_one_quantized_layer(symmetric: bool) -> None:
    weight = drawn(12, 20)
    grid = grid_of(weight, symmetric=symmetric)
    trained = LowRank(weight, grid, 3, torch.Generator().manual_seed(1))
    start = uniform.weight_codes(weight, grid.scale, grid.zero_point, 4)
    assert torch.equal(trained.merged()[0], start)  # B = 0
    with torch.no_grad():
        trained.left.copy_(drawn(12, 3, seed=2) * 0.2)
        codes, scale = trained.merged()
        whole = uniform.weight_codes(weight + trained.left @ trained.right, grid.scale, grid.zero_point, 4)
    assert torch.equal(codes, whole)
    assert not torch.equal(codes, start)
    assert torch.equal(scale, grid.scale)
    value = (codes - grid.zero_point[:, None]) * scale[:, None]
    assert torch.equal(trained.weight(hard=True), value)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_offsets_choose_between_floor_and_ceiling(symmetric: bool) -> None:
    weight = drawn(12, 20)
    grid = grid_of(weight, symmetric=symmetric)
    trained = RoundingOffsets(weight, grid)
    inside = uniform.weight_codes(weight, grid.scale, grid.zero_point, 4).abs() < 7
    error = (trained.weight(hard=False).detach() - weight)[inside].abs().max()
    assert float(error) < 1e-5  # starts at the float weight
    assert torch.equal(trained.merged()[0], uniform.weight_codes(weight, grid.scale, grid.zero_point, 4))
    with torch.no_grad():
        trained.offsets.copy_(drawn(12, 20, seed=5) * 9)
    steps = weight / grid.scale[:, None] + grid.zero_point[:, None]
    codes, scale = trained.merged()
    assert bool(((codes == steps.floor()) | (codes == steps.ceil()))[inside].all())
    assert torch.equal(scale, grid.scale)
    assert trained.penalty(0.1) is None
    undecided = RoundingOffsets(grid.scale[:, None] * 0.5 + torch.zeros(12, 4), grid)
    with torch.no_grad():
        assert float(undecided.penalty(1.0)) == pytest.approx(1.0)
        assert float(trained.penalty(1.0)) < 0.5


def test_all_weights_start_at_round_to_nearest_and_end_as_they_were_multiplied() -> None:
    weight = drawn(12, 20)
    grid = grid_of(weight)
    trained = FullWeight(weight, grid)
    codes, scale = trained.merged()
    assert torch.equal(codes, uniform.weight_codes(weight, grid.scale, grid.zero_point, 4))
    assert torch.equal(scale, grid.scale)
    with torch.no_grad():
        trained.leaf.add_(drawn(12, 20, seed=4) * 0.1)
        trained.scale.theta.add_(drawn(12, seed=6) * 0.1)
    codes, scale = trained.merged()
    assert torch.equal(trained.weight(hard=False), codes * scale[:, None])


# training


@pytest.mark.parametrize("parametrisation", ["full", "low_rank", "adaround"])
@pytest.mark.parametrize("loss", ["block", "block_and_feature"])
def test_every_block_learns_and_unseen_images_gain(parametrisation: str, loss: str) -> None:
    plain = unseen_cosine(reconstructed(configured([])))
    result = reconstructed(configured([{**SHORT, "parametrisation": parametrisation, "loss": loss}]))
    assert unseen_cosine(result) > plain + 0.001
    found = records(result)
    assert [r["block"] for r in found] == [0, 1, 2, 3]
    assert all(r["end"] < r["start"] for r in found if r["trained"])
    assert sum(r["trained"] for r in found) >= 3
    assert all(r["iterations"] == 25 for r in found)


def test_all_weights_are_at_least_as_good_as_a_low_rank() -> None:
    full, low = (
        unseen_cosine(reconstructed(configured([{**SHORT, "parametrisation": p}]))) for p in ("full", "low_rank")
    )
    assert full > low - 0.01


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    config = configured([{**SHORT, "iterations": 5}])
    cache = random_cache((2, 3), num_copies=2.0)
    first, second, other = (
        fits.fingerprint(quantize_with(CLIP.build(), resolve(c), cache, [CLIP.inputs(2, 24)], False).model)
        for c in (config, config, configured([{**SHORT, "iterations": 5, "seed": 1}]))
    )
    assert first == second
    assert first != other


def test_a_block_that_does_not_get_better_stays_as_it_was() -> None:
    plain = reconstructed(configured(["rtn"]))
    config = configured([{**SHORT, "iterations": 2, "learning_rate": 100.0, "scale_learning_rate": 5.0}])
    result = reconstructed(config)
    found = records(result)
    assert not any(r["trained"] for r in found)
    assert all(r["end"] == r["start"] for r in found)
    state = result.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.model.state_dict().items())


def test_scales_stay_where_they_are_not_to_be_learned() -> None:
    plain = reconstructed(configured([]))
    fixed = {**SHORT, "parametrisation": "adaround", "activation_scales": False}
    result = reconstructed(configured([fixed]))
    for (_, before), (_, after) in zip(quant_linears(plain.model), quant_linears(result.model), strict=True):
        assert torch.equal(before.input_scale, after.input_scale)
        assert torch.equal(before.weight_scale, after.weight_scale)
        assert int((before.codes().int() - after.codes().int()).abs().max()) <= 1


def test_layers_that_read_one_tensor_share_its_scale() -> None:
    result = reconstructed(configured([SHORT]))
    layers = dict(quant_linears(result.model))
    plain = dict(quant_linears(reconstructed(configured([])).model))
    moved = 0
    for name, layer in layers.items():
        if name.endswith("q_proj"):
            others = [layers[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
            assert all(torch.equal(layer.input_scale, other.input_scale) for other in others)
            moved += int(not torch.equal(layer.input_scale, plain[name].input_scale))
    assert moved > 0


# compositions


COMPOSED = [
    (["rotation"], {}),
    (["repq_vit"], {"attention": {"quantize": True, "bits": 4}}),
    (["mse"], {"deletion": {"block": 3, "count": 2}}),
    (["dynamic"], {}),
    (["bias_correction"], {"deletion": {"block": 2, "count": 2, "action": "replace"}}),
    ([], {"deletion": {"block": 3, "count": 2, "action": "late", "fill": "none"}}),
    ([], {"deletion": {"block": 2, "count": 2, "action": "per_token"}}),
    ([], {"deletion": {"block": 2, "count": 4, "rule": "threshold", "kappa": 1.05}}),
    (["ptq4vit"], {}),
]


@pytest.mark.parametrize(("others", "parts"), COMPOSED, ids=lambda v: "+".join(map(str, v)))
def test_it_works_with_other_methods_and_every_deletion(others: list[str], parts: dict[str, Any]) -> None:
    quick = {"candidates": 8, "rounds": 1, "draws": 1, "max_images": 4, "max_tokens": 40}
    named = [{"name": n, **quick} if n == "ptq4vit" else {"name": n} for n in others]
    plain = reconstructed(configured(named, **parts))
    result = reconstructed(configured([*named, {**SHORT, "iterations": 10}], **parts))
    assert unseen_cosine(result) > unseen_cosine(plain) - 0.01
    assert sum(r["trained"] for r in records(result)) >= 2


@pytest.mark.parametrize("name", ["siglip2", "dinov2_swiglu", "dinov3", "clip_dual"])
def test_every_kind_of_encoder_can_be_reconstructed(name: str) -> None:
    tiny = MODELS[name]
    result = reconstructed(configured([{**SHORT, "iterations": 10}]), tiny)
    assert unseen_cosine(result, tiny) > unseen_cosine(reconstructed(configured([]), tiny), tiny) - 0.02
    assert any(r["trained"] for r in records(result))


def test_attention_operands_learn_their_scales() -> None:
    attention = {"attention": {"quantize": True, "bits": 4}}
    plain, result = (reconstructed(configured(m, **attention)) for m in ([], [SHORT]))
    moved = {
        before.role
        for (_, a), (_, b) in zip(attention_products(plain.model), attention_products(result.model), strict=True)
        for (_, before), (_, after) in zip(a.operands(), b.operands(), strict=True)
        if not torch.equal(before.scale, after.scale)
    }
    assert moved == {"query", "key", "value"}


def test_the_result_is_plain_saved_exactly_and_runs_on_integers(tmp_path: Path) -> None:
    result = reconstructed(configured(["rotation", {**SHORT, "iterations": 10}]))
    plain = reconstructed(configured(["rotation"]))
    shapes = {n: (t.shape, t.dtype) for n, t in result.model.state_dict().items()}
    assert shapes == {n: (t.shape, t.dtype) for n, t in plain.model.state_dict().items()}
    assert result.config.simulated_reason is None
    result.model.save_pretrained(tmp_path)
    loaded = CLIP.model_class.from_pretrained(tmp_path)
    expected = CLIP.run(result.model)
    assert torch.equal(CLIP.run(loaded), expected)
    for backend in ("simulated", "reference"):
        set_backend(loaded, backend)
        torch.testing.assert_close(CLIP.run(loaded), expected, rtol=1e-4, atol=1e-4)
    assert all(isinstance(layer, QuantLinear) and layer._runtime is not None for _, layer in quant_linears(loaded))


def test_it_decides_the_weight_codes_alone() -> None:
    for name in ("reconstruction", "light", "glf_q"):
        with pytest.raises(ValueError, match=f"gptq and {name} both decide the weight codes; use one of them"):
            resolve(configured(["gptq", name]))


def test_a_search_judges_without_it() -> None:
    resolved = resolve(configured(["rotation", "mse", "light"]))
    assert [m.name for m in resolved.untrained().methods] == ["mse", "rotation"]
    assert resolve(resolved.untrained().config) == resolved.untrained()


REFUSED = [
    (
        {"parametrisation": "half"},
        r"reconstruction\.parametrisation must be one of full, low_rank, adaround; got 'half'",
    ),
    ({"loss": "features"}, r"reconstruction\.loss must be one of block, block_and_feature; got 'features'"),
    ({"rank": 0}, r"reconstruction\.rank must be at least 1, got 0"),
    ({"iterations": 0}, r"reconstruction\.iterations must be at least 1, got 0"),
    ({"batch": 0}, r"reconstruction\.batch must be at least 1, got 0"),
    ({"learning_rate": 0.0}, r"reconstruction\.learning_rate must be > 0 and finite, got 0\.0"),
    ({"scale_learning_rate": float("inf")}, r"reconstruction\.scale_learning_rate must be > 0 and finite, got inf"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda v: str(v)[:20])
def test_other_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reconstruction(**values)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reconstruction\.rank=4 has no effect: parametrisation='full' has no rank"):
        resolve(configured([{"name": "reconstruction", "rank": 4}]))
    with pytest.raises(ValueError, match=r"light\.activation_scales=False has no effect: dynamic activations have no"):
        resolve(configured(["dynamic", {"name": "light", "activation_scales": False}]))


def test_one_image_is_too_few() -> None:
    config = configured(["light"], registers=False)
    with pytest.raises(ValueError, match=r"needs at least 2 of them .*, got 1. Use more images"):
        quantize_with(CLIP.build(), resolve(config), None, [CLIP.inputs(2, 1)], False)


def test_presets_differ_by_their_defaults_only() -> None:
    assert {type(m).parametrise for m in (Light(), GLFQ())} == {Reconstruction.parametrise}
    assert GLFQ().iterations == 3000
    assert GLFQ().batch == 32
    assert Light().iterations < Reconstruction().iterations
