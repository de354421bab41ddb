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

# Both scripts begin with this. The first argument is where the pushing process leaves what the loading one must find.
PRELUDE = """
import sys
from pathlib import Path
import torch

folder = Path(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(1)
pixel_values = torch.rand(2, 3, 28, 28)
"""

PUSH = """
import tempfile
from huggingface_hub import HfApi
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil


def push(model, repo_id):
    model.push_to_hub(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
        processor.save_pretrained(temporary)
        HfApi().upload_folder(repo_id=repo_id, folder_path=temporary)
    with torch.no_grad():
        outputs = model(pixel_values).last_hidden_state
    torch.save((model.state_dict(), outputs), folder / repo_id.replace("/", "-"))


config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
model = Dinov2Model(config).eval()
push(model, "user/tiny")
assert "optimum_regcache" not in sys.modules

from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.quantizer import build_quantized

keys, values = {1: torch.randn(2, 1, 16)}, {1: torch.randn(2, 1, 16)}
quantization_config = RegCacheConfig(
    registers={"mode": "fixed", "blocks": [1], "num_copies": 3.0}, deletion={"block": 1, "count": 1}
)
batches = [{"pixel_values": torch.rand(4, 3, 28, 28)}]
push(build_quantized(model, quantization_config, RegisterCache(keys, values, 2, 3.0), batches), "user/name")
"""

LOAD = """
from transformers import AutoImageProcessor, AutoModel


def load(repo_id):
    model = AutoModel.from_pretrained(repo_id).eval()
    assert AutoImageProcessor.from_pretrained(repo_id).crop_size["height"] == 28
    with torch.no_grad():
        outputs = model(pixel_values).last_hidden_state
    state, expected = torch.load(folder / repo_id.replace("/", "-"))
    assert torch.equal(outputs, expected), f"largest difference {(outputs - expected).abs().max()}"
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    return model


load("user/tiny")
assert "optimum_regcache" not in sys.modules

import optimum_regcache

model = load("user/name")

from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.registers import get_register_cache, prepare_tower

assert [name for name in model.state_dict() if "register_" in name] == [
    f"encoder.layer.1.attention.register_{kind}" for kind in ("key", "value")
]
assert (get_register_cache(model).blocks, get_register_cache(model).num_copies) == ((1,), 3.0)
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


def test_push_then_load_gives_the_same_models(tmp_path: Path) -> None:
    """A float model, then a quantized one with registers and a deletion: pushed by one process, opened by another."""
    with HubServer() as hub:
        run_script(PRELUDE + PUSH, str(tmp_path), hub=hub, cache=tmp_path / "push")
        for repo_id, method in (("user/tiny", None), ("user/name", "regcache")):
            files = list(hub.repos[repo_id].commits.values())[-1]
            config = json.loads(files["config.json"])
            assert config.get("quantization_config", {}).get("quant_method") == method
        run_script(PRELUDE + LOAD, str(tmp_path), hub=hub, cache=tmp_path / "load")


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
