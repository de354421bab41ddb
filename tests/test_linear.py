"""float32 linear layers of our passes: oneDNN where it computes them, PyTorch's own choice elsewhere."""
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
from models import TOWERS
from torch import nn
from torch.nn import functional as F

from optimum_regcache.encoders.passes import encode, image_features
from optimum_regcache.math import linear as module
from optimum_regcache.math.linear import fast_linears, linear

pytestmark = pytest.mark.core


def _operands(shape=(2, 7, 24), out=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*s, generator=generator) for s in (shape, (out, shape[-1]), (out,))]
    return [t.to(dtype) for t in made]


@pytest.fixture
def products(monkeypatch):
    """How often oneDNN was asked."""
    seen, own = [], module._onednn

    def count(*args):
        seen.append(args[0].shape)
        return own(*args)

    monkeypatch.setattr(module, "_onednn", count)
    return seen


@pytest.mark.skipif(not module._USABLE, reason="this PyTorch has no oneDNN beside MKL")
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 7, 24), (2, 3, 7, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_onednn_computes_the_same_to_rounding(products, shape, biased):
    x, weight, bias = _operands(shape)
    with torch.no_grad():
        found = linear(x, weight, bias if biased else None)
    assert products == [x.shape]
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    strided = x.repeat_interleave(2, -1)[..., ::2]
    with torch.no_grad():
        torch.testing.assert_close(linear(strided, weight, bias if biased else None), found)


@pytest.mark.skipif(not module._USABLE, reason="this PyTorch has no oneDNN beside MKL")
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 7, 24)])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "all"])
def test_gradients_inside_the_block_are_those_of_pytorch(products, shape, wanted):
    names = ("x", "weight", "bias")
    plain = [t.requires_grad_(wanted in (name, "all")) for name, t in zip(names, _operands(shape), strict=True)]
    leaves = [t for t in plain if t.requires_grad]
    expected = torch.autograd.grad(F.linear(*plain).sin().sum(), leaves)
    with fast_linears():
        found = torch.autograd.grad(F.linear(*plain).sin().sum(), leaves)
        simulated = torch.autograd.grad(linear(*plain).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(simulated, torch.autograd.grad(F.linear(*plain).sum(), leaves), rtol=1e-4, atol=1e-5)
    assert len(products) == 2 * (1 + len([t for t in leaves if t is not plain[2]]))


@pytest.mark.skipif(not module._USABLE, reason="this PyTorch has no oneDNN beside MKL")
def test_second_derivatives_are_refused() -> None:
    x, weight, _ = _operands()
    with fast_linears():
        y = F.linear(x.requires_grad_(), weight).sin().sum()
        with pytest.raises(RuntimeError, match=r"not have been used|once_differentiable"):
            torch.autograd.grad(torch.autograd.grad(y, x, create_graph=True)[0].sum(), x)


def test_autograd_other_dtypes_empty_inputs_and_subclasses_are_left_to_pytorch(products):
    x, weight, bias = _operands()
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        half = _operands(dtype=torch.bfloat16)
        assert torch.equal(linear(*half), F.linear(*half))
        assert linear(x[:0], weight, bias).shape == (0, 7, 5)
        assert torch.equal(
            linear(x.double(), weight.double(), bias.double()), F.linear(*map(torch.Tensor.double, (x, weight, bias)))
        )
        assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
        linear(nn.Parameter(x, requires_grad=False), weight, bias)
    assert not products


@pytest.mark.skipif(not module._USABLE, reason="this PyTorch has no oneDNN beside MKL")
def test_inside_the_block_modules_use_it_and_stay_as_they_are(products):
    x, weight, bias = _operands()
    layer = nn.Linear(24, 5)
    layer.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        own = layer(x)
        with fast_linears():
            torch.testing.assert_close(layer(x), own)
        assert products == [x.shape]
        assert torch.equal(layer(x), own)
    assert len(products) == 1


@pytest.mark.skipif(not module._USABLE, reason="this PyTorch has no oneDNN beside MKL")
@pytest.mark.parametrize("family", TOWERS)
def test_features_of_every_family_are_those_of_pytorch(products, family, monkeypatch):
    tower = TOWERS[family]
    model, batch = tower.build(), tower.inputs()
    found = encode(model, [batch])
    assert products
    monkeypatch.setattr(module, "_USABLE", False)
    with torch.inference_mode():
        torch.testing.assert_close(image_features(model, batch), found, rtol=1e-4, atol=1e-4)
