"""Versions of other packages: bounds, messages, and releases that behave differently from the tested ones."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOWERS, quantized
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoModel, conversion_mapping

from optimum_regcache.encoders import compat, versions
from optimum_regcache.hub.hf_quantizer import RegCacheHfQuantizer, _checkpoint_files
from optimum_regcache.registers.cache import RegisterLayer

ROOT = Path(__file__).parent.parent
CLIP = TOWERS["clip"]


def pretend(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Make the installed versions look like ``found`` (None: not installed)."""
    real = metadata.version

    def version(package: str) -> str:
        value = found.get(package, real)
        if value is None:
            raise metadata.PackageNotFoundError(package)
        return real(package) if value is real else value  # type: ignore[return-value]

    monkeypatch.setattr(versions.metadata, "version", version)


def installed_bounds() -> dict[str, Requirement]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].strip().split("\n")
    return {r.name: r for r in map(Requirement, lines)}


@pytest.mark.parametrize("package", versions.REQUIRED)
def test_bounds_are_those_of_setup_cfg(package: str) -> None:
    assert installed_bounds()[package].specifier == Requirement(versions.requirement(package)).specifier


def test_what_is_installed_will_do() -> None:
    versions.check_transformers()
    versions.check_environment()


def test_tested_range_lies_within_the_bounds_and_covers_what_ci_runs() -> None:
    oldest, newest = map(Version, versions.TESTED_TRANSFORMERS)
    assert oldest == Version(versions.REQUIRED["transformers"]) < newest
    assert newest < Version(versions.NEXT_MAJOR["transformers"])


def test_an_old_release_is_refused_at_import(tmp_path: Path) -> None:
    code = (
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '5.3.0' if name == 'transformers' else real(name)\n"
        "import optimum_regcache\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: optimum-regcache: transformers 5.3.0 is installed, at least 5.4 is needed: "
        'pip install "transformers>=5.4,<6"'
    )


@pytest.mark.parametrize(
    ("version", "warns"),
    [("5.4.0", False), ("5.24.1", False), ("5.24.9.dev0", False), ("5.25.0", True), ("5.40.2", True)],
)
def test_a_newer_release_gets_one_warning(version: str, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, transformers=version)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    versions.logger.addHandler(handler)
    try:
        versions.check_transformers()
    finally:
        versions.logger.removeHandler(handler)
    assert len(records) == int(warns)
    if warns:
        assert f"tested with transformers 5.4 to 5.24; {version} is installed" in records[0].getMessage()


def test_everything_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.5.1+cpu", safetensors=None)
    config = quantized(CLIP).config.quantization_config
    quantizer = RegCacheHfQuantizer(config)
    with pytest.raises(ImportError) as error:
        quantizer.validate_environment(device_map=None)
    text = str(error.value)
    assert 'torch 2.5.1+cpu is installed, at least 2.9 is needed: pip install "torch>=2.9"' in text
    assert 'safetensors is not installed, at least 0.5 is needed: pip install "safetensors>=0.5"' in text


def test_opening_checks_the_environment_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quantized(CLIP).save_pretrained(tmp_path)
    pretend(monkeypatch, torch="2.5.1")
    with pytest.raises(ImportError, match=re.escape('pip install "torch>=2.9"')):
        AutoModel.from_pretrained(tmp_path)


class OtherKeyword(RegCacheHfQuantizer):
    """As if transformers called the files something else."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        kwargs["weight_files"] = kwargs.pop("checkpoint_files")
        return super()._process_model_before_weight_loading(model, **kwargs)


def test_damage_is_noticed_when_transformers_renames_its_argument(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers.quantizers import auto

    quantized(CLIP).save_pretrained(tmp_path)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "regcache", OtherKeyword)
    AutoModel.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("register_key"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'register_key' tensors, its quantization config needs"):
        AutoModel.from_pretrained(tmp_path)


def test_files_that_cannot_be_found_are_an_error() -> None:
    model = CLIP.build()
    assert _checkpoint_files(model, {"checkpoint_files": None}) == []
    files = ["a/model.safetensors", "b.bin"]
    assert _checkpoint_files(model, {"checkpoint_files": files}) == [Path(name) for name in files]
    with pytest.raises(ValueError, match="cannot be checked for missing tensors"):
        _checkpoint_files(model, {})


def test_unknown_renaming_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CLIP.build()
    monkeypatch.delattr(conversion_mapping, "get_model_conversion_mapping")
    with pytest.raises(
        ValueError, match=r"not known here .* pip install \"transformers>=5.4,<6\" \(tested: 5.4 to 5.24\)"
    ):
        compat.loaded_names(model, ["x"])


def test_attention_weights_are_wanted_where_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.attention_weights_wanted() is False
    monkeypatch.delattr(compat.output_capturing, "_active_collector")
    assert compat.attention_weights_wanted() is True


def test_a_register_layer_has_both_names_of_its_length() -> None:
    layer = RegisterLayer(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert layer.get_max_length() == layer.get_max_cache_shape() == layer.get_seq_length() == 3
