"""The layout of transformers.js: both towers, the joined network, and what lies beside them."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from models import COMPOSITES, quantized
from torch.nn import functional as F
from transformers import AutoConfig

import check_transformers_js
from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.commands.export import export_job
from optimum_regcache.data import reference
from optimum_regcache.export import ExportedEncoder, export_openvino, export_transformers_js, transformers_js
from optimum_regcache.quantizer import build_quantized

TEXTS = ["a red ring", "a blue square", "a green circle"]


pytestmark = pytest.mark.usefixtures("operators_read_once")


class Exported:
    """An embedded encoder with two text-independent registers and two deleted tokens, quantized and exported."""

    def __init__(self, name: str, path: Path) -> None:
        self.reference, self.path = reference.load(name), path
        self.processor = self.reference.processor
        images = [row["image"] for row in self.reference.dataset("report", 4, 0)]
        siglip = self.reference.model.config.model_type == "siglip"
        self.inputs = self.processor(
            text=TEXTS, images=images, return_tensors="pt", padding="max_length" if siglip else True
        )
        config = RegCacheConfig.from_preset("w8a8").replace(
            registers={"mode": "fixed", "blocks": (1,), "num_copies": 2.0}, deletion={"block": 1, "count": 2}
        )
        vision = self.reference.model.config.vision_config
        shape = (vision.num_attention_heads, 1, vision.hidden_size // vision.num_attention_heads)
        rows = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        cache = RegisterCache({1: rows[0]}, {1: rows[1]}, vision.num_hidden_layers, 2.0)
        pixels = {"pixel_values": self.inputs["pixel_values"]}
        self.model = build_quantized(self.reference.model, config, cache, [pixels])
        export_transformers_js(self.model, path, processor=self.processor)
        with torch.no_grad():
            self.expected = self.model(input_ids=self.inputs["input_ids"], pixel_values=self.inputs["pixel_values"])

    def run(self, file: str, *names: str) -> dict[str, torch.Tensor]:
        session = onnxruntime.InferenceSession(self.path / "onnx" / file, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        found = session.run(None, {name: self.inputs[name].numpy() for name in names})
        return {name: torch.from_numpy(np.array(value)) for name, value in zip(outputs, found, strict=True)}


@pytest.fixture(scope="module", params=["clip-scenes-induced", "siglip-scenes-induced"])
def exported(request, tmp_path_factory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("exported"))


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float(F.cosine_similarity(found.double(), expected.double(), dim=-1).min())


def test_every_network_computes_what_the_model_computes(exported: Exported):
    clip = exported.model.config.model_type == "clip"
    with torch.no_grad():
        image = exported.model.get_image_features(exported.inputs["pixel_values"]).pooler_output
        text = exported.model.get_text_features(exported.inputs["input_ids"]).pooler_output
    found = exported.run("vision_model_quantized.onnx", "pixel_values")
    assert list(found) == (["image_embeds"] if clip else ["last_hidden_state", "pooler_output"])
    assert cosine(list(found.values())[-1], image) > 0.9999
    found = exported.run("text_model.onnx", "input_ids")
    assert list(found) == (["text_embeds"] if clip else ["last_hidden_state", "pooler_output"])
    assert cosine(list(found.values())[-1], text) > 0.999999
    assert cosine(list(exported.run("text_model_quantized.onnx", "input_ids").values())[-1], text) > 0.999
    found = exported.run("model_quantized.onnx", "input_ids", "pixel_values")
    assert list(found) == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    for name, value in found.items():
        assert cosine(value, getattr(exported.expected, name)) > 0.999
    assert torch.equal(found["logits_per_image"], found["logits_per_text"].T)


def test_what_follows_the_end_of_a_text_changes_nothing(tmp_path, exported: Exported):
    """The graphs take no mask: CLIP pads with any length, SigLIP reads its padding."""
    if exported.model.config.model_type == "siglip":
        pytest.skip("SigLIP pads to the longest text that it takes")
    short = exported.run("text_model.onnx", "input_ids")["text_embeds"]
    ids = exported.inputs["input_ids"]
    exported.inputs["input_ids"] = F.pad(ids, (0, 3), value=exported.processor.tokenizer.pad_token_id)
    long = exported.run("text_model.onnx", "input_ids")["text_embeds"]
    exported.inputs["input_ids"] = ids
    assert torch.allclose(short, long, atol=1e-6)


def test_files_beside_the_networks(exported: Exported):
    names = {path.relative_to(exported.path).as_posix() for path in exported.path.rglob("*") if path.is_file()}
    networks = {"vision_model_quantized", "text_model", "text_model_quantized", "model_quantized"}
    assert {f"onnx/{name}.onnx" for name in networks} == {name for name in names if name.startswith("onnx/")}
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    config = json.loads((exported.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["transformers.js_config"] == {"dtype": "q8"}
    assert AutoConfig.from_pretrained(exported.path).vision_config == exported.reference.model.config.vision_config
    images = json.loads((exported.path / "preprocessor_config.json").read_text())
    assert images["size"] == {"height": 64, "width": 64}
    assert "image_processor" not in images
    info = json.loads((exported.path / "export.json").read_text())
    assert info["text"]["weights"] in ("int8", "int8, float embeddings")
    readme = (exported.path / "README.md").read_text()
    assert f"weights {info['text']['weights']}" in readme
    assert "image encoder, w8a8, with registers and token deletion: " in readme
    sizes = [(exported.path / f"onnx/text_model{suffix}.onnx").stat().st_size for suffix in ("_quantized", "")]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_runner_opens_the_layout(exported: Exported):
    encoder = ExportedEncoder.from_pretrained(exported.path, num_threads=1)
    pixels = {"pixel_values": exported.inputs["pixel_values"]}
    with torch.no_grad():
        expected = exported.model.get_image_features(**pixels).pooler_output
    assert cosine(encoder.image_features(pixels), expected) > 0.9999
    assert hasattr(encoder.processor, "tokenizer")
    with pytest.raises(ValueError, match=r"holds the format transformers\.js; a directory of export_onnx is needed"):
        export_openvino(exported.path, exported.path / "openvino")


def test_a_text_tower_that_int8_changes_stays_float(tmp_path, monkeypatch, exported: Exported):
    monkeypatch.setattr(transformers_js, "TEXT_COSINE", 2.0)
    info = transformers_js._write_text_tower(exported.model, exported.processor, tmp_path, "_quantized", 21)
    assert info["weights"] == "float"
    assert info["cosine"] > 0.99999
    assert (tmp_path / "text_model_quantized.onnx").read_bytes() == (tmp_path / "text_model.onnx").read_bytes()


def test_the_model_is_unchanged(exported: Exported):
    assert exported.model.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        again = exported.model(input_ids=exported.inputs["input_ids"], pixel_values=exported.inputs["pixel_values"])
    assert torch.equal(again.logits_per_image, exported.expected.logits_per_image)


def test_an_encoder_alone_is_one_network(tmp_path):
    processor = reference.load("clip-scenes").processor.image_processor
    processor.size = processor.crop_size = {"height": 32, "width": 32}
    model = quantized(COMPOSITES["vit_classifier"])
    export_transformers_js(model, tmp_path, processor=processor)
    assert [p.name for p in (tmp_path / "onnx").iterdir()] == ["model_quantized.onnx"]
    info = json.loads((tmp_path / "export.json").read_text())
    assert "logits" in info["outputs"]
    assert "text" not in info
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_float_model_has_names_without_suffix(tmp_path):
    ref = reference.load("clip-scenes")
    export_transformers_js(ref.model, tmp_path, processor=ref.processor)
    assert {p.name for p in (tmp_path / "onnx").iterdir()} == {"vision_model.onnx", "text_model.onnx", "model.onnx"}
    assert json.loads((tmp_path / "config.json").read_text())["transformers.js_config"] == {"dtype": "fp32"}


def test_refusals_say_why(tmp_path, monkeypatch):
    ref, output = reference.load("clip-scenes"), tmp_path / "x"
    for processor, message in (
        (None, r"The layout transformers\.js needs the model's processor; none is saved beside the model"),
        (ref.processor.image_processor, r"needs a tokenizer with a tokenizer\.json; CLIPModel came without"),
    ):
        with pytest.raises(ValueError, match=message):
            export_transformers_js(ref.model, output, processor=processor)
    for name, value, message in (
        (
            "_DUAL",
            ("siglip",),
            r"knows text towers of the types siglip, CLIPModel is of clip\. .* with the layout flat",
        ),
        ("_LARGEST", 1000, "CLIPModel is too large for one file of 2 GB"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(transformers_js, name, value)
            with pytest.raises(ValueError, match=message):
                export_transformers_js(ref.model, output, processor=ref.processor)
    assert not output.exists()


def test_command(tmp_path):
    with pytest.raises(
        ValueError, match=r"The layout 'transformers\.js' is none of the format openvino; leave --layout"
    ):
        export_job("clip-scenes", "openvino", tmp_path / "x", layout="transformers.js")
    info, text = export_job("clip-scenes", "onnx", tmp_path / "x", num_images=2, layout="transformers.js")
    assert info["parity"]["outputs"]["image_embeds"]["cosine"] > 0.9999
    assert "text tower: weights float, cosine 1.00000" in text
    assert info["bytes"] == sum(p.stat().st_size for p in (tmp_path / "x" / "onnx").iterdir())


def node_packages() -> Path | None:
    """Where @huggingface/transformers is installed for Node, or None: tests download nothing."""
    place = os.environ.get("REGCACHE_NODE_PACKAGES")
    found = place is not None and (Path(place) / "node_modules" / check_transformers_js.PACKAGE).is_dir()
    return Path(place) if found and shutil.which("node") else None


@pytest.mark.skipif(
    node_packages() is None, reason="REGCACHE_NODE_PACKAGES names no folder with @huggingface/transformers"
)
def test_transformers_js_computes_what_the_model_computes(exported: Exported):
    images = [row["image"] for row in exported.reference.dataset("report", 4, 0)]
    found = check_transformers_js.in_transformers_js(exported.path, images, TEXTS, node_packages())
    expected: dict[str, Any] = check_transformers_js.in_pytorch(exported.model, exported.processor, images, TEXTS)
    for name, rows in expected.items():
        assert cosine(torch.tensor(found[name]), rows) > 0.999
