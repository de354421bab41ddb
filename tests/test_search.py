"""The search engine: decisions, resuming, isolation of K and V, replay."""
# pyright: reportArgumentType=false

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TOWERS

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DataConfig, SearchConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.registers.replay import record_block_inputs, replaying
from optimum_regcache.search import (
    Candidates,
    Judges,
    RegisterSearch,
    Setup,
    Trial,
    TrialRunner,
    mine_tokens,
    scan_sensitivity,
)
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.mining import isolated_cache
from optimum_regcache.search.scores import TrialScores
from optimum_regcache.search.search import corrected_sigmas
from optimum_regcache.search.sensitivity import _suspects, coarse_images
from optimum_regcache.search.setups import best

SEARCH = SearchConfig(num_copies=(1, 15), max_delete=2, blocks_before=1, sensitive_block=3)
DATA = DataConfig(num_samples=24, batch_size=12)


def fit(search: SearchConfig = SEARCH, work_dir=None, images: int = 24, seed: int = 0):
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    dataset = planted.load_dataset("search", images, seed)
    return quantizer.fit(dataset, RegCacheConfig(), search, DATA, work_dir=work_dir, progress=False)


def tiny():
    return TOWERS["clip"].build()


def batches(count: int = 2, size: int = 4):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)} for _ in range(count)]


def engine(scores: dict[str, list[float]], confirm: dict[str, list[float]], config: SearchConfig, ceiling: float = 1.0):
    """A search whose scores are given, so that only the decision is tested."""
    journal = Journal(None, "")
    model = tiny()
    bench = TrialRunner(model, RegCacheConfig(activations={"mode": "dynamic"}), [])
    mined = mine_tokens(bench.float_model, batches(), [1], top=4, progress=False)
    judges: Any = Judges(SimpleNamespace(batches=batches(1, 4), best_score=None), None, ceiling)  # type: ignore[arg-type]
    scored = TrialScores(bench, judges.selection, journal)
    search = RegisterSearch(scored, config, Candidates(mined, 1, 1, 4), judges)
    alone = [Setup(), *search.space().prefixes()]
    for setup in [*alone, *(replace(setup, count=1) for setup in alone)]:
        journal.put(setup.key, scores[setup.kind])
        journal.put(f"confirm {setup.key}", confirm[setup.kind])
    return search


ONE = SearchConfig(num_copies=(1,), blocks_before=0, min_gain=0.01, algorithm="coordinate")


def test_nothing_wins_when_the_gain_is_within_the_noise():
    selection = {"nothing": [0.5] * 4, "prefix": [0.6] * 4, "delete": [0.4] * 4, "both": [0.7] * 4}
    noisy = {"nothing": [0.5, 0.5, 0.5, 0.5], "prefix": [0.5] * 4, "delete": [0.4] * 4, "both": [0.9, 0.2, 0.9, 0.2]}
    result = engine(selection, noisy, ONE).run()
    assert result.chosen == Setup()
    assert result.reason.startswith("nothing helped enough; best candidate: gain +0.0500 +- 0.2021")
    assert result.best_both is not None
    assert result.best_both.mean == pytest.approx(0.7)


def test_a_prefix_that_only_shows_with_deletion_is_found():
    """Alone all prefixes score about alike; the pair of the worse one (block 1, tau 1) is by far the best."""
    config, scores = SearchConfig(num_copies=(1, 2), min_gain=0.01, algorithm="coordinate"), {}
    journal = Journal(None, "")
    for start, copies, alone, pair in ((0, 1, 0.52, 0.45), (0, 2, 0.51, 0.45), (1, 1, 0.49, 0.9), (1, 2, 0.5, 0.8)):
        scores[Setup(start, "onwards", None, float(copies))] = alone
        scores[Setup(start, "onwards", None, float(copies), 1)] = pair
    scores |= {Setup(): 0.5, Setup(count=1): 0.4}
    for setup, score in scores.items():
        journal.put(setup.key, [score] * 4)
        journal.put(f"confirm {setup.key}", [score] * 4)
    bench = TrialRunner(tiny(), RegCacheConfig(activations={"mode": "dynamic"}), [])
    mined = mine_tokens(bench.float_model, batches(), [0, 1], top=4, progress=False)
    judges: Any = Judges(SimpleNamespace(batches=batches(1, 4), best_score=None), None)  # type: ignore[arg-type]
    scored = TrialScores(bench, judges.selection, journal)
    search = RegisterSearch(scored, config, Candidates(mined, 1, 1, 4), judges)
    result = search.run()
    assert result.best_prefix is not None
    assert result.best_prefix.setup.start_block == 0
    assert result.chosen == Setup(1, "onwards", None, 1.0, 1)
    # of the weaker tau of a start block only the winner's is tried with deletion
    assert Setup(0, "onwards", None, 2.0, 1).key not in search.trials
    assert len(result.trials) == 1 + 4 + 1 + 2 + 1


