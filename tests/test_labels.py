"""Classes of a data set become classes of the model by name; where they cannot, there is no accuracy and a reason."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_regcache import RegCacheQuantizer, SearchConfig
from optimum_regcache.commands.evaluate import Subject, evaluate_job
from optimum_regcache.commands.quantize import quantize_job
from optimum_regcache.commands.sources import Source, accuracy_data, open_source
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import DataConfig, Recipe
from optimum_regcache.data import ImageInputs, reference
from optimum_regcache.data.labels import imagenet_classes, is_generic, match_classes
from optimum_regcache.data.reference import planted
from optimum_regcache.evaluation.objective import AccuracyObjective, check_template, zero_shot_features
from optimum_regcache.evaluation.targets import Targets, accuracy_targets

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


class BrightestForImageClassification(torch.nn.Module):
    """Predicts the brightest channel; its classes are called ``names``."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.config = ViTConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=pixel_values.mean((2, 3)))


def pictures(labels: list[Any], names: list[str] | None, shown: list[str] | None = None) -> ImageInputs:
    """One picture a label; its colour is ``shown``, red by default."""
    images = [Image.new("RGB", (8, 8), COLOURS[colour]) for colour in shown or ["red"] * len(labels)]
    columns: dict[str, Any] = {"image": ImageFeature()}
    if names is not None:
        columns["label"] = ClassLabel(names=names)
    else:
        columns["label"] = Value("string" if isinstance(labels[0], str) else "int64")
    return ImageInputs(Dataset.from_dict({"image": images, "label": labels}, features=Features(columns)), PROCESSOR)


def targets(model_names: list[str], labels: list[Any], names: list[str] | None) -> Targets:
    return accuracy_targets(
        BrightestForImageClassification(model_names), PROCESSOR, pictures(labels, names), warn=False
    )


