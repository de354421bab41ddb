"""Every form in which people keep images: opened, or refused with what to pass in its place."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportMissingImports=false

from __future__ import annotations

import argparse
import gc
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from optimum.commands.register.regcache_base import resolve_recipe
from optimum.commands.register.register_regcache import AnalyzeCommand
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from optimum_regcache import RegCacheQuantizer
from optimum_regcache.commands.sources import open_source
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data import ImageInputs, load_images, load_splits
from optimum_regcache.data.images import class_names, reference_and_report

COUNT = 9
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def write_pictures(folder: Path, count: int = COUNT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i}.png")


def kind(i: int) -> str:
    return ("dog", "cat")[i % 2]


def lines(kind_of_path: str, folder: Path, separator: str = ",") -> str:
    names = {"relative": "photos/{}.png", "absolute": f"{folder}/photos/{{}}.png"}[kind_of_path]
    return "\n".join([f"image{separator}label", *(names.format(i) + separator + kind(i) for i in range(COUNT))])


def write(form: str, folder: Path) -> Path:
    """The nine pictures in one form; the path to give."""
    write_pictures(folder / "photos")
    data = load_splits(str(folder / "photos"))["train"]
    data = data.add_column("label", [kind(i) for i in range(COUNT)])  # type: ignore[call-arg]
    raw = [{"bytes": (folder / f"photos/{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(COUNT)]
    target = folder / "out"
    target.mkdir()
    match form:
        case "save_to_disk":
            data.save_to_disk(target)
        case "save_to_disk of splits":
            DatasetDict(train=data).save_to_disk(target)
        case "csv" | "csv of absolute paths" | "tsv":
            target = folder / ("list.tsv" if form == "tsv" else "list.csv")
            target.write_text(
                lines("relative" if len(form) == 3 else "absolute", folder, "\t" if form == "tsv" else ",")
            )
        case "csv in a folder":
            (target / "list.csv").write_text(lines("absolute", folder))
        case "jsonl":
            target = folder / "list.jsonl"
            rows = [f'{{"file_name": "photos/{i}.png", "label": "{kind(i)}"}}' for i in range(COUNT)]
            target.write_text("\n".join(rows))
        case "tar" | "tar in a folder":
            target = target / "shard.tar" if form == "tar" else target
            with tarfile.open(target / "shard-0.tar" if target.is_dir() else target, "w") as archive:
                for i in range(COUNT):
                    archive.add(folder / f"photos/{i}.png", f"{i:04}.png")
        case "bytes" | "bytes and paths" | "paths":
            target = folder / "table.parquet"
            column = {"bytes": [r["bytes"] for r in raw], "bytes and paths": raw}
            column["paths"] = [f"photos/{i}.png" for i in range(COUNT)]  # type: ignore[assignment]
            pa.parquet.write_table(pa.table({"pixels": column[form], "label": [kind(i) for i in range(COUNT)]}), target)
        case "arrow":
            target = folder / "data.arrow"
            with (
                pa.OSFile(str(target), "wb") as file,
                pa.ipc.new_stream(file, data.with_format("arrow")[:].schema) as out,
            ):
                out.write_table(data.with_format("arrow")[:])
    return target


FORMS = [
    "save_to_disk", "save_to_disk of splits", "csv", "csv of absolute paths", "csv in a folder", "tsv", "jsonl", "tar",
    "tar in a folder", "bytes", "bytes and paths", "paths", "arrow",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    data = load_images(str(write(form, tmp_path)))
    inputs = ImageInputs(data, PROCESSOR)
    expected = [PROCESSOR(images=picture(i), return_tensors="pt")["pixel_values"][0] for i in range(COUNT)]
    assert all(torch.equal(row["pixel_values"], pixels) for row, pixels in zip(inputs, expected, strict=True))
    if "tar" not in form and "disk" not in form and form != "arrow":
        assert class_names(data) == ["cat", "dog"]
        assert inputs.labels().tolist() == [(i + 1) % 2 for i in range(COUNT)]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata.csv open
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata_is_a_folder_of_images(suffix: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "meta")
    table = Dataset.from_dict({"file_name": [f"{i}.png" for i in range(COUNT)], "caption": ["x"] * COUNT})
    write_table = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[suffix]
    write_table(str(tmp_path / "meta" / f"metadata.{suffix}"))
    data = load_images(str(tmp_path / "meta"))
    assert len(data) == COUNT
    assert "caption" in data.column_names
    gc.collect()


def test_class_names_as_text_are_the_same_classes_in_all_splits(tmp_path: Path) -> None:
    for split, names in (("train", ["dog", "cat", None]), ("test", ["fox", "dog", "dog"]), ("validation", None)):
        rows: dict[str, Any] = {"image": [picture(0)] * 3} | ({} if names is None else {"label": names})
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_splits(str(tmp_path))
    assert class_names(splits["train"]) == class_names(splits["test"]) == ["cat", "dog", "fox"]
    assert splits["train"]["label"][:] == [1, 0, None]
    assert splits["test"]["label"][:] == [2, 1, 1]
    assert splits["validation"]["label"][:] == [None] * 3


def test_one_image_is_a_data_set(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 1)
    assert len(load_splits(tmp_path / "photos" / "0.png")["train"]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "empty",
            r"empty holds no images and no table of images\. Give a Hub id, a folder of images, a folder written by",
        ),
        ("text", r"text holds no images and no table of images"),
        ("text/a.txt", r"a\.txt is no data set that can be opened\. Give a Hub id, .*parquet or arrow"),
        ("rows.parquet", r"rows\.parquet"),
        (
            "cut.parquet",
            r"cut\.parquet could not be read \(parquet\): .*It must hold images, in one of these forms: a Hub",
        ),
        ("shards", r"shards/b\.parquet could not be read"),
        (
            "lost.csv",
            r"Column 'image' names the image photos/0\.png, which does not exist in .*Paths must be absolute or",
        ),
        ("words.csv", r"The data set has no image column; its columns are text, label"),
        ("bad.tar", r"bad\.tar could not be read \(webdataset\)"),
        ("bad.jsonl", r"bad\.jsonl could not be read \(json\)"),
        ("", r"The name of the data set is empty\. Give a Hub id"),
        (" ", r"The name of the data set is empty"),
    ],
)
def test_what_cannot_be_opened_is_named(name: str, message: str, tmp_path: Path) -> None:
    for folder in ("empty", "text", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    Dataset.from_dict({"image": []}).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_dict({"image": [picture(0)]}).to_parquet(tmp_path / "shards" / "a.parquet")
    whole = (tmp_path / "shards" / "a.parquet").read_bytes()
    for damaged in ("cut.parquet", "shards/b.parquet"):
        (tmp_path / damaged).write_bytes(whole[:-20])
    (tmp_path / "lost.csv").write_text("image,label\nphotos/0.png,1\n")
    (tmp_path / "words.csv").write_text("text,label\nhello,1\n")
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    (tmp_path / "bad.jsonl").write_text('{"image": \n')
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / name) if name.strip() else name)


@pytest.mark.parametrize("name", ["absent.csv", "absent.tar", "absent.jpg"])
def test_a_missing_file_is_told_as_one(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"No such data set file or directory: {name}")):
        load_splits(name)


# --- broken images


def test_skip_broken_leaves_the_split_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path / "photos", 30)
    name = str(tmp_path / "photos")
    before = [{i["image"].tobytes() for i in side} for side in reference_and_report(load_splits(name), name)]
    for i in (3, 4, 17):
        path = tmp_path / "photos" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:200])
    recipe = Recipe(dataset=name).override(["data.num_samples=64", "data.skip_broken=true"])
    source = open_source("planted-outlier", None, recipe)
    after = [{i["image"].tobytes() for i in side} for side in (source.search_images, source.report_images)]
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert sum(source.dropped.values()) == 3
    assert [len(old) - len(new) for new, old in zip(after, before, strict=True)] == list(source.dropped.values())
    assert len(load_images(name)) == 30


@pytest.mark.parametrize(("options", "skipped"), [([], False), (["--skip-broken"], True)])
def test_the_option_reaches_the_recipe(options: list[str], skipped: bool) -> None:
    parser = argparse.ArgumentParser()
    AnalyzeCommand.parse_args(parser)
    assert resolve_recipe(parser.parse_args(["--output", "out", *options]), None).data.skip_broken is skipped


# --- data in memory


def data_set() -> Dataset:
    data = Dataset.from_dict({"image": [picture(i) for i in range(4)], "label": [0, 1, 0, 1]})
    return data.cast_column("image", datasets.Image())


READY = [{"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i} for i in range(4)]


def as_pixels(rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "pixel_values": [PROCESSOR(images=image, return_tensors="pt")["pixel_values"][0] for image in rows["image"]]
    }


@pytest.mark.parametrize("form", ["torch", "numpy", "columns", "splits", "map", "transform", "image transform"])
def test_formats_of_a_data_set_change_nothing(form: str) -> None:
    data = data_set()
    source: Any = {
        "torch": lambda: data.with_format("torch"),
        "numpy": lambda: data.with_format("numpy"),
        "columns": lambda: data.with_format("torch", columns=["image"]),
        "splits": lambda: DatasetDict(train=data),
        "map": lambda: data.map(as_pixels, batched=True),
        "transform": lambda: data.with_transform(as_pixels),
        "image transform": lambda: data.with_transform(lambda rows: {"image": rows["image"]}),
    }[form]()
    inputs, plain = ImageInputs(source, PROCESSOR), ImageInputs(data, PROCESSOR)
    assert len(inputs) == 4
    for ours, theirs in zip(inputs, plain, strict=True):
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    if form != "transform":
        assert inputs.labels().tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]


def test_a_transform_of_images_is_applied() -> None:
    data = data_set().with_transform(lambda rows: {"image": [Image.new("RGB", (8, 8)) for _ in rows["image"]]})
    black = PROCESSOR(images=Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"][0]
    assert all(torch.equal(row["pixel_values"], black) for row in ImageInputs(data, PROCESSOR))


@pytest.mark.parametrize("form", ["loader", "batch", "list"])
def test_ready_model_inputs_in_all_their_forms(form: str) -> None:
    stacked = {key: torch.stack([torch.as_tensor(row[key]) for row in READY]) for key in ("pixel_values", "labels")}
    source: Any = {"loader": torch.utils.data.DataLoader(READY, batch_size=3), "batch": stacked, "list": READY}[form]  # type: ignore[arg-type]
    inputs = ImageInputs(source)
    assert [float(row["pixel_values"].mean()) for row in inputs] == [0.0, 1.0, 2.0, 3.0]
    assert inputs.labels().tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]


def generator() -> Iterator[Any]:
    yield from READY


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield READY[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (generator, TypeError, r"Got a generator in place of images\. Give a datasets\.Dataset.*list\(itertools\.islice"),
        (lambda: None, TypeError, r"Got a NoneType in place of images"),
        (lambda: pandas.DataFrame({"image": [1]}), TypeError, r"Got a DataFrame in place of images"),
        (lambda: 3, TypeError, r"Got a int in place of images"),
        (lambda: {"images": 1}, TypeError, r"Got a dict of images in place of images"),
        (dict, TypeError, r"Got a dict in place of images"),
        (lambda: "folder", TypeError, r"Got the name 'folder' in place of images\. Open it: load_images\('folder'\)"),
        (lambda: Path("folder"), TypeError, r"Got the name 'folder' in place of images"),
        (lambda: data_set().to_iterable_dataset(), TypeError, r"A streamed data set has no fixed rows.*data\.take\(256\)"),
        (lambda: DatasetDict(train=data_set(), test=data_set()), ValueError, r"has the splits train, test\. Pass one"),
        (lambda: torch.utils.data.DataLoader(Endless()), TypeError, r"Got a DataLoader in place of images"),
        (lambda: [picture(0)], ValueError, r"Item 0 of the data is a Image without 'pixel_values'"),
    ],
)  # fmt: skip
def test_data_without_rows_is_refused_with_advice(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageInputs(make(), PROCESSOR)
    if make() is not None:
        quantizer = RegCacheQuantizer.from_pretrained("planted-outlier")
        with pytest.raises(error, match=message):
            quantizer.fit(make(), progress=False)
        with pytest.raises(error, match=message):
            quantizer.quantize(calibration_dataset=make(), progress=False)


def test_the_advice_for_streams_works() -> None:
    stream = data_set().to_iterable_dataset()
    data = Dataset.from_list(list(stream.take(3)), features=stream.features)
    assert len(list(ImageInputs(data, PROCESSOR).batches(2))) == 2


def test_a_column_of_text_labels_of_ready_items_is_left_aside() -> None:
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "label": "cat"}]
    inputs = ImageInputs(rows)
    assert inputs.labels() is None
    assert set(inputs[0]) == {"pixel_values"}
