"""`optimum-cli regcache report` over what is broken, unfinished or no result: it says so, and no traceback ends it."""
# pyright: reportArgumentType=false

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from test_page import check_page

from optimum_regcache.commands.page.write import report_job
from optimum_regcache.config.output import WORK

ROWS = [
    {"name": name, "cosine": 1.0 - 0.1 * i, "accuracy": None, "retention": 1.0, "recovered_loss": None, "max_block_norm": 9.0,
     "mean_block_norm": 2.0, "max_fc2_norm": 5.0, "flops": 1e9, "below_naive": False, "installed": "-", "standard_error": 0.01}
    for i, name in enumerate(("float", "naive", "RegCache"))
]  # fmt: skip
NORMS = {
    f"{how}_{site}": [1.0, 20.0]
    for how in ("max", "mean", "median")
    for site in ("block_input", "fc2_input")
}  # fmt: skip
SETUP = {"start_block": 1, "scope": "onwards", "candidate": None, "num_copies": 2.0, "count": 1, "refinement": None}
NOTHING = {**SETUP, "start_block": None, "num_copies": 1.0, "count": 0}
RESULTS: dict[str, Any] = {
    "model": "m", "dataset": "d", "quantization": "w8a8", "report_images": 8, "rows": ROWS, "below_naive": [], "seeds": {},
    "norms": {"float": NORMS, "RegCache": NORMS}, "recommendation": None, "environment": {"torch": "2"},
    "recipe": {"quantization": {"registers": {"mode": "none"}, "deletion": {"count": 0}}, "search": {"seed": 0}},
    "fit": {
        "sensitive_block": 1,
        "sensitivity": {"objective": "cosine", "sensitive_block": 1, "drops": {"a.0.fc1": 0.0, "a.1.fc1": None}},
        "search": {
            "chosen": {**SETUP, "text": "x"}, "reason": "gain +0.1", "unfinished": False, "baseline": 0.5,
            "confirmation": {"gain": 0.1, "standard_error": None},
            "trials": [{**NOTHING, "score": 0.5}, {**SETUP, "score": 0.9}, {**SETUP, "count": 2, "score": None}],
        },
    },
}  # fmt: skip


