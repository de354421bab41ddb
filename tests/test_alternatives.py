"""Other quantizers beside a result: judged on the confirmation images, refused ones with their reason."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer, SearchConfig
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.reference import load
from optimum_regcache.encoders.sharing import shared_copy
from optimum_regcache.evaluation.targets import Targets
from optimum_regcache.search import alternatives
from optimum_regcache.search.alternatives import SCHEMES, Alternative, Scheme, find_alternatives
from optimum_regcache.search.objectives import objective_on
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.run import QuantizationRun, run_plan

NAMES = [scheme.name for scheme in SCHEMES if scheme.most_bits >= 8]
DYNAMIC = SCHEMES[0]
DATA = DataConfig(num_samples=32, batch_size=16)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return load("planted-outlier")


@pytest.fixture(scope="module")
def images(encoder: Any) -> ReferenceImages:
    return ReferenceImages(encoder.dataset("search", 32, 0), encoder.processor)


def made(encoder: Any, images: ReferenceImages, **parts: Any) -> QuantizationRun:
    config = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"}).replace(**parts)
    return run_plan(encoder.model, images, QuantizationPlan.of(Recipe(config, data=DATA)), progress=False)


@pytest.fixture(scope="module")
def plain(encoder: Any, images: ReferenceImages) -> QuantizationRun:
    return made(encoder, images)


def found_for(encoder: Any, images: ReferenceImages, run: QuantizationRun) -> alternatives.Recommendation:
    model = run.quantized.model
    return find_alternatives(encoder.model, model, run.recipe, images, known=run.fit, progress=False)


def test_scales_per_token_repair_what_the_outliers_spoil(
    encoder: Any, images: ReferenceImages, plain: QuantizationRun
) -> None:
    found = found_for(encoder, images, plain)
    assert found.images == len(images.split(DATA, 0).confirmation) == 8
    assert found.alternatives[0].name == "dynamic per token"
    assert {a.name for a in found.alternatives} == set(NAMES)
    scores = [a.score for a in found.alternatives if a.score is not None]
    assert scores == sorted(scores, reverse=True)
    better = found.better
    assert better is not None
    assert better is found.alternatives[0]
    assert better.options == ("--no-registers", "--method", "dynamic")
    assert better.gain is not None
    assert better.gain == pytest.approx((better.score or 0) - found.score, abs=1e-5)
    assert better.gain > 0.3 > found.min_gain
    assert found.ceiling == pytest.approx(1)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["better"] == "dynamic per token"


def test_python_makes_the_better_one(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "SCHEMES", (DYNAMIC,))
    quantizer = RegCacheQuantizer(encoder.model, encoder.processor)
    pictures: dict[str, Any] = {"calibration_dataset": encoder.dataset("search", 32, 0), "progress": False}
    config = RegCacheConfig(registers={"mode": "none"})
    model = quantizer.quantize(quantization_config=config, **pictures)
    with pytest.raises(TypeError, match=r"recommend\(\) takes the model that quantize\(\) returned; this \w+ is float"):
        quantizer.recommend(encoder.model, **pictures)
    better = quantizer.recommend(model, **pictures).better
    assert better is not None
    assert better.recipe.data.num_samples == 32
    model = quantizer.quantize(recipe=better.recipe, **pictures)
    assert model.config.quantization_config.label == "w8a8-dynamic"
    found = quantizer.recommend(model, recipe=better.recipe, **pictures)
    assert found.score == pytest.approx(better.score)
    assert found.alternatives == []  # loses less than search.min_gain
    assert found.better is None


def test_a_scheme_that_is_refused_is_not_applicable(
    encoder: Any, images: ReferenceImages, plain: QuantizationRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemes = (Scheme("both", ("dynamic", "ptq4vit"), (False,)), Scheme("percentile", ("percentile",), (False,)))
    monkeypatch.setattr(alternatives, "SCHEMES", schemes)
    found = found_for(encoder, images, plain)
    last = found.alternatives[-1]
    assert (last.name, last.score, last.clearly_better) == ("both", None, False)
    assert "both decide the input scales" in str(last.reason)
    assert last.to_dict()["not_applicable"] == last.reason
    assert found.alternatives[0].reason is None


def test_what_was_made_is_not_tried_again(
    encoder: Any, images: ReferenceImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "SCHEMES", SCHEMES[:2])
    run = made(encoder, images, methods=["percentile"], weights={"bits": 4}, activations={"bits": 4})
    found = found_for(encoder, images, run)
    assert [a.name for a in found.alternatives] == ["dynamic per token"]
    assert found.alternatives[0].recipe.quantization.weights.bits == 4


def test_registers_of_the_result_are_tried_under_the_schemes(
    encoder: Any, images: ReferenceImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "SCHEMES", SCHEMES[:2])
    search = SearchConfig(num_copies=(1, 15), max_delete=4, sensitive_block=3, blocks_before=0)
    recipe = Recipe(RegCacheConfig.from_preset("w4a4"), search, DATA)
    run = run_plan(encoder.model, images, QuantizationPlan.of(recipe), progress=False)
    assert run.fit is not None
    assert run.fit.config.registers.mode == "fixed"
    found = found_for(encoder, images, run)
    tried = {a.name: a for a in found.alternatives}
    assert set(tried) == {"dynamic per token", "percentile", "percentile with registers"}
    under = tried["percentile with registers"]
    assert under.options == ("--method", "percentile")
    assert under.recipe.quantization.registers == run.fit.config.registers
    assert under.recipe.quantization.deletion == run.fit.config.deletion
    again = run_plan(encoder.model, images, QuantizationPlan.of(under.recipe), known=run.fit, progress=False)
    assert again.cache is run.fit.cache
    assert tried["percentile"].recipe.quantization.registers.mode == "none"


def test_dynamic_results_and_their_observers_are_left_behind() -> None:
    base = RegCacheConfig.from_preset("w8a8-dynamic").replace(registers={"mode": "none"}, weights={"observer": "mse"})
    for candidate in alternatives._candidates(Recipe(base)):
        assert QuantizationPlan.of(candidate.recipe).resolved.config.weights.bits == 8
    base = RegCacheConfig(activations={"observer": "percentile", "percentile": 99.0}, registers={"mode": "none"})
    made = {c.name: QuantizationPlan.of(c.recipe).resolved.config for c in alternatives._candidates(Recipe(base))}
    assert made["mse"].activations.observer == "mse"
    assert made["percentile"].activations.percentile == 99.99


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (6, 6), (4, 4), (4, 8)])
def test_each_width_has_its_own_list(weights: int, activations: int) -> None:
    config = RegCacheConfig(weights={"bits": weights}, activations={"bits": activations})
    config = config.replace(registers={"mode": "fixed", "blocks": [3]})
    tried = alternatives._candidates(Recipe(config))
    bits = min(weights, activations)
    names = [(s.name, registers) for s in SCHEMES if bits <= s.most_bits for registers in s.registers]
    assert [(c.scheme.name, c.registers) for c in tried] == names
    for candidate in tried:
        made = QuantizationPlan.of(candidate.recipe).resolved.config
        assert (made.weights.bits, made.activations.bits) == (weights, activations)
        assert made.registers.mode == ("fixed" if candidate.registers else "none")


def test_one_image_decides_nothing_and_no_infinity_is_written() -> None:
    candidate = Alternative("x", DYNAMIC, False, Recipe())
    judged = alternatives._judged(candidate, torch.tensor([1.0]), torch.tensor([0.1]), 0.001, 2.0)
    assert not judged.clearly_better
    assert judged.to_dict()["needed"] is None
    json.dumps(judged.to_dict(), allow_nan=False)
    clear = alternatives._judged(candidate, torch.ones(4), torch.tensor([0.1, 0.2, 0.1, 0.2]), 0.001, 2.0)
    assert clear.clearly_better
    small = alternatives._judged(candidate, torch.ones(4), torch.full((4,), 0.9995), 0.001, 2.0)
    assert not small.clearly_better


def test_accuracy_judges_where_it_was_maximised(
    encoder: Any, images: ReferenceImages, plain: QuantizationRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternatives, "SCHEMES", (DYNAMIC,))
    recipe = replace(plain.recipe, search=SearchConfig(objective="accuracy"))
    found = find_alternatives(encoder.model, plain.quantized.model, recipe, images, progress=False)
    assert found.objective == "top-1 accuracy"
    assert found.ceiling > found.score


def test_an_objective_is_made_once_for_a_model_and_forgotten_with_the_images() -> None:
    encoder = load("planted-outlier")
    images = ReferenceImages(encoder.dataset("search", 16, 0), encoder.processor)
    parts = images.split(DataConfig(num_samples=16), 0)
    model, targets = encoder.model, Targets(False)
    first = objective_on("confirmation", "cosine", model, parts, targets, None)
    assert objective_on("confirmation", "cosine", shared_copy(model), parts, targets, None) is first
    assert objective_on("selection", "cosine", model, parts, targets, None) is not first
    assert objective_on("confirmation", "cosine", copy.deepcopy(model), parts, targets, None) is not first
    parts.release()
    assert not parts.objectives
