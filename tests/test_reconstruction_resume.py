"""A reconstruction that was interrupted goes on where it was and ends in the same bits; damaged files are refused."""
# pyright: reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from models import TOWERS, random_cache
from torch.nn import functional as F

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config.recipe import DataConfig, Recipe
from optimum_regcache.encoders.passes import JoinedBatches, count_images
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.methods._reconstruction import train

CLIP = TOWERS["clip"]


def reconstruct(folder: Path | None, images: int = 12, more: int = 0, **parameters: Any) -> Any:
    method = {"name": "reconstruction", "iterations": 4, "batch": 4, **parameters}
    config = RegCacheConfig.from_preset("w4a4").replace(
        methods=[method],
        registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0},
        deletion={"block": 2, "count": 2},
        attention={"quantize": True, "bits": 4},
    )
    cache = random_cache((2, 3), num_copies=2.0)
    batches = [CLIP.inputs(2, images)]
    training = JoinedBatches(batches, [CLIP.inputs(3, more)]) if more else ()
    return quantize_with(CLIP.build(), resolve(config), cache, batches, False, folder, training)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("reconstruction-*/block-*"))


def test_interrupted_and_continued_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reconstruct(tmp_path / "whole")
    assert [path.name for path in files(tmp_path / "whole")] == [f"block-{i:03d}" for i in range(4)]
    original, calls = train.BlockTraining.run, list[int]()

    def interrupted(self: train.BlockTraining, bar: Any) -> train.BlockRecord:
        if self.ours.block == 2:
            raise KeyboardInterrupt
        return original(self, bar)

    def counted(self: train.BlockTraining, bar: Any) -> train.BlockRecord:
        calls.append(self.ours.block)
        return original(self, bar)

    monkeypatch.setattr(train.BlockTraining, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(tmp_path / "parts")
    assert len(files(tmp_path / "parts")) == 2
    monkeypatch.setattr(train.BlockTraining, "run", counted)
    continued = reconstruct(tmp_path / "parts")
    assert calls == [2, 3]
    assert fits.fingerprint(continued.model) == fits.fingerprint(whole.model)
    for a, b in zip(files(tmp_path / "whole"), files(tmp_path / "parts"), strict=True):
        assert a.relative_to(tmp_path / "whole") == b.relative_to(tmp_path / "parts")
    again = reconstruct(tmp_path / "parts")
    assert calls == [2, 3]
    assert fits.fingerprint(again.model) == fits.fingerprint(whole.model)
    assert again.measured == continued.measured


def test_other_settings_and_images_have_files_of_their_own(tmp_path: Path) -> None:
    reconstruct(tmp_path)
    reconstruct(tmp_path, seed=1)
    reconstruct(tmp_path, images=11)
    assert len(list(tmp_path.glob("reconstruction-*"))) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    whole = reconstruct(tmp_path)
    path = files(tmp_path)[1]
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"block-001 is not what the reconstruction wrote\. Delete it to train"):
        reconstruct(tmp_path)
    if damage != "folder":
        path.unlink()
        assert fits.fingerprint(reconstruct(tmp_path).model) == fits.fingerprint(whole.model)


def test_a_restored_model_runs(tmp_path: Path) -> None:
    first, second = (CLIP.run(reconstruct(tmp_path).model).flatten(1) for _ in range(2))
    assert torch.equal(first, second)
    assert bool(F.cosine_similarity(first, second).isfinite().all())


def test_more_images_train_and_the_scales_stay_those_of_calibration() -> None:
    few, more = reconstruct(None, activation_scales=False), reconstruct(None, more=5, activation_scales=False)
    name = "encoder.layers.0.mlp.fc1"
    one, other = (result.model.get_submodule(name) for result in (few, more))
    assert torch.equal(one.input_scale, other.input_scale)
    assert not torch.equal(one.weight, other.weight)


def test_quantize_trains_on_the_images_that_rank_and_on_none_that_confirm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = train.Reconstruction.__init__

    def noted(self: Any, fit: Any, *args: Any, **kwargs: Any) -> None:
        seen.extend([count_images(fit.batches), count_images(fit.training)])
        own(self, fit, *args, **kwargs)

    monkeypatch.setattr(train.Reconstruction, "__init__", noted)
    data = DataConfig(num_samples=24, calibration_fraction=0.25, confirm_fraction=0.5, batch_size=4)
    config = RegCacheConfig(registers={"mode": "none"}, methods=[{"name": "light", "iterations": 1, "batch": 2}])
    images = [{"pixel_values": image} for image in CLIP.inputs(2, 24)["pixel_values"]]
    RegCacheQuantizer(CLIP.build(), None).quantize(recipe=Recipe(config, data=data), calibration_dataset=images)
    assert seen == [6, 15]
