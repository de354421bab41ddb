"""Attention to the registers is what the attention weights say, and measuring it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import BLOCKS, HEADS, MODELS, PACKED, TOWERS, TinyModel, quantized, random_cache

from optimum_regcache.config import DeletionConfig
from optimum_regcache.evaluation.attention import register_attention
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers

CLIP = TOWERS["clip"]


def with_registers(tiny: TinyModel, **options: Any) -> Any:
    model = tiny.build()
    set_registers(model, random_cache((1, 3), **options))
    return model


@pytest.mark.parametrize("tiny", [t for t in TOWERS.values() if t.name != "siglip2"], ids=lambda t: t.name)
def test_it_is_the_weight_on_the_register_columns(tiny: TinyModel) -> None:
    model = with_registers(tiny, registers=2, num_copies=3.0)
    batches = [tiny.inputs(seed=seed) for seed in (0, 1)]
    before = tiny.run(model)
    share = register_attention(model, batches)
    assert torch.equal(tiny.run(model), before)  # the attention implementation is the one it was
    assert share.shape == (BLOCKS, HEADS)
    assert (share[[0, 2]] == 0).all()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = [model(**batch, output_attentions=True).attentions for batch in batches]
    for block in (1, 3):
        weights = torch.cat([attentions[block][..., :2].sum(-1) for attentions in outputs])  # [B, H, N]
        torch.testing.assert_close(share[block], weights.mean((0, 2)))


def test_many_copies_of_a_register_get_nearly_everything() -> None:
    few, many = (register_attention(with_registers(CLIP, num_copies=tau), [CLIP.inputs()]) for tau in (1e-6, 1e6))
    assert float(few[[1, 3]].max()) < 0.01
    assert float(many[[1, 3]].min()) > 0.99


def test_padding_asks_for_nothing() -> None:
    tiny = MODELS["siglip2"]
    model, batch = with_registers(tiny), tiny.inputs()
    share = register_attention(model, [batch])
    mask = batch["pixel_attention_mask"].bool()
    assert not mask.all()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**tiny.inputs(), output_attentions=True).attentions[1][..., 0]  # [B, H, N]
    valid = torch.stack([w[:, m].mean(1) for w, m in zip(weights, mask, strict=True)])
    torch.testing.assert_close(share[1], valid.mean(0))


def test_deletion_and_quantized_layers_may_be_there() -> None:
    share = register_attention(quantized(CLIP), [CLIP.inputs()])
    assert (share[:2] == 0).all()
    assert (share[2:] > 0).all()
    products = register_attention(quantized(CLIP, attention={"quantize": True, "bits": 8}), [CLIP.inputs()])
    assert (products[2:] > 0).all()


def test_what_cannot_be_measured_is_refused() -> None:
    plain = CLIP.build()
    with pytest.raises(ValueError, match="No block of this model has registers"):
        register_attention(plain, [CLIP.inputs()])
    prepare_tower(plain)
    set_deletion(plain, DeletionConfig(block=1, count=1))
    with pytest.raises(ValueError, match="No block of this model has registers"):
        register_attention(plain, [CLIP.inputs()])
    with pytest.raises(ValueError, match="No images to measure attention on"):
        register_attention(with_registers(CLIP), [])
    packed = next(iter(PACKED.values()))
    with pytest.raises(ValueError, match="not measured where patches are packed"):
        register_attention(with_registers(packed), [packed.inputs()])
