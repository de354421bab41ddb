"""Deletions that an encoder cannot do are refused with the reason."""

from __future__ import annotations

import pytest
from models import BLOCKS, DINOV2_BACKBONE, TOWERS

from optimum_regcache import DeletionConfig
from optimum_regcache.registers import prepare_tower, set_deletion

CLIP, SIGLIP2 = TOWERS["clip"], TOWERS["siglip2"]


def test_set_deletion_errors() -> None:
    with pytest.raises(ValueError, match=r"deletion.block=4, but the encoder has blocks 0 to 3\."):
        set_deletion(CLIP.build(), DeletionConfig(block=BLOCKS, count=1))
    for tiny, name in ((SIGLIP2, r"Siglip2Vision\w+"), (DINOV2_BACKBONE, "Dinov2Backbone")):
        model = tiny.build()
        message = f"{name} needs the whole patch grid after the last block; use deletion.fill='neighbour_mean'"
        with pytest.raises(ValueError, match=message):
            set_deletion(model, DeletionConfig(block=1, count=1, fill="none"))
        assert not prepare_tower(model).deletion.active
        set_deletion(model, DeletionConfig(fill="none"))  # nothing is deleted: no objection
