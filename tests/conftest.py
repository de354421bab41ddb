"""Settings of every test process."""

from __future__ import annotations

from collections.abc import Iterator

import fits
import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture(scope="session", autouse=True)
def kept_fits_stay_as_they_are() -> Iterator[None]:
    """No test changed a fit that others were given a copy of."""
    yield
    assert fits.changed() == []