def stored(folder: Path, data: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def test_the_whole_one_is_whole(tmp_path: Path) -> None:
    text = report_job([stored(tmp_path / "r", RESULTS)], tmp_path / "page.html")
    assert text.count("left out") == 2  # outliers.png and the model are not there
    page = check_page(tmp_path / "page.html")
    assert "0.9000 ± 0.0100" in page.text  # no labels: the cosine is the metric
    assert (
        "top-1 " not in page.text.partition("Token norms")[0].partition("Accuracy Measured")[2].partition("variant")[2]
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(RESULTS)[:900], "results.json cannot be used: it is no JSON, perhaps cut off (JSONDecodeError)."),
        ("", "perhaps cut off"),
        ("[1]", "results.json cannot be used: it holds no JSON object."),
        ("[" * 100_000, "perhaps cut off (RecursionError)"),
        ('{"rows": []}', "results.json is not as this version writes it: no recipe, fit."),
        ("{}", "no rows, recipe, fit"),
    ],
    ids=["cut", "empty", "list", "deep", "part", "nothing"],
)
def test_a_broken_result_says_what_is_wrong(content: str, said: str, tmp_path: Path) -> None:
    broken, whole = stored(tmp_path / "broken", content), stored(tmp_path / "whole", RESULTS)
    report_job([broken, whole], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    assert said in page.text
    assert page.headings[page.headings.index("broken") + 1] == "State"
    assert "0.9000 ± 0.0100" in page.text  # the other one is whole


def test_an_interrupted_search_is_marked(tmp_path: Path) -> None:
    data = copy.deepcopy(RESULTS)
    data["fit"]["search"]["unfinished"] = True
    report_job([stored(tmp_path / "r", data)], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    assert "The search was interrupted: this is the best of what it had tried." in page.text
    assert "Search" in page.headings


def test_a_job_under_way_is_marked(tmp_path: Path) -> None:
    journal = tmp_path / "r" / WORK / "abc.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("a\nb\nc\n")
    report_job([tmp_path / "r"], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    assert page.headings == ["r", "State"]
    assert "This job is not finished: 3 steps are kept" in page.text


def test_a_model_without_results_is_marked(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text("model: m\n")
    report_job([tmp_path / "r"], tmp_path / "page.html")
    assert "There is no results.json beside the model" in check_page(tmp_path / "page.html").text


def spoiled(data: Any, chance: random.Random, share: float = 0.04) -> Any:
    """``data`` with some values of another kind, and some gone."""
    if chance.random() < share:
        return chance.choice([None, "x", -1, 0, 1e308, float("nan"), [], {}, [None], {"a": 1}, True])
    if isinstance(data, dict):
        return {k: spoiled(v, chance, share) for k, v in data.items() if chance.random() > share / 4}
    return [spoiled(v, chance, share) for v in data] if isinstance(data, list) else data


@pytest.mark.parametrize("seed", range(6))
def test_values_of_another_kind_never_end_it(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    results = [{name: spoiled(part, chance) for name, part in RESULTS.items()} for _ in range(3)]
    folders = [stored(tmp_path / f"r{i}", data) for i, data in enumerate(results)]
    report_job(folders, tmp_path / "page.html")
    check_page(tmp_path / "page.html")


def test_a_picture_that_is_none_is_left_out(tmp_path: Path) -> None:
    folder = stored(tmp_path / "r", RESULTS)
    (folder / "outliers.png").write_bytes(b'"><script>alert(1)</script>')
    assert "outliers.png cannot be read" in report_job([folder], tmp_path / "page.html")
    check_page(tmp_path / "page.html")


def test_what_is_no_result_is_refused_with_advice(tmp_path: Path, run: Any) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    good, output = stored(tmp_path / "good", RESULTS), tmp_path / "page.html"
    for name, said in (
        ("other", "holds no result of optimum-regcache. Give a folder that quantize or analyze wrote"),
        ("gone", "There is no result"),
        ("a.json", "is no result of optimum-regcache. Give"),
        ("b.json", "is no result of optimum-regcache: it is no JSON, perhaps cut off (JSONDecodeError). Give"),
    ):
        code, out, error = run("report", good, tmp_path / name, "--output", output)
        assert (code, out) == (2, "")
        assert said in error
        assert not output.exists()


def test_the_output_is_looked_at_first(tmp_path: Path, run: Any) -> None:
    good = stored(tmp_path / "good", RESULTS)
    for name, said in (("page.txt", "must end in .html"), ("dir.html", "is a folder; a file is written here")):
        (tmp_path / "dir.html").mkdir(exist_ok=True)
        assert said in run("report", good, "--output", tmp_path / name)[2]
    for name in ("theirs.html", "theirs.md"):
        (tmp_path / name).write_text("mine")
        code, _, error = run("report", good, "--output", tmp_path / "theirs.html", "--overwrite")
        assert code == 2
        assert f"{name} is a file that optimum-regcache did not write. Use another name." in error
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert (
        "--num-images must be at least 1" in run("report", good, "--output", tmp_path / "p.html", "--num-images", 0)[2]
    )
    code, out, _ = run("report", good, "--output", tmp_path / "p.html")
    assert code == 0
    assert out.splitlines()[-1] == f"written: {tmp_path}/p.html, {tmp_path}/p.md"


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, error = run("report", stored(tmp_path / "good", RESULTS), "--output", tmp_path / "page.html")
    assert code == 2
    assert "Pictures need matplotlib: pip install 'optimum-regcache[plots]'." in error
    assert not (tmp_path / "page.html").exists()
