"""What cannot be exported is refused with the reason, and nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DINOV2_BACKBONE, MODELS, TOWERS, quantized

from optimum_regcache import Recipe
from optimum_regcache.commands.evaluate import Subject, evaluate_job
from optimum_regcache.data.reference import planted
from optimum_regcache.export import ExportedEncoder, export_onnx, export_openvino


def refused(name: str, **parts: Any) -> Any:
    return lambda: quantized(MODELS[name], **parts)


REFUSALS = {
    "SigLIP2": (refused("siglip2"), "takes patches of varying grids with a padding mask; .* run the model in PyTorch"),
    "backbone": (lambda: quantized(DINOV2_BACKBONE), "returns feature maps of chosen stages.* Dinov2Model"),
    "float16": (
        lambda: TOWERS["vit"].build().half(),
        r"made of float32, ViTModel holds torch.float16\. Open it again with from_pretrained",
    ),
    "products": (refused("vit", attention={"quantize": True}), "attention products are simulated.*quantize=false"),
    "twin": (
        refused("vit", activations={"post_activation": "twin"}),
        r"Layer layers.0.mlp.fc2 cannot be exported: a twin quantizer has two steps.* the preset w8a8 without ptq4vit",
    ),
    "16 bits": (
        refused("vit", modules={"mixed_precision": ("mlp.fc1",)}),
        r"Layer layers.0.mlp.fc1 cannot be exported: 16-bit inputs are simulated. Quantize with static",
    ),
    "threshold": (
        refused("vit", deletion={"block": 2, "count": 2, "rule": "threshold"}),
        "needs the median norm.*deletion.rule='topk'",
    ),
    "zero points per token": (
        refused("vit", activations={"mode": "dynamic", "granularity": "per_token", "symmetric": False}),
        "dynamic zero points exist in ONNX for 8 bits per tensor only; use symmetric or static",
    ),
    "no encoder": (lambda: torch.nn.Linear(2, 2), "contains no supported vision encoder"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why(case: str, tmp_path):
    build, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        export_onnx(build(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_refused_options(tmp_path):
    model = TOWERS["vit"].build()
    with pytest.raises(ValueError, match="opset must be at least 21, got 17"):
        export_onnx(model, tmp_path, opset=17)
    with pytest.raises(ValueError, match="image_size 4 x 4 is smaller than a patch of 8 x 8 pixels"):
        export_onnx(model, tmp_path, image_size=4)
    with pytest.raises(ValueError, match=r"is no exported encoder: it has no export.json. Write one with `optimum-cli"):
        export_openvino(tmp_path, tmp_path / "y")
    (tmp_path / "export.json").write_text('{"format": "onnx"}')
    with pytest.raises(ValueError, match=r"is incomplete: model.onnx is missing. Export the model again"):
        ExportedEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size belong to the ONNX export"):
        export_openvino(tmp_path, tmp_path / "y", image_size=32)
    (tmp_path / "export.json").write_text('{"format": "coreml"}')
    with pytest.raises(ValueError, match="unknown format 'coreml'; expected onnx or openvino"):
        ExportedEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("package", "extra"),
    [("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino")],
)
def test_missing_packages_are_named(package: str, extra: str, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "export.json").write_text('{"format": "onnx"}')
    (tmp_path / "model.onnx").touch()
    call: Any = {
        "onnxscript": lambda: export_onnx(TOWERS["vit"].build(), tmp_path / "x"),
        "onnxruntime": lambda: ExportedEncoder.from_pretrained(tmp_path),
        "openvino": lambda: export_openvino(TOWERS["vit"].build(), tmp_path / "x"),
    }[package]
    with pytest.raises(ImportError, match=rf'{package} is needed .*pip install "optimum-regcache\[{extra}\]"'):
        call()


@pytest.mark.parametrize("classifies", [True, False])
def test_an_export_alone_is_evaluated_as_far_as_its_folder_goes(
    classifies: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = planted.build_planted_model()
    images = planted.load_dataset("report", 24)
    folder = export_onnx(
        model if classifies else model.base_model, tmp_path / "out", processor=planted.build_processor()
    )
    images.to_parquet(tmp_path / "images.parquet")
    subject = Subject(str(folder), dataset=str(tmp_path / "images.parquet"))
    recipe = Recipe().override(["data.num_samples=4", "data.num_report=8", "data.batch_size=8"])
    if not classifies:
        with pytest.raises(ValueError, match=r"is exported and predicts no classes: .* Give --float-model, or --task"):
            evaluate_job(subject, recipe, tmp_path / "results.json")
        return
    results, _ = evaluate_job(subject, recipe, tmp_path / "results.json")
    assert results["accuracy"] == 1.0
    assert results["float_model"] is None
    assert "feature_cosine" not in results
    assert "No comparison with a float original: none is recorded. Give it with --float-model." in caplog.text
