"""Refinements of the best prefix: chosen only if they win, resumed bit by bit, and never another model than the recipe says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TOWERS, random_cache
from safetensors.torch import load, save
from transformers import AutoModelForImageClassification

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer, RegisterCache
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DELETION_REFINEMENTS, REFINEMENTS, DataConfig, SearchConfig
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.passes import ImageRange, count_images
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.hub.registers import get_registers
from optimum_regcache.search import Candidates, Judges, RegisterSearch, Setup, TrialRunner, TrialScores, mine_tokens
from optimum_regcache.search import refine as refine_module
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.plan import QuantizationPlan
from optimum_regcache.search.refine import MAKERS, Start, clusters, from_tensors, to_tensors
from optimum_regcache.search.tuning import TuningSettings

PREFIX = Setup(1, "onwards", None, 1.0)
SCORES = {"nothing": [0.5] * 4, "prefix": [0.7] * 4, "delete": [0.4] * 4, "both": [0.6] * 4}
FIT = SearchConfig(num_copies=(15,), max_delete=1, blocks_before=0, sensitive_block=3, refinements=("tuned",))
DATA = DataConfig(num_samples=24, batch_size=6)
W4A4 = RegCacheConfig.from_preset("w4a4")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TuningSettings(
        steps=30, evaluate_every=10, recalibrate_every=5, learning_rate=0.3, bias_learning_rate=0.3
    )
    monkeypatch.setattr(refine_module, "TUNING", settings)


def engine(
    refined: dict[str, tuple[list[float], list[float]]], confirm: dict[str, list[float]] = SCORES
) -> RegisterSearch:
    """A search whose scores are given: name of a refinement -> (on the selection images, on the confirmation images)."""
    journal, batch = Journal(None, ""), TOWERS["clip"].inputs(seed=1)
    runner = TrialRunner(TOWERS["clip"].build(), RegCacheConfig(activations={"mode": "dynamic"}), [])  # type: ignore[arg-type]
    mined = mine_tokens(runner.float_model, [batch], [1], top=4, progress=False)
    judges: Any = Judges(SimpleNamespace(batches=[batch], best_score=None), None)  # type: ignore[arg-type]
    config = SearchConfig(
        num_copies=(1,), blocks_before=0, min_gain=0.01, algorithm="coordinate", refinements=tuple(refined)
    )
    scores = TrialScores(runner, judges.selection, journal)
    search = RegisterSearch(scores, config, Candidates(mined, 1, 1, 4), judges)
    for setup in (Setup(), PREFIX, Setup(count=1), replace(PREFIX, count=1)):
        journal.put(setup.key, SCORES[setup.kind])
        journal.put(f"confirm {setup.key}", confirm[setup.kind])
    for name, (selecting, confirming) in refined.items():
        setup = replace(PREFIX, refinement=name)
        journal.put(setup.key, selecting)
        journal.put(f"confirm {setup.key}", confirming)
    return search


def test_the_registry_is_complete() -> None:
    assert [*MAKERS, *DELETION_REFINEMENTS] == list(REFINEMENTS)
    with pytest.raises(
        ValueError, match=r"search\.refinements must hold each of clusters, block_copies, tuned, .*threshold at most"
    ):
        SearchConfig(refinements=("tuned", "tuned"))
    with pytest.raises(ValueError, match=r"search\.refinements must hold each of"):
        SearchConfig(refinements=("polished",))


@pytest.mark.parametrize("name", MAKERS)
def test_each_is_chosen_if_it_wins_and_not_if_it_does_not(name: str) -> None:
    better, as_good, noisy = [0.8] * 4, [0.705] * 4, [1.0, 0.3, 1.3, 0.5]
    won = engine({name: (better, better)}).run()
    assert won.chosen == replace(PREFIX, refinement=name)
    assert won.chosen.describe() == f"prefix from block 1, tau 1; {REFINEMENTS[name]}"
    assert won.gain == pytest.approx(0.3)
    assert f"over 'prefix from block 1, tau 1': {REFINEMENTS[name]} +0.1000" in won.reason
    record = won.to_dict()["refinements"][0]
    assert (record["name"], record["chosen"]) == (name, True)
    assert (record["gain"], record["error"]) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-6))
    assert won.to_dict()["chosen"]["refinement"] == name
    for confirming in (as_good, noisy, [0.6] * 4, [0.2] * 4, [float("nan")] * 4):
        kept = engine({name: (better, confirming)}).run()
        assert kept.chosen == PREFIX
        assert [r.chosen for r in kept.refinements] == [False]
    assert engine({name: ([float("nan")] * 4, better)}).run().chosen == PREFIX  # a score that is no number never wins


def test_the_best_on_the_selection_images_that_wins_is_taken() -> None:
    result = engine(
        {
            "clusters": ([0.75] * 4, [0.9] * 4),
            "block_copies": ([0.8] * 4, [0.8] * 4),
            "tuned": ([0.9] * 4, [0.6] * 4),
        }
    ).run()
    assert result.chosen.refinement == "block_copies"
    assert [r.setup.refinement for r in result.refinements] == ["tuned", "block_copies", "clusters"]


def test_it_may_win_where_its_start_does_not_and_has_to_beat_what_is_installed() -> None:
    useless = {**SCORES, "prefix": [0.5] * 4, "both": [0.5] * 4}
    result = engine({"tuned": ([0.8] * 4, [0.6] * 4)}, useless).run()
    assert result.chosen == replace(PREFIX, refinement="tuned")
    deleting = {**useless, "delete": [0.7] * 4}
    result = engine({"tuned": ([0.8] * 4, [0.6] * 4)}, deleting).run()
    assert result.chosen == Setup(count=1)
    assert result.refinements[0].rival == Setup(count=1)


def test_more_candidates_need_more_standard_errors() -> None:
    confirm = {**SCORES, "prefix": [0.5 + x for x in (0.1, 0.3, 0.2, 0.22)]}
    alone, beside = engine({}, confirm).run(), engine({"tuned": ([0.6] * 4, [0.1] * 4)}, confirm).run()
    assert float(beside.reason.split("needed ")[1][:6]) > float(alone.reason.split("needed ")[1][:6])
    assert alone.refinements == []
    assert "refinement" not in PREFIX.key


def test_registers_survive_as_bytes() -> None:
    for copies in (3.0, {1: 0.3, 3: 1e-3}):
        cache = random_cache((1, 3), registers=2).restricted((1, 3), copies)
        again = from_tensors(load(save(to_tensors(cache))))
        assert (again.blocks, again.num_copies, len(again.layers)) == (
            cache.blocks,
            cache.num_copies,
            len(cache.layers),
        )
        assert all(torch.equal(a, b) for i in (1, 3) for a, b in zip(again.rows(i), cache.rows(i), strict=True))


@pytest.mark.parametrize("family", ["clip", "siglip2", "dinov2"])
def test_later_images_are_the_rest(family: str) -> None:
    batches = [TOWERS[family].inputs(seed=s) for s in (1, 2)]
    total = count_images(batches)
    for skipped in range(total + 1):
        first, later = ImageRange(batches, skipped), ImageRange(batches, first=skipped)
        assert (count_images(first), count_images(later)) == (skipped, total - skipped)
        for name in batches[0]:
            whole = torch.cat([b[name] for b in batches])
            assert torch.equal(torch.cat([b[name] for b in (*first, *later)]), whole)


def start_of(config: RegCacheConfig) -> Start:
    tower = TOWERS["clip"]
    runner = TrialRunner(tower.build(), config, [tower.inputs(seed=1)])
    selection = CosineObjective(runner.float_model, [tower.inputs(seed=s) for s in (2, 3)])
    tokens = mine_tokens(runner.float_model, selection.batches, [1], progress=False)[1]
    cache = tokens.average((1, 2, 3), 4).restricted((1, 2, 3), 4.0)
    return Start(runner, selection, cache, 4.0, DeletionConfig(block=1, count=1), tokens, 0)


@pytest.mark.parametrize("form", ["w4a4", "w8a8-dynamic"])
@pytest.mark.parametrize("name", MAKERS)
def test_they_are_deterministic_and_choose_by_the_selection_images(name: str, form: str) -> None:
    start = start_of(RegCacheConfig.from_preset(form).replace(registers={"mode": "none"}))
    made, again = (MAKERS[name](start) for _ in range(2))
    assert same(made, again)
    if name == "clusters":
        assert made.num_registers in (2, 4)
        scores = {
            (k, tau): float(start.runner.score(c.restricted((1, 2, 3), tau), start.deletion, start.selection).mean())
            for k in (2, 4)
            for c in [start.tokens.clusters(k, (1, 2, 3), 4)]
            for tau in (4.0, 4.0 / k)
        }
        assert scores[made.num_registers, made.num_copies] == max(scores.values())  # type: ignore[index]
    elif name == "block_copies":
        before, after = (
            float(start.runner.score(c, start.deletion, start.selection).mean()) for c in (start.cache, made)
        )
        assert after >= before


def test_clusters_of_one_token_are_that_token() -> None:
    start = start_of(RegCacheConfig.from_preset("w4a4"))
    made = clusters(replace(start, tokens=start.tokens.first(1)))
    assert (made.num_registers, made.num_copies) == (1, 4.0)


def quantizer() -> RegCacheQuantizer:
    return RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())


def images() -> Any:
    return planted.load_dataset("search", 24)


def same(a: RegisterCache | None, b: RegisterCache | None) -> bool:
    return a is not None and b is not None and save(to_tensors(a)) == save(to_tensors(b))


def test_saved_opened_and_made_again_from_its_recipe_it_is_the_same_model(tmp_path: Path) -> None:
    one = quantizer()
    model = one.quantize(tmp_path / "a", calibration_dataset=images(), recipe=Recipe(W4A4, FIT, DATA), progress=False)
    fit = one.fit_result
    assert fit is not None
    assert fit.search.chosen.refinement == "tuned"
    assert isinstance(fit.config.registers.num_copies, tuple)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    wanted = model.state_dict()
    assert all(torch.equal(t, wanted[k]) for k, t in opened.state_dict().items())
    assert same(get_registers(opened), fit.cache)
    saved = Recipe.load(tmp_path / "a" / "recipe.yaml")
    assert saved.quantization == fit.requested  # it searches again
    again = quantizer().quantize(calibration_dataset=images(), recipe=saved, progress=False)
    assert all(torch.equal(t, wanted[k]) for k, t in again.state_dict().items())
    # the fixed config takes the fit's registers, and without the fit it is refused
    fixed = replace(saved, quantization=fit.config)
    taken = one.quantize(calibration_dataset=images(), recipe=fixed, progress=False)
    assert all(torch.equal(t, wanted[k]) for k, t in taken.state_dict().items())
    with pytest.raises(ValueError, match=r"search\.refinements=\['tuned'\] may have made the registers of this recipe"):
        quantizer().quantize(calibration_dataset=images(), recipe=fixed, progress=False)
    # so is the config alone, which says what made them; mined ones may be asked for
    config: Any = opened.config.quantization_config
    assert config.registers.refinement == "tuned"
    with pytest.raises(ValueError, match=r"registers\.refinement='tuned' made the registers of this config"):
        quantizer().quantize(calibration_dataset=images(), quantization_config=config, progress=False)
    registers = replace(config.registers, refinement=None)
    mined = quantizer().quantize(
        calibration_dataset=images(), quantization_config=config.replace(registers=registers), progress=False
    )
    assert not same(get_registers(mined), fit.cache)
    # in another quantizer they are not what the fit was for: the recipe stays fixed, and is refused
    other = fit.config.replace(methods=["mse"])
    resolved = QuantizationPlan.of(replace(fixed, quantization=other)).resolved.config
    one.save(one.quantize(quantization_config=resolved, calibration_dataset=images(), progress=False), tmp_path / "b")
    stuck = Recipe.load(tmp_path / "b" / "recipe.yaml")
    assert (stuck.quantization.registers.mode, stuck.search.refinements) == ("fixed", ("tuned",))


def test_where_none_was_chosen_the_recipe_holds_none(tmp_path: Path) -> None:
    one = quantizer()
    recipe = Recipe(RegCacheConfig(), replace(FIT, refinements=("clusters",), max_delete=2, num_copies=(15,)), DATA)
    one.quantize(tmp_path / "a", calibration_dataset=images(), recipe=recipe, progress=False)
    assert one.fit_result is not None
    assert one.fit_result.search.chosen.refinement is None
    assert [r.chosen for r in one.fit_result.search.refinements] == [False]
    saved = Recipe.load(tmp_path / "a" / "recipe.yaml")
    assert saved.search.refinements == ()
    assert saved.quantization.registers.refinement is None
    assert saved.quantization.registers.mode == "fixed"


def test_a_killed_fit_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(name: str) -> Any:
        return quantizer().fit(images(), W4A4, FIT, DATA, work_dir=tmp_path / name, progress=False)

    whole = fit("whole")
    (path,) = (tmp_path / "whole").glob("*.tuned.safetensors")
    put, score = Journal.put, TrialRunner.score
    waiting = ["registers ", whole.search.chosen.key, f"confirm {whole.search.chosen.key}"]

    def killed(self: Journal, name: str, values: list[float]) -> None:
        if waiting and name.startswith(waiting[0]):
            waiting.pop(0)
            raise KeyboardInterrupt
        put(self, name, values)

    monkeypatch.setattr(Journal, "put", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            fit("cut")
    assert not waiting
    calls: list[Any] = []
    monkeypatch.setattr(TrialRunner, "score", lambda self, *args: calls.append(args) or score(self, *args))
    resumed = fit("cut")
    assert len(calls) == 1  # the confirmation that was cut off
    assert resumed.search.to_dict() == whole.search.to_dict()
    assert resumed.config == whole.config
    assert same(resumed.cache, whole.cache)
    journal = path.name.removesuffix(".tuned.safetensors")
    assert (tmp_path / "cut" / journal).read_text() == (tmp_path / "whole" / journal).read_text()
    assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is not what this fit wrote\. Delete it and .* to start this fit again"):
        fit("whole")
    path.unlink()
    with pytest.raises(ValueError, match="is not what this fit wrote"):
        fit("whole")
