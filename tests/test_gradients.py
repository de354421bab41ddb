"""Gradients through quantized encoders: straight through the quantizers, or an error; never a part of the gradient."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS, TOWERS

from optimum_regcache import RegCacheConfig, RegCacheQuantizer, RegisterCache, fuse, set_backend
from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.kernels import native
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.math.nonuniform import PROBABILITY_FORMS, quantize_probabilities, twin_signed
from optimum_regcache.math.uniform import fake_quantize

FORMS: dict[str, dict[str, Any]] = {
    "static": {},
    "asymmetric": {"activations": {"symmetric": False}},
    "per token": {"activations": {"mode": "dynamic", "granularity": "per_token"}},
    "per tensor": {"activations": {"mode": "dynamic", "granularity": "per_tensor"}},
    "hadamard": {"activations": {"mlp_out_hadamard": True}},
    "patch embedding": {"modules": {"patch_embedding": True}},
    "attention products": {"attention": {"quantize": True, "probabilities": "twin"}},
    "twin": {"methods": ["ptq4vit"]},
    "noisyquant": {"methods": ["noisyquant"]},
    "rotation": {"methods": ["rotation"]},
    "mixed precision": {"methods": ["mixed_precision"]},
    "registers in tokens": {"methods": [{"name": "test_time_registers", "variant": "token"}]},
}


def quantized(family: str, **parts: Any) -> tuple[Any, Any]:
    """(float model, its W8A8 copy)."""
    model = MODELS[family].build()
    config = RegCacheConfig(registers={"mode": "none"}).replace(**parts)
    items = [{"pixel_values": x} for seed in (3, 4) for x in MODELS[family].inputs(seed)["pixel_values"]]
    return model, RegCacheQuantizer(model).quantize(
        quantization_config=config, calibration_dataset=items, progress=False
    )


def gradient(model: Any, seed: int = 1, **inputs: Any) -> torch.Tensor:
    """Of a fixed projection of the output to the pixels, flat."""
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    output = model(pixel_values=pixels, **inputs).last_hidden_state
    (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
    assert pixels.grad is not None
    return pixels.grad.flatten()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_the_float_model_but_for_rounding(form: str) -> None:
    model, ours = quantized("dinov2" if form == "registers in tokens" else "clip", **FORMS[form])
    expected, found = gradient(model), gradient(ours)
    assert cosine(expected, found) > 0.97
    assert 0.9 < float(found.norm() / expected.norm()) < 1.1


@pytest.mark.parametrize("family", ["siglip", "dinov2", "vit", "dinov3"])
def test_every_family_has_gradients(family: str) -> None:
    model, ours = quantized(family)
    assert cosine(gradient(model), gradient(ours)) > 0.97


def test_registers_and_deletion_have_gradients() -> None:
    model, ours = quantized("dinov2", deletion={"block": 2, "count": 3})
    tower = find_tower(ours)
    rows = {b: torch.randn(tower.num_heads, 1, tower.head_dim, requires_grad=True) for b in (2, 3)}
    full, found = gradient(model), gradient(ours)
    assert 0.3 < cosine(full, found) < 0.999  # of what is left
    values = {b: torch.randn(tower.num_heads, 1, tower.head_dim, requires_grad=True) for b in (2, 3)}
    wired = TOWERS["dinov2"].build()
    from optimum_regcache import RegCacheDinov2Model

    regcache = RegCacheDinov2Model._from_config(wired.config).eval()
    cache = RegisterCache(rows, values, 4, 2.0)
    regcache(pixel_values=torch.randn(1, 3, 32, 32), past_key_values=cache).last_hidden_state.sum().backward()
    for tensor in (*rows.values(), *values.values()):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["onednn", "reference"])
def test_a_backend_without_gradients_says_so(backend: str) -> None:
    _, ours = quantized("clip")
    if backend == "onednn":
        from optimum_regcache.kernels.onednn import kernel_reason

        if kernel_reason() is not None:
            pytest.skip(kernel_reason() or "")
    set_backend(ours, backend)
    with pytest.raises(
        RuntimeError, match=rf"The backend '{backend}' has no gradients. For gradients call set_backend"
    ):
        gradient(ours)
    with torch.no_grad():
        assert ours(pixel_values=torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()
    set_backend(ours, "simulated")
    assert gradient(ours).abs().max() > 0


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="fused blocks need an int8 kernel")
def test_a_fused_model_steps_aside_for_gradients() -> None:
    _, ours = quantized("clip")
    expected = gradient(ours)
    fuse(ours)
    with torch.inference_mode():
        before = ours(pixel_values=torch.ones(1, 3, 32, 32)).last_hidden_state
    assert torch.equal(gradient(ours), expected)
    with torch.inference_mode():
        assert torch.equal(ours(pixel_values=torch.ones(1, 3, 32, 32)).last_hidden_state, before)


def test_what_inference_mode_prepared_serves_gradients_later() -> None:
    model = MODELS["clip"].build()
    items = [{"pixel_values": x} for x in MODELS["clip"].inputs(3, 4)["pixel_values"]]
    config = RegCacheConfig(registers={"mode": "none"}, deletion={"block": 2, "count": 1})
    with torch.inference_mode():
        ours = RegCacheQuantizer(model).quantize(quantization_config=config, calibration_dataset=items, progress=False)
        ours(pixel_values=torch.randn(1, 3, 32, 32))
    assert not any(t.is_inference() for t in (*ours.parameters(), *ours.buffers()))
    assert gradient(ours).abs().max() > 0
    set_backend(ours, "simulated")
    with torch.inference_mode():
        ours(pixel_values=torch.randn(1, 3, 32, 32))
    assert gradient(ours).abs().max() > 0


def test_a_bias_that_trains_is_the_one_that_is_used() -> None:
    _, ours = quantized("clip")
    layer = next(m for m in ours.modules() if isinstance(m, QuantLinear))
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        layer(x)  # prepared
    layer.bias.requires_grad_(True)
    before = layer(x)
    before.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 2.0))
    with torch.no_grad():
        layer.bias.add_(1.0)
    torch.testing.assert_close(layer(x), before + 1)


def test_gradients_stop_where_values_are_clipped() -> None:
    x = torch.tensor([-3.0, -1.0, 0.3, 0.9, 5.0], requires_grad=True)
    scale, zero = torch.tensor(0.1), torch.tensor(0)
    y = fake_quantize(x, scale, zero, 5, True)  # up to 1.5
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert torch.equal(y, fake_quantize(x.detach(), scale, zero, 5, True))
    x.grad = None
    twin_signed(x, scale, torch.tensor(0.1), 5).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("form", PROBABILITY_FORMS)
def test_probabilities_pass_gradients(form: str) -> None:
    p = torch.tensor([0.0, 1e-6, 0.2, 0.9], requires_grad=True)
    scale = torch.tensor(0.25 if form == "twin" else 1.0)
    y = quantize_probabilities(p, scale, 4, form)
    y.sum().backward()
    assert p.grad.tolist() == [1.0] * 4
    assert torch.equal(y, quantize_probabilities(p.detach(), scale, 4, form))


def test_deletion_and_gradient_checkpointing_are_refused_together() -> None:
    _, ours = quantized("vit", deletion={"block": 2, "count": 3})
    enable = getattr(type(ours), "activation_checkpointing_enable", type(ours).gradient_checkpointing_enable)
    enable(ours)
    ours.train()
    with pytest.raises(ValueError, match="Token deletion and gradient checkpointing do not go together"):
        gradient(ours)
    from optimum_regcache import set_deletion

    set_deletion(ours, DeletionConfig())
    checkpointed = gradient(ours)
    getattr(ours, enable.__name__.replace("enable", "disable"))()
    assert torch.equal(checkpointed, gradient(ours))
