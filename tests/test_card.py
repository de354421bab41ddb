"""The model card: metadata that huggingface_hub reads back, words for what was done, and nothing that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from models import TOWERS, quantized

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.data import reference
from optimum_regcache.hub.card import Measured, at_hub, describe, known_licence, write_card

CONFIG = RegCacheConfig.from_preset("w8a8").replace(
    registers={"mode": "fixed", "blocks": (2, 3), "num_copies": 2.5}, deletion={"block": 2, "count": 3}
)
FIGURES = {"accuracy": 0.75, "cosine_similarity": 0.99}
MEASURED = Measured("| variant |\n| --- |\n| RegCache |", FIGURES, 500, "user/images", "user/images", "test")


def card_of(folder: Path, base: str | None = "user/clip", **options: Any) -> Any:
    write_card(folder, folder / "clip-w8a8", CONFIG, base, "zero-shot-image-classification", **options)
    return ModelCard.load(folder / "README.md")


def test_the_metadata_survives_the_hub(tmp_path: Path) -> None:
    card = card_of(tmp_path, measured=MEASURED, licence={"license": "mit"})
    data = card.data
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict() == data.to_dict()
    assert (data.license, data.base_model, data.datasets, data.library_name) == (
        "mit",
        "user/clip",
        ["user/images"],
        "transformers",
    )
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.model_name == "clip-w8a8"
    found = {r.metric_type: (r.metric_name, r.metric_value, r.task_type) for r in data.eval_results or []}
    assert found == {
        "accuracy": ("top-1 accuracy", 0.75, "zero-shot-image-classification"),
        "cosine_similarity": (
            "mean cosine to the features of the float model",
            0.99,
            "zero-shot-image-classification",
        ),
    }
    first = (data.eval_results or [])[0]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("user/images", "user/images", "test")


def test_the_text_says_what_was_done_and_what_was_not(tmp_path: Path) -> None:
    text = card_of(tmp_path, measured=MEASURED, notes=["a note"]).text
    assert "`user/clip`, vision tower quantized to W8A8 with RegCache" in text
    assert "On 500 images of `user/images` (split `test`) that search and calibration never saw:" in text
    assert "attention of blocks 2 to 3, and weigh as much as tau = 2.5 copies" in text
    assert "k~ = 3 tokens of largest norm leave each image at block 2" in text
    for line in ("- a note", "not measured: other data sets", "not measured: speed", "licence: not known here"):
        assert line in text
    assert "trust_remote_code" not in text  # the file for it is not there


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    card = card_of(tmp_path, "local:mine")
    fields = card.data.to_dict()
    assert not {"license", "base_model", "base_model_relation", "datasets", "model-index"} & fields.keys()
    assert "`mine`, vision tower" in card.text
    assert "Nothing was measured on images" in card.text
    assert "no accuracy is known" in card.text


@pytest.mark.parametrize("name", ["clip-scenes-induced", "planted-outlier"])
def test_an_embedded_encoder_is_called_so(name: str, tmp_path: Path) -> None:
    note = reference.load(name).note
    card = card_of(tmp_path, name, notes=[note])
    assert card.text.count(note) == 1
    assert f"The float original is an encoder embedded in that package: {note}" in card.text
    assert "embedded-encoder" in (card.data.tags or [])
    assert card.data.base_model is None


def test_blocks_in_words() -> None:
    config = RegCacheConfig.from_preset("w4a4").replace(
        registers={"mode": "fixed", "blocks": (1, 3), "num_registers": 2, "num_copies": (1.0, 0.5)}
    )
    assert describe(config)[1] == (
        "registers: the cached key and value of 2 registers come first in the attention of blocks 1, 3, and weigh as much as "
        "tau = 1, 0.5 copies (per block)"
    )
    nothing = RegCacheConfig.from_preset("w8a8-dynamic").replace(registers={"mode": "none"}, methods=("gptq",))
    assert describe(nothing)[1:] == ["no register and no deletion is installed", "methods: gptq"]
    threshold = {"block": 1, "count": 2, "rule": "threshold"}
    assert "at most k~ = 2 tokens" in describe(nothing.replace(deletion=threshold))[1]


def test_the_licence_is_that_of_the_originals_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_licence("clip-scenes-induced") == {"license": "apache-2.0"}
    assert known_licence("local:mine", tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\n---\n# A\n")
    expected = {"license": "other", "license_name": "terms", "license_link": "LICENSE"}
    assert known_licence("local:mine", tmp_path) == expected
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert known_licence("local:mine", tmp_path) is None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert known_licence("user/clip") is None
    snapshot = tmp_path / "cache" / "models--user--clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    refs = tmp_path / "cache" / "models--user--clip" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert known_licence("user/clip") == {"license": "mit"}


def test_at_the_hub_the_model_is_opened_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "modeling_regcache.py").touch()
    text = at_hub(card_of(tmp_path).content, "user/mine", "w8a8")
    assert 'AutoModel.from_pretrained("user/mine", revision="w8a8")\n' in text
    assert 'AutoModel.from_pretrained("user/mine", revision="w8a8", trust_remote_code=True)' in text
    assert "this folder, or the repository" not in text


def test_python_writes_a_card_too(tmp_path: Path) -> None:
    tiny = TOWERS["vit"]
    RegCacheQuantizer(tiny.build()).save(quantized(tiny), tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").content
    assert "A model, vision tower quantized to W8A8 with RegCache" in text
    assert str(tmp_path) not in text
    original = reference.load("clip-scenes")
    config = RegCacheConfig.from_preset("w8a8-dynamic").replace(registers={"mode": "none"})
    RegCacheQuantizer(original.model, original.processor).quantize(tmp_path / "clip", quantization_config=config)
    card: Any = ModelCard.load(tmp_path / "clip" / "README.md")
    assert "`clip-scenes`, vision tower quantized to W8A8-DYNAMIC without registers" in card.text
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "zero-shot-image-classification")