@pytest.mark.parametrize(
    ("names", "theirs"),
    [
        (["blue", "green", "red"], ["red", "green", "blue"]),
        (["Blue", "GREEN", "red"], ["red", "green", "blue"]),
        (["navy_blue", "sea-green", "red"], ["Red", "sea green", "navy  blue"]),
        (["blue", "green", "red"], ["red, crimson", "emerald, green", "azure,blue"]),
        (["azure, blue", "green", "crimson"], ["red, crimson", "green", "blue, sky"]),
        (["blue", "red"], ["red", "green", "blue"]),
        (["2", "1", "0"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["LABEL_2", "LABEL_0"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_accuracy_does_not_depend_on_the_order_of_the_classes(names: list[str], theirs: list[str]) -> None:
    shown = ["blue", "green", "red"] if len(names) == 3 else ["blue", "red"]
    inputs = pictures(list(range(len(names))), names, shown)
    model: Any = BrightestForImageClassification(theirs)
    source = Source("m", "d", model, PROCESSOR, None, None, "", "")
    labels, text = accuracy_data(source, inputs)
    assert labels is not None
    assert text is None
    assert AccuracyObjective(list(inputs.batches(2)), labels).scores(model).tolist() == [1.0] * len(names)


@pytest.mark.parametrize(
    ("theirs", "labels", "names", "note"),
    [
        (["red", "green", "blue"], [0, 1, 2], ["blue", "green", "violet"], r"1 of 3 classes .* \('violet'; the model's 3 beg"),
        (["red", "green", "blue"], [0, 1], ["cat", "dog"], r"2 of 2 classes of the data set are unknown to the model"),
        (["crane", "crane", "dog"], [0, 1], ["crane", "dog"], r"stand for several of its classes \('crane'"),
        (["LABEL_0", "LABEL_1"], [0, 1], ["a", "b", "c"], r"3 of 3 classes"),
        (["red", "green", "blue"], [0, 1], None, r"numbers without names, up to 1, and the model's 3 named classes may"),
        (["LABEL_0", "LABEL_1"], [0, 2], None, r"label 2 is none of the 2 classes of the model"),
        (["red", "green"], [0, 1, 7], ["0", "1", "7"], r"."),
        (["red", "green"], [-1, -1], None, r"2 of 2 labels are negative, as in test splits whose labels are hidden"),
        (["red", "green"], [0, -1], ["red", "green"], r"1 of 2 labels are negative|1 of 2 images have no label"),
        (["red", "green"], [0, None], ["red", "green"], r"1 of 2 images have no label"),
        (["red", "green"], [None, None], ["red", "green"], r"^the data set has no labels$"),
        (["red", "green"], ["red", "green"], None, r"labels such as 'red' are no class numbers \(name classes with"),
        (["red", "green"], [0, 1], ["n99999999", "n01440764"], r"2 of 2 classes"),
    ],
)  # fmt: skip
def test_without_a_match_there_is_no_accuracy_and_a_reason(
    theirs: list[str], labels: list[Any], names: list[str] | None, note: str
) -> None:
    if names == ["0", "1", "7"]:
        labels = [0, 1, 2]
    found = targets(theirs, labels, names)
    assert not found.available
    assert found.labels(pictures(labels, names)) is None
    assert re.search(note, found.note or "")


def test_numbers_count_where_nothing_contradicts_them() -> None:
    for theirs, labels, names in (
        (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1], None),
        (["red", "green"], [0, 1], None),
        (["LABEL_0", "LABEL_1"], [0, 1], ["cat", "dog"]),
    ):
        found = targets(theirs, labels, names)
        assert found.available
        assert "labels were taken as class numbers" in (found.note or "")
        values = found.labels(pictures(labels, names))
        assert values is not None
        assert values.tolist() == labels


def test_folders_of_numbers_sort_as_text() -> None:
    names = sorted(str(i) for i in range(12))
    assert names[2] == "10"
    found = targets([f"class {i}" for i in range(12)], [2, 1], names)
    assert found.numbers is not None
    assert found.numbers[2] == 10


def test_the_highest_number_of_the_whole_table_counts() -> None:
    inputs = pictures([0, 1, 2], None)
    chosen = ImageInputs(inputs.source.select([1, 0]), PROCESSOR)
    model = BrightestForImageClassification(["red", "green", "blue"])
    assert accuracy_targets(model, PROCESSOR, chosen).available


def test_ready_items_hold_the_numbers_of_the_model() -> None:
    items = [{"pixel_values": torch.zeros(3, 8, 8), "labels": i} for i in (1, 0)]
    found = accuracy_targets(BrightestForImageClassification(["a", "b", "c"]), None, ImageInputs(items))
    assert found.available
    items[0]["labels"] = 3
    found = accuracy_targets(BrightestForImageClassification(["a", "b", "c"]), None, ImageInputs(items), warn=False)
    assert found.note == "label 3 is none of the 3 classes of the model"


# --- ImageNet


def test_wordnet_ids_and_short_names_find_their_classes() -> None:
    ids, names = list(imagenet_classes()), list(imagenet_classes().values())
    full = dict(enumerate(names))
    order = list(range(1000))
    assert (ids[0], names[0], len(set(ids))) == ("n01440764", "tench, Tinca tinca", 1000)
    assert match_classes(ids, full, {}) == order
    assert match_classes(names, dict(enumerate(ids)), {}) == order
    assert match_classes([name.split(",")[0] for name in names], full, {}) == order
    assert match_classes(names, {i: name.split(",")[0] for i, name in full.items()}, {}) == order
    assert match_classes(ids[::-1][:10], full, {}) == order[::-1][:10]
    assert match_classes([ids[517], ids[134]], full, {}) == [517, 134]  # both are called crane
    assert match_classes(["crane", "tench"], full, {}) == [None, 0]
    assert match_classes(["Cardigan", "cardigan"], full, {}) == [264, 474]
    few = {0: "golden retriever", 1: "tench"}
    assert match_classes(["n01440764", "n02099601", "n02124075"], few, {}) == [1, 0, None]


def test_two_names_of_one_number_in_the_config_are_both_known() -> None:
    assert match_classes(["x", "b"], {0: "a", 1: "b"}, {"a": 0, "x": 0}) == [0, 1]
    assert match_classes(["b", "b2", "a"], {0: "a", 1: "b", 2: "c", 3: "d"}, {"b": 2}) == [None, None, 0]


@pytest.mark.parametrize(
    ("names", "generic"), [(["LABEL_0", "LABEL_1"], True), (["0", "1"], True), (["label 0", "cat"], False)]
)
def test_generic_names(names: list[str], generic: bool) -> None:
    assert is_generic(names) is generic


# --- zero-shot


def test_zero_shot_needs_names_a_text_tower_and_a_tokenizer() -> None:
    encoder = reference.load("clip-scenes")
    inputs = ImageInputs(encoder.dataset("report", 6, 0), encoder.processor)
    found = accuracy_targets(encoder.model, encoder.processor, inputs, encoder.template)
    assert found.note is None
    assert found.text_features is not None
    assert torch.equal(found.labels(inputs), inputs.labels())  # type: ignore[arg-type]
    empty = SimpleNamespace(tokenizer=range(2))  # what transformers makes of a directory without tokenizer files
    for processor, words in ((encoder.processor.image_processor, 0), (empty, 2)):
        found = accuracy_targets(encoder.model, processor, inputs, encoder.template, warn=False)
        assert not found.available
        assert f"the tokenizer has {words} tokens and the text tower 679; save the full processor" in (found.note or "")
    with pytest.raises(ValueError, match=r"Zero-shot accuracy cannot be computed: the tokenizer has 2 tokens"):
        zero_shot_features(encoder.model, empty, ["a"])
    found = accuracy_targets(encoder.model, encoder.processor, pictures([0], None), "{}", warn=False)
    assert "does not name its classes" in (found.note or "")
    found = accuracy_targets(encoder.model, encoder.processor, pictures([0], ["n99999999"]), "{}", warn=False)
    assert "nothing is known of the WordNet id n99999999" in (found.note or "")
    fish = [
        accuracy_targets(encoder.model, encoder.processor, pictures([0], [name]), "{}")
        for name in ("n01440764", "tench")
    ]
    assert torch.equal(fish[0].text_features, fish[1].text_features)  # type: ignore[arg-type]
    tower = SimpleNamespace(config=encoder.model.config)
    found = accuracy_targets(tower, encoder.processor, inputs, encoder.template, warn=False)
    assert found.note == "SimpleNamespace has no text tower"


@pytest.mark.parametrize(
    "template", ["", "a photo", "{name}", "{0}", "{} {}", "{{}}", "{", "a }", "{!r}", "{:>9}", "{0.real}", None]
)
def test_a_template_has_one_place_for_the_name(template: Any) -> None:
    with pytest.raises(ValueError, match=r"The template must hold \{\} once, where the class name goes"):
        check_template(template)
    if template is not None:
        with pytest.raises(ValueError, match=r"The template must hold \{\} once"):
            open_source("planted-outlier", None, Recipe(), template=template)
        with pytest.raises(ValueError, match=r"The template must hold \{\} once"):
            RegCacheQuantizer.from_pretrained("planted-outlier").fit([], template=template)


# --- the search and the report


def test_the_search_maps_labels_as_the_report_does() -> None:
    """A data set with the planted model's classes in another order gives the float model the same accuracy."""
    model, images = planted.build_planted_model(), planted.load_dataset("calibration", 16)
    names = images.features["label"].names
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    order = names[::-1]
    numbers = [order.index(names[label]) for label in images["label"]]
    shuffled = images.remove_columns("label").add_column("label", numbers).cast_column("label", ClassLabel(names=order))
    search = SearchConfig(
        objective="accuracy", always=True, sensitive_block=3, num_copies=(1,), max_delete=0, blocks_before=0
    )
    data, scores = DataConfig(num_samples=16, batch_size=8), []
    for part in (images, shuffled):
        quantizer = RegCacheQuantizer(model, planted.build_processor())
        scores.append(quantizer.fit(part, search=search, data=data, progress=False).search.to_dict())
    assert scores[0] == scores[1]
    with pytest.raises(ValueError, match=r"objective='accuracy' is not possible: the data set has no labels\. Use obj"):
        quantizer.fit(images.remove_columns("label"), search=search, data=data, progress=False)


@pytest.mark.parametrize("renamed", ["order", "other"])
def test_the_report_of_a_folder_in_another_order(renamed: str, tmp_path: Path) -> None:
    """Folders sort by name; the model numbers its classes in another way, or does not know them."""
    model, images = planted.build_planted_model(), planted.load_dataset("report", 24)
    count = int(model.config.num_labels)
    names = [f"class {9 - i}" for i in range(count)]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    for i, row in enumerate(images):
        folder = (
            tmp_path / "photos" / (names[row["label"]].replace(" ", "_") if renamed == "order" else f"k{row['label']}")
        )
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    used = len(set(images["label"]))
    model.save_pretrained(tmp_path / "float")
    planted.build_processor().save_pretrained(tmp_path / "float")
    recipe = Recipe().override(["quantization.registers.mode=none", "data.num_samples=8", "data.batch_size=8"])
    source = open_source(str(tmp_path / "float"), str(tmp_path / "photos"), recipe)
    results, table = quantize_job(source, recipe, Output(tmp_path / "out", {}), progress=False)
    json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    again, text = evaluate_job(
        Subject(str(tmp_path / "out"), str(tmp_path / "float"), str(tmp_path / "photos")),
        recipe,
        tmp_path / "again.json",
    )
    if renamed == "order":
        assert results["rows"][0]["accuracy"] == again["float_accuracy"] == 1.0
        assert again["accuracy_note"] is None
        assert "accuracy, top-1: " in text
        assert not re.search("^(accuracy|feature_cosine|accuracy_note): |None$|local:", text, re.M)
    else:
        assert {row["accuracy"] for row in results["rows"]} == {None}
        assert all(0 < row["retention"] <= 1.001 for row in results["rows"])
        assert f"no top-1: {used} of {used} classes of the data set are unknown to the model" in " ".join(table.split())
        assert "unknown to the model" in again["accuracy_note"]
        assert f"accuracy_note: {again['accuracy_note']}" in text
        assert "accuracy" not in again
