"""Where the large tokens lie: each norm at its patch, deleted ones marked, whatever is installed."""
# pyright: reportMissingImports=false

from __future__ import annotations

import pytest
import torch
from models import BLOCKS, MODELS, PATCHES
from PIL import Image

from optimum_regcache import DeletionConfig, set_deletion
from optimum_regcache.commands.pictures import frame_outliers
from optimum_regcache.evaluation import measure_token_norms
from optimum_regcache.evaluation.places import are_outliers, patch_norms
from optimum_regcache.registers import prepare_tower


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_norms_stay_at_their_patches_where_tokens_are_deleted(name: str) -> None:
    tiny = MODELS[name]
    model, batch = tiny.build(), {"pixel_values": tiny.inputs()["pixel_values"]}
    before = patch_norms(model, batch)
    assert before.shape == (BLOCKS, 3, PATCHES)
    assert torch.equal(before.amax((1, 2)), measure_token_norms(model, [batch]).max_block_input)
    runtime = prepare_tower(model)
    set_deletion(model, DeletionConfig(block=2, count=3))
    after = patch_norms(model, batch)
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after.isnan().sum(-1), torch.tensor([[0], [0], [3], [3]]).expand(-1, 3))
    kept = ~after[2].isnan()
    assert torch.equal(after[2][kept], before[2][kept])
    assert torch.equal(after[2].nan_to_num(0).amax(-1), before[2].sort(-1).values[:, -4])  # the three largest are gone
    assert not runtime.keep_positions


def test_outliers_are_framed_and_deleted_tokens_crossed_out() -> None:
    norms = torch.ones(4, 4).flatten()
    norms[5], norms[10] = 20.0, torch.nan
    assert are_outliers(norms).nonzero().flatten().tolist() == [5]
    drawn = frame_outliers(Image.new("RGB", (8, 8), (0, 0, 255)), norms, (4, 4), side=64, most=1)
    assert drawn.size == (64, 64)
    colours = {drawn.getpixel((x, y)) for x in range(16, 32) for y in range(16, 32)}
    assert colours == {(255, 0, 200), (0, 0, 255)}
    assert drawn.getpixel((40, 40)) == (0, 0, 0)
    assert drawn.getpixel((8, 8)) == (0, 0, 255)
