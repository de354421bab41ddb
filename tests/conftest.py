"""Settings of every test process."""

from __future__ import annotations

from collections.abc import Iterator

import fits
import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

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
    """Files of `FIRST` first; tests keep their order within a file."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def kept_fits_stay_as_they_are() -> Iterator[None]:
    """No test changed a fit that others were given a copy of."""
    yield
    assert fits.changed() == []
