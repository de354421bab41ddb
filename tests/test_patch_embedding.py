"""QuantPatchEmbedding against the convolution it replaces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels import onednn
from optimum_regcache.layers.linear import QuantLinear, set_backend
from optimum_regcache.layers.patch_embedding import QuantPatchEmbedding, unfold_patches
from optimum_regcache.math import uniform

IN, OUT = 37, 11
STATIC, DYNAMIC = ActivationsConfig(), ActivationsConfig(mode="dynamic", granularity="per_token")
REASON = onednn.machine_reason()
needs_int8 = pytest.mark.skipif(REASON is not None, reason=f"no int8 kernel on this machine: {REASON}")


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def patches_of(x: torch.Tensor, kernel: tuple[int, int]) -> torch.Tensor:
    return F.unfold(x, kernel, stride=kernel).transpose(1, 2)


def fake_pixels(embed: QuantPatchEmbedding, x: torch.Tensor, kernel: tuple[int, int]) -> torch.Tensor:
    """The image after quantizing and dequantizing it; one scale per patch if activations are dynamic."""
    a, scale, zero = embed.linear.activations, embed.linear.input_scale, embed.linear.input_zero_point
    if scale is not None and zero is not None:
        return uniform.fake_quantize(x, scale, zero, a.bits, a.symmetric)
    patches = patches_of(x, kernel)
    rebuilt = uniform.fake_quantize(
        patches, *uniform.dynamic_qparams(patches, a.bits, a.symmetric, a.granularity), a.bits, a.symmetric
    )
    covered = (x.shape[2] // kernel[0] * kernel[0], x.shape[3] // kernel[1] * kernel[1])
    return F.fold(rebuilt.transpose(1, 2), covered, kernel, stride=kernel)


@pytest.mark.parametrize(
    "backend", ["auto", "simulated", "reference", "int_mm", pytest.param("onednn", marks=needs_int8)]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    ("kernel", "size"), [((4, 4), (12, 8)), ((4, 4), (15, 11)), ((2, 5), (6, 10))], ids=["exact", "cropped", "oblong"]
)
@pytest.mark.parametrize("activations", [STATIC, DYNAMIC, ActivationsConfig(symmetric=False)], ids=["s", "dyn", "asym"])
def test_patch_embedding_equals_the_convolution_on_fake_quantized_operands(
    activations: ActivationsConfig, kernel: tuple[int, int], size: tuple[int, int], bias: bool, backend: str
) -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(3, OUT, kernel, stride=kernel, bias=bias)
    x = sample(2, 3, *size)
    embed = QuantPatchEmbedding.from_float(conv, WeightsConfig(), activations)
    if activations.mode == "static":
        qparams = uniform.choose_qparams(x.amin(), x.amax(), activations.bits, activations.symmetric)
        embed.linear.set_input_qparams(*qparams)
    set_backend(embed, backend)
    weight = embed.linear.dequantized_weight().reshape(conv.weight.shape)
    expected = F.conv2d(fake_pixels(embed, x, kernel), weight, conv.bias, stride=kernel).detach()
    y = embed(x)
    assert y.shape == conv(x).shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


def test_linear_patch_embedding_is_the_linear_layer() -> None:
    linear, x = nn.Linear(IN, OUT), sample(2, 5, IN)
    embed = QuantPatchEmbedding.from_float(linear, WeightsConfig(), DYNAMIC)
    assert torch.equal(embed(x), QuantLinear.from_float(linear, WeightsConfig(), DYNAMIC)(x))


@pytest.mark.parametrize("module", [nn.Linear(IN, OUT), nn.Conv2d(3, OUT, 4, 4, bias=False)], ids=["linear", "conv"])
def test_an_empty_patch_embedding_waits_for_a_checkpoint(module: nn.Module) -> None:
    full = QuantPatchEmbedding.from_float(module, WeightsConfig(), DYNAMIC)
    empty = QuantPatchEmbedding.empty_like(module, WeightsConfig(), DYNAMIC)
    x = sample(2, 5, IN) if isinstance(module, nn.Linear) else sample(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"This QuantLinear has no weights yet"):
        empty(x)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty(x), full(x))


def test_patch_embedding_shows_the_model_dtype_and_stores_only_its_linear_layer() -> None:
    embed = QuantPatchEmbedding.from_float(nn.Conv2d(3, OUT, 4, 4), WeightsConfig(), DYNAMIC)
    assert embed.weight.dtype == torch.float32
    assert copy.deepcopy(embed).half().weight.dtype == torch.float16
    assert {key.partition(".")[0] for key in embed.state_dict()} == {"linear"}
    x = sample(1, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(embed))(x), embed(x))


def test_unfolded_patches_are_channel_major_rows() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = unfold_patches(x, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert torch.equal(patches[1, 3], x[1, :, 2:4, 3:6].reshape(-1))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=2),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2),
        nn.Conv2d(4, 8, 4, stride=4, groups=2),
        nn.Conv1d(3, 8, 4, stride=4),
        nn.Identity(),
    ],
    ids=["overlap", "padding", "dilation", "groups", "1d", "identity"],
)
def test_other_patch_embeddings_are_refused(module: nn.Module) -> None:
    expected = (
        r"Only a patch embedding that is a linear layer, or a Conv2d.*Set modules\.patch_embedding=False for this"
    )
    for build in (QuantPatchEmbedding.from_float, QuantPatchEmbedding.empty_like):
        with pytest.raises(TypeError, match=expected):
            build(module, WeightsConfig(), STATIC)
