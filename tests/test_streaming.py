"""Streamed data sets: no more is read than is used, the two sides share nothing, and what was read is read again."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer, SearchConfig
from optimum_regcache.commands.sources import divided_alike, open_source
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.data.streaming import stream_images, take_images
from optimum_regcache.search.fit import fit_registers
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages

FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
PROCESSOR = planted.build_processor()


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )  # 5 s for each parquet stream


def encoded(number: int) -> dict[str, Any]:
    pixels, file = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def table(first: int, count: int, label: Any = None) -> Dataset:
    rows = [{"image": encoded(i), "label": i % 2 if label is None else label} for i in range(first, first + count)]
    return Dataset.from_list(rows, features=FEATURES)


class HttpError(Exception):
    """That of an HTTP client is no `OSError`."""


class Counted:
    """A stream that counts what is read of it."""

    def __init__(self, rows: int, features: Features | None = FEATURES) -> None:
        self.read = 0

        def generate() -> Iterator[Any]:
            for i in range(rows):
                self.read += 1
                yield {"image": encoded(i), "label": i % 2}

        self.stream: Any = IterableDataset.from_generator(generate, features=features)


def names(images: Any) -> list[str]:
    return [row["image"]["path"] for row in images.cast_column("image", ImageFeature(decode=False))]


def serve(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any], commit: str = "c0ffee") -> list[dict[str, Any]]:
    """In place of the Hub: ``splits``; returns the options of each time that they were opened."""
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda name, token: type("Info", (), {"sha": commit, "id": (name, token)})
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, **options: opened.append({"name": name, **options}) or splits
    )
    return opened


def test_no_more_is_read_than_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = Counted(500), Counted(500)
    opened = serve(monkeypatch, {"train": train.stream, "test": test.stream})
    search, report = stream_images("us/pets", 10, 6, 0, "secret")
    assert opened == [{"name": "us/pets", "streaming": True, "token": "secret", "revision": "c0ffee"}]
    assert (len(search), len(report)) == (10, 6)
    assert train.read <= 21  # as many again fill the buffer that rows are shuffled in
    assert test.read <= 13
    assert search.features["label"].names == ["cat", "dog"]


def test_what_was_read_is_read_again_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = Counted(60)
    opened = serve(monkeypatch, {"train": train.stream})
    first = stream_images("us/pets", 10, 6, 0)
    read = train.read
    again = stream_images("us/pets", 10, 6, 0)
    assert len(opened) == 1
    assert train.read == read
    assert [names(side) for side in again] == [names(side) for side in first]

    def unreachable(name: str, token: str | None) -> Any:
        raise HttpError("no route")

    monkeypatch.setattr(huggingface_hub, "dataset_info", unreachable)
    assert [names(side) for side in stream_images("us/pets", 10, 6, 0)] == [names(side) for side in first]
    assert "us/pets are those that were kept at commit c0ffee: the Hub cannot be asked: no route" in caplog.text
    with pytest.raises(OSError, match="us/pets is no file or folder here, and the Hub does not give it: no route"):
        stream_images("us/pets", 10, 7, 0)


def test_another_commit_seed_or_count_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"train": Counted(60).stream})
    first = stream_images("us/pets", 10, 6, 0)
    assert names(stream_images("us/pets", 10, 6, 1)[0]) != names(first[0])
    opened = serve(monkeypatch, {"train": Counted(60).stream}, commit="decaf")
    stream_images("us/pets", 10, 6, 0)
    stream_images("us/pets", 11, 6, 0)
    assert [options["revision"] for options in opened] == ["decaf", "decaf"]


def test_what_a_kill_left_is_not_taken_for_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Any]:
        yield from ({"image": encoded(i), "label": 0} for i in range(5))
        raise ConnectionError("gone")

    serve(monkeypatch, {"train": IterableDataset.from_generator(broken, features=FEATURES)})
    with pytest.raises(ConnectionError, match="gone"):
        stream_images("us/pets", 10, 6, 0)
    serve(monkeypatch, {"train": Counted(60).stream})
    assert len(stream_images("us/pets", 10, 6, 0)[0]) == 10


def test_one_split_is_divided_by_content_whatever_is_asked_for(tmp_path: Path) -> None:
    name = str(tmp_path / "images.parquet")
    table(0, 80).to_parquet(name)
    searched: set[str] = set()
    reported: set[str] = set()
    for samples, report, seed in ((10, 12, 0), (40, 4, 1), (4, 40, 2)):
        sides = stream_images(name, samples, report, seed)
        searched |= set(names(sides[0]))
        reported |= set(names(sides[1]))
    assert not searched & reported
    assert len(searched | reported) > 60
    table(0, 1).to_parquet(name)
    with pytest.raises(ValueError, match=r"streams \d+ images for the search and \d+ for reports, too few"):
        stream_images(name, 4, 4, 0)


@pytest.mark.parametrize("form", ["parquet", "csv", "tar", "folder", "save_to_disk", "binary"])
def test_local_forms(tmp_path: Path, form: str) -> None:
    folder, data = tmp_path / "data", table(0, 30)
    folder.mkdir()
    for i in range(30) if form in ("csv", "tar", "folder") else ():
        (folder / f"{i}.png").write_bytes(encoded(i)["bytes"])
    path = folder
    if form == "parquet":
        data.select(range(20)).to_parquet(folder / "train.parquet")
        data.select(range(20, 30)).to_parquet(folder / "test.parquet")
    elif form == "csv":
        path = folder / "list.csv"
        path.write_text("\n".join(["image,label", *(f"{i}.png,{('dog', 'cat')[i % 2]}" for i in range(30))]))
    elif form == "tar":
        import tarfile

        path = tmp_path / "data.tar"
        with tarfile.open(path, "w") as archive:
            for i in range(30):
                archive.add(folder / f"{i}.png", f"{i}.png")
    elif form == "save_to_disk":
        DatasetDict({"train": data}).save_to_disk(folder)
    elif form == "binary":
        path = folder / "rows.parquet"
        Dataset.from_dict({"photo": [encoded(i)["bytes"] for i in range(30)]}).to_parquet(path)
    sides = stream_images(str(path), 8, 8, 0)
    tables = [{row["pixel_values"].numpy().tobytes() for row in ImageInputs(side, PROCESSOR)} for side in sides]
    assert [len(found) for found in tables] == [8, 8]
    assert not tables[0] & tables[1]
    if form == "csv":
        assert sides[0].features["label"].names == ["cat", "dog"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    name = tmp_path / "images.parquet"
    table(0, 30).to_parquet(name)
    name.write_bytes(name.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"images\.parquet could not be read"):
        stream_images(str(name), 8, 8, 0)
    with pytest.raises(FileNotFoundError, match="No such data set file or directory"):
        stream_images("./absent", 8, 8, 0)


def test_rows_sorted_by_class_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(tmp_path / "images.parquet")
    datasets.concatenate_datasets([table(0, 60, 0), table(60, 60, 1)]).to_parquet(name)
    stream_images(name, 4, 4, 0)
    assert "All 4 streamed images of" in caplog.text
    assert "are of one class, though it has 2" in caplog.text


def test_a_killed_fit_of_a_streamed_data_set_resumes_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, {"train": Counted(60).stream})
    recipe = Recipe(
        dataset="us/pets", search=SearchConfig(always=True, sensitive_block=1, num_copies=(2,), max_delete=1)
    )
    recipe = recipe.override(["data.streaming=true", "data.num_samples=12", "data.num_report=4"])
    model = planted.build_planted_model()

    def fit(work: Path) -> Any:
        source = open_source("planted-outlier", None, recipe)
        images = ReferenceImages(source.search_images, source.processor)
        found = fit_registers(model, images, QuantizationPlan.of(recipe), work_dir=work, progress=False).to_dict()
        return {**found, "seconds": None}

    whole = fit(tmp_path / "whole")
    (journal,) = (tmp_path / "whole").glob("*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / journal.name).write_bytes(b"".join(lines[: len(lines) // 2]))
    for beside in (tmp_path / "whole").glob("*.safetensors"):
        (tmp_path / "cut" / beside.name).write_bytes(beside.read_bytes())

    def unreachable(name: str, token: str | None) -> Any:
        raise HttpError("no route")

    monkeypatch.setattr(huggingface_hub, "dataset_info", unreachable)
    assert fit(tmp_path / "cut") == whole
    assert (tmp_path / "cut" / journal.name).read_bytes() == journal.read_bytes()


def test_python_takes_as_many_of_a_stream_as_are_stated() -> None:
    counted = Counted(500)
    quantizer = RegCacheQuantizer(planted.build_planted_model(), PROCESSOR)
    plain = RegCacheConfig(registers={"mode": "none"})
    recipe = Recipe(plain, data=DataConfig(num_samples=8))
    first = quantizer.quantize(recipe=recipe, calibration_dataset=counted.stream, progress=False)
    assert 8 <= counted.read <= 17
    taken = take_images(Counted(500).stream, 8, 0)
    second = quantizer.quantize(recipe=recipe, calibration_dataset=taken, progress=False)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    with pytest.raises(TypeError, match=r"A streamed data set has no fixed rows.*Pass one split of it, and how many"):
        quantizer.quantize(quantization_config=plain, calibration_dataset=counted.stream, progress=False)
    with pytest.raises(TypeError, match="A streamed data set has no fixed rows"):
        quantizer.fit(counted.stream, progress=False)


def test_a_fit_of_a_stream_states_the_count_for_quantize() -> None:
    quantizer = RegCacheQuantizer(planted.build_planted_model(), PROCESSOR)
    counted = Counted(500)
    search = SearchConfig(always=True, sensitive_block=1, num_copies=(2,), max_delete=0)
    fit = quantizer.fit(counted.stream, search=search, data=DataConfig(num_samples=8), progress=False)
    model = quantizer.quantize(calibration_dataset=counted.stream, progress=False)
    assert counted.read <= 34
    assert model.config.quantization_config == fit.config


def test_streams_of_model_inputs_and_of_untyped_rows() -> None:
    counted = Counted(50, features=None)
    images = take_images(counted.stream, 5, 0)
    assert sorted(images.column_names) == ["image", "label"]
    assert len(ImageInputs(images, PROCESSOR)) == 5
    ready = Counted(50).stream.map(lambda row: {"pixel_values": torch.full((3, 8, 8), 0.1)})
    inputs = ImageInputs(take_images(ready, 5, 0))
    assert torch.equal(inputs[4]["pixel_values"], torch.full((3, 8, 8), 0.1))
    with pytest.raises(ValueError, match="The data set is empty"):
        take_images(Counted(0).stream, 5, 0)


def test_a_report_divides_as_the_recipe_beside_the_model() -> None:
    streamed = Recipe(dataset="us/pets", data=DataConfig(streaming=True))
    assert divided_alike(Recipe(), streamed, "us/pets").data.streaming
    assert not divided_alike(Recipe(), streamed, "us/birds").data.streaming
    assert divided_alike(streamed, Recipe(dataset="us/birds"), "us/pets").data.streaming
    with pytest.raises(ValueError, match=r"data\.streaming: the model was made without it on us/pets"):
        divided_alike(streamed, Recipe(dataset="us/pets"), "us/pets")


def test_the_content_of_files_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder streams paths; rows may have the name of another file of the working directory."""
    (tmp_path / "photos").mkdir()
    for i in range(20):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encoded(i)["bytes"])
        (tmp_path / f"{i}.png").write_bytes(b"another")
    rows = table(0, 20).to_iterable_dataset()
    monkeypatch.chdir(tmp_path)
    for data in (rows, datasets.load_dataset("imagefolder", data_dir="photos", streaming=True)):
        stream: Any = data["train"] if isinstance(data, dict) else data
        for row in take_images(stream, 4, 0).cast_column("image", ImageFeature(decode=False)):
            assert row["image"]["bytes"] == encoded(int(Path(row["image"]["path"]).stem))["bytes"]
