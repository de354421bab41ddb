"""Token norms and FLOPs are those of what blocks compute on: without tokens that are deleted, with those that are added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import BLOCKS, HEAD_DIM, HEADS, MODELS, PACKED, PATCHES, TOWERS, WIDTH, TinyModel

from optimum_regcache import RegisterCache
from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.norms import block_flops, measure_token_norms
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import set_register_neurons

DELETED, BLOCK = 2, 2


def block_inputs(model: Any, batch: dict[str, torch.Tensor], tiny: TinyModel) -> list[torch.Tensor]:
    """What arrives at each block, deleted tokens included."""
    seen: list[torch.Tensor] = []
    handles = [b.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone())) for b in find_tower(model).blocks]
    tiny.run(model, batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("tiny", [*TOWERS.values(), MODELS["siglip2"]], ids=lambda t: t.name)
@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_a_deleted_token_is_not_measured(tiny: TinyModel, rule: str) -> None:
    model, batch = tiny.build(), tiny.inputs()
    prepare_tower(model)
    plain = measure_token_norms(model, [batch])
    set_deletion(model, DeletionConfig(block=BLOCK, count=DELETED, rule=rule, kappa=1.001))
    norms = measure_token_norms(model, [batch])
    assert torch.equal(norms.max_block_input[:BLOCK], plain.max_block_input[:BLOCK])
    arrived = block_inputs(model, batch, tiny)[BLOCK].abs().amax(-1)
    mask = batch.get("pixel_attention_mask", torch.ones_like(arrived)).bool()
    kept: list[float] = []
    for row, valid in zip(arrived, mask, strict=True):
        values = sorted(row[valid][tiny.lead :].tolist())
        kept += values[:-DELETED]
    assert float(norms.max_block_input[BLOCK]) == pytest.approx(max(kept), rel=1e-5)
    assert float(norms.mean_block_input[BLOCK]) == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert float(norms.max_block_input[BLOCK]) < float(plain.max_block_input[BLOCK])
    masked = rule == "threshold" or tiny.name.startswith("siglip2")
    after = PATCHES + tiny.lead - (0 if masked else DELETED)
    assert norms.tokens.tolist() == [PATCHES + tiny.lead] * BLOCK + [after] * (BLOCKS - BLOCK)


def test_a_token_that_the_first_block_adds_is_no_patch() -> None:
    tiny = TOWERS["clip"]
    model, batch = tiny.build(), tiny.inputs()
    expected = measure_token_norms(model, [batch])
    set_register_neurons(model, {1: [0]})
    norms = measure_token_norms(model, [batch])
    assert float(norms.mean_block_input[0]) == float(expected.mean_block_input[0])
    assert norms.tokens.tolist() == [PATCHES + 2] * BLOCKS


def test_flops_of_registers_and_deletion() -> None:
    tiny = TOWERS["clip"]
    model, batch = tiny.build(), tiny.inputs()
    prepare_tower(model)

    def flops() -> float:
        found = block_flops(model, measure_token_norms(model, [batch]).tokens)
        assert found is not None
        return found

    def block(tokens: int, rows: int = 0) -> int:
        weights = 4 * WIDTH * WIDTH + 2 * WIDTH * 128
        return 2 * tokens * weights + 4 * tokens * (tokens + rows) * WIDTH

    tokens = PATCHES + 1
    assert flops() == BLOCKS * block(tokens)
    rows = {i: torch.ones(HEADS, 1, HEAD_DIM) for i in (1, 3)}
    set_registers(model, RegisterCache(rows, rows, BLOCKS))
    assert flops() == 2 * block(tokens) + 2 * block(tokens, 1)
    set_deletion(model, DeletionConfig(block=3, count=2))
    assert flops() == 2 * block(tokens) + block(tokens, 1) + block(tokens - 2, 1)
    packed = PACKED["qwen3_vl"]
    qwen = packed.build()
    assert block_flops(qwen, measure_token_norms(qwen, [packed.inputs()]).tokens) is None
