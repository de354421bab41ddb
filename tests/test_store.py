"""Batches in memory up to a budget and in files beyond it; reading images by worker processes; fits without any."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TOWERS
from PIL import Image

from optimum_regcache import RegCacheConfig
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.data import reading
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reading import number_of_workers, read_batches, store_batches
from optimum_regcache.encoders import store
from optimum_regcache.encoders.passes import ImageRange, count_images, encode, move
from optimum_regcache.encoders.store import StoredBatches, TensorSpace
from optimum_regcache.evaluation.objective import CosineObjective
from optimum_regcache.search.fit import fit_registers
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.trials import TrialRunner

KIB = 1024


def batch(seed: int, images: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(images, 3, 8, 8, generator=generator),
        "pixel_attention_mask": torch.rand(images, 4, generator=generator) > 0.5,
    }


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("budget", [0, 4 * KIB, 10**9])
def test_what_comes_out_is_what_went_in(budget: int, tmp_path: Path) -> None:
    space = TensorSpace(budget, tmp_path)
    batches = StoredBatches(space)
    given = [batch(i, images=2 - (i == 4)) for i in range(5)]
    for each in given:
        batches.append(each, len(each["pixel_values"]))
    assert len(batches) == 5
    assert batches.sizes == [2, 2, 2, 2, 1]
    assert count_images(batches) == 9
    assert all(same(a, b) for a, b in zip(batches, given, strict=True))
    assert same(batches[-1], given[-1])
    assert len(batches[1:3]) == 2
    assert space.used <= max(budget, 0)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == batches.in_files == {0: 5, 4 * KIB: 2}.get(budget, 0)
    first = ImageRange(batches, 3)
    assert first.sizes == [2, 1]
    assert same(first[-1], {k: v[:1] for k, v in given[1].items()})
    del batches, first
    gc.collect()
    assert (space.used, space.written, list(tmp_path.rglob("*.safetensors"))) == (0, 0, [])
    space.close()
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_process_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    dead, living = (tmp_path / f"{store._PREFIX}{pid}-x" for pid in (2**22 + 1, os.getppid()))
    other = tmp_path / "regcache-tensors-elsewhere-1-x"
    for folder in (dead, living, other):
        folder.mkdir()
    space = TensorSpace(0, tmp_path)
    space.write(batch(0))
    assert not dead.exists()
    assert living.exists()
    assert other.exists()


def test_too_little_disk_is_said_before_the_work(tmp_path: Path) -> None:
    space = TensorSpace(0, tmp_path)
    with pytest.raises(OSError, match=r"900 images take .* GiB, of which data.memory_budget leaves .* GiB to .* free"):
        space.require_room(2**60, "900 images")
    space.require_room(1, "one image")
    TensorSpace(2**61, tmp_path).require_room(2**60, "900 images")


def test_the_default_budget_is_a_share_of_free_memory() -> None:
    assert 0 < TensorSpace().budget <= store.available_memory() * 2


@pytest.fixture(scope="module")
def pictures() -> ImageInputs:
    from datasets import Dataset
    from transformers import CLIPImageProcessor

    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 256, (10, 20, 24, 3), generator=generator, dtype=torch.uint8).numpy()
    data = Dataset.from_dict({"image": [Image.fromarray(a) for a in arrays]})
    side = {"height": 16, "width": 16}
    return ImageInputs(data, CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side))


def test_workers_read_the_same_images_in_the_same_order(pictures: ImageInputs) -> None:
    alone, others = (list(read_batches(pictures, DataConfig(batch_size=4, workers=w))) for w in (0, 2))
    assert [len(b["pixel_values"]) for b in alone] == [4, 4, 2]
    assert all(same(a, b) for a, b in zip(alone, others, strict=True))
    assert number_of_workers(pictures, None) == 0  # few images


@pytest.mark.parametrize(("method", "daemon", "workers"), [("fork", False, 3), ("spawn", False, 0), ("fork", True, 0)])
def test_workers_start_by_themselves_only_where_that_is_safe(
    method: str, daemon: bool, workers: int, pictures: ImageInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MANY", 5)
    monkeypatch.setattr(reading.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(reading.multiprocessing, "get_start_method", lambda: method)
    monkeypatch.setattr(reading.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=daemon))
    assert number_of_workers(pictures, None) == workers
    assert number_of_workers(pictures, 2) == 2  # who asks for them gets them


def test_an_error_in_a_worker_keeps_its_words(tmp_path: Path) -> None:
    from datasets import Dataset, Features
    from datasets import Image as Picture
    from transformers import CLIPImageProcessor

    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (20, 20), "red").save(good)
    bad.write_bytes(good.read_bytes()[:40])
    data = Dataset.from_dict({"image": [str(good)] * 5 + [str(bad)]}, features=Features({"image": Picture()}))
    inputs = ImageInputs(data, CLIPImageProcessor(size={"shortest_edge": 16}))
    messages = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"bad\.png") as raised:
            list(read_batches(inputs, DataConfig(batch_size=2, workers=workers)))
        messages.append(re.sub("0x[0-9a-f]+", "", str(raised.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("family", ["clip", "siglip2", "dinov3"])
def test_scores_do_not_depend_on_the_budget(family: str, tmp_path: Path) -> None:
    tower = TOWERS[family]
    model = tower.build()
    config = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    found = []
    for budget in (None, 10**9, 0):
        space = None if budget is None else TensorSpace(budget, tmp_path)
        calibration, selection = [tower.inputs(seed=1)], [tower.inputs(seed=2), tower.inputs(seed=3)]
        runner = TrialRunner(model, config, calibration, space=space)
        objective = CosineObjective(runner.float_model, selection)
        found.append([runner.score(None, DeletionConfig(block, count), objective) for block, count in ((2, 1), (1, 2))])
        if budget == 0:
            assert list(tmp_path.rglob("*.safetensors"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_fit_in_files_is_the_fit_in_memory(pictures: ImageInputs, tmp_path: Path) -> None:
    tower = TOWERS["clip"]
    model = tower.build()
    images = [{"pixel_values": tower.inputs(seed=s)["pixel_values"][0]} for s in range(24)]
    search = SearchConfig(always=True, num_copies=(1, 4), max_delete=2, sensitive_block=2, blocks_before=1)
    fits = []
    for budget in (1.0, 0.0):
        data = DataConfig(num_samples=24, batch_size=4, memory_budget=budget)
        plan = QuantizationPlan.of(Recipe(RegCacheConfig.from_preset("w6a6"), search, data))
        work = tmp_path / str(budget)
        fits.append(fit_registers(model, ReferenceImages(images), plan, work_dir=work, progress=False))
    journals = [next((tmp_path / work).glob("*.jsonl")) for work in ("0.0", "1.0")]
    assert len({j.name for j in journals}) == 1  # the budget is no reason for another one
    assert journals[0].read_bytes() == journals[1].read_bytes()
    assert fits[0].search.to_dict() == fits[1].search.to_dict()
    del fits
    gc.collect()
    assert not list(tmp_path.rglob("regcache-tensors-*"))


def test_each_image_is_processed_once_in_a_whole_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_regcache import RegCacheQuantizer

    tower = TOWERS["clip"]
    images = [{"pixel_values": tower.inputs(seed=s)["pixel_values"][0]} for s in range(16)]
    seen: list[int] = []
    batches = ImageInputs.batches

    def watched(self: ImageInputs, size: int) -> Any:
        seen.extend(self.indices)
        return batches(self, size)

    monkeypatch.setattr(ImageInputs, "batches", watched)
    search = SearchConfig(always=True, num_copies=(1,), max_delete=1, sensitive_block=2, blocks_before=0)
    quantizer = RegCacheQuantizer(tower.build())
    quantizer.quantize(calibration_dataset=images, search=search, progress=False)
    assert sorted(seen) == list(range(16))
    assert quantizer.fit_result is not None
    assert quantizer.fit_result.parts.space.used == 0  # the result is kept, the images are not


def test_stored_batches_feed_the_store(pictures: ImageInputs, tmp_path: Path) -> None:
    stored = store_batches(pictures, DataConfig(batch_size=3), TensorSpace(0, tmp_path))
    assert stored.sizes == [3, 3, 3, 1]
    assert all(same(a, b) for a, b in zip(stored, pictures.batches(3), strict=True))


@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_features_keep_nothing_else_of_a_batch(family: str) -> None:
    model = TOWERS[family].build()
    images = [TOWERS[family].inputs(seed=s, batch=b) for s, b in ((1, 3), (2, 3), (3, 1))]
    found, streamed = encode(model, images), encode(model, iter(images))
    assert torch.equal(found, streamed)
    assert torch.equal(found, torch.cat([encode(model, [batch]) for batch in images]))
    for features in (found, streamed):
        assert features.untyped_storage().nbytes() == features.nbytes  # no view of all tokens
    with pytest.raises(ValueError, match="The data set is empty"):
        encode(model, [])


def test_pinned_batches_are_pinned_in_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # this machine may have nothing to pin for
        pinned.append(tuple(tensor.shape))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    space = TensorSpace(2 * 4 * 6, tmp_path)
    batches = StoredBatches(space)
    batches.append({"pixel_values": torch.zeros(1, 6)}, 1)
    assert not pinned
    space.pinned = True
    for value in (1.0, 2.0):
        batches.append({"pixel_values": torch.full((1, 6), value)}, 1)
    assert pinned == [(1, 6)], "the third batch is in a file"
    assert [float(b["pixel_values"][0, 0]) for b in batches] == [0.0, 1.0, 2.0]


def test_copies_from_pinned_memory_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, non_blocking: bool = False) -> torch.Tensor:
        waits.append(not non_blocking)
        return plain(tensor, *args)

    batch = {"pixel_values": torch.zeros(1, 3, dtype=torch.float64), "pixel_attention_mask": torch.ones(1, 3).long()}
    model = torch.nn.Linear(3, 1)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.dtype == torch.float64)
    moved = move(batch, model)
    assert waits[:2] == [False, True]
    assert [t.dtype for t in moved.values()] == [torch.float32, torch.int64]
