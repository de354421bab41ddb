"""The tasks of `evaluate`, each beside the float original, as a user asks for them."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from optimum.commands.optimum_cli import main
from optimum.commands.register.register_regcache import EvaluateCommand  # pyright: ignore[reportMissingImports]
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer
from optimum_regcache.commands.evaluate import Subject, evaluate_job
from optimum_regcache.commands.harness import Score, Seen
from optimum_regcache.commands.page.write import report_job
from optimum_regcache.commands.tasks import TASKS
from optimum_regcache.data.captions import caption_column, captions_of
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import load, planted
from optimum_regcache.encoders.passes import FeatureEncoder, encode
from optimum_regcache.evaluation.dense import ProjectedCosineObjective, projector_problem
from optimum_regcache.evaluation.objective import AccuracyObjective, encode_texts, label_ranks
from optimum_regcache.export import export_onnx
from optimum_regcache.hub.loading import load_model
from support_table import fit
from whole_models import WHOLES

NAME, TRAIN, REPORT = "clip-scenes-induced", 160, 24
FEW = ("--num-samples", str(TRAIN), "--num-report", str(REPORT), "--batch-size", "16")
PLAIN = RegCacheConfig(registers={"mode": "none"}, weights={"bits": 4}, activations={"bits": 4})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder, output = load(NAME), tmp_path_factory.mktemp("tasks") / "w4a4"
    quantizer = RegCacheQuantizer(encoder.model, encoder.processor)
    images = encoder.dataset("search", 16, 0)
    quantizer.quantize(output, quantization_config=PLAIN, calibration_dataset=images, progress=False)
    return output


def evaluate(monkeypatch: pytest.MonkeyPatch, output: Path, *args: str, code: int = 0) -> dict[str, Any]:
    """Stored results of the command line."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", "evaluate", "--output", str(output), *args])
    if code:
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == code
        return {}
    main()
    return json.loads(output.read_text(), parse_constant=pytest.fail)


def features_of(model: Any, split: str, count: int) -> torch.Tensor:
    encoder = load(NAME)
    batches = ImageInputs(encoder.dataset(split, count, 0), encoder.processor).batches(16)
    return F.normalize(encode(model, batches), dim=-1)


def test_the_command_line_knows_the_tasks() -> None:
    parser = ArgumentParser()
    EvaluateCommand.parse_args(parser)
    action = next(a for a in parser._actions if a.dest == "task")
    assert action.choices == tuple(TASKS)
    assert "the first four" in str(action.help)
    assert [name for name, task in TASKS.items() if task.by_default] == list(TASKS)[:4]


def test_paired_differences_and_their_errors() -> None:
    ours, theirs = torch.tensor([1.0, 0, 0, 1, 0]), torch.tensor([1.0, 1, 1, 1, 0])
    score = Score.of(ours, theirs)
    assert (score.value, score.float_value, score.difference) == pytest.approx((0.4, 0.8, -0.4))
    assert score.standard_error == pytest.approx((0.3 / 5) ** 0.5)  # variance of the sample 6/20
    assert score.difference_error == pytest.approx((0.3 / 5) ** 0.5)
    assert score.describe() == "40.00 % +- 24.49, float 80.00 %, difference -40.00 +- 24.49 points"
    assert (
        Score.of(torch.tensor([1.0]), torch.tensor([0.0])).describe()
        == "100.00 %, float 0.00 %, difference +100.00 points"
    )
    assert Score.of(torch.tensor([0.5, 0.7]), share=False).describe() == "0.6000 +- 0.1000"


def test_ranks_put_the_first_of_equal_classes_first_and_nan_last() -> None:
    class Encoder(FeatureEncoder):
        def run(self, batch: Any) -> Any:
            return batch["pixel_values"]

        def features_of(self, output: Any) -> torch.Tensor:
            return output

    features = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, float("nan")], [0, 0.2, 1]])
    batches = [{"pixel_values": features[:3]}, {"pixel_values": features[3:]}]
    accuracy = AccuracyObjective(batches, torch.tensor([0, 0, 1, 2, 0]), torch.eye(3))
    ranks = label_ranks(accuracy.logits_of(Seen.of(Encoder(), batches)), accuracy.labels)
    assert ranks.tolist() == [0, 0, 1, 3, 2]
    assert (ranks == 0).float().tolist() == accuracy.scores(Encoder()).tolist()


