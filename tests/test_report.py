"""The figures of a report mean one thing each, and a model that is worse than naive is said to be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import MODELS, TOWERS, random_cache

from optimum_regcache import RegCacheConfig
from optimum_regcache.commands import compare as comparing
from optimum_regcache.commands.compare import LEGEND, ReportOptions, compare, plain_rows
from optimum_regcache.commands.report import (
    Reporter,
    Row,
    clearly_below,
    expected_work,
    markdown_table,
    recovered_loss,
    render_table,
    retention,
)
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.encoders.passes import count_images
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective, score_both
from optimum_regcache.search import progress
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.run import run_plan
from optimum_regcache.search.trials import TrialRunner

ROW = Row("float", 1.0, 0.8, 1.0, None, 10.0, 2.0, 5.0, 1e9, False, "-")


def test_retention_and_recovered_loss_are_two_things() -> None:
    assert retention(0.6, 0.8) == pytest.approx(0.75)
    assert retention(0.6, 0.0) is None
    assert retention(0.6, None) is None
    assert retention(float("nan"), 0.8) is None
    assert recovered_loss(0.6, 0.4, 0.8) == pytest.approx(0.5)
    assert recovered_loss(0.4, 0.4, 0.8) == 0.0
    assert recovered_loss(0.2, 0.4, 0.8) == pytest.approx(-0.5)
    assert recovered_loss(0.8, 0.8, 0.8) is None  # nothing was lost
    assert recovered_loss(0.8, 0.9, 0.8) is None
    assert recovered_loss(float("nan"), 0.4, 0.8) is None


def test_only_a_clear_loss_is_called_one() -> None:
    naive = torch.tensor([1.0, 0.0, 1.0, 0.0] * 8)
    assert clearly_below(naive * 0, naive)
    assert not clearly_below(naive, naive)
    assert not clearly_below(1 - naive, naive)  # other images, as many
    assert clearly_below(naive - 0.1, naive)
    assert clearly_below(naive * float("nan"), naive)
    assert not clearly_below(torch.tensor([0.9]), torch.tensor([0.5]))


def test_what_is_not_defined_is_left_out_of_the_table() -> None:
    bad = replace(ROW, name="gptq", accuracy=0.0, retention=None, below_naive=True, flops=None)
    more = replace(ROW, name="RegCache", flops=1.01e9, recovered_loss=0.5, installed="delete 2")
    lines = markdown_table([ROW, bad, more]).splitlines()
    headings = "variant | top-1 | cosine | retention | recovered | max norm | mean norm | max fc2 | FLOPs | installed"
    assert lines[0] == f"| {headings} |"
    assert lines[2] == "| float | 80.00 % | 1.0000 | 100.0 % | - | 10.00 | 2.00 | 5.00 | +0.0 % | - |"
    assert lines[3] == "| gptq (below naive) | 0.00 % | 1.0000 | - | - | 10.00 | 2.00 | 5.00 | - | - |"
    assert lines[4] == "| RegCache | 80.00 % | 1.0000 | 100.0 % | 50.0 % | 10.00 | 2.00 | 5.00 | +1.0 % | delete 2 |"
    unlabelled = [replace(row, accuracy=None) for row in (ROW, more)]
    assert "top-1" not in render_table(unlabelled, "title", [])


def batches() -> list[dict[str, torch.Tensor]]:
    return [TOWERS["clip"].inputs(seed=seed, batch=8) for seed in (1, 2)]


def test_rows_are_compared_with_naive_image_by_image() -> None:
    runner = TrialRunner(TOWERS["clip"].build(), RegCacheConfig.from_preset("w4a4"), batches())
    reporter = Reporter(runner, batches(), None, None, 2)
    first, naive, token = plain_rows(reporter)
    assert (first.retention, first.recovered_loss, first.below_naive) == (pytest.approx(1.0), None, False)
    assert naive.recovered_loss == 0.0
    assert token.recovered_loss == pytest.approx((token.cosine - naive.cosine) / (1 - naive.cosine), rel=1e-4)
    worse = reporter.model_row("gptq", TOWERS["clip"].build(seed=5), runner.float_model, "nothing")
    assert worse.below_naive
    assert worse.recovered_loss is not None
    assert worse.recovered_loss < 0
    assert not any(math.isnan(v) for v in worse.to_dict().values() if isinstance(v, float))


def test_rows_that_start_at_a_known_block_are_those_of_whole_passes(monkeypatch: Any) -> None:
    model = TOWERS["clip"].build()
    cache, deletion = random_cache((2, 3)), DeletionConfig(block=2, count=2)
    first, second = batches(), batches()
    rows = []
    for reuse in (True, False):
        runner = TrialRunner(model, RegCacheConfig(), first, reuse=reuse)
        reporter = Reporter(runner, second, None, None, 2)
        plain_rows(reporter)
        rows.append([reporter.row("both", cache, deletion, ""), reporter.row("delete", None, deletion, "")])
    assert rows[0] == rows[1]
    assert rows[0][0] != rows[0][1]
    monkeypatch.setattr("optimum_regcache.commands.report.NORM_FLOPS", 1.0)  # 16 images at least
    assert count_images(Reporter(runner, second, None, None, 2).norm_batches) == 16
    many = [TOWERS["clip"].inputs(seed=seed, batch=30) for seed in (1, 2)]
    assert count_images(Reporter(runner, many, None, None, 2).norm_batches) == 16


def test_rows_tell_how_far_the_report_is(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    runner = TrialRunner(TOWERS["clip"].build(), RegCacheConfig(), batches())
    with progress.watching("quantize", True) as watched, watched.stage("report"):
        watched.expect(report=expected_work(16, runner.depth))
        reporter = Reporter(runner, batches(), None, None, 2)
        plain_rows(reporter)
        reporter.row("both", random_cache((2, 3)), DeletionConfig(block=2, count=2), "")
        reporter.model_row("RegCache", runner.quantized, runner.float_model, "")
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("quantize: report ...; ") for line in lines)
    assert 0.5 < watched.done / expected_work(16, runner.depth) < 1.5


@pytest.fixture(scope="module")
def job() -> tuple[Any, Any, Any]:
    settings = ["data.num_samples=48", "data.num_report=24", "search.num_copies=[1, 15]", "search.max_delete=4"]
    recipe = Recipe().override([*settings, "search.sensitive_block=3", "search.blocks_before=0"])
    source, plan = open_source("planted-outlier", None, recipe), QuantizationPlan.of(recipe)
    images = ReferenceImages(source.search_images, source.processor)
    return source, plan, run_plan(source.model, images, plan, progress=False)


def test_the_halves_are_those_of_what_is_installed(job: Any) -> None:
    source, plan, run = job
    result, _ = compare(source, plan, run, run.quantized.model, ReportOptions(seeds=2), progress=False)
    for word, text in LEGEND.items():
        assert any(word in row.name for row in result.rows) == any(text in note for note in result.notes)
    rows = {row.name: row for row in result.rows}
    chosen = run.fit.search.chosen
    assert chosen.start_block is not None
    assert chosen.count
    assert rows["RegCache"].installed == f"{rows['prefix only'].installed}; {rows['delete only'].installed}"
    others = {rows[name].installed for name in rows if name.startswith("best ")}
    assert not others & {rows["prefix only"].installed, rows["delete only"].installed}
    prefix, plain, both, delete = (rows[n].flops or 0 for n in ("prefix only", "float", "RegCache", "delete only"))
    assert prefix > plain > both > delete > 0
    assert result.seeds["seeds"] == [0, 1]
    for name in ("float", "naive", "RegCache"):
        values = result.seeds[name]["values"]
        assert values[0] == rows[name].metric
        assert result.seeds[name]["mean"] == pytest.approx(sum(values) / 2)
    assert result.seeds["naive"]["std"] > 0
    assert any(n.startswith("over 2 seeds of the report scenes: float 100.0 +- 0.0 %, naive ") for n in result.notes)
    assert not any("WORSE" in note for note in result.notes)


def test_a_model_that_collapses_is_flagged(
    job: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan, run = job
    spoilt: Any = open_source("planted-outlier", None, plan.recipe).model
    with torch.no_grad():
        spoilt.classifier.weight.copy_(spoilt.classifier.weight.roll(1, 0))
        spoilt.classifier.bias.copy_(spoilt.classifier.bias.roll(1, 0))
    monkeypatch.setattr(comparing, "_ablation", lambda fit: iter(()))
    result, _ = compare(source, plan, run, spoilt, ReportOptions(), progress=False)
    assert result.rows[-1].below_naive
    assert any(note.startswith("WORSE THAN ROUND TO NEAREST (naive): RegCache. Do not use") for note in result.notes)
    assert "The quantized model is worse than plain round to nearest: 0.0000, naive 0." in caplog.text


def test_seeds_need_embedded_scenes() -> None:
    ReportOptions(seeds=3).check("planted-outlier (embedded images)")
    with pytest.raises(
        ValueError, match=r"--report-seeds needs the scenes of an embedded encoder; the unseen images of"
    ):
        ReportOptions(seeds=3).check("imgs")
    with pytest.raises(ValueError, match=r"--report-seeds must be at least 1, got 0"):
        ReportOptions(seeds=0).check("imgs")


@pytest.mark.parametrize("kind", ["classifier", "zero-shot", "features"])
def test_both_scores_come_from_one_run(kind: str) -> None:
    tiny = MODELS["clip_dual" if kind == "zero-shot" else "vit_classifier"]
    model: Any = tiny.build()
    batches = [{"pixel_values": tiny.inputs(seed)["pixel_values"]} for seed in (1, 2)]
    count = sum(len(b["pixel_values"]) for b in batches)
    cosine = CosineObjective(model, batches)
    text = None
    if kind == "zero-shot":
        text = torch.nn.functional.normalize(torch.randn(5, cosine.reference.shape[1]), dim=-1)
    accuracy = None if kind == "features" else AccuracyObjective(batches, torch.arange(count) % 2, text)
    runs = 0

    def count_runs(module: Any, args: Any) -> None:
        nonlocal runs
        runs += 1

    other = tiny.build(seed=1)
    find_tower(other).blocks[0].register_forward_pre_hook(count_runs)
    found = score_both(other, cosine, accuracy)
    assert runs == len(batches)
    torch.testing.assert_close(found[0], cosine.scores(other))
    if accuracy is None:
        assert found[1] is None
    else:
        assert found[1] is not None
        assert torch.equal(found[1], accuracy.scores(other))
