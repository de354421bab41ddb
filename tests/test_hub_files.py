"""Downloads that went wrong: one line that names the file, before anything is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOWERS

from optimum_regcache import RegCacheQuantizer
from optimum_regcache.hub import loading
from optimum_regcache.hub.loading import load_model

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
HTML = b"\n<!DOCTYPE html><html><body>404: Not Found</body></html>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TOWERS["vit"].build().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, r"is a Git LFS pointer, not the file itself\. Run `git lfs pull`"),
        (HTML, r"is a web page\. Download the model again"),
        (b"", r"is empty\. Download the model again"),
    ],
)
def test_what_stands_in_for_a_file_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        load_model(folder)


def test_weights_that_are_cut_off(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"model\.safetensors is cut off or damaged \(.*\)\. Download the model again"
        ):
            load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1000)}, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is cut off"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": 5}, r"config\.json: architectures must be a list of class names, got 5"),
        ({"architectures": [5]}, r"config\.json: architectures must be a list of class names, got \[5\]"),
        ({"architectures": "ViTModel"}, r"config\.json: architectures must be a list of class names, got 'ViTModel'"),
        ({"model_type": "no-such"}, r"config\.json: model_type 'no-such' is not known to transformers 5"),
        ({"model_type": None}, r"config\.json: model_type None is not known to transformers 5"),
        ({"model_type": ["vit"]}, r"config\.json: model_type \['vit'\] is not known to transformers 5"),
    ],
)
def test_a_config_of_something_else(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("architectures", [["Trainer"], ["os"], ["pipeline"], ["AutoModel"], ["NoSuchModel"], [], None])
def test_an_architecture_that_is_no_model_is_passed_over(folder: Path, architectures: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    assert type(load_model(folder)).__name__ == "ViTModel"


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "must hold a mapping, got list"), ("{", "is not JSON"), ("[" * 10**6, "is not JSON")],
)
def test_a_config_that_is_no_mapping(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        load_model(folder)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json: no model was saved there"):
        load_model(tmp_path)


def test_where_files_are_and_whose_code_may_run_reaches_every_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"revision": "main", "token": False, "cache_dir": str(folder), "local_files_only": True}
    given |= {"trust_remote_code": True, "code_revision": "main"}
    seen: dict[str, list[dict[str, Any]]] = {}
    for auto in (loading.AutoConfig, loading.AutoProcessor, loading.AutoImageProcessor):

        def record(name: Any, _auto: Any = auto, _open: Any = auto.from_pretrained, **kwargs: Any) -> Any:
            seen.setdefault(_auto.__name__, []).append(dict(kwargs))
            return _open(name, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", record)
    RegCacheQuantizer.from_pretrained(folder, **given)
    for name in ("AutoConfig", "AutoProcessor", "AutoImageProcessor"):  # transformers calls them too, in its own way
        assert given in seen[name], name
