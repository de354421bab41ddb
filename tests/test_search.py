"""The search engine: decisions, resuming, isolation of K and V, replay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from models import TOWERS

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DataConfig, SearchConfig
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
from optimum_regcache.search.mining import isolated_cache
from optimum_regcache.search.search import SearchRecord, _best

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
    record = SearchRecord(None, "")
    model = tiny()
    bench = TrialRunner(model, RegCacheConfig(activations={"mode": "dynamic"}), [])
    mined = mine_tokens(bench.float_model, batches(), [1], top=4, progress=False)
    search = RegisterSearch(
        bench,
        config,
        Candidates(mined, 1, 1, 4),
        Judges(None, None, ceiling),
        record,
        progress=False,  # type: ignore[arg-type]
    )
    for setup in [Setup(), *search._prefix_setups(), Setup(count=1)]:
        record.scores[setup.key] = scores[kind(setup)]
        record.scores[f"confirm {setup.key}"] = confirm[kind(setup)]
    for copies in config.num_copies:
        both = Setup(1, "onwards", None, copies, 1)
        record.scores[both.key] = scores["both"]
        record.scores[f"confirm {both.key}"] = confirm["both"]
    return search


def kind(setup: Setup) -> str:
    if setup.start_block is None:
        return "delete" if setup.count else "nothing"
    return "both" if setup.count else "prefix"


ONE = SearchConfig(num_copies=(1,), blocks_before=0, min_gain=0.01)


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
    config, record, scores = SearchConfig(num_copies=(1, 2), min_gain=0.01), SearchRecord(None, ""), {}
    for start, copies, alone, pair in ((0, 1, 0.52, 0.45), (0, 2, 0.51, 0.45), (1, 1, 0.49, 0.9), (1, 2, 0.5, 0.8)):
        scores[Setup(start, "onwards", None, float(copies))] = alone
        scores[Setup(start, "onwards", None, float(copies), 1)] = pair
    scores |= {Setup(): 0.5, Setup(count=1): 0.4}
    for setup, score in scores.items():
        record.scores[setup.key] = record.scores[f"confirm {setup.key}"] = [score] * 4
    bench = TrialRunner(tiny(), RegCacheConfig(activations={"mode": "dynamic"}), [])
    mined = mine_tokens(bench.float_model, batches(), [0, 1], top=4, progress=False)
    search = RegisterSearch(
        bench,
        config,
        Candidates(mined, 1, 1, 4),
        Judges(None, None),
        record,
        progress=False,  # type: ignore[arg-type]
    )
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
    assert kind(result.chosen) == "prefix"
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
    assert kind(engine(same, same, ONE).run().chosen) == "prefix"


def test_an_interrupted_search_resumes_to_the_identical_result(tmp_path, monkeypatch):
    whole = fit(work_dir=tmp_path / "whole")
    calls = {"count": 0}
    original = TrialRunner.score

    def interrupted(self, *args):
        calls["count"] += 1
        if calls["count"] == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(TrialRunner, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(work_dir=tmp_path / "cut")
    assert len(json.loads((tmp_path / "cut" / "search.json").read_text())["scores"]) == 3
    calls["count"] = 100
    resumed = fit(work_dir=tmp_path / "cut")
    fresh = calls["count"] - 100
    assert resumed.search.to_dict() == whole.search.to_dict()
    assert resumed.config.to_dict() == whole.config.to_dict()
    assert (tmp_path / "cut" / "search.json").read_text() == (tmp_path / "whole" / "search.json").read_text()
    calls["count"] = 200
    fit(work_dir=tmp_path / "cut")
    assert calls["count"] == 200  # a finished search measures nothing again
    assert fresh > 0


def test_a_record_of_another_search_is_refused(tmp_path):
    fit(work_dir=tmp_path)
    with pytest.raises(ValueError, match="records a search with another model, data set or settings"):
        fit(SearchConfig(num_copies=(2,), max_delete=1, sensitive_block=3), work_dir=tmp_path)
    with pytest.raises(ValueError, match="records a search with another model, data set or settings"):
        fit(work_dir=tmp_path, seed=5)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(ValueError, match="is not a readable search record"):
        fit(work_dir=tmp_path)


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
    from optimum_regcache.data.images import ImageInputs

    return next(ImageInputs(planted.load_dataset("calibration", 12), planted.build_processor()).batches(12))


def test_a_score_that_is_no_number_never_wins():
    bad = Trial(Setup(count=1), torch.tensor([float("nan")]))
    good = Trial(Setup(count=2), torch.tensor([0.1]))
    assert _best([bad, good]) is good
    assert _best([bad]) is None


def test_a_float_model_that_overflows_is_said_so():
    bench = TrialRunner(tiny(), RegCacheConfig(activations={"mode": "dynamic"}), [])
    objective = CosineObjective(bench.float_model, batches())
    objective.reference = objective.reference * float("nan")
    with pytest.raises(ValueError, match=r"features are not finite. Load it with dtype=torch.float32"):
        scan_sensitivity(bench.float_model, bench.config, [], objective, progress=False)
