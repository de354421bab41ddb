"""Settings of every test process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import fits
import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

# What shows that a combination of versions works (marker "core"): encoders found and unchanged, registers, deletion, saving and
# opening, checkpoints of earlier versions, damage noticed. Under three minutes on two cores.
CORE = {
    f"test_{name}.py"
    for name in (
        "architectures", "checkpoint_damage", "deletion", "golden_checkpoints", "hf_integration", "models", "packed_towers",
        "quantizer", "register_cache", "registers", "surgery", "versions",
    )
}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m core`` other files are not even imported: they may need packages that an environment lacks."""
    wanted = re.match(r"core\b", config.getoption("markexpr") or "") is not None
    name = collection_path.name
    return True if wanted and name.startswith("test_") and name.endswith(".py") and name not in CORE else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `CORE`."""
    for item in items:
        if item.path.name in CORE:
            item.add_marker("core")


@pytest.fixture(scope="session", autouse=True)
def kept_fits_stay_as_they_are() -> Iterator[None]:
    """No test changed a fit that others were given a copy of."""
    yield
    assert fits.changed() == []
