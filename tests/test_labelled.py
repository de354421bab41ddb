"""A search without labels on labelled images: the report says what labels would have chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOWERS

from optimum_regcache import RegCacheConfig, RegCacheQuantizer, SearchConfig
from optimum_regcache.commands import labelled
from optimum_regcache.commands.analyze import analyze_job
from optimum_regcache.commands.labelled import LabelledChoice, labelled_choice
from optimum_regcache.commands.quantize import quantize_job
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import DataConfig, Recipe
from optimum_regcache.search.fit import search_config
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.run import run_plan
from optimum_regcache.search.setups import Setup
from optimum_regcache.search.trials import TrialRunner

SETTINGS = [
    "data.num_samples=48", "data.num_report=24", "data.batch_size=12", "search.num_copies=[15]", "search.max_delete=4",
    "search.sensitive_block=3", "search.blocks_before=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def job() -> tuple[Any, Any, Any]:
    recipe = Recipe().override(SETTINGS)
    source, plan = open_source("planted-outlier", None, recipe), QuantizationPlan.of(recipe)
    images = ReferenceImages(source.search_images, source.processor)
    return source, plan, run_plan(source.model, images, plan, progress=False)


def runner_of(job: Any, **options: Any) -> TrialRunner:
    source, _, run = job
    return TrialRunner(source.model, search_config(run.quantized.config), run.calibration, **options)


def test_top_1_of_the_leaders_is_counted_on_the_confirmation_images(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, run = job
    calls, score = [], TrialRunner.score
    monkeypatch.setattr(TrialRunner, "score", lambda self, *args: calls.append(args) or score(self, *args))
    found = labelled_choice(source, run.fit, runner_of(job))
    assert found is not None
    assert len(calls) == len(found.accuracies) == 4
    part, labels = run.fit.parts.confirmation, run.fit.parts.confirmation.labels()
    installed = {"prefix": "prefix only", "delete": "delete only", "both": "both"}
    runner, right = runner_of(job, reuse=False), {}
    for kind, (_, accuracy) in found.accuracies.items():
        cache, deletion = run.fit.variants[installed[kind]] if kind != "nothing" else (None, DeletionConfig())
        runner.install(cache, deletion)
        with torch.no_grad():
            logits = torch.cat([runner.quantized(**batch).logits for batch in part.batches(12)])
        right[kind] = logits.argmax(-1) == labels
        assert accuracy == pytest.approx(right[kind].double().mean().item())
    assert found.images == len(labels)
    assert found.accuracies["nothing"] == ("nothing", found.accuracies["nothing"][1])
    assert found.accuracies[found.chosen][0] == run.fit.search.chosen.describe()
    top = max(value for _, value in found.accuracies.values())
    assert found.accuracies[found.best][1] == top
    difference = right[found.best].double() - right[found.chosen].double()
    assert found.difference == pytest.approx(difference.mean().item())
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_was_chosen_stands_for_its_kind(job: Any) -> None:
    """Retuning may choose a neighbour of the leader: four evaluations all the same."""
    fit = job[2].fit
    other = replace(fit.search.chosen, num_copies=3.0)
    leaders = labelled._leaders(replace(fit, search=replace(fit.search, chosen=other)))
    assert list(leaders) == ["nothing", "prefix", "delete", "both"]
    assert leaders[other.kind][0] == other
    none = labelled._leaders(replace(fit, search=replace(fit.search, chosen=Setup(), best_both=None)))
    assert list(none) == ["nothing", "prefix", "delete"]


def test_of_equals_the_chosen_one_is_the_best(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, run = job
    values = {"nothing": [1.0, 1, 0, 0], "prefix": [1.0, 1, 1, 0], "delete": [0.0, 1, 1, 1], "both": [0.0, 0, 1, 1]}
    order = iter(values.values())
    monkeypatch.setattr(TrialRunner, "score", lambda self, *args: torch.tensor(next(order)))
    fit = replace(run.fit, search=replace(run.fit.search, chosen=run.fit.search.best_delete.setup))
    found = labelled_choice(source, fit, runner_of(job))
    assert found is not None
    assert (found.best, found.chosen, found.difference) == ("delete", "delete", 0.0)
    assert found.describe().endswith("they choose delete as feature cosine did")
    order = iter(values.values())
    fit = replace(run.fit, search=replace(run.fit.search, chosen=Setup()))
    found = labelled_choice(source, fit, runner_of(job))
    assert found is not None
    assert (found.best, found.chosen, found.difference) == ("prefix", "nothing", 0.25)
    assert (
        "nothing 50.00 %, prefix 75.00 %, delete 75.00 %, both 50.00 %; they would have chosen prefix"
        in found.describe()
    )
    assert found.describe().endswith("): +25.00 +- 25.00 points over nothing")


def test_one_image_has_no_standard_error() -> None:
    found = LabelledChoice("c", 1, {"nothing": ("nothing", 0.0), "both": ("b", 1.0)}, "nothing", "both", 1.0, None, "q")
    assert found.describe().endswith("they would have chosen both (b): +100.00 points over nothing")
    assert found.to_dict()["standard_error"] is None


def test_where_labels_say_nothing_nothing_is_run(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, run = job
    runner = runner_of(job)
    monkeypatch.setattr(TrialRunner, "score", lambda self, *args: pytest.fail("a trial ran"))
    for kind in ("accuracy", "knn"):
        read = replace(run.fit, settings=replace(run.fit.settings, objective=kind))
        assert labelled_choice(source, read, runner) is None
    assert labelled_choice(source, replace(run.fit, variants={}), runner) is None
    bare = ReferenceImages(source.search_images.remove_columns("label"), source.processor)
    parts = bare.split(run.fit.data, 0)
    assert labelled_choice(source, replace(run.fit, parts=parts), runner) is None


@pytest.mark.parametrize("objective", ["patch_cosine", "knn"])
def test_the_report_and_the_results_tell_it(objective: str, tmp_path: Path) -> None:
    recipe = Recipe().override([*SETTINGS, f"search.objective={objective}"])
    source = open_source("planted-outlier", None, recipe)
    results, table = quantize_job(source, recipe, Output(tmp_path / "out", {}), progress=False)
    stored = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert stored["labelled"] == results["labelled"]
    if objective == "knn":
        assert results["labelled"] is None
        assert "labels: top-1" not in table
    else:
        assert results["labelled"]["chosen"] == "both"
        assert set(results["labelled"]["top-1"]) == {"nothing", "prefix", "delete", "both"}
        assert "labels: top-1 on the 12 confirmation images (round to nearest, w8a8)" in " ".join(table.split())
        assert "labels: top-1 on the 12 confirmation images" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("objective", ["knn", "similarity_kl", "logit_kl", "patch_cosine"])
def test_analyze_scans_with_every_objective(objective: str, tmp_path: Path) -> None:
    recipe = Recipe().override([*SETTINGS, f"search.objective={objective}", "search.sensitivity_images=16"])
    source = open_source("planted-outlier", None, recipe)
    results, text = analyze_job(source, recipe, Output(tmp_path / "out", {}), progress=False)
    assert results["sensitivity"]["sensitive_block"] == 3
    assert f"sensitive block 3 ({results['sensitivity']['objective']}, w8a8)" in text


# --- labels of the data set alone


def fit_knn(labels: list[Any], work_dir: Path | None = None) -> Any:
    items: list[Any] = [{"pixel_values": x} for x in TOWERS["dinov2"].inputs(seed=3, batch=24)["pixel_values"]]
    items = [{**item, "labels": label} for item, label in zip(items, labels, strict=True)]
    search = SearchConfig(
        objective="knn", num_copies=(2,), max_delete=1, sensitive_block=1, blocks_before=0, always=True
    )
    quantizer = RegCacheQuantizer(TOWERS["dinov2"].build())
    data = DataConfig(num_samples=24, batch_size=8)
    return quantizer.fit(items, RegCacheConfig(), search, data, work_dir=work_dir, progress=False)


def test_knn_needs_no_classes_of_the_model(tmp_path: Path) -> None:
    first = [i % 2 for i in range(24)]
    fit = fit_knn(first, tmp_path)
    assert 0 <= fit.search.baseline <= 1
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    fit_knn([1 - label for label in first], tmp_path)  # as many of each: another data set all the same
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    fit_knn(first, tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    for labels, message in (
        ([None] * 24, r"objective='knn' is not possible: the data set has no labels\. Use objective='cosine'"),
        ([0, None] * 12, r"objective='knn' is not possible: 12 of 24 images have no label"),
        ([-1] * 24, r"objective='knn' is not possible: 24 of 24 labels are negative"),
        (list(range(24)), r"objective='knn' needs several images of a class: for 12 of 12 there is no other one"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_knn(labels)