def test_by_default_what_needs_nothing_more(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    templates = ("{}", "a picture of {}")
    options = [word for template in templates for word in ("--template", template)]
    results = evaluate(monkeypatch, tmp_path / "r.json", "--model", str(folder), "--float-model", NAME, *options, *FEW)
    assert list(results["tasks"]) == ["accuracy", "cosine", "patch_cosine"]
    encoder, model = load(NAME), load_model(folder)
    data = encoder.dataset("report", REPORT, 0)
    names = data.features["label"].names
    text = sum(encode_texts(encoder.model, encoder.processor, [t.format(n) for n in names]) for t in templates)
    found = results["tasks"]["accuracy"]
    for key, one in (("value", model), ("float_value", encoder.model)):
        logits = (features_of(one, "report", REPORT) @ F.normalize(text, dim=-1).T).numpy()
        assert found["top-1"][key] == pytest.approx(accuracy_score(data["label"], logits.argmax(1)))
        top5 = top_k_accuracy_score(data["label"], logits, k=5, labels=range(len(names)))
        assert found["top-5"][key] == pytest.approx(top5)
    assert results["accuracy"] == found["top-1"]["value"]
    assert results["float_accuracy"] == found["top-1"]["float_value"]
    assert results["feature_cosine"] == results["tasks"]["cosine"]["features"]["value"]
    assert found["top-1"]["count"] == REPORT
    out = capsys.readouterr().out
    assert f"accuracy, top-1: {100 * results['accuracy']:.2f} % +- " in out
    assert "patch_cosine, patch tokens: 0." in out
    report_job([tmp_path / "r.json"], tmp_path / "page.html")
    top5 = found["top-5"]
    shown = [f"{100 * top5['value']:.2f} ± {100 * top5['standard_error']:.2f} %", f"{100 * top5['float_value']:.2f} %"]
    difference = f"{100 * top5['difference']:.2f} ± {100 * top5['difference_error']:.2f} %"
    assert " | ".join(["| accuracy, top-5", *shown, difference, f"{REPORT} |"]) in (tmp_path / "page.md").read_text()


def test_retrieval_finds_equal_captions(folder: Path, tmp_path: Path, monkeypatch) -> None:
    results = evaluate(
        monkeypatch, tmp_path / "r.json", "--model", str(folder), "--float-model", NAME, "--task", "retrieval", *FEW
    )
    found = results["tasks"]["retrieval"]
    assert "accuracy" not in results
    encoder = load(NAME)
    captions = list(encoder.dataset("report", REPORT, 0)["caption"])
    texts = list(dict.fromkeys(captions))
    text = encode_texts(encoder.model, encoder.processor, texts)
    scores = features_of(load_model(folder), "report", REPORT) @ text.T
    hits = [captions[i] in [texts[j] for j in row.topk(5).indices] for i, row in enumerate(scores)]
    assert found["image to text R@5"]["value"] == pytest.approx(sum(hits) / REPORT)
    hits = [t in [captions[i] for i in row.topk(5).indices] for t, row in zip(texts, scores.T, strict=True)]
    assert found["text to image R@5"]["value"] == pytest.approx(sum(hits) / len(texts))
    assert found["text to image R@5"]["count"] == len(texts)
    assert set(found) == {f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)}


def test_neighbours_and_probes_are_those_of_each_model(folder: Path, tmp_path: Path, monkeypatch) -> None:
    tasks = ("--task", "knn", "linear_probe")
    results = evaluate(monkeypatch, tmp_path / "r.json", "--model", str(folder), "--float-model", NAME, *tasks, *FEW)
    found, encoder = results["tasks"], load(NAME)
    train, labels = (list(encoder.dataset(*part, 0)["label"]) for part in (("search", TRAIN), ("report", REPORT)))
    for key, model in (("value", load_model(folder)), ("float_value", encoder.model)):
        plain = KNeighborsClassifier(20, metric="cosine").fit(features_of(model, "search", TRAIN).double(), train)
        accuracy = plain.score(features_of(model, "report", REPORT).double(), labels)
        assert found["knn"]["plain votes"][key] == pytest.approx(accuracy)
    own, moved = found["linear_probe"]["own probe"], found["linear_probe"]["float probe"]
    assert own["float_value"] == moved["float_value"]
    assert found["knn"]["weighted votes"]["float_value"] > 5 / 64  # of 64 classes, hardly an image each
    alone = evaluate(monkeypatch, tmp_path / "float.json", "--model", NAME, *tasks, *FEW)
    assert list(alone["tasks"]["linear_probe"]) == ["own probe"]
    assert alone["tasks"]["linear_probe"]["own probe"]["value"] == pytest.approx(own["float_value"])
    assert alone["tasks"]["knn"]["plain votes"]["difference"] is None


