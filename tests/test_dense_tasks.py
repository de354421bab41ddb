"""The tasks `segmentation` and `depth` of `evaluate`: float, quantized and exported models beside their original."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from test_tasks import FEW, NAME, evaluate, folder  # noqa: F401 (a fixture)

from optimum_regcache import Recipe
from optimum_regcache.commands.dense_tasks import token_problem
from optimum_regcache.commands.evaluate import Subject, evaluate_job
from optimum_regcache.commands.harness import Columns
from optimum_regcache.data import scenes
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import load
from optimum_regcache.encoders import outputs
from optimum_regcache.encoders.passes import patch_tokens
from optimum_regcache.evaluation.pixels import PatchGrid, SegmentationProbe, class_shares
from optimum_regcache.export import export_onnx
from optimum_regcache.hub.loading import load_model, load_processor

DENSE = ("--task", "segmentation", "depth")
SMALL = ["data.num_samples=24", "data.num_report=8", "data.batch_size=8"]
FIGURES = {"segmentation": ("mIoU", "pixel accuracy"), "depth": ("RMSE", "AbsRel", "delta1")}


def test_both_probes_of_both_tasks(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:  # noqa: F811
    results = evaluate(monkeypatch, tmp_path / "r.json", "--model", str(folder), "--float-model", NAME, *DENSE, *FEW)
    for task, names in FIGURES.items():
        found = results["tasks"][task]
        assert list(found) == [f"{which} probe {name}" for which in ("own", "float") for name in names]
        for name in names:
            own, moved = found[f"own probe {name}"], found[f"float probe {name}"]
            assert own["float_value"] == moved["float_value"]
            assert own["difference"] == pytest.approx(own["value"] - own["float_value"])
            assert own["difference_error"] > 0
            assert own["share"] == (name not in ("RMSE", "AbsRel"))
    assert found["float probe AbsRel"]["value"] > found["own probe AbsRel"]["value"]  # W4A4 moves the tokens
    out = capsys.readouterr().out
    assert "segmentation, own probe mIoU: " in out
    assert f"depth, own probe AbsRel: {found['own probe AbsRel']['value']:.4f} +- " in out
    alone = evaluate(monkeypatch, tmp_path / "float.json", "--model", NAME, *DENSE, *FEW)
    assert list(alone["tasks"]["depth"]) == [f"own probe {name}" for name in FIGURES["depth"]]
    assert alone["tasks"]["depth"]["own probe RMSE"]["value"] == pytest.approx(found["own probe RMSE"]["float_value"])


def test_the_iou_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    recipe, encoder = Recipe().override(SMALL), load(NAME)
    found, _ = evaluate_job(Subject(NAME), recipe, tmp_path / "r.json", tasks=("segmentation",))
    sides = [encoder.dataset(*part, 0) for part in (("search", 24), ("report", 8))]
    masks = [[torch.from_numpy(np.array(m)).long() for m in side["mask"]] for side in sides]
    classes = torch.cat([m.flatten() for side in masks for m in side]).unique()
    size, grid = masks[0][0].shape, PatchGrid.of(masks[0][0].shape, (8, 8))
    assert tuple(ImageInputs(sides[0], encoder.processor)[0]["pixel_values"].shape[1:]) == size  # no resizing
    tokens = []
    for side in sides:
        (batch,) = ImageInputs(side, encoder.processor).batches(24)
        with torch.inference_mode():
            tokens.append(patch_tokens(encoder.model, batch)[0].clone().split(grid.places))
    numbered = [[torch.searchsorted(classes, m) for m in side] for side in masks]
    shares = [class_shares(m, len(classes), grid) for m in numbered[0]]
    probe = SegmentationProbe(torch.cat(tokens[0]), torch.cat(shares))
    predictions = [probe.predictions(t, grid).flatten() for t in tokens[1]]
    truth = torch.cat([m.flatten() for m in numbered[1]]).numpy()
    expected = jaccard_score(truth, torch.cat(predictions).numpy(), average="macro", labels=np.unique(truth))
    assert found["tasks"]["segmentation"]["own probe mIoU"]["value"] == pytest.approx(expected)


def test_exports_are_judged_by_their_patch_tokens(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    exported = export_onnx(load_model(folder), tmp_path / "onnx", processor=load_processor(folder))
    for split, side, count in (("search", "train", 24), ("report", "test", 8)):
        (tmp_path / "d").mkdir(exist_ok=True)
        scenes.load_dataset(split, count).to_parquet(tmp_path / "d" / f"{side}.parquet")
    recipe, found = Recipe().override(SMALL), []
    for name, model in (("onnx", exported), ("torch", folder)):
        subject = Subject(str(model), NAME, str(tmp_path / "d"))
        tasks = ("patch_cosine", "segmentation", "depth")
        found.append(evaluate_job(subject, recipe, tmp_path / f"{name}.json", tasks=tasks)[0]["tasks"])
    ours, theirs = found
    assert ours["patch_cosine"]["patch tokens"]["value"] == pytest.approx(
        theirs["patch_cosine"]["patch tokens"]["value"], abs=0.01
    )
    for task, names in FIGURES.items():
        for name in names:
            pair = [f[task][f"float probe {name}"] for f in found]
            assert pair[0]["float_value"] == pair[1]["float_value"]
            assert pair[0]["value"] == pytest.approx(pair[1]["value"], rel=0.1)
    alone = evaluate_job(
        Subject(str(exported), dataset=str(tmp_path / "d")), recipe, tmp_path / "x.json", tasks=("depth",)
    )
    assert alone[0]["tasks"]["depth"]["own probe delta1"]["float_value"] is None


def test_each_model_runs_once(folder: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    runs, real = [], outputs.run_once

    def counted(model: Any, batch: Any, **options: Any) -> Any:
        runs.append(len(batch["pixel_values"]))
        return real(model, batch, **options)

    monkeypatch.setattr("optimum_regcache.commands.harness.run_once", counted)
    for where in ("encoders.passes.encode", "evaluation.objective.encode", "evaluation.objective.run_once"):
        monkeypatch.setattr(f"optimum_regcache.{where}", lambda *args, **options: pytest.fail("another run"))
    tasks = ("accuracy", "cosine", "patch_cosine", "retrieval", "knn", "linear_probe", "segmentation", "depth")
    evaluate_job(Subject(str(folder), NAME, None), Recipe().override(SMALL), tmp_path / "r.json", tasks=tasks)
    assert sum(runs) == 2 * (24 + 8)  # model and original, search and report side


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    data, recipe = load(NAME).dataset("report", 24, 0), Recipe().override(["data.num_samples=8", "data.num_report=4"])
    data.remove_columns(["mask", "depth"]).to_parquet(tmp_path / "bare.parquet")
    blank = data.remove_columns(["mask", "depth"])
    for name, value in (("mask", 255 * np.ones((64, 64), np.uint8)), ("depth", np.zeros((64, 64), np.uint16))):
        blank = blank.add_column(name, [encoded(value)] * 24).cast_column(name, data.features[name])
    blank.to_parquet(tmp_path / "blank.parquet")
    for name, task, columns, message in (
        ("bare", "segmentation", Columns(), r"--task segmentation is not possible: the data set has no column of "
         r"pictures mask, .* or label; name it with --mask-column\."),
        ("bare", "depth", Columns(), r"the data set has no column of pictures depth or depth_map; name it"),
        ("bare", "depth", Columns(depth="far"), r"no column of pictures 'far'; those of pictures are image\. Give one"),
        ("blank", "segmentation", Columns(), r"several classes; beside the ignored 255 those of the search side hold \[\]"),
        ("blank", "segmentation", Columns(ignore=-1), r"beside the ignored -1 those of the search side hold \[255\]"),
        ("blank", "depth", Columns(), r"No training image has a depth\. Depths are numbers above 0; see --depth-column\."),
    ):  # fmt: skip
        subject = Subject(NAME, dataset=str(tmp_path / f"{name}.parquet"), columns=columns)
        with pytest.raises(ValueError, match=message):
            evaluate_job(subject, recipe, tmp_path / "r.json", tasks=(task,))
    for option, value, task in (
        ("--mask-column", "x", "segmentation"),
        ("--ignore-index", "0", "segmentation"),
        ("--depth-column", "x", "depth"),
    ):
        evaluate(monkeypatch, tmp_path / "r.json", "--model", NAME, option, value, code=2)
        assert f"{option} has no effect without --task {task}. Leave it out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        ImportError, match=r"for --task knn, linear_probe, segmentation and depth and could not .*\[eval\]"
    ):
        evaluate_job(Subject(NAME), recipe, tmp_path / "r.json", tasks=("depth",))


def encoded(values: np.ndarray) -> dict[str, Any]:
    from datasets import Image as ImageFeature
    from PIL import Image

    return ImageFeature().encode_example(Image.fromarray(values))


def test_deleted_places_without_fill_cannot_be_judged() -> None:
    deletion = SimpleNamespace(count=2, fill="none")
    model = SimpleNamespace(config=SimpleNamespace(quantization_config=SimpleNamespace(deletion=deletion)))
    assert "returns fewer patch tokens than there are places" in str(token_problem(SimpleNamespace(model=model)))
    deletion.fill = "neighbour_mean"
    assert token_problem(SimpleNamespace(model=model)) is None
