"""Settings of every test process."""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import fits
import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

# What shows that a combination of versions works (marker "core"): encoders found and unchanged, registers, deletion, saving and
# opening, checkpoints of earlier versions, gradients, damage and edits noticed. Under three minutes on two cores.
CORE = {
    f"test_{name}.py"
    for name in (
        "architectures", "checkpoint_damage", "deletion", "door", "fingerprint", "golden_checkpoints", "gradients",
        "hf_integration", "hidden_states", "independence", "models", "packed_towers", "push", "quantizer", "register_cache",
        "registers", "remote_code", "support_table", "surgery", "trials", "versions",
    )
}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m core`` other files are not even imported: they may need packages that an environment lacks."""
    wanted = re.match(r"core\b", config.getoption("markexpr") or "") is not None
    name = collection_path.name
    return True if wanted and name.startswith("test_") and name.endswith(".py") and name not in CORE else None


# the files of few long tests, in the order in which they begin: last, one of them would keep one process busy alone
FIRST = (
    "test_reference_encoders.py",
    "test_export.py",
    "test_avx2.py",
    "test_hub.py",
    "test_recipes_folder.py",
    "test_every_setting.py",
    "test_methods.py",
    "test_planted.py",
    "test_memory.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `CORE`; files of `FIRST` come first, and tests keep their order within a file."""
    for item in items:
        if item.path.name in CORE:
            item.add_marker("core")
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def kept_fits_stay_as_they_are() -> Iterator[None]:
    """No test changed a fit that others were given a copy of."""
    yield
    assert fits.changed() == []


@pytest.fixture(scope="module")
def operators_read_once() -> Iterator[None]:
    """The exporter parses its 500 operator functions anew for each model, more than half of the time of a tiny export."""
    from torch.onnx._internal import _lazy_import

    source = _lazy_import.onnxscript_apis
    patch = pytest.MonkeyPatch()
    patch.setattr(import_module(source.__name__), "get_torchlib_ops", lru_cache(source.get_torchlib_ops))
    yield
    patch.undo()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in this process; returns (exit code, stdout, last line of stderr)."""

    def call(*args: Any) -> tuple[int, str, str]:
        from optimum.commands.optimum_cli import main

        monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().rpartition("\n")[2]

    return call
