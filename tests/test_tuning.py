"""Registers tuned by gradients, and tau tuned block by block (docs/method.md 4 and 5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import BLOCKS, TOWERS, random_cache

from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.config import DeletionConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.registers import prepare_tower
from optimum_regcache.search import TrialRunner, mine_tokens, tuning
from optimum_regcache.search.block_copies import tune_copies
from optimum_regcache.search.tuning import TrainedRows, TuningSettings, tune_registers, tuning_loss

QUICK = TuningSettings(steps=6, recalibrate_every=2, evaluate_every=3, learning_rate=0.1)
DELETE = DeletionConfig(block=1, count=1)
W4A4 = RegCacheConfig.from_preset("w4a4").replace(registers={"mode": "none"})


def tiny(family: str = "clip", config: RegCacheConfig = W4A4) -> tuple[Any, TrialRunner, list[Any], CosineObjective]:
    """(model, runner, training batches, held-out objective)."""
    tower = TOWERS[family]
    model = tower.build()
    runner = TrialRunner(model, config, [tower.inputs(seed=1)])
    held_out = CosineObjective(runner.float_model, [tower.inputs(seed=5)])
    return model, runner, [tower.inputs(seed=2), tower.inputs(seed=3)], held_out


def same_rows(a: RegisterCache, b: RegisterCache) -> bool:
    pairs = [(x, y) for i in a.blocks for x, y in zip(a.rows(i), b.rows(i), strict=True)]
    return (a.blocks, a.num_copies) == (b.blocks, b.num_copies) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "dinov2", "dinov3"])
def test_never_worse_deterministic_and_the_model_unchanged(family: str) -> None:
    start = random_cache((1, 3)).restricted((1, 3), {1: 2.0, 3: 0.5})
    results = []
    for _ in range(2):
        model, runner, train, held_out = tiny(family)
        own, before = ({k: v.clone() for k, v in m.state_dict().items()} for m in (model, runner.quantized))
        cache, record = tune_registers(runner, start, DELETE, train, held_out, QUICK, progress=False)
        assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
        changed = {
            k for k, v in runner.quantized.state_dict().items() if k not in before or not torch.equal(v, before[k])
        }
        assert all(k.endswith(("input_scale", "register_key", "register_value")) for k in changed)
        assert all(p.grad is None for m in (model, runner.quantized, runner.float_model) for p in m.parameters())
        score = float(runner.score(cache, DELETE, held_out).mean())
        assert score == max(s for _, s in record.held_out) == dict(record.held_out)[record.best_step]
        assert score >= record.held_out[0][1] == float(runner.score(start, DELETE, held_out).mean())
        assert (record.steps, len(record.losses), [s for s, _ in record.held_out]) == (6, 6, [0, 3, 6])
        assert (cache is start) == (record.best_step == 0)
        results.append((cache, record))
    (a, first), (b, second) = results
    assert same_rows(a, b)
    assert (first.losses, first.held_out) == (second.losses, second.held_out)
    assert first.to_dict()["stopped"] == "steps"


@pytest.mark.parametrize("config", ["attention products", "dynamic", "patch embedding"])
def test_other_forms_of_quantization(config: str) -> None:
    forms = {
        "attention products": W4A4.replace(attention={"quantize": True}),
        "dynamic": RegCacheConfig.from_preset("w8a8-dynamic"),
        "patch embedding": W4A4.replace(modules={"patch_embedding": True}),
    }
    _, runner, train, held_out = tiny("clip", forms[config])
    _, record = tune_registers(runner, random_cache((0, 2)), DeletionConfig(), train, held_out, QUICK, progress=False)
    assert all(map(math.isfinite, record.losses))
    assert len(set(record.losses)) > 2


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
def test_gradients_agree_with_finite_differences(family: str) -> None:
    """In the float model, in float64; features are float32, so the steps may not be small."""
    tower = TOWERS[family]
    model = tower.build().double()
    prepare_tower(model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tower.inputs().items()}
    reference = torch.nn.functional.normalize(
        CosineObjective(tower.build(), [tower.inputs()]).reference.double(), dim=-1
    )
    cache = random_cache((1, 3), registers=2).restricted((1, 3), {1: 2.0, 3: 0.5})
    rows = TrainedRows(cache, torch.device("cpu"), torch.float64)
    reference = reference.roll(1, 0)  # far from the optimum
    gradients = torch.autograd.grad(tuning_loss(model, rows.live(), batch, reference), rows.leaves())
    generator = torch.Generator().manual_seed(0)
    for leaf, gradient in zip(rows.leaves(), gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * 4e-3 * direction
            ends.append(float(tuning_loss(model, rows.live(), batch, reference).detach()))
            with torch.no_grad():
                leaf -= sign * 4e-3 * direction
        measured = (ends[0] - ends[1]) / 8e-3
        expected = float((gradient * direction).sum())
        assert expected == pytest.approx(measured, rel=5e-3, abs=2e-5)
        assert gradient.abs().max() > 0


def test_a_pass_that_starts_at_the_block_gives_the_same_loss() -> None:
    _, runner, train, held_out = tiny()
    cache = random_cache((2, 3), num_copies=2.0)
    runner.score(cache, DeletionConfig(), held_out)
    known = runner.quantized_inputs(cache, DeletionConfig(), train)
    assert known is not None
    assert known.block == 2
    reference = CosineObjective(runner.float_model, train[:1]).reference.clone()
    whole = tuning_loss(runner.quantized, cache, train[0], reference).detach()
    states = [type(known.states[0])(known.states[0].hidden.clone())]
    part = tuning_loss(runner.quantized, cache, train[0], reference, type(known)(2, states)).detach()
    torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_ends_it_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    _, runner, train, held_out = tiny()
    start, count, real = random_cache((1, 3)), 0, tuning.tuning_loss

    def broken(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return real(*args) * (math.nan if count == 5 else 1.0)

    monkeypatch.setattr(tuning, "tuning_loss", broken)
    cache, record = tune_registers(runner, start, DELETE, train, held_out, QUICK, progress=False)
    assert (record.stopped, record.steps) == ("not finite", 5)
    assert math.isnan(record.losses[-1])
    assert [step for step, _ in record.held_out] == [0, 3]
    cache.check_finite()


def test_patience_and_the_norm_term() -> None:
    _, runner, train, held_out = tiny()
    still = TuningSettings(steps=50, evaluate_every=2, patience=2, learning_rate=0.0, bias_learning_rate=0.0)
    start = random_cache((1, 3))
    cache, record = tune_registers(runner, start, DELETE, train, held_out, still, progress=False)
    assert cache is start
    assert (record.stopped, record.steps, record.best_step) == ("patience", 4, 0)
    weighted = TuningSettings(steps=2, norm_weight=0.5, learning_rate=0.0, bias_learning_rate=0.0)
    _, other = tune_registers(runner, start, DELETE, train, held_out, weighted, progress=False)
    assert all(b > a + 0.1 for a, b in zip(record.losses, other.losses, strict=False))


def test_wrong_arguments() -> None:
    _, runner, train, held_out = tiny()
    empty = RegisterCache({}, {}, BLOCKS)
    with pytest.raises(ValueError, match="There are no registers to tune: the cache has no rows"):
        tune_registers(runner, empty, DELETE, train, held_out, QUICK)
    with pytest.raises(ValueError, match="There are no images to tune registers on"):
        tune_registers(runner, random_cache(), DELETE, [], held_out, QUICK)
    with pytest.raises(ValueError, match="There is no block whose tau could be searched"):
        tune_copies(runner, empty, DELETE, held_out)
    with pytest.raises(ValueError, match=r"tuning\.patience must be at least 1, got 0"):
        TuningSettings(patience=0)
    with pytest.raises(ValueError, match=r"tuning\.learning_rate must be >= 0 and finite, got nan"):
        TuningSettings(learning_rate=math.nan)


def test_tau_per_block_is_never_worse_and_may_leave_blocks_out() -> None:
    _, runner, _, held_out = tiny()
    start = random_cache((0, 1, 3), num_copies=2.0)
    cache, trials = tune_copies(runner, start, DELETE, held_out, steps=((-2.0, 2.0), (0.5,)), progress=False)
    assert trials[0].copies == {0: 2.0, 1: 2.0, 3: 2.0}
    top = max(trials, key=lambda t: t.score)
    assert {b: cache.copies(b) for b in cache.blocks} == top.copies
    assert float(runner.score(cache, DELETE, held_out).mean()) == top.score
    assert any(len(t.copies) < 3 for t in trials)
    assert all(t.copies for t in trials)
    alone, trials = tune_copies(runner, start.restricted((3,)), DELETE, held_out, steps=((1.0,),), progress=False)
    assert alone.blocks == (3,)
    assert len(trials) == 2


def test_tuning_repairs_more_of_the_planted_encoder() -> None:
    """Registers alone at four bits: a random start of the right place becomes better on images it was not trained on."""

    def batches(split: str, count: int) -> list[Any]:
        return list(ImageInputs(planted.load_dataset(split, count), planted.build_processor()).batches(16))

    runner = TrialRunner(planted.build_planted_model(), RegCacheConfig.from_preset("w4a4"), batches("calibration", 16))
    train, held_out, report = (
        CosineObjective(runner.float_model, batches(split, count))
        for split, count in (("search", 48), ("calibration", 32), ("report", 32))
    )
    block = planted.PLANTED_BLOCK
    mined = mine_tokens(runner.float_model, train.batches, [block], progress=False)[block]
    start = mined.average(tuple(range(block, 6)), 6)
    settings = TuningSettings(steps=40, learning_rate=0.1, bias_learning_rate=0.2)
    cache, record = tune_registers(runner, start, DeletionConfig(), train, held_out, settings, progress=False)
    before, after = (float(runner.score(c, DeletionConfig(), report).mean()) for c in (start, cache))
    assert record.best_step > 0
    assert after > before + 0.01
