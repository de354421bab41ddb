"""Finding columns and splits; loading images from folders and parquet files."""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from optimum_regcache.data import scenes
from optimum_regcache.data.images import (
    choose_split,
    class_names,
    image_column,
    label_column,
    load_images,
    load_splits,
    subsample,
)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    return scenes.load_dataset("report", 6, size=16)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_columns_are_found_by_their_feature(pictures: Dataset) -> None:
    renamed = pictures.rename_columns({"image": "photo", "label": "kind"})
    assert (image_column(renamed), label_column(renamed)) == ("photo", "kind")
    names = class_names(renamed)
    assert names is not None
    assert names[:2] == ["a red circle", "a red square"]
    plain = Dataset.from_dict({"label": [0], "other": ["x"]})
    assert label_column(plain) == "label"
    assert class_names(plain) is None
    assert label_column(plain.remove_columns("label")) is None
    assert class_names(plain.remove_columns("label")) is None
    with pytest.raises(
        ValueError, match=r"no image column; its columns are label, other\. Cast one with dataset\.cast_col"
    ):
        image_column(plain)


def write_image_folder(folder: Path) -> None:
    for split, names in (("train", ["cat", "dog"]), ("test", ["cat"])):
        for position, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, position, 0)).save(folder / split / name / f"{i}.png")


def test_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "pets")
    name = str(tmp_path / "pets")
    assert {split: len(rows) for split, rows in load_splits(name).items()} == {"train": 6, "test": 3}
    dataset = load_images(name)
    assert class_names(dataset) == ["cat", "dog"]
    assert dataset["label"][:] == [0, 0, 0, 1, 1, 1]
    assert len(load_images(name, split="test")) == 3
    with pytest.raises(ValueError, match=r"pets has no split 'dev'; it has train, test\."):
        load_images(name, split="dev")


def test_parquet_file_and_directory(tmp_path: Path, pictures: Dataset) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    pictures.to_parquet(folder / "report.parquet")
    pictures.select(range(2)).to_parquet(folder / "calibration.parquet")
    single = str(folder / "report.parquet")
    for dataset in (load_images(str(folder), split="report"), load_images(single), load_images(single, split="train")):
        assert dataset["label"][:] == pictures["label"][:]
        assert class_names(dataset) == class_names(pictures)
        assert np.array_equal(np.asarray(dataset[1]["image"]), np.asarray(pictures[1]["image"]))
    assert len(load_images(str(folder))) == 2  # no split "train": the first
    with pytest.raises(ValueError, match=r"images has no split 'train'; it has calibration, report\."):
        load_images(str(folder), split="train")


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"],
        ["train/0000", "train/0001", "test/0000"],
    ],
    ids=["shards", "folders"],
)
def test_parquet_shards_of_a_split_belong_together(tmp_path: Path, pictures: Dataset, names: list[str]) -> None:
    """The two layouts in which the Hub stores data sets."""
    for position, name in enumerate(names):
        path = tmp_path / "images" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.select([2 * position, 2 * position + 1]).to_parquet(path)
    splits = load_splits(str(tmp_path / "images"))
    labels = {split: rows["label"][:] for split, rows in splits.items()}
    assert labels == {"train": pictures["label"][:4], "test": pictures["label"][4:]}


def test_subset_is_seeded_and_random(tmp_path: Path, pictures: Dataset) -> None:
    path = str(tmp_path / "report.parquet")
    pictures.to_parquet(path)
    captions = [load_images(path, num_samples=4, seed=seed)["caption"][:] for seed in (0, 0, 1)]
    assert captions[0] == captions[1] != captions[2]
    assert len(captions[0]) == 4
    assert set(captions[0]) <= set(pictures["caption"][:])
    for count in (None, 6, 99):
        assert load_images(path, num_samples=count)["caption"][:] == pictures["caption"][:]
        assert subsample(pictures, count, 0) is pictures


def test_choose_split_prefers_train_then_the_first(pictures: Dataset) -> None:
    first, second = pictures.select([0]), pictures.select([1])
    assert choose_split({"report": first, "train": second}, None, "x") is second
    assert choose_split({"report": first, "dev": second}, None, "x") is first
    assert choose_split({"report": first, "dev": second}, "dev", "x") is second
    with pytest.raises(ValueError, match=r"^x has no split 'all'; it has report, dev\.$"):
        choose_split({"report": first, "dev": second}, "all", "x")


@pytest.mark.parametrize("name", ["./absent", "~/absent", "absent.parquet", "{tmp}/absent"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    name = name.format(tmp=tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"No such data set file or directory: {name}")):
        load_images(name)


def test_home_directory_is_expanded(tmp_path: Path, pictures: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures.to_parquet(tmp_path / "mine.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(load_images("~/mine.parquet")) == 6


def test_data_without_images(tmp_path: Path) -> None:
    path = str(tmp_path / "text.parquet")
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"The data set has no image column; its columns are text, label\."):
        load_images(path)