def test_an_export_without_classes_is_judged_by_its_features(tmp_path: Path) -> None:
    model, images = planted.build_planted_model(), str(tmp_path / "images.parquet")
    folder = str(export_onnx(model.base_model, tmp_path / "out", processor=planted.build_processor()))
    planted.load_dataset("report", 60).to_parquet(images)
    recipe = Recipe().override(["data.num_samples=40", "data.num_report=20", "data.batch_size=20"])
    alone, tasks = Subject(folder, dataset=images), ("knn", "linear_probe")
    results, _ = evaluate_job(alone, recipe, tmp_path / "onnx.json", tasks=tasks)
    same, _ = evaluate_job(Subject("planted-outlier", dataset=images), recipe, tmp_path / "torch.json", tasks=tasks)
    assert results["tasks"] == same["tasks"]
    assert results["tasks"]["knn"]["weighted votes"]["value"] > 0.25
    with pytest.raises(
        ValueError, match=r"is exported and predicts no classes: .* or --task knn linear_probe segmentation depth\."
    ):
        evaluate_job(alone, recipe, tmp_path / "x.json")
    both = Subject(folder, "planted-outlier", images)
    paired, _ = evaluate_job(both, recipe, tmp_path / "both.json", tasks=("knn", "cosine", "patch_cosine"))
    assert paired["tasks"]["knn"]["plain votes"]["difference"] == 0
    assert paired["feature_cosine"] == pytest.approx(1)
    assert paired["tasks"]["patch_cosine"]["patch tokens"]["value"] == pytest.approx(1)
    for task, message in (
        ("retrieval", r"--task retrieval is not possible: \w+ has no text tower\."),
        ("projector", r"--task projector is not possible: ExportedEncoder is no vision tower with a language model"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_job(both, recipe, tmp_path / "x.json", tasks=(task,))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--task", "cosine"), "--task cosine is not possible: there is no float original to compare with"),
        (
            ("--task", "projector"),
            "--task projector is not possible: CLIPModel is no vision tower with a language model",
        ),
        (("--caption-column", "x"), "--caption-column has no effect without --task retrieval. Leave it out"),
        (
            ("--task", "retrieval", "--caption-column", "x"),
            "The data set has no column of captions 'x'; its columns are",
        ),
        (("--task", "retrieval", "--caption-column", "box"), "Column 'box' holds '[0."),
        (("--task", "retrieval", "--num-report", "1"), "--task retrieval needs several images with different captions"),
        (("--template", "{}", "--template", "a {} {}"), "The template must hold {} once"),
    ],
)
def test_what_cannot_be_measured_says_why(
    args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    evaluate(monkeypatch, tmp_path / "r.json", "--model", NAME, *FEW, *args, code=2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r.json").exists()


def test_missing_labels_captions_and_unknown_tasks(tmp_path: Path) -> None:
    data, recipe = load(NAME).dataset("report", 12, 0), Recipe().override(["data.num_samples=8", "data.num_report=4"])
    data.remove_columns(["label", "caption"]).to_parquet(tmp_path / "bare.parquet")
    subject = Subject(NAME, dataset=str(tmp_path / "bare.parquet"))
    for task, message in (
        ("knn", r"--task knn is not possible: the data set has no labels\."),
        ("accuracy", r"--task accuracy is not possible: the data set has no labels\."),
        (
            "retrieval",
            r"not possible: the data set has no column caption, .* or alt_text; name its captions with --caption",
        ),
        ("knm", r"Unknown task 'knm'; expected one of accuracy, cosine, "),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_job(subject, recipe, tmp_path / "r.json", tasks=(task,))
    hidden = data.cast_column("label", data.features["label"]).map(lambda row: {"label": -1})
    hidden.to_parquet(tmp_path / "hidden.parquet")
    with pytest.raises(
        ValueError, match=r"--task linear_probe is not possible: \d of \d labels are negative.* side\)\."
    ):
        evaluate_job(
            Subject(NAME, dataset=str(tmp_path / "hidden.parquet")),
            recipe,
            tmp_path / "r.json",
            tasks=("linear_probe",),
        )


# --- captions


def test_captions_in_all_their_forms() -> None:
    images = load(NAME).dataset("report", 3, 0).select_columns(["image"])
    processor = load(NAME).processor
    cells: dict[str, list[Any]] = {
        "text": ["a cat ", "a dog", "a bird"],
        "captions": [["a cat", "a cat", " its tail"], ["a dog"], ["a bird"]],
        "sentences": [{"raw": "a cat", "imgid": 1}, {"raw": "a dog", "imgid": 2}, {"raw": "a bird", "imgid": 3}],
        "sentence": [[{"raw": "a cat"}, {"raw": "its tail"}], [{"raw": "a dog"}], [{"raw": "a bird"}]],
    }
    for column, values in cells.items():
        inputs = ImageInputs(images.add_column(column, values), processor)
        assert caption_column(inputs) == column
        found = captions_of(inputs.subset([2, 0]), column)
        assert found[0] == ["a bird"]
        assert found[1][0] == "a cat"
        assert len(found[1]) == (2 if column in ("captions", "sentence") else 1)
    inputs = ImageInputs(images.add_column("text", ["a", None, " "]).add_column("number", [1, 2, 3]), processor)
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption in column 'text'\. Leave them out"):
        captions_of(inputs, "text")
    with pytest.raises(ValueError, match=r"Column 'number' holds '1', which is no caption"):
        captions_of(inputs, "number")
    assert caption_column(ImageInputs(images, processor)) is None
    assert caption_column(ImageInputs([{"pixel_values": torch.zeros(3, 8, 8)}])) is None


def test_one_picture_in_several_rows_has_all_their_captions(tmp_path: Path) -> None:
    """A table with a row for each caption: the text of another row of the same picture is a hit."""
    data = load(NAME).dataset("report", 6, 0)
    rows = [0, 0, 1, 1, 2, 3, 4, 5]
    captions = [data["caption"][0], "something else", data["caption"][1], "nothing", *data["caption"][2:]]
    table = data.select(rows).remove_columns("caption").add_column("caption", captions)
    search = Dataset.from_dict({name: table[name] for name in table.column_names}, features=table.features)
    for split in ("train", "test"):
        (tmp_path / "d").mkdir(exist_ok=True)
        search.to_parquet(tmp_path / "d" / f"{split}.parquet")
    recipe = Recipe().override(["data.num_samples=8", "data.num_report=8"])
    results, _ = evaluate_job(
        Subject(NAME, dataset=str(tmp_path / "d")), recipe, tmp_path / "r.json", tasks=("retrieval",)
    )
    assert results["tasks"]["retrieval"]["image to text R@1"]["value"] == 1.0


# --- projected tokens


@pytest.mark.parametrize("family", ["LLaVA (CLIP)", "PaliGemma", "Qwen2.5-VL", "SmolVLM", "InternVL"])
@torch.no_grad()
def test_projected_tokens_are_what_the_language_model_gets(family: str) -> None:
    whole = next(w for w in WHOLES if w.family == family)
    model, pictures = whole.build(), [whole.picture(seed) for seed in range(4)]
    quantized = fit(model, pictures, registers={"mode": "none"})
    assert projector_problem(model) is None
    batches = list(ImageInputs(pictures).batches(2))
    scores = ProjectedCosineObjective(model, batches).scores(quantized)
    assert len(scores) == 4
    inputs = dict(batches[0])
    if family == "SmolVLM":
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    ours, theirs = (m.get_image_features(**inputs).pooler_output[1].float() for m in (quantized, model))
    expected = F.cosine_similarity(ours.flatten(0, -2), theirs.flatten(0, -2), dim=-1).mean()
    assert float(scores[1]) == pytest.approx(float(expected), abs=1e-5)
    assert 0.5 < float(scores.min()) <= float(scores.max()) < 1
