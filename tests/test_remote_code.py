"""`trust_remote_code=True` in place of the import: the same model, saved and opened again; what happens without either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import CLIP_CLASSIFIER, MODELS, TinyModel, quantized

from optimum_regcache import RegCacheCLIPVisionModel, RegCacheConfig, RegCacheQuantizer
from optimum_regcache.hub.remote_code import SHIM, add_remote_code, auto_map
from optimum_regcache.hub.stored import sort_metadata
from optimum_regcache.quantizer import build_quantized

ROOT = Path(__file__).parent.parent
AUTO = {
    "clip": hf.AutoModel,
    "siglip": hf.AutoModel,
    "dinov2": hf.AutoModel,  # stored under other names than those of the modules
    "vit": hf.AutoModel,
    "clip_dual": hf.AutoModelForZeroShotImageClassification,
    "siglip_dual": hf.AutoModel,
    "dinov2_classifier": hf.AutoModelForImageClassification,
    "vit_classifier": hf.AutoModelForImageClassification,
    "clip_classifier": hf.AutoModelForImageClassification,
}


def tiny_named(name: str) -> TinyModel:
    return CLIP_CLASSIFIER if name == "clip_classifier" else MODELS[name]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies remote code to a folder of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    add_remote_code(folder, model.config)
    return folder


def code_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("auto_map")


def require_equal(tiny: TinyModel, one: Any, other: Any) -> None:
    state = other.state_dict()
    assert list(one.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(tiny.run(one), tiny.run(other))


@pytest.mark.parametrize("name", AUTO)
def test_remote_code_opens_the_same_model_and_saves_the_same_files(name: str, tmp_path: Path) -> None:
    tiny, auto = tiny_named(name), AUTO[name]
    model = quantized(tiny)
    first = saved(model, tmp_path / "first")
    opened: Any = auto.from_pretrained(first, trust_remote_code=True)
    assert type(opened).__module__.endswith(".modeling_regcache")
    assert type(opened).__name__ == type(model).__name__
    require_equal(tiny, model, opened)
    second = tmp_path / "second"
    opened.save_pretrained(second)
    for folder in (first, second):
        sort_metadata(folder)
    assert {p.name: p.read_bytes() for p in second.iterdir() if p.name != "config.json"} == {
        p.name: p.read_bytes() for p in first.iterdir() if p.name != "config.json"
    }
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    for part in ("architectures", "auto_map", "quantization_config"):
        assert one[part] == other[part]
    require_equal(tiny, model, auto.from_pretrained(second, trust_remote_code=True))


def test_without_remote_code_the_classes_are_those_of_transformers_and_leave_no_trace(tmp_path: Path) -> None:
    tiny = MODELS["vit"]
    opened: Any = hf.AutoModel.from_pretrained(saved(quantized(tiny), tmp_path / "first"))
    assert type(opened) is hf.ViTModel
    opened.save_pretrained(tmp_path / "second")
    assert code_of(tmp_path / "second") is None
    assert not (tmp_path / "second" / SHIM.name).exists()


def test_code_of_others_stays_named(tmp_path: Path) -> None:
    model = quantized(MODELS["vit"])
    model.config.auto_map = {
        "AutoModel": "user/name--modeling_regcache.ViTModel",
        "AutoConfig": "user/x--theirs.Config",
    }
    model.save_pretrained(tmp_path)
    assert code_of(tmp_path) == {"AutoConfig": "user/x--theirs.Config"}


def test_what_the_config_names() -> None:
    assert auto_map(hf.CLIPConfig()) == {
        "AutoModel": "modeling_regcache.CLIPModel",
        "AutoModelForImageClassification": "modeling_regcache.CLIPForImageClassification",
        "AutoModelForZeroShotImageClassification": "modeling_regcache.CLIPModel",
    }
    assert auto_map(hf.YolosConfig())["AutoModelForObjectDetection"] == "modeling_regcache.YolosForObjectDetection"
    assert auto_map(hf.CLIPVisionConfig()) == {"AutoModel": "modeling_regcache.CLIPVisionModel"}


def test_the_file_gives_models_of_transformers_only() -> None:
    from optimum_regcache.hub import modeling_regcache

    assert issubclass(modeling_regcache.ViTModel, hf.ViTModel)
    assert modeling_regcache.ViTModel is modeling_regcache.ViTModel
    for name in ("AutoConfig", "pipeline", "NoSuchModel", "__path__"):
        assert not hasattr(modeling_regcache, name)


def test_our_own_classes_are_saved_with_it_too(tmp_path: Path) -> None:
    tiny = MODELS["clip"]
    config = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    model = build_quantized(tiny.build(cls=RegCacheCLIPVisionModel), config, None, [tiny.inputs(seed=2)])
    RegCacheQuantizer(tiny.build()).save(model, tmp_path / "out")
    assert code_of(tmp_path / "out") == {"AutoModel": "modeling_regcache.CLIPVisionModel"}
    opened: Any = hf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(tiny.run(opened), tiny.run(model))


SCRIPT = """
import sys
import torch
from transformers import AutoModel

folder = sys.argv[1]
sys.modules["optimum_regcache"] = None  # as if it was not installed
try:
    AutoModel.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print("ImportError:", error)
del sys.modules["optimum_regcache"]
try:
    AutoModel.from_pretrained(folder)
except RuntimeError as error:
    print("RuntimeError:", error)
assert "optimum_regcache" not in sys.modules
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert "optimum_regcache" in sys.modules
torch.set_num_threads(1)
inputs, expected = torch.load(folder + "/expected")
with torch.no_grad():
    assert torch.equal(model(**inputs).last_hidden_state, expected)
"""


def test_a_process_that_imports_nothing(tmp_path: Path) -> None:
    """With the code it opens; without the package it says what to install; without the code it stops, and never guesses."""
    tiny = MODELS["dinov2"]
    folder = saved(quantized(tiny), tmp_path / "model")
    torch.save((tiny.inputs(), tiny.run(quantized(tiny))), folder / "expected")
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    result = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "ImportError: This model is quantized with RegCache and needs the package: pip install optimum-regcache",
        "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above "
        "report!",
    ]
    assert "Unknown quantization type, got regcache" in result.stderr
