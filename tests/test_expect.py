"""What a recipe expects, and whether a result reaches it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from optimum_regcache.commands.sources import with_known_images
from optimum_regcache.config import recipe_files
from optimum_regcache.config.expect import ExpectConfig, compare_expected
from optimum_regcache.config.recipe import Recipe


@dataclass
class Row:
    accuracy: float | None
    cosine: float


FLOAT, NAIVE, SAVED = Row(0.9, 1.0), Row(0.5, 0.8), Row(0.86, 0.99)


def verdicts(expect: ExpectConfig, saved: Row = SAVED) -> dict[str, bool | None]:
    return {check.name: check.passed for check in compare_expected(expect, FLOAT, NAIVE, saved)}


def test_measured_figures_bind_and_floors_always_do() -> None:
    expect = ExpectConfig("accuracy", float_model=0.9, naive=0.4, result=0.865, retention=0.95, recovered=0.89)
    assert verdicts(expect) == {
        "float accuracy": True,
        "naive accuracy": None,
        "result accuracy": True,
        "retention": True,  # 0.956
        "recovered": True,  # 0.36 of 0.4
    }
    assert verdicts(replace(expect, float_model=0.92, result=0.88, retention=0.96, recovered=0.91)) == {
        "float accuracy": False,
        "naive accuracy": None,
        "result accuracy": False,
        "retention": False,
        "recovered": False,
    }
    assert verdicts(replace(expect, source="published", float_model=0.5, result=0.99)) == {
        "float accuracy": None,
        "naive accuracy": None,
        "result accuracy": None,
        "retention": True,
        "recovered": True,
    }
    assert verdicts(ExpectConfig(result=0.99, recovered=0.9)) == {"result cosine": True, "recovered": True}


def test_what_was_not_measured_is_missed() -> None:
    expect = ExpectConfig("accuracy", float_model=0.9, result=0.8, retention=0.9, recovered=0.5)
    assert set(verdicts(expect, Row(None, 0.99)).values()) == {True, False}  # only the float row has labels
    nothing = compare_expected(expect, Row(None, 1.0), Row(None, 0.8), Row(None, 0.99))
    assert {check.passed for check in nothing} == {False}
    assert nothing[0].describe() == "float accuracy: none, expected 0.9000 +- 0.01: MISSED"
    lossless = compare_expected(ExpectConfig(recovered=0.5), FLOAT, FLOAT, FLOAT)  # nothing to gain back
    assert [(check.found, check.passed) for check in lossless] == [(None, False)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "top5"}, r"expect\.metric must be one of accuracy, cosine"),
        ({"source": "guessed"}, r"expect\.source must be one of measured, published"),
        ({"float_model": 68.3}, r"expect\.float_model is a fraction such as 0\.98, got 68\.3\."),
        ({"tolerance": 1.5}, r"expect\.tolerance must lie between 0 and 1, got 1\.5\."),
        ({"floor": 0.9}, r"floor"),
    ],
)
def test_bad_expectations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({"expect": values})


def test_it_survives_saving(tmp_path: Path) -> None:
    recipe = Recipe(expect=ExpectConfig("accuracy", result=0.5, where="scenes"))
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe == Recipe.load(tmp_path)  # a folder that holds one
    assert recipe.override(["expect.result=0.6"]).expect == ExpectConfig("accuracy", result=0.6, where="scenes")


def test_packaged_recipes_are_known_by_name() -> None:
    names = recipe_files.packaged_recipes()
    assert {"clip-scenes-induced-w8a8", "clip-vit-base-patch16-w8a8"} <= set(names)
    assert Recipe.load("planted-outlier-w8a8").model == "planted-outlier"


def test_a_recipe_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    Recipe(notes="theirs").save(tmp_path / "recipe.yaml")

    def download(repository: str, name: str, *, revision: str | None, token: str | None) -> str:
        asked.append((repository, name, revision, token))
        if repository == "user/none":
            raise LocalEntryNotFoundError("no such entry")
        return str(tmp_path / "recipe.yaml")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert Recipe.load("user/model@v1", token="secret").notes == "theirs"
    assert asked == [("user/model", "recipe.yaml", "v1", "secret")]
    with pytest.raises(FileNotFoundError, match=r"No recipe 'user/none': .* The Hub says: no such entry"):
        Recipe.load("user/none")
    for name in ("recipes/absent.yaml", "a/b/c", "absent"):  # never asked for
        with pytest.raises(FileNotFoundError, match="no repository of the Hub with a recipe"):
            Recipe.load(name)
    assert len(asked) == 2


@pytest.mark.parametrize(("floor", "code"), [(0.9, 0), (1.5, 6)])
def test_run_says_whether_the_result_is_what_was_expected(
    floor: float, code: int, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = Recipe.load("planted-outlier-w8a8").to_dict()
    values["search"] |= {"sensitive_block": 3, "blocks_before": 0, "num_copies": [4], "max_delete": 4}
    values["data"] |= {"num_samples": 32, "num_report": 32}
    values["expect"] = {"metric": "accuracy", "retention": floor}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    found, out, _ = run("run", "mine.yaml", "--no-recommend")
    assert found == code
    assert ("reached" if code == 0 else "MISSED") in out
    assert (tmp_path / "mine" / "results.json").exists()


def test_a_model_of_the_hub_gets_the_images_of_its_recipe(tmp_path: Path) -> None:
    recipe = with_known_images(Recipe(model="openai/clip-vit-base-patch16"))
    assert (recipe.dataset, recipe.data.streaming) == ("ILSVRC/imagenet-1k", True)
    for other in (
        Recipe(model="somebody/model"),
        Recipe(model=str(tmp_path)),
        Recipe(model="planted-outlier"),
        Recipe(),
        Recipe(model="openai/clip-vit-base-patch16", dataset="mine"),
    ):
        assert with_known_images(other) == other
