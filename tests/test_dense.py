"""Patch tokens of the float model are kept like other recorded states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import TOWERS
from test_objectives import batches_of, perturbed

from optimum_regcache.encoders.store import StoredBatches, TensorSpace
from optimum_regcache.evaluation import make_objective


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_patch_cosine_keeps_within_the_memory_budget(name: str, tmp_path: Path) -> None:
    """The float tokens go to files with the images, and change no bit there."""
    tiny = TOWERS[name]
    _, scored = batches_of(tiny)
    found = []
    for budget in (0, 2**30):
        space = TensorSpace(budget, tmp_path)
        batches = StoredBatches(space)
        for batch in scored:
            batches.append(batch, len(batch["pixel_values"]))
        images = space.used + space.written
        objective = make_objective("patch_cosine", tiny.build(), batches)
        assert (space.used == 0, space.written == 0) == (budget == 0, budget > 0)
        assert space.used + space.written > images
        found.append((objective.scores(perturbed(tiny)), objective.first(3).scores(perturbed(tiny))))
        space.close()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(
        found[0][0], make_objective("patch_cosine", tiny.build(), scored).scores(perturbed(tiny))
    )
