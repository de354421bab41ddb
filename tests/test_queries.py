"""Segmenters whose queries join before all other tokens at a later block (EoMT): patches move on, queries are protected."""
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectors import EOMT
from models import BLOCKS, PATCHES, quantized, random_cache, run_block
from references import neighbour_mean

from optimum_regcache import DeletionConfig, fuse
from optimum_regcache.encoders.passes import image_features, patch_tokens
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.visiting import patch_span
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.outliers import measure_outliers
from optimum_regcache.evaluation.places import patch_norms
from optimum_regcache.methods._search.gradients import squared_gradients
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neurons import set_register_neurons
from optimum_regcache.registers.replay import Recorded, record_block_inputs, replaying
from optimum_regcache.rewrites.rotation import rotate_residual
from optimum_regcache.search.mining import mine_tokens

PREFIX, QUERIES, JOIN = 3, 3, 2


def outputs(model: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(**EOMT.inputs(), **options)


def test_where_the_patches_are() -> None:
    model = EOMT.build()
    tower = find_tower(model)
    assert (tower.num_queries, tower.first_with_queries) == (QUERIES, JOIN)
    spans = [patch_span(tower, b) for b in range(BLOCKS)]
    assert [s.lead for s in spans] == [PREFIX, PREFIX, PREFIX + QUERIES, PREFIX + QUERIES]
    prepare_tower(model)
    assert [patch_span(tower, b) for b in range(BLOCKS)] == spans
    assert tower.patches.lead == PREFIX + QUERIES


def test_nothing_takes_queries_for_patches() -> None:
    model, batches = EOMT.build(), [EOMT.inputs(2)]
    with torch.no_grad():
        model.query.weight[:, 5] = 1e3
    assert patch_norms(model, batches[0]).shape == (BLOCKS, 3, PATCHES)
    assert patch_norms(model, batches[0]).max() < 500
    assert measure_token_norms(model, batches).max_block_input.max() < 500
    assert measure_outliers(model, batches).ratio.max() < 20
    mined = mine_tokens(model, batches, [JOIN], top=4, progress=False)[JOIN]
    assert mined.position.min() >= PREFIX + QUERIES
    assert patch_tokens(model, batches[0])[1] == [PATCHES] * 3


def test_features_are_queries_and_patches() -> None:
    model = EOMT.build()
    features = image_features(model, EOMT.inputs())
    assert features.shape == (3, (QUERIES + PATCHES) * 64)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    last = outputs(model).last_hidden_state
    torch.testing.assert_close(
        features[:, :64] * (2 * QUERIES) ** 0.5, torch.nn.functional.normalize(last[:, 0], dim=-1)
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", range(BLOCKS))
def test_deletion_before_at_and_behind_the_join(block: int, masked: bool) -> None:
    """Against one image and one block at a time, with the tokens really taken out and the queries put in by hand."""
    model, plain = EOMT.build(), EOMT.build()
    set_deletion(model, DeletionConfig(block=block, count=3))
    prepare_tower(model).keep_positions = masked
    seen: list[torch.Tensor] = []
    tower = find_tower(plain)
    lead = PREFIX + (QUERIES if block >= JOIN else 0)
    handle = tower.blocks[block].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(plain)
    handle.remove()
    finals: list[torch.Tensor] = []
    model.layernorm.register_forward_pre_hook(lambda module, args: finals.append(args[0]))
    found = outputs(model)
    assert found.masks_queries_logits.shape == outputs(plain).masks_queries_logits.shape
    for image, hidden in zip(finals[-1], seen[0], strict=True):
        norms = hidden[lead : lead + PATCHES].abs().amax(-1).numpy()
        gone = sorted(np.argsort(-norms, kind="stable")[:3].tolist())
        kept = [p for p in range(len(hidden)) if p - lead not in gone]
        state = hidden[None, kept]
        with torch.no_grad():
            for later in range(block, BLOCKS):
                if later == JOIN and block < JOIN:
                    state = torch.cat((plain.query.weight[None], state), 1)
                state = run_block(tower.blocks[later], state)
        full = np.zeros((PREFIX + QUERIES + PATCHES, 64), np.float32)
        joined = QUERIES if block < JOIN else 0
        full[[*range(joined), *(p + joined for p in kept)]] = state[0].numpy()
        full[PREFIX + QUERIES :] = neighbour_mean(full[PREFIX + QUERIES :], gone, (4, 4))
        np.testing.assert_allclose(image.numpy(), full, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("block", range(1, BLOCKS))
def test_passes_that_start_at_a_block(block: int) -> None:
    model, inputs = EOMT.build(), EOMT.inputs()
    set_deletion(model, DeletionConfig(block=1, count=3))
    set_registers(model, random_cache((2, 3)))
    expected = outputs(model)
    states = record_block_inputs(model, [inputs], block, Recorded(0, record_block_inputs(model, [inputs], 0)))
    with replaying(model, block, states):
        found = outputs(model)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits, rtol=1e-5, atol=1e-5)


def test_fused() -> None:
    model = quantized(EOMT, deletion={"block": 1, "count": 3})
    expected = outputs(model)
    assert not fuse(model, attention="float32").skipped
    torch.testing.assert_close(outputs(model).last_hidden_state, expected.last_hidden_state, rtol=1e-3, atol=1e-3)


def test_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="adds its queries at a later block"):
        rotate_residual(EOMT.build())
    with pytest.raises(ValueError, match="reads all tokens behind its queries as patches"):
        set_register_neurons(EOMT.build(), {1: [2]})
    with pytest.raises(ValueError, match="needs the whole patch grid"):
        set_deletion(EOMT.build(), DeletionConfig(block=1, count=2, fill="none"))
    model = EOMT.build()
    model.attn_mask_probs.fill_(1.0)
    with pytest.raises(ValueError, match=r"attn_mask_probs above 0.*model\.attn_mask_probs\.zero_\(\)"):
        prepare_tower(model)


def test_layers_are_sampled_by_the_patches_of_their_block() -> None:
    model, tower = EOMT.build(), find_tower(EOMT.build())
    prepare_tower(model)
    names = [f"{tower.block_name(b)}.{tower.mlp_out_name(b)}" for b in range(BLOCKS)]
    assert [tower.block_of(name) for name in names] == list(range(BLOCKS))
    assert tower.block_of("class_predictor") == BLOCKS - 1
    batch = EOMT.inputs(batch=2)
    few = squared_gradients(model, names, [batch], draws=1, limit=2 * (PREFIX + QUERIES + 1))
    protected = [PREFIX, PREFIX, PREFIX + QUERIES, PREFIX + QUERIES]
    every = squared_gradients(model, names, [batch], draws=1)
    for name, lead in zip(names, protected, strict=True):
        whole = every[name].x.reshape(2, -1, every[name].x.shape[1])
        kept = few[name].x.reshape(2, -1, whole.shape[2])
        assert torch.equal(kept[:, :lead], whole[:, :lead])
