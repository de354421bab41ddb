"""Vision towers of Qwen2.5-VL and Qwen3-VL: rotary positions, one layer for query, key and value, images packed into one
sequence. Registers reach every image (and every window) alike; deletion is refused."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import BLOCKS, HEAD_DIM, HEADS, PACKED, QWEN_GRIDS, WIDTH, Inputs, TinyModel, random_cache, randomize
from torch import nn
from torch.nn import functional as F

from optimum_regcache import DeletionConfig, RegCacheConfig, RegCacheQuantizer, RegisterCache, SearchConfig, set_backend
from optimum_regcache.encoders.passes import image_features
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.fusion import fuse
from optimum_regcache.kernels.onednn import kernel_reason
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.registers import get_register_cache, prepare_tower, set_deletion, set_registers
from optimum_regcache.search.mining import isolated_cache, mine_tokens

every_tower = pytest.mark.parametrize("tiny", PACKED.values(), ids=lambda t: t.name)


def items(count: int, seed: int = 1) -> list[Inputs]:
    """One mapping per image, as the image processors of these models give them."""
    found = []
    for i in range(count):
        grid = torch.tensor([QWEN_GRIDS[i % len(QWEN_GRIDS)]])
        generator = torch.Generator().manual_seed(100 * seed + i)
        pixels = torch.rand(int(grid.prod()), 3 * 2 * 8 * 8, generator=generator) * 2 - 1
        found.append({"pixel_values": pixels, "image_grid_thw": grid})
    return found


def single(batch: Inputs, image: int) -> Inputs:
    lengths = batch["image_grid_thw"].prod(1).tolist()
    return {
        "pixel_values": batch["pixel_values"].split(lengths)[image],
        "image_grid_thw": batch["image_grid_thw"][image : image + 1],
    }


@every_tower
def test_nothing_installed_is_native(tiny: TinyModel) -> None:
    model, prepared = tiny.build(), tiny.build()
    prepare_tower(prepared)
    assert torch.equal(tiny.run(model), tiny.run(prepared))


@every_tower
def test_one_row_finds_everything(tiny: TinyModel) -> None:
    tower = find_tower(tiny.build())
    assert (len(tower.blocks), tower.num_heads, tower.head_dim) == (BLOCKS, HEADS, HEAD_DIM)
    (key, columns), (value, others) = tower.key_value(0)
    assert key is value
    assert isinstance(key, nn.Linear)
    assert key.out_features == 3 * WIDTH
    assert (columns, others) == (slice(WIDTH, 2 * WIDTH), slice(2 * WIDTH, None))
    assert tower.is_gated(0) is (tiny.name == "qwen2_5_vl")


@every_tower
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_registers_against_independent_attention(tiny: TinyModel, implementation: str) -> None:
    """Every segment of the sequence (an image, or a window of one) sees the same register rows with weight tau."""
    model, copies = tiny.build(), 3.0
    model.set_attn_implementation(implementation)
    cache = random_cache((2,), num_copies=copies)
    seen: dict[str, Any] = {}
    attention = find_tower(model).attention(2)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"])

    set_registers(model, cache)
    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(lambda m, a, output: seen.update(output=output))
    tiny.run(model)

    hidden, starts = seen["hidden"], seen["cu_seqlens"].tolist()
    q, k, v = F.linear(hidden, attention.qkv.weight, attention.qkv.bias).reshape(-1, 3, HEADS, HEAD_DIM).unbind(1)
    cos, sin = (t.unsqueeze(1) for t in seen["position_embeddings"])
    half = HEAD_DIM // 2
    q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))
    rows = []
    for start, end in itertools.pairwise(starts):
        for position in range(start, end):
            heads = []
            for head in range(HEADS):
                keys = torch.cat((cache.rows(2)[0][head], k[start:end, head]))
                values = torch.cat((cache.rows(2)[1][head], v[start:end, head]))
                logits = keys @ q[position, head] / math.sqrt(HEAD_DIM)
                logits[0] += math.log(copies)
                heads.append(logits.softmax(0) @ values)
            rows.append(torch.cat(heads))
    expected = F.linear(torch.stack(rows), attention.proj.weight, attention.proj.bias)
    assert torch.allclose(seen["output"], expected, atol=2e-5)


@every_tower
def test_images_of_a_batch_are_independent(tiny: TinyModel) -> None:
    model = tiny.build()
    set_registers(model, random_cache((1, 2, 3), num_copies=2.0))
    batch = tiny.inputs()
    with torch.no_grad():
        together = image_features(model, batch)
        alone = torch.cat([image_features(model, single(batch, i)) for i in range(3)])
    assert together.shape == (3, 48)
    assert torch.allclose(together, alone, atol=1e-5)


@every_tower
def test_deletion_is_refused_with_the_reason(tiny: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"packs the patches of all images .* no token of it can be deleted"):
        set_deletion(tiny.build(), DeletionConfig(block=1, count=2))


@every_tower
def test_mined_rows_are_projections_without_position(tiny: TinyModel) -> None:
    model, batch = tiny.build(), tiny.inputs(batch=4)
    mined = mine_tokens(model, [batch], [1], top=3, progress=False)[1]
    attention, norm = find_tower(model).attention(1), find_tower(model).norm(1, 0)
    with torch.no_grad():
        _, k, v = attention.qkv(norm(mined.states)).reshape(-1, 3, HEADS, HEAD_DIM).unbind(1)
    assert torch.allclose(mined.keys[1], k, atol=1e-5)
    assert torch.allclose(mined.values[1], v, atol=1e-5)
    lengths = batch["image_grid_thw"].prod(1)
    assert bool((mined.position < lengths[mined.image]).all())


@every_tower
def test_isolated_token(tiny: TinyModel) -> None:
    """One token alone attends to itself only, whatever its position: K and V follow from the norm and the value path."""
    model, state = tiny.build(), torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    cache = isolated_cache(model, state, 1, (1, 2))
    attention, norm = find_tower(model).attention(1), find_tower(model).norm(1, 0)
    with torch.no_grad():
        _, k, v = attention.qkv(norm(state)).reshape(3, HEADS, 1, HEAD_DIM)
    assert torch.allclose(cache.rows(1)[0], k, atol=1e-5)
    assert torch.allclose(cache.rows(1)[1], v, atol=1e-5)


@every_tower
@pytest.mark.parametrize("bits", [8, 4])
def test_round_trip_is_bit_exact(tiny: TinyModel, bits: int, tmp_path: Path) -> None:
    config = RegCacheConfig.from_preset(f"w{bits}a{bits}").replace(
        registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}
    )
    model = build_quantized(tiny.build(), config, random_cache((2, 3), num_copies=2.0), [tiny.inputs(seed=2)])
    assert len(list(quant_linears(model))) == BLOCKS * (5 if tiny.name == "qwen2_5_vl" else 4)
    output = tiny.run(model)
    model.save_pretrained(tmp_path)
    again = tiny.model_class.from_pretrained(tmp_path)
    assert torch.equal(tiny.run(again), output)
    cache = get_register_cache(again)
    assert cache is not None
    assert cache.blocks == (2, 3)
    set_backend(again, "simulated")
    assert float(F.cosine_similarity(tiny.run(again), output).min()) > 0.9999  # a tie may take the neighbouring code


@every_tower
def test_search_finds_registers_without_deletion(tiny: TinyModel) -> None:
    quantizer = RegCacheQuantizer(tiny.build())
    search = SearchConfig(num_copies=(1, 4), blocks_before=1, sensitivity="block")
    model = quantizer.quantize(calibration_dataset=items(12), search=search, progress=False)
    assert quantizer.fit_result is not None
    assert all(trial.setup.count == 0 for trial in quantizer.fit_result.search.trials)
    assert torch.isfinite(tiny.run(model)).all()


@pytest.mark.skipif(kernel_reason() is not None, reason="no int8 kernel here")
@every_tower
def test_fused_execution_is_refused_with_the_reason(tiny: TinyModel) -> None:
    config = RegCacheConfig(registers={"mode": "none"})
    model = build_quantized(tiny.build(), config, None, [tiny.inputs(seed=2)])
    output = tiny.run(model)
    report = fuse(model)
    assert report.fused == ()
    assert "rotary positions and packed sequences have no fused attention" in str(report)
    assert torch.equal(tiny.run(model), output)


def test_packed_batches_of_several_images_are_one_item_each() -> None:
    batch = PACKED["qwen3_vl"].inputs()
    with pytest.raises(ValueError, match=r"packs several images into one sequence .* one image per item"):
        RegCacheQuantizer(PACKED["qwen3_vl"].build()).quantize(
            quantization_config=RegCacheConfig(registers={"mode": "none"}), calibration_dataset=[batch] * 8
        )


def test_inside_the_language_model(tmp_path: Path) -> None:
    """The tower of a whole VLM is quantized, the language model is not; saved and opened as one."""
    text = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0},
    }
    vision = {**PACKED["qwen3_vl"].config().to_dict(), "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, vision_start_token_id=61, vision_end_token_id=62
    )
    model = randomize(hf.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa"), 0)
    batch = {"pixel_values": items(1)[0]["pixel_values"], "image_grid_thw": items(1)[0]["image_grid_thw"]}
    ids = torch.tensor([[1, 61, 60, 60, 60, 60, 62, 2, 3]])
    kinds = (ids == 60).int()
    quantization = RegCacheConfig(registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0})
    quantized = build_quantized(model, quantization, random_cache((2, 3), num_copies=2.0), [batch])
    assert {name.split("visual.")[0] for name, _ in quant_linears(quantized)} == {"model."}

    def logits(network: Any) -> torch.Tensor:
        with torch.no_grad():
            return network(input_ids=ids, mm_token_type_ids=kinds, **batch).logits

    output = logits(quantized)
    assert not torch.equal(output, logits(model))
    quantized.save_pretrained(tmp_path)
    again = hf.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again), output)
    assert again.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_a_cache_may_be_passed_by_any_of_its_names() -> None:
    from optimum_regcache import RegCacheCLIPVisionModel

    model = RegCacheCLIPVisionModel._from_config(hf.CLIPVisionConfig(hidden_size=64, num_attention_heads=4))
    rows = torch.randn(4, 1, 16)
    cache = RegisterCache({0: rows}, {0: rows}, 12)
    with pytest.raises(ValueError, match="passed as past_key_values and as cache; give one of them"):
        model(pixel_values=None, past_key_values=cache, cache=cache)
    with pytest.raises(TypeError, match="register_cache must be a RegisterCache, got dict"):
        model(pixel_values=None, register_cache={})
