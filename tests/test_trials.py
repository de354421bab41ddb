"""Trials: what configurations have in common is computed once, and changes no bit of any score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TOWERS

from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.passes import ImageRange
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation import CosineObjective
from optimum_regcache.search import TrialRunner
from optimum_regcache.search.trials import setting_digest

CONFIGS = {
    "static": RegCacheConfig(registers={"mode": "none"}),
    "asymmetric, moving average": RegCacheConfig(
        activations={"symmetric": False, "observer": "moving_average"}, registers={"mode": "none"}
    ),
    "patch embedding and head": RegCacheConfig(modules={"patch_embedding": True}, registers={"mode": "none"}),
    "attention products": RegCacheConfig(attention={"quantize": True}, registers={"mode": "none"}),
    "dynamic": RegCacheConfig.from_preset("w8a8-dynamic"),
}


def parts(family: str) -> tuple[Any, list[Any], list[Any]]:
    """(model, calibration, selection); the last selection batch is a smaller one."""
    tower = TOWERS[family]
    model = tower.build()
    selection = [tower.inputs(seed=3), ImageRange([tower.inputs(seed=4)], 1)[0]]
    return model, [tower.inputs(seed=1), tower.inputs(seed=2)], selection


def cache(model: torch.nn.Module, blocks: tuple[int, ...]) -> RegisterCache:
    """Random registers for ``blocks``."""
    tower = find_tower(model)
    rows = {
        b: torch.randn(tower.num_heads, 1, tower.head_dim, generator=torch.Generator().manual_seed(b)) for b in blocks
    }
    return RegisterCache(rows, rows, len(tower.blocks), 4.0)


@pytest.mark.parametrize("family", ["clip", "siglip2", "dinov2", "dinov3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_with_and_without_the_record_are_the_same_bits(family: str, name: str) -> None:
    model, calibration, selection = parts(family)
    runners = [TrialRunner(model, CONFIGS[name], calibration, reuse=reuse) for reuse in (False, True)]
    objectives = [CosineObjective(r.float_model, selection) for r in runners]
    setups: list[tuple[RegisterCache | None, DeletionConfig]] = [
        (None, DeletionConfig()),
        (cache(model, (2, 3)), DeletionConfig()),
        (None, DeletionConfig(block=2, count=1)),
        (cache(model, (1, 2, 3)), DeletionConfig(block=2, count=2)),  # an earlier block than before
        (cache(model, (3,)), DeletionConfig()),
        (None, DeletionConfig()),
    ]
    for registers, deletion in setups:
        plain, reused = (r.score(registers, deletion, o) for r, o in zip(runners, objectives, strict=True))
        assert torch.equal(plain, reused)
        assert plain.isfinite().all()
    few = ImageRange(calibration, 2)
    for registers, deletion in setups:  # on fewer images, each list with scales of its own
        plain, reused = (
            r.score(registers, deletion, o.first(2), few) for r, o in zip(runners, objectives, strict=True)
        )
        assert torch.equal(plain, reused)
    saved = runners[0].block_forwards - runners[1].block_forwards
    assert saved == 0 if name == "attention products" else saved > 0


def test_block_forwards_are_those_that_run() -> None:
    model, calibration, selection = parts("clip")
    runner = TrialRunner(model, CONFIGS["static"], calibration)
    objective = CosineObjective(runner.float_model, selection)
    seen = 0

    def count(block: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        replay = block.regcache.replay
        if replay is None or block.block_index >= replay.block:
            seen += len(args[0])

    stopped = 0  # a recording pass enters the block at which it stops
    for twin in (runner.float_model, runner.quantized):
        for block in find_tower(twin).blocks:
            block.register_forward_pre_hook(count)
    runner.score(None, DeletionConfig(), objective)
    assert runner.block_forwards == seen
    runner.score(cache(model, (2, 3)), DeletionConfig(), objective)
    stopped = sum(len(b["pixel_values"]) for b in (*calibration, *selection))
    assert runner.block_forwards == seen - stopped
    before = runner.block_forwards
    runner.score(cache(model, (2, 3)), DeletionConfig(block=2, count=1), objective)
    assert runner.block_forwards == seen - stopped
    assert runner.block_forwards - before == 2 * stopped  # two of four blocks, nothing recorded again


def test_the_first_images_of_an_objective_keep_their_reference() -> None:
    model, _, selection = parts("clip")
    whole = CosineObjective(model, selection)
    part = whole.first(3)
    assert [len(b["pixel_values"]) for b in part.batches] == [len(selection[0]["pixel_values"]), 1][: len(part.batches)]
    torch.testing.assert_close(part.scores(model), whole.scores(model)[: len(part.reference)])


def test_scales_of_another_runner_are_taken_where_all_calibration_images_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration, selection = parts("clip")
    registers, deletion = cache(model, (2, 3)), DeletionConfig(block=2, count=2)
    first = TrialRunner(model, RegCacheConfig(), calibration)
    objective = CosineObjective(first.float_model, selection)
    known = first.score(registers, deletion, objective)
    few = ImageRange(calibration, 4)
    fewer = first.score(registers, deletion, objective, few)
    monkeypatch.setattr("optimum_regcache.search.trials.calibrate", lambda *args: pytest.fail("calibrated again"))
    second = TrialRunner(model, RegCacheConfig(), calibration, scales=first.scales)
    assert bool((second.score(registers, deletion, objective) == known).all())
    monkeypatch.undo()
    assert bool((second.score(registers, deletion, objective, few) == fewer).all())
    assert not bool((fewer == known).all())
    other = RegisterCache(
        {b: k + 1e-6 for b, k in ((b, registers.rows(b)[0]) for b in registers.blocks)},
        {b: registers.rows(b)[1] for b in registers.blocks},
        len(registers.layers),
    )
    digests = {setting_digest(c, d) for c in (registers, other, None) for d in (deletion, DeletionConfig())}
    assert len(digests) == 6
