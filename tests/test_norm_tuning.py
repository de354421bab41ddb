"""Norm tuning: what it may change, what it may not, and that it helps on images that it did not see."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPOSITES, PACKED, TOWERS, TinyModel, random_cache
from transformers import AutoModel

from optimum_regcache import RegCacheConfig
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.methods import norm_tuning, quantize_with, resolve
from optimum_regcache.methods.norm_tuning import NormTuning
from optimum_regcache.registers import get_register_cache

CLIP = TOWERS["clip"]
QUICK = {"name": "norm_tuning", "iterations": 3, "batch": 4, "learning_rate": 0.02}
FIXED = {"registers": {"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}, "deletion": {"block": 2, "count": 2}}
NONE = {"registers": {"mode": "none"}}


def fitted(tiny: TinyModel, methods: list[Any], bits: str = "w4a4", model: Any = None, **parts: Any) -> Any:
    """Fit on 20 images; norm tuning holds 5 out."""
    config = RegCacheConfig.from_preset(bits).replace(**{**FIXED, **parts}, methods=methods)
    rows = random_cache((2, 3), num_copies=2.0) if config.registers.mode == "fixed" else None
    batches = [tiny.inputs(seed=seed, batch=10) for seed in (2, 3)]
    return quantize_with(model or tiny.build(), resolve(config), rows, batches, progress=False)


def changed(a: Any, b: Any) -> set[str]:
    """Names of the tensors that differ between two models."""
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    return {name for name in one if not torch.equal(one[name], other[name])}


def kind(name: str) -> str:
    if name.endswith(("register_key", "register_value")):
        return "registers"
    return "layer_scale" if "lambda1" in name else "norms" if "norm" in name or "layrnorm" in name else name


@cache
def gain(family: str) -> tuple[float, dict[str, Any], set[str], set[str]]:
    """(gain on unseen images, what was measured, kinds of tensors that changed, of the caller's model)."""
    tiny = TOWERS[family]
    model, untouched = tiny.build(), tiny.build()
    plain = fitted(tiny, ["rtn"])
    tuned = fitted(tiny, ["rtn", {**QUICK, "iterations": 60, "batch": 8, "learning_rate": 0.005}], model=model)
    unseen = CosineObjective(model, [tiny.inputs(seed=seed, batch=16) for seed in (12, 13)])
    better = float((unseen.scores(tuned.model) - unseen.scores(plain.model)).mean())
    return (
        better,
        tuned.measured["norm_tuning"],
        set(map(kind, changed(plain.model, tuned.model))),
        changed(model, untouched),
    )


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
def test_only_float_tensors_change_and_unseen_features_come_closer(family: str) -> None:
    better, record, kinds, own = gain(family)
    expected = {"norms", "registers"} | ({"layer_scale"} if family == "dinov2" else set())
    assert kinds == expected == set(record["tensors"])
    assert not own
    assert record["installed"]
    assert record["gain"] == pytest.approx(record["end"] - record["start"], abs=1e-6)
    assert (record["trained_on"], record["held_out"]) == (15, 5)
    assert record["gain"] > record["gain_error"] > 0
    assert better > 0


@pytest.mark.parametrize("part", ["norms", "layer_scale", "registers"])
def test_each_part_can_be_left_out(part: str) -> None:
    dinov2 = TOWERS["dinov2"]
    result = fitted(dinov2, ["rtn", {**QUICK, "iterations": 10, "learning_rate": 0.01, part: False}])
    kinds = set(map(kind, changed(fitted(dinov2, ["rtn"]).model, result.model)))
    assert kinds == {"norms", "layer_scale", "registers"} - {part}


COMPOSITIONS = {
    "gptq, rotation, bias correction": (["rotation", "mse", "gptq", "bias_correction"], {}),
    "dynamic": (["dynamic"], {}),
    "attention products": (["mse"], {"attention": {"quantize": True, "bits": 4}}),
    "oracle": (["oracle"], {"deletion": {}}),
    "per token": (["rtn"], {"deletion": {"block": 2, "count": 2, "action": "per_token"}}),
    "replace": (["rtn"], {"deletion": {"block": 2, "count": 2, "action": "replace"}}),
    "late deletion": (["rtn"], {"deletion": {"block": 2, "count": 2, "action": "late"}}),
    "patch embedding": (["rtn"], {"modules": {"patch_embedding": True}}),
    "no registers": (["rtn"], NONE),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composes_with_the_rest_and_never_installs_what_is_worse_on_held_out_images(name: str) -> None:
    methods, parts = COMPOSITIONS[name]
    plain, tuned = fitted(CLIP, methods, **parts), fitted(CLIP, [*methods, QUICK], **parts)
    record = tuned.measured["norm_tuning"]
    assert set(map(kind, changed(plain.model, tuned.model))) <= {"norms", "registers"}
    assert record["end"] >= record["start"]
    batch = CLIP.inputs(seed=3, batch=10)
    held_out = CosineObjective(CLIP.build(), [{key: value[5:] for key, value in batch.items()}])
    for result, expected in ((plain, record["start"]), (tuned, record["end"])):
        assert float(held_out.scores(result.model).mean()) == pytest.approx(expected, abs=1e-4)


def test_the_start_is_kept_where_nothing_is_better() -> None:
    plain = fitted(CLIP, ["rtn"])
    tuned = fitted(CLIP, ["rtn", {**QUICK, "learning_rate": 50.0}])
    record = tuned.measured["norm_tuning"]
    assert (record["best_iteration"], record["gain"], record["gain_error"], record["installed"]) == (0, 0.0, 0.0, False)
    assert not changed(plain.model, tuned.model)
    assert tuned.config.registers.num_copies == 2.0


def test_a_gain_within_its_standard_error_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CosineObjective.scores

    def noisy(objective: CosineObjective, model: Any) -> torch.Tensor:
        scores = real(objective, model)
        first = not hasattr(objective, "asked")
        objective.asked = True  # type: ignore[attr-defined]
        return torch.zeros(5) if first and len(scores) == 5 else torch.tensor([1.0, -1.0, 0.5, -0.4, 0.1])

    monkeypatch.setattr(norm_tuning.CosineObjective, "scores", noisy)
    tuned = fitted(CLIP, ["rtn", QUICK])
    record = tuned.measured["norm_tuning"]
    assert (record["best_iteration"], record["installed"], record["end"]) == (3, False, 0.0)
    assert 0 < record["gain"] < record["gain_error"]
    monkeypatch.undo()
    assert not changed(fitted(CLIP, ["rtn"]).model, tuned.model)


def test_patience_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_tuning, "EVALUATE_EVERY", 1)
    record = fitted(CLIP, ["rtn", {**QUICK, "learning_rate": 50.0, "patience": 2}]).measured["norm_tuning"]
    assert (record["iterations"], record["stopped"]) == (2, "patience")


def test_a_step_that_is_not_finite_ends_it_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = norm_tuning.image_features, [0]

    def broken(model: Any, batch: Any) -> torch.Tensor:
        calls[0] += 1
        return real(model, batch) * (float("nan") if calls[0] == 2 else 1.0)

    monkeypatch.setattr(norm_tuning, "image_features", broken)
    tuned = fitted(CLIP, ["rtn", QUICK])
    record = tuned.measured["norm_tuning"]
    assert (record["iterations"], record["stopped"], record["best_iteration"]) == (2, "not finite", 0)
    assert not changed(fitted(CLIP, ["rtn"]).model, tuned.model)


def test_the_same_arguments_give_the_same_bits_and_another_seed_others() -> None:
    first, second, other = (fitted(CLIP, ["rtn", {**QUICK, "seed": seed}]) for seed in (0, 0, 1))
    assert not changed(first.model, second.model)
    assert first.measured == second.measured
    assert first.config == second.config
    assert changed(first.model, other.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stored_model_is_the_tuned_one(tmp_path: Path, dtype: torch.dtype) -> None:
    methods = ["rotation", {**QUICK, "iterations": 10, "learning_rate": 0.01}]
    result = fitted(CLIP, methods, model=CLIP.build().to(dtype))
    assert result.measured["norm_tuning"]["installed"]
    result.model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert not changed(result.model, opened)
    copies = result.config.registers.num_copies
    assert isinstance(copies, tuple)
    assert all(get_register_cache(m).num_copies == copies for m in (opened, result.model))
    assert get_register_cache(result.float_model).num_copies == 2.0  # it computes what the caller's model does
    assert opened.config.quantization_config == result.config
    assert torch.equal(CLIP.run(opened), CLIP.run(result.model))


def test_nothing_is_left_for_gradients_and_the_text_tower_is_shared() -> None:
    dual = COMPOSITES["clip_dual"]
    model = dual.build()
    result = fitted(dual, ["rtn", QUICK], model=model)
    assert not any(p.requires_grad or p.grad is not None for p in result.model.parameters())
    assert all(layer._runtime is None and layer._for_gradients is None for _, layer in quant_linears(result.model))
    assert not changed(model, dual.build())
    assert (
        result.model.text_model.final_layer_norm.weight.data_ptr()
        == model.text_model.final_layer_norm.weight.data_ptr()
    )


@pytest.mark.parametrize("tiny", [TOWERS["siglip2"], PACKED["qwen3_vl"]], ids=lambda t: t.name)
def test_padded_and_packed_images(tiny: TinyModel) -> None:
    result = fitted(tiny, ["rtn", QUICK], deletion={}, bits="w8a8")
    assert result.measured["norm_tuning"]["end"] >= result.measured["norm_tuning"]["start"]
    assert result.measured["norm_tuning"]["trained_on"] == 15


REFUSED = [
    ({"iterations": 0}, "norm_tuning.iterations must be at least 1, got 0"),
    ({"batch": 0}, "norm_tuning.batch must be at least 1, got 0"),
    ({"patience": 0}, "norm_tuning.patience must be at least 1, got 0"),
    ({"learning_rate": 0.0}, "norm_tuning.learning_rate must be > 0 and finite, got 0.0"),
    ({"learning_rate": float("inf")}, "norm_tuning.learning_rate must be > 0 and finite, got inf"),
    ({"holdout": 1.0}, "norm_tuning.holdout must be between 0 and 1, got 1.0"),
    ({"norms": False, "layer_scale": False, "registers": False}, "norm_tuning trains nothing"),
]


@pytest.mark.parametrize(("parameters", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_parameters_are_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormTuning(**parameters)


def test_what_cannot_be_trained_is_refused_before_the_fit() -> None:
    with pytest.raises(ValueError, match=r"layer_scale=False has no effect: CLIP has no LayerScale"):
        fitted(CLIP, ["rtn", {**QUICK, "layer_scale": False}])
    with pytest.raises(
        ValueError, match=r"nothing to train: CLIP has no LayerScale, and norms and registers are false"
    ):
        fitted(CLIP, ["rtn", {**QUICK, "norms": False, "registers": False}])
    config = RegCacheConfig.from_preset("w8a8").replace(**NONE, methods=[QUICK])
    with pytest.raises(ValueError, match=r"at least 3 calibration images, one to train on and two to judge by; got 2"):
        quantize_with(CLIP.build(), resolve(config), None, [CLIP.inputs(batch=2)], progress=False)
    with pytest.raises(ValueError, match=r"norm_tuning.registers=False has no effect: registers.mode is 'none'"):
        resolve(config.replace(methods=[{**QUICK, "registers": False}]))
    with pytest.raises(ValueError, match=r"norm_tuning.norms=False has no effect: without registers nothing is left"):
        resolve(config.replace(methods=[{**QUICK, "norms": False, "layer_scale": False}]))


def test_registers_alone_where_a_search_installed_none_is_said() -> None:
    config = RegCacheConfig.from_preset("w8a8").replace(methods=[{**QUICK, "norms": False}])
    nothing = config.replace(**NONE)
    resolved = resolve(config).installing(nothing.registers, nothing.deletion)
    result = quantize_with(CLIP.build(), resolved, None, [CLIP.inputs(batch=3)], progress=False)
    assert result.measured["norm_tuning"] == {"note": "nothing to train: no registers are installed"}
