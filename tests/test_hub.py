"""Pushing to and loading from the Hub, against a loopback server, in processes that share nothing but that server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

REPO_ROOT = Path(__file__).resolve().parents[1]

# Each script is what it shares (PRELUDE), one part that depends on the kind of model, and one that does not.
PRELUDE = """
import sys
import torch

repo_id, outputs_file = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
pixel_values = torch.rand(2, 3, 28, 28)
"""

# Defines `model` and `processor`.
BUILD_TINY_DINOV2 = """
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
model = Dinov2Model(config).eval()
processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
"""

PUSH = """
import tempfile
from huggingface_hub import HfApi

model.push_to_hub(repo_id)
with tempfile.TemporaryDirectory() as folder:
    processor.save_pretrained(folder)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
with torch.no_grad():
    torch.save(model(pixel_values).last_hidden_state, outputs_file)
"""

# Whatever a model needs to have imported before AutoModel can load it goes in front.
LOAD = """
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(repo_id).eval()
assert AutoImageProcessor.from_pretrained(repo_id).crop_size["height"] == 28
with torch.no_grad():
    outputs = model(pixel_values).last_hidden_state
expected = torch.load(outputs_file)
assert torch.equal(outputs, expected), f"largest difference {(outputs - expected).abs().max()}"
"""


# A quantized model with registers and a deletion; the processor of its float original.
BUILD_QUANTIZED_DINOV2 = (
    BUILD_TINY_DINOV2
    + """
from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.quantizer import build_quantized

keys, values = {1: torch.randn(2, 1, 16)}, {1: torch.randn(2, 1, 16)}
quantization_config = RegCacheConfig(
    registers={"mode": "fixed", "blocks": [1], "num_copies": 3.0}, deletion={"block": 1, "count": 1}
)
batches = [{"pixel_values": torch.rand(4, 3, 28, 28)}]
model = build_quantized(model, quantization_config, RegisterCache(keys, values, 2, 3.0), batches)
torch.save(model.state_dict(), outputs_file + ".state")
"""
)

CHECK_QUANTIZED = """
from optimum_regcache.modules import quant_linears
from optimum_regcache.registers import get_register_cache, prepare_tower

state, expected = model.state_dict(), torch.load(outputs_file + ".state")
assert list(state) == list(expected)
assert all(torch.equal(state[name], expected[name]) for name in expected)
assert [name for name in state if "register_" in name] == [
    f"encoder.layer.1.attention.register_{kind}" for kind in ("key", "value")
]
assert get_register_cache(model).blocks == (1,)
assert get_register_cache(model).num_copies == 3.0
assert prepare_tower(model).deletion.count == 1
assert len(list(quant_linears(model))) == 12
"""


def run_script(script: str, *args: str, hub: HubServer, cache: Path) -> None:
    """Run ``script`` in a fresh process whose Hub is ``hub`` and whose Hugging Face cache is ``cache``."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(dropped)}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": "dummy", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"PYTHONPATH": os.pathsep.join([str(REPO_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    command = [sys.executable, "-W", "error", "-c", script, *args]
    result = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{result.stderr}\nRequests so far:\n" + "\n".join(hub.requests)


def test_push_then_load_gives_the_same_outputs(tmp_path: Path) -> None:
    outputs = str(tmp_path / "outputs.pt")
    with HubServer() as hub:
        run_script(PRELUDE + BUILD_TINY_DINOV2 + PUSH, "user/tiny", outputs, hub=hub, cache=tmp_path / "push")
        run_script(PRELUDE + LOAD, "user/tiny", outputs, hub=hub, cache=tmp_path / "load")


def test_quantized_model_with_registers_travels_through_the_hub(tmp_path: Path) -> None:
    outputs = str(tmp_path / "outputs.pt")
    load = PRELUDE + "import optimum_regcache\n" + LOAD + CHECK_QUANTIZED
    with HubServer() as hub:
        run_script(PRELUDE + BUILD_QUANTIZED_DINOV2 + PUSH, "user/name", outputs, hub=hub, cache=tmp_path / "push")
        files = list(hub.repos["user/name"].commits.values())[-1]
        assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "regcache"
        run_script(load, "user/name", outputs, hub=hub, cache=tmp_path / "load")


def test_loopback_hub_answers_like_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights.bin").write_bytes(bytes(range(256)))
    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token="dummy")
        for repo_id in ("user/one", "user/two"):
            assert api.create_repo(repo_id).repo_id == repo_id
        api.create_repo("user/one", exist_ok=True)
        commit = api.upload_folder(repo_id="user/one", folder_path=folder)

        assert api.model_info("user/one").sha == commit.oid
        assert api.list_repo_files("user/one") == ["config.json", "sub/weights.bin"]
        assert api.list_repo_files("user/two") == []
        snapshot = Path(api.snapshot_download("user/one", cache_dir=tmp_path / "cache"))
        assert snapshot.name == commit.oid
        assert (snapshot / "sub" / "weights.bin").read_bytes() == bytes(range(256))
        api.delete_folder("sub", repo_id="user/one")
        assert api.list_repo_files("user/one") == ["config.json"]
        assert api.list_repo_files("user/one", revision=commit.oid) == ["config.json", "sub/weights.bin"]

        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download("user/one", "missing.json", cache_dir=tmp_path / "cache")
        with pytest.raises(RevisionNotFoundError):
            api.model_info("user/one", revision="missing")
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/missing")
