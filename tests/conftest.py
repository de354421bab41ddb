"""Settings of every test process."""

from __future__ import annotations

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `CORE`."""
    for item in items:
        if item.path.name in CORE:
            item.add_marker("core")
