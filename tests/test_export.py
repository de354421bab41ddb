"""Exported encoders in ONNX Runtime and OpenVINO against the model in PyTorch."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
import platform
from collections import Counter
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import fits
import models as tiny_models
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import transformers as hf
from models import COMPOSITES, MODELS, TOWERS, TinyModel, quantized, random_cache
from onnx import numpy_helper
from torch.nn import functional as F

from optimum_regcache import RegCacheConfig, RegCacheQuantizer, fuse
from optimum_regcache.commands.export import compare, export_job
from optimum_regcache.data import reference
from optimum_regcache.encoders.passes import encode
from optimum_regcache.export import ExportedEncoder, export_onnx, export_openvino, runner
from optimum_regcache.fusion import is_fused
from optimum_regcache.kernels.cpu import needs_vnni
from optimum_regcache.kernels.onednn import machine_reason
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.quantizer import build_quantized

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "deit")]  # they add nothing to DINOv2's graph
FAMILIES = ("clip", "siglip", "dinov2", "dinov2_registers", *SLOW)
X86 = platform.machine().lower() in ("x86_64", "amd64")


pytestmark = pytest.mark.usefixtures("operators_read_once")


def small(tiny: TinyModel, bits: int = 8, **parts: Any) -> Any:
    """Two blocks; one has a register with a logit bias, and two tokens are deleted at its input."""
    config = RegCacheConfig.from_preset(f"w{bits}a{bits}").replace(
        registers={"mode": "fixed", "blocks": (1,), "num_copies": 2.0}, deletion={"block": 1, "count": 2}
    )
    config, cache = config.replace(**parts), random_cache((1,), 1, 2.0, num_blocks=2)

    def make() -> Any:
        return build_quantized(tiny.build(num_hidden_layers=2), config, cache, [tiny.inputs(seed=2)])

    return fits.once(("small", tiny, repr(config)), make)


class Exported:
    """A quantized tiny model with its two exports."""

    def __init__(self, tiny: TinyModel, model: Any, path: Path, **options: Any) -> None:
        self.tiny, self.model, self.path = tiny, model, path
        self.onnx = export_onnx(model, path / "onnx", **options)
        self.graph = onnx.load(self.onnx / "model.onnx").graph
        self.count = Counter(node.op_type for node in self.graph.node)
        self.constants = {c.name: numpy_helper.to_array(c) for c in self.graph.initializer}

    @cached_property
    def openvino(self) -> Path:
        return export_openvino(self.onnx, self.path / "openvino")

    def encoder(self, kind: str) -> ExportedEncoder:
        return ExportedEncoder.from_pretrained(getattr(self, kind), num_threads=1)


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """Family -> its model with both exports, each made once."""
    return lru_cache(lambda name: Exported(TOWERS[name], small(TOWERS[name]), tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, export_of) -> Exported:
    return export_of(request.param)


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> None:
    """A value near the middle between two codes may round to the other one, so a few features differ by a step."""
    assert found.shape == expected.shape
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9999
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_export_computes_what_the_model_computes(exported: Exported, kind: str):
    encoder = exported.encoder(kind)
    for batch in (1, 3):
        inputs = exported.tiny.inputs(batch=batch)
        with torch.no_grad():
            expected = exported.model(**inputs)
        found = encoder(**inputs)
        assert isinstance(found, hf.modeling_outputs.BaseModelOutputWithPooling)
        assert_same(found.last_hidden_state, expected.last_hidden_state)
        assert_same(found.pooler_output, expected.pooler_output)
    assert torch.equal(encoder(inputs["pixel_values"].numpy(), return_dict=False)[0], found.last_hidden_state)


def test_weights_are_our_codes_and_inputs_are_quantized_once(exported: Exported):
    layers = [module for _, module in quant_linears(exported.model)]
    stored = [c for c in exported.constants.values() if c.dtype == np.int8 and c.ndim == 2]
    assert {c.tobytes() for c in stored} == {m.codes().t().contiguous().numpy().tobytes() for m in layers}
    assert len(stored) == len(layers) == 12
    weights = [n for n in exported.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in exported.constants]
    assert len(weights) == 12
    assert {a.i for n in weights for a in n.attribute if a.name == "axis"} == {1}
    assert exported.count["QuantizeLinear"] == 8  # query, key and value share theirs
    zero = {exported.constants[n.input[2]].tolist() for n in exported.graph.node if n.op_type == "QuantizeLinear"}
    assert zero == {128}
    assert exported.count["TopK"] >= 2
    assert exported.count["Gather"] >= 1
    assert exported.count["ScatterND"] >= 1


def test_registers_are_constants(exported: Exported):
    attention = [m for m in exported.model.modules() if getattr(m, "register_key", None) is not None]
    assert len(attention) == 1
    stored = {np.ascontiguousarray(c).tobytes() for c in exported.constants.values() if c.dtype == np.float32}
    for module in attention:
        for rows in (module.register_key, module.register_value):
            assert rows.numpy().tobytes() in stored


@pytest.mark.skipif(not X86, reason="the integer kernels of other processors have other names")
def test_every_linear_layer_is_an_integer_kernel_in_both_runtimes(exported: Exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(exported.onnx / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert Counter(n.op_type for n in graph.node)["MatMulIntegerToFloat"] == 12
    network = openvino.Core().compile_model(exported.openvino / "openvino_model.xml", "CPU")
    layers = [op.get_rt_info() for op in network.get_runtime_model().get_ops()]
    layers = [i["runtimePrecision"].astype(str) for i in layers if i["layerType"].astype(str) == "FullyConnected"]
    assert sum(p in ("u8", "i8") for p in layers) == 12


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_where_integer_kernels_saturate_others_are_used(exported: Exported, kind: str, monkeypatch):
    """The options for CPUs without VNNI, here on any CPU."""
    assert exported.encoder(kind).info["needs_vnni"]
    monkeypatch.setattr(runner, "sums_saturate", lambda: True)
    pixels = exported.tiny.inputs(batch=3)["pixel_values"]
    with torch.no_grad():
        expected = exported.model(pixel_values=pixels).last_hidden_state
    assert_same(exported.encoder(kind)(pixels).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("highest", "code", "needed"),
    [
        (255, 127, True),  # 8 bits: two products of at most 32385
        (255, 63, False),  # 7-bit weights: 2 * 16065
        (127, 127, False),  # 7-bit activations: 2 * 16129
        (63, 31, False),
        (255, 64, False),  # 32640 is the last that 16 bits hold here
        (255, 65, True),
        (255, -64, False),
        (255, -65, True),
        (255, -128, True),
    ],
)
def test_what_needs_vnni(highest: int, code: int, needed: bool):
    assert needs_vnni(highest, torch.tensor([[0, code]], dtype=torch.int8)) == needed


def test_no_weights_need_no_vnni():
    assert not needs_vnni(255, torch.empty(0, 4, dtype=torch.int8))


def test_seven_bit_weights_are_exact_on_every_cpu(tmp_path):
    tiny = TOWERS["clip"]
    exported = Exported(tiny, small(tiny, weights={"bits": 7}), tmp_path)
    pixels = tiny.inputs(batch=2)["pixel_values"]
    with torch.no_grad():
        expected = exported.model(pixel_values=pixels).last_hidden_state
    for kind in ("onnx", "openvino"):
        encoder = exported.encoder(kind)
        assert not encoder.info["needs_vnni"]
        assert_same(encoder(pixels).last_hidden_state, expected)


def test_model_is_unchanged_by_the_export(exported: Exported):
    assert exported.tiny.tower_of(exported.model).config._attn_implementation == "sdpa"
    assert torch.equal(exported.tiny.run(exported.model), exported.tiny.run(small(exported.tiny)))


@pytest.mark.skipif(machine_reason() is not None, reason=f"int8 kernel: {machine_reason()}")
def test_a_fused_model_is_exported_like_an_unfused_one(export_of, tmp_path):
    fused = small(TOWERS["clip"])
    assert fuse(fused).fused == (0, 1)
    export_onnx(fused, tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == (export_of("clip").onnx / "model.onnx").read_bytes()
    assert is_fused(fused)


FORMS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "w4a4, asymmetric, fill none": (
        "vit", 4, {"weights": {"bits": 4, "symmetric": False}, "activations": {"bits": 4, "symmetric": False},
                   "deletion": {"block": 1, "count": 2, "fill": "none"}}
    ),
    "per token scales, per tensor weights": (
        "clip", 8, {"weights": {"granularity": "per_tensor"}, "activations": {"mode": "dynamic", "granularity": "per_token"}}
    ),
    "dynamic zero points": ("vit", 8, {"activations": {"mode": "dynamic", "symmetric": False}}),
    "outlier tokens replaced": ("vit", 8, {"deletion": {"action": "replace"}}),
    "late deletion": ("clip", 8, {"deletion": {"action": "late"}}),
    "per token at fc2": ("clip", 4, {"deletion": {"action": "per_token"}}),
    "rotation, offset, patch embedding, head": (
        "vit", 8, {"methods": ("rotation", "noisyquant"), "modules": {"patch_embedding": True, "head": True}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form: str, tmp_path):
    name, bits, parts = FORMS[form]
    tiny = TOWERS[name]
    made = Exported(tiny, small(tiny, bits, **parts), tmp_path)
    expected = tiny.run(made.model)
    for kind in ("onnx", "openvino"):
        found = made.encoder(kind)(**tiny.inputs()).last_hidden_state
        assert found.shape == expected.shape
        assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999


def test_projection_and_classifier_come_along(tmp_path):
    dual = Exported(MODELS["clip_dual"], quantized(COMPOSITES["clip_dual"]), tmp_path / "dual")
    pixels = {"pixel_values": dual.tiny.inputs()["pixel_values"]}
    with torch.no_grad():
        expected = dual.model.get_image_features(**pixels).pooler_output
    encoder = dual.encoder("onnx")
    assert encoder.info["outputs"] == ["last_hidden_state", "pooler_output", "image_embeds"]
    assert_same(encoder(**pixels).image_embeds, expected)
    assert_same(encode(encoder, [pixels]), encode(dual.model, [pixels]))
    assert not any("text" in name for name in dual.constants)
    labels = Exported(MODELS["vit_classifier"], small(COMPOSITES["vit_classifier"]), tmp_path / "labels")
    encoder = labels.encoder("onnx")
    assert_same(encoder(**pixels).logits, labels.tiny.run(labels.model, pixels))
    assert_same(encode(encoder, [pixels]), encode(labels.model, [pixels]))


def test_other_image_size_and_fixed_batch(tmp_path):
    tiny = TOWERS["vit"]
    made = Exported(tiny, small(tiny), tmp_path, image_size=(48, 32), dynamic_batch=False)
    pixels = tiny_models.pixels(5, 1, 48, 32)
    with torch.no_grad():
        expected = made.model(pixels, interpolate_pos_encoding=True).last_hidden_state
    for kind in ("onnx", "openvino"):
        encoder = made.encoder(kind)
        assert_same(encoder(pixels).last_hidden_state, expected)
        for wrong in (pixels.repeat(2, 1, 1, 1), pixels[..., :16], pixels[0]):
            with pytest.raises(ValueError, match=r"This export takes pixel_values \[1, 3, 48, 32\], got \["):
                encoder(wrong)


def test_file_is_about_a_quarter_of_the_float_weights(tmp_path):
    config = hf.ViTConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024, image_size=32, patch_size=8
    )
    model = tiny_models.randomize(hf.ViTModel(config, add_pooling_layer=False), 0)
    plain = RegCacheConfig(registers={"mode": "none"})
    path = export_onnx(build_quantized(model, plain, None, [TOWERS["vit"].inputs()]), tmp_path)
    ratio = (path / "model.onnx").stat().st_size / sum(4 * p.numel() for p in model.parameters())
    assert 0.24 < ratio < 0.32


def test_command_exports_checks_and_evaluates(tmp_path, run):
    saved, path = tmp_path / "saved", tmp_path / "exported"
    images = reference.load("clip-scenes").dataset("search", 16, 0)
    quantizer = RegCacheQuantizer.from_pretrained("clip-scenes")
    model = quantizer.quantize(
        saved, quantization_config=RegCacheConfig(registers={"mode": "none"}), calibration_dataset=images
    )
    arguments = ("--model", str(saved), "--format", "onnx", "--output", str(path), "--num-images", "4")
    code, out, _ = run("export", *arguments)
    assert code == 0
    assert "onnx against PyTorch, 4 of random pixels" in out
    assert f"saved to {path}: 36 quantized layers" in out
    info = json.loads((path / "export.json").read_text())
    assert set(info["parity"]["outputs"]) == {"last_hidden_state", "pooler_output", "image_embeds"}
    assert all(row["cosine"] > 0.999 for row in info["parity"]["outputs"].values())
    assert info["quantization"] == "w8a8"
    assert info["image_size"] == [64, 64]
    encoder = ExportedEncoder.from_pretrained(path, num_threads=1)
    pixels = encoder.processor(images=images[0]["image"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
    assert F.cosine_similarity(encoder(pixel_values=pixels).image_embeds, expected).min() > 0.999
    assert encoder.config.vision_config.hidden_size == model.config.vision_config.hidden_size

    results = []
    for directory in (saved, path):
        output = tmp_path / f"{directory.name}.json"
        options = ("--float-model", "clip-scenes", "--num-report", "32", "--output", str(output))
        assert run("evaluate", "--model", directory, *options)[0] == 0
        results.append(json.loads(output.read_text()))
    ours, theirs = results
    assert theirs["format"] == "onnx"
    for field in ("quantization", "quantized_layers", "images", "float_accuracy"):
        assert theirs[field] == ours[field]
    assert abs(theirs["accuracy"] - ours["accuracy"]) <= 1 / 32
    assert abs(theirs["feature_cosine"] - ours["feature_cosine"]) < 1e-3


def test_job_refuses_impossible_options(tmp_path):
    for options, message in (
        (("tflite",), "Unknown export format 'tflite'; expected onnx, openvino, compressed-tensors"),
        (("onnx", tmp_path, [1, 2, 3]), "image_size takes the side, or height and width; got 3 numbers"),
        (("onnx", tmp_path, None, None, 0), "at least one image, got num_images=0"),
    ):
        with pytest.raises(ValueError, match=message):
            export_job("clip-scenes", *(options if len(options) > 1 else (*options, tmp_path)))


def test_comparison_finds_a_wrong_export(exported: Exported):
    wrong = exported.tiny.build(seed=7, num_hidden_layers=2)
    pixels = exported.tiny.inputs()["pixel_values"]
    assert compare(exported.model, exported.encoder("onnx"), pixels)["last_hidden_state"]["cosine"] > 0.9999
    assert compare(wrong, exported.encoder("onnx"), pixels)["last_hidden_state"]["cosine"] < 0.9