def test_a_confirmed_gain_is_installed_and_an_unconfirmed_favourite_is_passed_over():
    selection = {"nothing": [0.5] * 4, "prefix": [0.6] * 4, "delete": [0.4] * 4, "both": [0.7] * 4}
    confirm = {"nothing": [0.5] * 4, "prefix": [0.56, 0.57, 0.56, 0.57], "delete": [0.4] * 4, "both": [0.45] * 4}
    result = engine(selection, confirm, ONE).run()
    assert result.chosen.kind == "prefix"
    assert result.gain == pytest.approx(0.065)
    assert result.reason.startswith("gain +0.0650 +- 0.0029 on held-out search images, needed 0.0100")


def test_nothing_to_repair_is_said_so():
    flat = {"nothing": [0.9999] * 4, "prefix": [0.9998] * 4, "delete": [0.9] * 4, "both": [0.9] * 4}
    result = engine(flat, flat, ONE).run()
    assert result.chosen == Setup()
    assert result.reason.startswith("nothing to repair (naive loses 0.0001)")
    assert result.chosen.describe() == "nothing"


def test_equal_scores_prefer_the_simpler_setup():
    same = {"nothing": [0.5] * 4, "prefix": [0.8] * 4, "delete": [0.8] * 4, "both": [0.8] * 4}
    assert engine(same, same, ONE).run().chosen.kind == "prefix"


def test_a_broken_off_search_resumes_to_the_identical_result(tmp_path, monkeypatch):
    whole = fit(work_dir=tmp_path / "whole")
    calls = {"count": 0}
    original = TrialRunner.score

    def interrupted(self, *args):
        calls["count"] += 1
        if calls["count"] == 4:
            raise RuntimeError
        return original(self, *args)

    monkeypatch.setattr(TrialRunner, "score", interrupted)
    with pytest.raises(RuntimeError):
        fit(work_dir=tmp_path / "cut")
    (journal,) = (tmp_path / "cut").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 4  # a line for the mined tokens
    calls["count"] = 100
    resumed = fit(work_dir=tmp_path / "cut")
    fresh = calls["count"] - 100
    assert resumed.search.to_dict() == whole.search.to_dict()
    assert resumed.config.to_dict() == whole.config.to_dict()
    assert journal.read_text() == (tmp_path / "whole" / journal.name).read_text()
    calls["count"] = 200
    fit(work_dir=tmp_path / "cut")
    assert calls["count"] == 200  # a finished search measures nothing again
    assert fresh > 0


def test_another_search_has_a_journal_of_its_own(tmp_path):
    first = fit(work_dir=tmp_path)
    fit(replace(SEARCH, num_copies=(2,), max_delete=1), work_dir=tmp_path)
    fit(work_dir=tmp_path, seed=5)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert fit(work_dir=tmp_path).search.to_dict() == first.search.to_dict()


def test_the_same_seed_gives_the_same_search():
    assert fit().search.to_dict() == fit().search.to_dict()


def test_isolated_copies_give_the_same_rows_as_one():
    """docs/method.md 4: tau identical tokens attending only to each other have the K and V of a single one."""
    model = tiny()
    state = torch.randn(64, generator=torch.Generator().manual_seed(2))
    cache = isolated_cache(model, state, 1, (1, 2, 3))
    hidden = state.expand(1, 7, 64)
    with torch.inference_mode():
        for index in range(1, 4):
            block = model.encoder.layers[index]
            normed = block.layer_norm1(hidden)
            keys = block.self_attn.k_proj(normed).view(7, 4, 16)
            values = block.self_attn.v_proj(normed).view(7, 4, 16)
            for copy in range(7):
                torch.testing.assert_close(cache.rows(index)[0][:, 0], keys[0 + copy], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(cache.rows(index)[1][:, 0], values[copy], atol=1e-5, rtol=1e-5)
            hidden = block(hidden, None)


def test_in_context_rows_are_the_projected_tokens_of_their_images():
    model, data = tiny(), batches()
    mined = mine_tokens(model, data, [1], top=5, progress=False)[1]
    captured = {}
    handle = model.encoder.layers[2].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: captured.setdefault(len(captured), output)
    )
    with torch.inference_mode():
        for batch in data:
            model(**batch)
    handle.remove()
    keys = torch.cat(list(captured.values()))  # [images, tokens, 64]
    expected = keys[mined.image, mined.position].view(5, 4, 16)
    torch.testing.assert_close(mined.keys[2], expected)
    averaged = mined.average((1, 2, 3), 4).rows(2)[0]
    torch.testing.assert_close(averaged[:, 0], expected.mean(0))
    torch.testing.assert_close(mined.single(3, (2,), 4).rows(2)[0][:, 0], expected[3])
    with pytest.raises(ValueError, match="There are 5 mined tokens, no number 5"):
        mined.single(5, (2,), 4)


