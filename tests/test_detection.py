"""The task `detection` of `evaluate`: objects of a data set in their forms, and average precision."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer
from optimum_regcache.commands.evaluate import Subject, evaluate_job
from optimum_regcache.commands.harness import Columns
from optimum_regcache.data import scenes
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.objects import Objects, object_class_names, objects_column, objects_of
from optimum_regcache.evaluation.detection import AveragePrecision, need_pycocotools

RECIPE = Recipe().override(["data.num_samples=16", "data.num_report=6", "data.batch_size=4"])
BOX = [2.0, 3.0, 10.0, 8.0]


def objects(*rows: tuple[int, list[float]]) -> Objects:
    boxes = torch.tensor([box for _, box in rows], dtype=torch.float64).reshape(-1, 4)
    classes = torch.tensor([number for number, _ in rows], dtype=torch.int64)
    return Objects(boxes, classes, torch.zeros(len(rows), dtype=torch.bool), (64, 64))


def found(*rows: tuple[float, int, list[float]]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[x, y, x + w, y + h] for _, _, (x, y, w, h) in rows]).reshape(-1, 4)
    return {
        "scores": torch.tensor([score for score, _, _ in rows]),
        "labels": torch.tensor([number for _, number, _ in rows], dtype=torch.int64),
        "boxes": boxes,
    }


# average precision


def test_figures_of_known_detections() -> None:
    truth = [objects((0, BOX)), objects((1, BOX), (1, [30.0, 30.0, 20.0, 20.0]))]
    second = [(0.9, 1, BOX), (0.8, 1, [30.0, 30.0, 20.0, 20.0])]
    assert AveragePrecision(truth, [found((0.5, 0, BOX)), found(*second)]).figures() == {"AP": 1.0, "AP50": 1.0}
    moved = [2.0, 3.0, 10.0, 8.0 / 0.62]  # an IoU of 0.62: a hit at 0.5, 0.55 and 0.6
    figures = AveragePrecision(truth, [found((0.5, 0, moved)), found()]).figures()
    assert figures == {"AP": pytest.approx(0.15), "AP50": pytest.approx(0.5)}  # of class 1 nothing is found
    assert AveragePrecision(truth, [found((0.5, 1, BOX)), found()]).figures()["AP50"] == 0.0


def noisy(seed: int, count: int) -> AveragePrecision:
    generator, truth, guesses = np.random.default_rng(seed), [], []
    for i in range(count):
        shapes = scenes.render_shapes("report", i)
        rows = list(zip(shapes.categories, map(list, shapes.boxes), strict=True))
        truth.append(objects(*rows))
        guess = [(generator.random(), c, (np.array(b) + generator.normal(0, 2, 4)).tolist()) for c, b in rows]
        guesses.append(found(*guess, (0.3, 2, [1.0, 1.0, 9.0, 9.0])))
    return AveragePrecision(truth, guesses)


def test_the_error_is_that_of_the_jackknife() -> None:
    judged, count = noisy(0, 12), 12
    values = judged.influences()
    for name, whole in judged.figures().items():
        without = [judged.figures([j for j in range(count) if j != i])[name] for i in range(count)]
        assert values[name].mean() == pytest.approx(whole)
        error = ((count - 1) / count * np.sum((np.array(without) - np.mean(without)) ** 2)) ** 0.5
        assert values[name].std() / count**0.5 == pytest.approx(error)
        assert 0 < whole < 1


def test_a_subset_is_what_it_would_be_alone() -> None:
    whole = noisy(1, 9)
    assert whole.figures(range(5)) == noisy(1, 5).figures()
    assert len(noisy(1, 70).influences()["AP"]) == 64
    assert noisy(1, 1).influences()["AP50"].tolist() == [noisy(1, 1).figures()["AP50"]]


def test_nothing_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="No report image has an object"):
        AveragePrecision([objects()], [found()])
    with pytest.raises(ValueError, match="boxes or scores that are no numbers"):
        AveragePrecision([objects((0, BOX))], [found((float("nan"), 0, BOX))])
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"pycocotools is needed for --task detection .*optimum-regcache\[eval\]"):
        need_pycocotools("coco")


# objects of a data set


def images(cells: list[Any], feature: Any = None) -> ImageInputs:
    picture = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    columns = {"image": [picture] * len(cells), "objects": cells}
    if feature is not None:
        return ImageInputs(
            Dataset.from_dict(columns, Features({"image": ImageFeature(), "objects": feature})), object()
        )
    return ImageInputs(Dataset.from_dict(columns).cast_column("image", ImageFeature()), object())


def test_forms_of_a_cell() -> None:
    mapping = {"bbox": [BOX, [0.0, 0.0, 60.0, 40.0]], "category": [1, 0], "iscrowd": [0, 1]}
    rows = [{"boxes": BOX, "label": 1}]
    for cell, count in ((mapping, 2), (rows, 1)):
        (read,) = objects_of(images([cell]), "objects")
        assert read.boxes[0].tolist() == BOX
        assert read.classes.tolist() == [1, 0][:count]
        assert read.size == (60, 40)
    assert objects_of(images([mapping]), "objects")[0].crowd.tolist() == [False, True]
    corners = {"bbox": [[2.0, 3.0, 12.0, 11.0]], "category": [0]}
    assert objects_of(images([corners]), "objects", "corners")[0].boxes.tolist() == [BOX]
    names = ["a", "b"]
    feature = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=names))}
    empty = {"bbox": [], "category": []}
    inputs = images([{"bbox": [BOX], "category": [1]}, empty], feature)
    assert object_class_names(inputs, "objects") == names
    assert objects_of(inputs, "objects")[1].boxes.shape == (0, 4)
    assert object_class_names(
        images([rows], List({"boxes": List(Value("float32")), "label": ClassLabel(names=names)})), "objects"
    )
    assert objects_column(inputs) == "objects"
    assert object_class_names(images([mapping]), "objects") is None


@pytest.mark.parametrize(
    ("cell", "box_format", "message"),
    [
        (
            {"bbox": [[30.0, 3.0, 50.0, 11.0]], "category": [0]},
            "coco",
            "1 of 1 boxes .* fit as --box-format corners: give",
        ),
        (
            {"bbox": [BOX, [30.0, 3.0, 5.0, 30.0]], "category": [0, 0]},
            "corners",
            "1 of 2 .* fit as --box-format coco: give",
        ),
        ({"bbox": [[0.5, 0.5, 0.0, 0.5]], "category": [0]}, "coco", "fractions of the picture: multiply"),
        ({"bbox": [[5.0, 5.0, 70.0, 4.0]], "category": [0]}, "coco", "Mend or leave out these images"),
        ({"bbox": [BOX], "category": ["cat"]}, "coco", "classes such as 'cat', which are no class numbers"),
        ({"bbox": [[1.0, 2.0, 3.0]], "category": [0]}, "coco", "not one box of four numbers and one class each"),
        ({"polygon": [[1.0]]}, "coco", "have no bbox and category"),
        ({"bbox": [BOX], "category": [0]}, "yolo", "must be one of coco, corners, got 'yolo'"),
    ],
)
def test_other_cells_are_refused(cell: Any, box_format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objects_of(images([cell]), "objects", box_format)


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no column of objects 'things'; its columns are image, objects"):
        objects_column(images([{"bbox": [BOX], "category": [0]}]), "things")


# the task


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random detector with its quantized copy and pictures of shapes, in a folder."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    config = hf.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 64], patch_size=16,
        num_detection_tokens=4, use_mid_position_embeddings=False, id2label=dict(enumerate(scenes.SHAPES)),
        label2id={name: i for i, name in enumerate(scenes.SHAPES)}, initializer_range=0.5,
    )  # fmt: skip
    model = hf.YolosForObjectDetection(config).eval()
    processor = YolosImageProcessorPil(size={"height": 64, "width": 64}, do_pad=False)
    (folder / "data").mkdir()
    for split, side, count in (("search", "train", 16), ("report", "test", 6)):
        scenes.load_shapes(split, count).to_parquet(folder / "data" / f"{side}.parquet")
    items = list(ImageInputs(scenes.load_shapes("search", 4), processor))
    config_8 = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    quantizer = RegCacheQuantizer(model, processor)
    quantized = quantizer.quantize(quantization_config=config_8, calibration_dataset=items, progress=False)
    model.save_pretrained(folder / "float")
    quantizer.save(quantized, folder / "w8a8")
    processor.save_pretrained(folder / "float")
    return folder


def test_both_figures_beside_the_float_original(detector: Path, tmp_path: Path) -> None:
    subject = Subject(str(detector / "w8a8"), str(detector / "float"), str(detector / "data"))
    results, text = evaluate_job(subject, RECIPE, tmp_path / "r.json", tasks=("detection", "cosine"))
    scores = results["tasks"]["detection"]
    assert list(scores) == ["AP", "AP50"]
    assert all(score["count"] == 6 and score["share"] for score in scores.values())
    assert scores["AP"]["difference"] == pytest.approx(scores["AP"]["value"] - scores["AP"]["float_value"])
    assert "detection, AP50: " in text
    assert results["feature_cosine"] > 0.9
    alone, _ = evaluate_job(
        Subject(str(detector / "float"), dataset=str(detector / "data")),
        RECIPE,
        tmp_path / "f.json",
        tasks=("detection",),
    )
    assert alone["tasks"]["detection"]["AP"]["value"] == pytest.approx(scores["AP"]["float_value"])


def test_a_detector_that_is_right(detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the boxes, from fractions of the model's input to pixels of the picture and classes of the data set."""
    rows = [scenes.render_shapes("report", i) for i in range(6)]
    shown = iter(rows)

    def forward(self: Any, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        last = self.vit(pixel_values).last_hidden_state
        logits, boxes = torch.full((len(pixel_values), 4, 9), -20.0), torch.full((len(pixel_values), 4, 4), 0.5)
        logits[..., 8] = 0.0
        for image in range(len(pixel_values)):
            row = next(shown)
            for q, (c, (x, y, w, h)) in enumerate(zip(row.categories, row.boxes, strict=True)):
                logits[image, q, c], boxes[image, q] = 20.0, torch.tensor([x + w / 2, y + h / 2, w, h]) / 64
        return hf.models.yolos.modeling_yolos.YolosObjectDetectionOutput(
            logits=logits, pred_boxes=boxes, last_hidden_state=last
        )

    monkeypatch.setattr(hf.YolosForObjectDetection, "forward", forward)
    subject = Subject(str(detector / "float"), dataset=str(detector / "data"))
    results, _ = evaluate_job(subject, RECIPE, tmp_path / "r.json", tasks=("detection",))
    assert results["tasks"]["detection"]["AP"]["value"] == pytest.approx(1.0, abs=1e-3)


def test_what_the_task_cannot_do(detector: Path, tmp_path: Path) -> None:
    def run(
        message: str, data: str = str(detector / "data"), model: str = str(detector / "float"), **columns: Any
    ) -> None:
        subject = Subject(model, dataset=data, columns=Columns(**columns))
        with pytest.raises(ValueError, match=message):
            evaluate_job(subject, RECIPE, tmp_path / "r.json", tasks=("detection",))

    run("--task detection is not possible: CLIPModel is no detector", model="clip-scenes")
    run("no column of objects 'things'", objects="things")
    run("read as --box-format corners. All of them fit as --box-format coco: give that", box_format="corners")
    (tmp_path / "d").mkdir()
    data = scenes.load_shapes("search", 16)
    data.remove_columns("objects").to_parquet(tmp_path / "d" / "train.parquet")
    run("the data set has no column objects or annotations; name it with --objects-column", str(tmp_path / "d"))
    (tmp_path / "n").mkdir()
    other = {"bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=list("abcdefgh")))}
    data.cast_column("objects", other).to_parquet(tmp_path / "n" / "train.parquet")
    run("classes of the data set are unknown to the model .*Rename them after config.id2label", str(tmp_path / "n"))
    (tmp_path / "m").mkdir()
    plain = {"bbox": other["bbox"], "category": List(Value("int64"))}
    data.filter(lambda row: max(row["objects"]["category"]) < 7).cast_column("objects", plain).to_parquet(
        tmp_path / "m" / "train.parquet"
    )
    run("numbers without names, up to 6, and the model's 8 classes may be numbered in another", str(tmp_path / "m"))


def test_options_without_the_task(detector: Path, tmp_path: Path) -> None:
    subject = Subject(str(detector / "float"), dataset=str(detector / "data"), columns=Columns(box_format="corners"))
    with pytest.raises(ValueError, match="--box-format has no effect without --task detection"):
        evaluate_job(subject, RECIPE, tmp_path / "r.json")


def test_card_and_pipeline(detector: Path) -> None:
    card: Any = ModelCard.load(detector / "w8a8" / "README.md")
    assert card.data.pipeline_tag == "object-detection"
    assert "AutoModelForObjectDetection.from_pretrained(" in card.text
    detect = hf.pipeline(
        "object-detection",
        str(detector / "w8a8"),
        image_processor=YolosImageProcessorPil.from_pretrained(detector / "float"),
    )
    picture = scenes.render_shapes("report", 0).image
    found = detect(picture, threshold=0.0)
    assert len(found) == 4
    assert {f["label"] for f in found} <= set(scenes.SHAPES)
