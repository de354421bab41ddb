"""`auto` never falls back to simulation without a word, and `backend_report` says what every layer got and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import nn

import optimum_regcache
from optimum_regcache import backend_report, fuse, kernels, set_backend
from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.kernels import onednn
from optimum_regcache.kernels.simulated import SimulatedLinear
from optimum_regcache.layers.linear import QuantLinear

OLD = "the CPU is too old."


def layer(**activations: Any) -> QuantLinear:
    return QuantLinear.from_float(nn.Linear(8, 4), WeightsConfig(), ActivationsConfig(mode="dynamic", **activations))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the warnings of `select_backend`, as in a fresh process."""
    seen: list[str] = []
    monkeypatch.setattr(kernels, "_warned", [])
    monkeypatch.setattr(kernels.logger, "warning", seen.append)
    return seen


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "machine_reason", lambda: OLD)
    monkeypatch.setattr(onednn, "kernel_reason", lambda: OLD)


def test_simulation_of_the_machine_warns_once(warnings: list[str], old_cpu: None) -> None:
    for _ in range(3):
        assert isinstance(layer().runtime(), SimulatedLinear)
    assert warnings == [
        "Quantized layers are simulated in float32, without the speed of int8: the CPU is too old. "
        "optimum_regcache.backend_report(model) lists the layers; set_backend(model, 'simulated') chooses simulation "
        "without this warning."
    ]


def test_chosen_simulation_is_no_surprise(warnings: list[str], old_cpu: None) -> None:
    chosen = layer()
    set_backend(chosen, "simulated")
    chosen(torch.randn(2, 8))
    assert not warnings


def test_a_layer_that_is_always_simulated_is_no_surprise(warnings: list[str], old_cpu: None) -> None:
    for activations in ({"bits": 16}, {"granularity": "per_token", "symmetric": False}):
        assert isinstance(layer(**activations).runtime(), SimulatedLinear)
    assert not warnings


@pytest.mark.parametrize("overload", ["default", "binary"])
def test_another_schema_is_refused_loudly(overload: str, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    """The operators are PyTorch's own: a release may change them."""
    monkeypatch.setattr(onednn.cpu, "capabilities", lambda: {"architecture": "x86_64", "avx512_vnni": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    schemas = {o: f"onednn::qlinear_pointwise(Tensor x) -> {o}" for o in ("default", "binary")}
    for (name, o), types in onednn._SCHEMAS.items():
        arguments, _, returned = types.partition(" -> ")
        named = ", ".join(f"{kind} a{i}" for i, kind in enumerate(arguments.split(", ")))
        schemas[f"{name}.{o}"] = f"onednn::{name}({named}) -> {returned}"
    schemas[f"qlinear_pointwise.{overload}"] = "onednn::qlinear_pointwise(Tensor x, *, int y=3) -> Tensor"

    def packet(name: str) -> Any:
        found = {o: SimpleNamespace(_schema=schemas[f"{name}.{o}"]) for n, o in onednn._SCHEMAS if n == name}
        return SimpleNamespace(overloads=lambda: list(found), **found)

    fake = SimpleNamespace(qlinear_prepack=packet("qlinear_prepack"), qlinear_pointwise=packet("qlinear_pointwise"))
    monkeypatch.setattr(torch.ops, "onednn", fake)
    monkeypatch.setattr(onednn, "schema_reason", onednn.schema_reason.__wrapped__)
    reason = onednn.kernel_reason() or ""
    assert f"torch.ops.onednn.qlinear_pointwise.{overload} of PyTorch {torch.__version__} has another schema" in reason
    assert "got (Tensor, *, int -> Tensor)" in reason
    assert isinstance(layer().runtime(), SimulatedLinear)
    assert len(warnings) == 1
    assert reason in warnings[0]
    with pytest.raises(ValueError, match="has another schema"):
        fuse(models.quantized(models.TOWERS["clip"]))


def test_a_missing_overload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(overloads=lambda: [])
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace(qlinear_prepack=fake, qlinear_pointwise=fake))
    assert "got (missing)" in (onednn.schema_reason.__wrapped__() or "")


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="no oneDNN operators in this PyTorch")
def test_the_schemas_are_those_of_this_pytorch() -> None:
    assert onednn.schema_reason.__wrapped__() is None


def test_report_of_layers(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setattr(onednn, "machine_reason", lambda: None)
    model = nn.Sequential(layer(), layer(bits=16), nn.ReLU(), layer(), layer())
    set_backend(model[3], "reference")
    model[4] = QuantLinear(8, 4, True, WeightsConfig(), ActivationsConfig(mode="dynamic"))
    report = backend_report(model)
    assert [(found.name, found.asked, found.chosen) for found in report.layers] == [
        ("0", "auto", "onednn"),
        ("1", "auto", "simulated"),
        ("3", "reference", "reference"),
        ("4", "auto", None),
    ]
    assert report.layers[1].refused["onednn"] == "16-bit inputs are simulated."
    assert report.layers[3].problem == "This QuantLinear has no weights yet: weight_scale is not finite."
    text = str(report)
    assert "onednn: 1 of 4 layers (0)" in text
    assert "simulated: 1 of 4 layers (1)\n    not int_mm: 16-bit inputs are simulated." in text
    assert "cannot run: 1 of 4 layers (4)\n    This QuantLinear has no weights yet" in text
    assert not warnings


def test_report_of_a_model(old_cpu: None, warnings: list[str]) -> None:
    model = models.quantized(models.TOWERS["clip"])
    report = optimum_regcache.backend_report(model)
    assert {found.chosen for found in report.layers} == {"simulated"}
    assert str(report).count(f"not onednn: {OLD}") == 1
    assert f"simulated: {len(report.layers)} of {len(report.layers)} layers" in str(report)
    assert str(backend_report(nn.ReLU())) == "no quantized layers"
    assert not warnings


@pytest.mark.skipif(onednn.machine_reason() is not None, reason=f"int8 kernel: {onednn.machine_reason()}")
def test_report_names_fused_layers() -> None:
    model = models.quantized(models.TOWERS["clip"])
    assert not any(found.fused for found in backend_report(model).layers)
    fuse(model, native=False)
    report = backend_report(model)
    assert all(found.fused == (".layers." in f".{found.name}") for found in report.layers)
    assert any(found.fused for found in report.layers)
    assert "onednn, fused: " in str(report)


def test_report_of_a_model_without_weights() -> None:
    (found,) = backend_report(layer().to("meta")).layers
    assert found.chosen is None
    assert found.problem
