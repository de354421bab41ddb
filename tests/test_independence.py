"""Images of a batch do not touch each other, and what is no number is never taken for one."""
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TOWERS

from optimum_regcache import (
    RegCacheCLIPVisionModel,
    RegCacheConfig,
    RegCacheQuantizer,
    RegisterCache,
    fuse,
    set_backend,
    set_registers,
)
from optimum_regcache.config import DeletionConfig
from optimum_regcache.kernels import native
from optimum_regcache.registers import prepare_tower, set_deletion

DELETIONS = {
    "top k": DeletionConfig(block=2, count=3),
    "l2": DeletionConfig(block=2, count=3, score="l2"),
    "threshold": DeletionConfig(block=2, count=3, rule="threshold", kappa=1.01),
    "fill none": DeletionConfig(block=2, count=3, fill="none"),
    **{action: DeletionConfig(block=2, count=3, action=action) for action in ("replace", "late", "per_token")},
}
needs_int8 = pytest.mark.skipif(native.unavailable_reason() is not None, reason="fused blocks need an int8 kernel")


def broken(kind: float, images: int = 3) -> torch.Tensor:
    """Images of which the first is nothing but ``kind``."""
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    x[0] = kind
    return x


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", DELETIONS)
@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
def test_an_image_of_nan_stays_alone(family: str, name: str, kind: float) -> None:
    model = TOWERS[family].build()
    prepare_tower(model)
    set_deletion(model, DELETIONS[name])
    x = broken(kind)
    with torch.no_grad():
        alone = model(pixel_values=x[1:]).last_hidden_state
        for order in ([0, 1, 2], [1, 2, 0], [1, 0, 2]):
            found = model(pixel_values=x[order]).last_hidden_state
            torch.testing.assert_close(found[[order.index(1), order.index(2)]], alone)
            assert found[order.index(0)].isnan().all()


def test_one_token_of_nan_is_deleted_first() -> None:
    model = TOWERS["clip"].build()
    runtime = prepare_tower(model)
    set_deletion(model, DELETIONS["top k"])
    hidden = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(1))
    hidden[0, 5] = float("nan")
    kept = runtime.delete(hidden, None)
    assert kept.isfinite().all()
    assert kept.shape == (2, 14, 64)
    assert runtime.current.selection.dropped[0, 5]
    assert runtime.finish(kept).isfinite().all()


def quantized(**parts: Any) -> Any:
    items = [{"pixel_values": x} for x in TOWERS["clip"].inputs(3, 8)["pixel_values"]]
    config = RegCacheConfig(registers={"mode": "none"}, deletion={"block": 2, "count": 3}).replace(**parts)
    return RegCacheQuantizer(TOWERS["clip"].build()).quantize(
        quantization_config=config, calibration_dataset=items, progress=False
    )


ACTIVATIONS = [
    {},
    {"outlier_tokens": "per_token"},
    {"mode": "dynamic"},
    {"mode": "dynamic", "symmetric": False},
    {"mode": "dynamic", "bits": 16},
    {"mode": "dynamic", "granularity": "per_token"},
]


FORMS = [
    *({"activations": a} for a in ACTIVATIONS),
    *({"deletion": {"action": a}} for a in ("replace", "late", "per_token")),
]


@pytest.mark.parametrize("parts", FORMS, ids=str)
def test_every_form(parts: dict[str, Any]) -> None:
    model = quantized(**parts)
    for backend in ("auto", "simulated", "reference", "int_mm", "onednn"):
        try:
            set_backend(model, backend)
        except ValueError:
            continue  # this layer has no such form
        for kind in (float("nan"), float("inf")):
            x = broken(kind)
            with torch.inference_mode():
                alone = model(pixel_values=x[1:]).last_hidden_state
                found = model(pixel_values=x)
            torch.testing.assert_close(found.last_hidden_state[1:], alone, atol=1e-5, rtol=1e-5)
            assert found.last_hidden_state[0].isnan().all()  # the class token too
            assert found.pooler_output[0].isnan().all()


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_int8)])
@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_quantized_models_too(fused: bool, kind: float) -> None:
    model = quantized()
    if fused:
        fuse(model)
    x = broken(kind)
    with torch.inference_mode():
        alone = model(pixel_values=x[1:]).last_hidden_state
        for order in ([0, 1, 2], [1, 2, 0]):
            found = model(pixel_values=x[order]).last_hidden_state
            torch.testing.assert_close(found[[order.index(1), order.index(2)]], alone, atol=1e-5, rtol=1e-5)
            assert found[order.index(0)].isnan().all()


def test_a_reference_image_of_nan_is_named() -> None:
    items = [{"pixel_values": x * float("nan")} for x in broken(0.0, 8)]
    with pytest.raises(ValueError, match=r"Image \d of the data holds values that are not finite \(nan or inf\)"):
        RegCacheQuantizer(TOWERS["clip"].build()).quantize(
            quantization_config=RegCacheConfig(registers={"mode": "none"}), calibration_dataset=items, progress=False
        )


def cache(blocks: int = 4, heads: int = 4, width: int = 16, value: float = 0.5) -> RegisterCache:
    rows = {2: torch.full((heads, 1, width), value)}
    return RegisterCache(rows, rows, blocks)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "register_cache"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (cache(value=float("nan")), "Register rows of block 2 are not finite"),
        (cache(value=float("inf")), "Register rows of block 2 are not finite"),
        (cache(blocks=6), "The register cache is for 6 blocks, this encoder has 4"),
        (cache(heads=2), r"Register rows of block 2 have shape \(2, 1, 16\); this encoder needs \[4, registers, 16\]"),
        (cache(width=8), r"Register rows of block 2 have shape \(4, 1, 8\)"),
    ],
)
def test_a_passed_cache_that_does_not_fit_is_refused(name: str, bad: RegisterCache, message: str) -> None:
    model = RegCacheCLIPVisionModel._from_config(TOWERS["clip"].build().config).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(pixel_values=x, **{name: bad})
    with pytest.raises(ValueError, match=message):
        set_registers(model, bad)
    with torch.no_grad():  # nothing is left behind
        good = model(pixel_values=x, **{name: cache()}).last_hidden_state
        assert torch.equal(good, model(pixel_values=x, **{name: cache()}).last_hidden_state)
        assert not torch.equal(good, model(pixel_values=x).last_hidden_state)


def test_a_cache_of_another_dtype_is_cast() -> None:
    model = RegCacheCLIPVisionModel._from_config(TOWERS["clip"].build().config).eval()
    rows = {2: torch.full((4, 1, 16), 0.5, dtype=torch.float64)}
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        expected = model(pixel_values=x, past_key_values=cache()).last_hidden_state
        assert torch.equal(
            model(pixel_values=x, past_key_values=RegisterCache(rows, rows, 4)).last_hidden_state, expected
        )