def test_mining_does_not_depend_on_the_batching():
    model = tiny()
    images = torch.cat([b["pixel_values"] for b in batches()])
    one = mine_tokens(model, [{"pixel_values": images}], [1, 2], top=6, progress=False)
    many = mine_tokens(model, [{"pixel_values": i[None]} for i in images], [1, 2], top=6, progress=False)
    for block in (1, 2):
        assert torch.equal(one[block].image, many[block].image)
        assert torch.equal(one[block].position, many[block].position)
        torch.testing.assert_close(one[block].states, many[block].states, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Unknown score_site 'middle'"):
        mine_tokens(model, batches(), [1], score_site="middle", progress=False)
    with pytest.raises(ValueError, match="No images to mine tokens from"):
        mine_tokens(model, [], [1], progress=False)


def test_replay_equals_a_full_pass_and_is_gone_afterwards():
    bench = TrialRunner(tiny(), RegCacheConfig(), batches())
    data = batches()
    objective = CosineObjective(bench.float_model, data)
    states = record_block_inputs(bench.float_model, data, 2)
    with replaying(bench.float_model, 2, states):
        assert torch.allclose(objective.scores(bench.float_model), torch.ones(8), atol=1e-6)
    shuffled = [replace(s, hidden=s.hidden.flip(0)) for s in states]
    with replaying(bench.float_model, 2, shuffled):
        assert objective.scores(bench.float_model).min() < 0.999  # the recorded states are really used
    assert torch.allclose(objective.scores(bench.float_model), torch.ones(8), atol=1e-6)


def test_scales_are_recalibrated_for_every_configuration():
    bench = TrialRunner(planted.build_planted_model(), RegCacheConfig(), [_planted_batch()])
    quant = bench.quantized.get_submodule("vit.layers.3.mlp.fc2")
    bench.install(None, DeletionConfig())
    naive = float(quant.input_scale)
    mined = mine_tokens(bench.float_model, [_planted_batch()], [3], top=20, progress=False)[3]
    bench.reset()
    bench.install(mined.average((3, 4, 5), 6).restricted((3, 4, 5), 15.0), DeletionConfig(block=3, count=4))
    assert float(quant.input_scale) < naive / 20


def _planted_batch():
    return next(ImageInputs(planted.load_dataset("calibration", 12), planted.build_processor()).batches(12))


def test_a_score_that_is_no_number_never_wins():
    bad = Trial(Setup(count=1), torch.tensor([float("nan")]))
    good = Trial(Setup(count=2), torch.tensor([0.1]))
    assert best([bad, good]) is good
    assert best([bad]) is None


def test_a_float_model_that_overflows_is_said_so():
    bench = TrialRunner(tiny(), RegCacheConfig(activations={"mode": "dynamic"}), [])
    objective = CosineObjective(bench.float_model, batches())
    objective.reference = objective.reference * float("nan")
    with pytest.raises(ValueError, match=r"features are not finite. Load it with dtype=torch.float32"):
        scan_sensitivity(bench.float_model, bench.config, [], objective, progress=False)


def test_several_tests_need_more_standard_errors():
    assert corrected_sigmas(2.0, 1) == 2.0
    assert corrected_sigmas(2.0, 3) == pytest.approx(2.4284, abs=1e-4)  # one-sided, 0.02275 / 3
    assert corrected_sigmas(0.0, 3) == 0.0


def test_where_round_to_nearest_loses_nothing_nobody_searches(tmp_path, monkeypatch):
    quantizer = RegCacheQuantizer(tiny())
    items = [{"pixel_values": row} for batch in batches(3, 8) for row in batch["pixel_values"]]
    settings = SearchConfig(min_gain=0.05)
    calls = []
    monkeypatch.setattr(TrialRunner, "score", _counting(TrialRunner.score, calls))
    fit = quantizer.fit(items, RegCacheConfig(), settings, DATA, work_dir=tmp_path, progress=False)
    assert len(calls) == 1
    assert fit.search.reason.startswith("nothing to repair: naive loses 0.0")
    assert fit.search.reason.endswith("less than search.min_gain=0.05")
    assert fit.config.registers.mode == "none"
    assert (fit.sensitive_block, fit.sensitivity, fit.cache, fit.variants) == (None, None, None, {})
    assert fit.to_dict()["sensitive_block"] is None
    assert not quantizer.quantize(progress=False).config.quantization_config.deletion.active
    quantizer.fit(items, RegCacheConfig(), replace(settings, always=True), DATA, progress=False)
    assert len(calls) > 10


def _counting(score, calls):
    def counted(self, *args):
        calls.append(args)
        return score(self, *args)

    return counted


def test_the_coarse_scan_agrees_with_the_complete_one():
    bench = TrialRunner(planted.build_planted_model(), RegCacheConfig(), [_planted_batch()])
    objective = CosineObjective(bench.float_model, [_planted_batch()])
    scans = {
        kind: scan_sensitivity(bench.float_model, bench.config, bench.calibration, objective, kind, progress=False)
        for kind in ("coarse", "linear", "block")
    }
    coarse, linear, block = scans.values()
    assert coarse.sensitive_block == linear.sensitive_block == 3
    assert coarse.top(1) == linear.top(1)
    assert {name: coarse.drops[name] for name in block.drops} == block.drops
    layers = set(coarse.drops) - set(block.drops)
    assert len(layers) == 6  # the second block loses less than a quarter as much
    assert all(coarse.drops[name] == linear.drops[name] for name in layers)
    assert block.top(1) == [("block 3", block.drops["block 3"])]


@pytest.mark.parametrize(
    ("drops", "expected"),
    [
        ([0.1, 0.8, 0.21, 0.3], [1, 3]),
        ([0.1, 0.8, 0.19, 0.0], [1]),
        ([-0.1, -0.2, -0.3], [0]),
        ([0.0, 0.0], [0, 1]),
        ([math.inf, 0.5, math.inf], [0, 2]),
        ([math.inf, 0.5], [0]),
    ],
)
def test_the_second_block_is_scanned_where_it_loses_a_quarter_as_much(drops, expected):
    assert _suspects({str(block): drop for block, drop in enumerate(drops)}, 2) == [str(block) for block in expected]


def test_the_coarse_scan_looks_at_blocks_with_a_quarter_of_the_images():
    assert [coarse_images(n) for n in (1, 16, 40, 64, 128)] == [1, 16, 16, 16, 32]
    processor = planted.build_processor()
    images = ImageInputs(planted.load_dataset("search", 20), processor)
    bench = TrialRunner(planted.build_planted_model(), RegCacheConfig(), [_planted_batch()])
    objective = CosineObjective(bench.float_model, list(images.batches(5)))

    def scan(objective, kind):
        return scan_sensitivity(bench.float_model, bench.config, bench.calibration, objective, kind, progress=False)

    coarse, few, linear = scan(objective, "coarse"), scan(objective.first(16), "block"), scan(objective, "linear")
    assert {name: coarse.drops[name] for name in few.drops} == few.drops
    assert coarse.top(1) == linear.top(1)
    layers = {name: drop for name, drop in coarse.drops.items() if name not in few.drops}
    assert len(layers) == 6
    for block in {coarse.blocks[name] for name in layers}:  # the worst of each block, on all images
        worst = max((n for n in layers if coarse.blocks[n] == block), key=lambda n: layers[n])
        assert layers[worst] == linear.drops[worst]


def test_a_scan_continues_where_it_was_interrupted(tmp_path):
    bench = TrialRunner(tiny(), RegCacheConfig(), batches())
    objective = CosineObjective(bench.float_model, batches())

    def scan(journal):
        return scan_sensitivity(
            bench.float_model, bench.config, bench.calibration, objective, "coarse", progress=False, journal=journal
        )

    journal = Journal(tmp_path, "abc")
    whole = scan(journal)
    journal.close()
    lines = (tmp_path / "abc.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "abc.jsonl").write_text("".join(lines[:7]))
    journal = Journal(tmp_path, "abc")
    assert scan(journal) == whole
    journal.close()
    assert (tmp_path / "abc.jsonl").read_text() == "".join(lines)
