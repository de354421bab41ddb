"""Export to compressed-tensors: transformers opens it without this package and computes the same."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPOSITES, TOWERS, TinyModel, quantized
from safetensors.torch import load_file

from optimum_regcache import DeletionConfig, RegistersConfig, set_backend
from optimum_regcache.commands.export import export_job
from optimum_regcache.config.output import Output
from optimum_regcache.export import ExportedEncoder, export_compressed_tensors
from optimum_regcache.export.layout import is_exported
from optimum_regcache.hub.loading import load_model
from optimum_regcache.layers.linear import quant_linears

PLAIN: dict[str, Any] = {"registers": RegistersConfig(mode="none"), "deletion": DeletionConfig()}
NEEDS_PACKAGE = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)

# arguments: folder, class, file of the pixels and the output
OPEN = """
import sys, warnings
import torch, transformers
folder, name, file = sys.argv[1:]
data = torch.load(file)
model = getattr(transformers, name).from_pretrained(folder).eval()
with torch.no_grad():
    data["output"] = getattr(model(**data["inputs"]), data["field"])
data["state"] = dict(model.state_dict())
torch.save(data, file)
assert not any(name.startswith("optimum_regcache") for name in sys.modules)
"""


def plain(tiny: TinyModel, bits: int = 8, **parts: Any) -> Any:
    """Quantized without registers and deletion, simulated."""
    model = quantized(tiny, bits, **{**PLAIN, **parts})
    set_backend(model, "simulated")
    return model


@pytest.mark.parametrize(("name", "bits"), [("clip", 8), ("siglip", 6), ("clip", 4)])
def test_codes_and_scales_are_the_models_own(name: str, bits: int, tmp_path: Path) -> None:
    model = plain(TOWERS[name], bits)
    export_compressed_tensors(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layers = dict(quant_linears(model))
    assert len(layers) == 24
    assert sum(key.endswith(".input_scale") for key in stored) == len(layers)
    for path, layer in layers.items():
        key = next(k.removesuffix(".weight") for k in stored if k.endswith(f"{path}.weight"))
        assert torch.equal(stored[f"{key}.weight"], layer.codes())
        assert stored[f"{key}.weight"].dtype == torch.int8
        assert torch.equal(stored[f"{key}.weight_scale"][:, 0], layer.weight_scale)
        assert torch.equal(stored[f"{key}.input_scale"], layer.input_scale.reshape(1))
        assert torch.equal(stored[f"{key}.bias"], layer.bias)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == group["input_activations"]["num_bits"] == bits
    assert model.config.quantization_config.quant_method == "regcache"


@NEEDS_PACKAGE
@pytest.mark.parametrize(("name", "bits"), [("clip_dual", 8), ("siglip", 6), ("vit", 4)])
def test_plain_transformers_computes_the_same(name: str, bits: int, tmp_path: Path) -> None:
    tiny = {**TOWERS, **COMPOSITES}[name]
    model, inputs = plain(tiny, bits), tiny.inputs()
    export_compressed_tensors(model, tmp_path / "out")
    torch.save({"inputs": inputs, "field": tiny.output}, tmp_path / "data.pt")
    command = [sys.executable, "-c", OPEN, str(tmp_path / "out"), type(model).__name__, str(tmp_path / "data.pt")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    data, expected = torch.load(tmp_path / "data.pt"), tiny.run(model, inputs)
    assert (data["output"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    for path, layer in quant_linears(model):
        weight = data["state"][f"{path}.weight"]  # opened at the first call: codes times scales
        assert torch.equal(torch.round(weight / layer.weight_scale.reshape(-1, 1)).to(torch.int8), layer.codes())


REFUSALS = {
    "registers": (
        {"registers": {"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}},
        "it has registers or token del",
    ),
    "deletion": ({"deletion": {"block": 2, "count": 2}}, "without which it would be another model"),
    "divided": ({}, "Dinov2Model cannot be .* transformers divides tensors of this type as it opens them"),
    "products": ({"attention": {"quantize": True}}, "its attention products are quantized"),
    "patches": ({"modules": {"patch_embedding": True}}, "its patch embedding is quantized as a product"),
    "rotation": ({"methods": ("rotation",)}, "its residual stream is rotated"),
    "dynamic": ({"activations": {"mode": "dynamic"}}, r"Layer layers\.0\..* one static symmetric step for each input"),
    "asymmetric": ({"weights": {"symmetric": False}}, "and symmetric weights. Quantize with --no-registers"),
    "offset": ({"methods": ("noisyquant",)}, "one static symmetric step for each input"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why(case: str, tmp_path: Path) -> None:
    parts, message = REFUSALS[case]
    model = quantized(TOWERS["dinov2" if case == "divided" else "vit"], **{**PLAIN, **parts})
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_float_model_half_precision_and_mixed_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made of float32, ViTModel holds torch\.float16\. .* dtype=torch\.float32"):
        export_compressed_tensors(quantized(TOWERS["vit"], dtype=torch.float16, **PLAIN), tmp_path / "x")
    with pytest.raises(ValueError, match="ViTModel is not quantized; compressed-tensors holds quantized layers"):
        export_compressed_tensors(TOWERS["vit"].build(), tmp_path / "x")
    model = plain(TOWERS["vit"])
    _, layer = next(quant_linears(model))
    layer.weights = layer.weights.__class__(bits=4)
    layer.set_codes(torch.zeros(layer.out_features, layer.in_features))
    with pytest.raises(ValueError, match=r"The layers of ViTModel differ in bits \[\(4, 8\), \(8, 8\)\]"):
        export_compressed_tensors(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_folder_is_a_model_and_no_network(tmp_path: Path) -> None:
    export_compressed_tensors(plain(TOWERS["vit"]), tmp_path)
    assert not is_exported(tmp_path)
    with pytest.raises(
        ValueError, match="holds the format compressed-tensors; open it with from_pretrained of transformers"
    ):
        ExportedEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds the result of another job"):  # ours: --overwrite may replace it
        Output(tmp_path, {"kind": "export"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "torchao"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds a model that optimum-regcache did not write"):
        Output(tmp_path, {"kind": "export"})


def test_refused_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="image_size has no effect: compressed-tensors keeps the model's code"):
        export_job("clip-scenes", "compressed-tensors", tmp_path / "x", [64])
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(
        ImportError, match=r'compressed_tensors is needed .*pip install "optimum-regcache\[compressed-tensors\]"'
    ):
        export_job("clip-scenes", "compressed-tensors", tmp_path / "x")


@NEEDS_PACKAGE
def test_command_opens_and_compares(tmp_path: Path) -> None:
    saved, output = tmp_path / "saved", tmp_path / "out"
    plain(TOWERS["vit"]).save_pretrained(saved)
    info, text = export_job(str(saved), "compressed-tensors", output, num_images=2)
    assert info["parity"]["outputs"]["last_hidden_state"]["max_difference"] < 1e-5
    assert f"saved to {output}: 24 quantized layers" in text
    assert load_model(output).config.quantization_config.quant_method == "compressed-tensors"
