"""`optimum-cli regcache report`: the page holds what the results say, complete in itself, and nothing of theirs is markup."""
# pyright: reportArgumentType=false

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optimum_regcache.commands.page.parts import number, percent
from optimum_regcache.commands.page.plots import Plotter
from optimum_regcache.commands.page.write import report_job

ROOT = Path(__file__).parent.parent
VOID = {"meta", "br", "img", "hr", "link", "input"}
SECTIONS = [
    "What it is",
    "Accuracy",
    "Token norms",
    "Sensitivity",
    "Outlier tokens",
    "Attention to the registers",
    "Search",
]
HOSTILE = "<script>alert(1)</script>|\"'><img src=x onerror=alert(1)> $x^{ [a](javascript:b) \ud800"


class Page(HTMLParser):
    """Elements, attributes and text of a page; asserts that what is opened is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.text.split())
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag in ("h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] in ("h2", "h3"):
            self.headings[-1] += data
        self.text += f" {data}"

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]


def check_page(path: Path) -> Page:
    """A page that is well formed, complete in itself, and whose links and names are right."""
    page = Page(path)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    pictures = page.values("src") + [link for link in page.values("xlink:href") if link[0] != "#"]  # of colour bars
    assert all(value.startswith("data:image/png;base64,") for value in pictures)
    links = page.values("href") + [link for link in page.values("xlink:href") if link[0] == "#"]
    assert {link for link in links if not link.startswith("#")} == {"https://arxiv.org/abs/2510.04547"}
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(ids)
    assert not re.search(r"url\((?!#)|@import|\$\\math", page.source)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    for tag, attrs in page.elements:
        if tag == "img" or attrs.get("role") == "img":
            assert len(attrs.get("alt") or attrs.get("aria-label") or "") > 30
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of `quantize`, small."""
    from optimum.commands.optimum_cli import main

    folder = tmp_path_factory.mktemp("page") / "result"
    options = ["--num-samples", "24", "--num-report", "24", "--set", "search.max_delete=2", "--no-recommend"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv",
            ["optimum-cli", "regcache", "quantize", "--model", "planted-outlier", "--output", str(folder), *options],
        )  # fmt: skip
        main()
    return folder


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    output = made.parent / "page.html"
    report_job([made], output, num_images=8)
    return output


@pytest.fixture(scope="module")
def results(made: Path) -> dict[str, Any]:
    return json.loads((made / "results.json").read_text())


def altered(results: dict[str, Any], folder: Path, **changes: Any) -> Path:
    """A folder with changed results and no model, so that nothing is measured."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**results, **changes}))
    return folder


def test_results_hold_what_a_page_needs(results: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in results["rows"]}
    share, images = rows["naive"]["accuracy"], results["report_images"]
    assert rows["naive"]["standard_error"] == pytest.approx((share * (1 - share) / (images - 1)) ** 0.5)
    assert list(results["norms"]) == ["float", "RegCache"]
    for name, norms in results["norms"].items():
        assert max(norms["max_block_input"]) == pytest.approx(rows[name]["max_block_norm"], abs=1e-4)
    assert sum(results["search_images"].values()) == 24


def test_every_section_is_there_with_its_figures(page: Path, results: dict[str, Any]) -> None:
    found = check_page(page)
    assert found.headings == ["result", *SECTIONS]
    assert "Left out" not in found.text
    for row in results["rows"]:
        assert row["name"] in found.text
        assert f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f} %" in found.text
        assert percent(row["recovered_loss"]) in found.text
    search = results["fit"]["search"]
    for text in (
        "planted-outlier",
        search["chosen"]["text"],
        search["reason"],
        f"The best of {len(search['trials'])} trials",
        number(results["norms"]["float"]["max_fc2_input"][3], ".2f"),
        number(max(results["fit"]["sensitivity"]["drops"].values()), ".5f"),
        "on the report split: 24 images",
        "Measured for this page on 8 unseen images",
        results["environment"]["torch"],
        *(f"{count} {part}" for part, count in results["search_images"].items()),
    ):
        assert text in found.text
    assert sum(tag == "svg" for tag, _ in found.elements) == 8  # bars, norms twice, two heat maps, the search thrice
    assert sum(tag == "img" for tag, _ in found.elements) == 1
    assert "currentColor" in found.source


def test_the_markdown_says_the_same(page: Path, results: dict[str, Any]) -> None:
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert re.findall(r"^### (.*)$", text, re.M) == SECTIONS
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) == sum(tag == "table" for tag, _ in check_page(page).elements)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for row in results["rows"]:
        name = row["name"] + " (below naive)" * row["below_naive"]
        assert f"| {name} | {100 * row['accuracy']:.2f} ± " in text


def test_a_page_is_the_same_every_time_and_a_job_may_be_repeated(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "page.html"
    report_job([made], output, num_images=2)
    first = output.read_bytes()
    report_job([made], output, num_images=2)
    assert output.read_bytes() == first
    with pytest.raises(ValueError, match=r"holds a page over other results\. Use another name, or --overwrite"):
        report_job([made], output, num_images=3)
    report_job([made], output, num_images=3, overwrite=True)
    assert output.read_bytes() != first


def test_nothing_of_a_result_is_markup(results: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "name": f"{HOSTILE} {row['name']}", "installed": HOSTILE} for row in results["rows"]]
    rows[0]["name"] = "float"
    norms = {f"{HOSTILE} {name}": values for name, values in results["norms"].items()}
    drops = {f"{HOSTILE}.{name}": drop for name, drop in results["fit"]["sensitivity"]["drops"].items()}
    fit = {**results["fit"], "sensitivity": {**results["fit"]["sensitivity"], "drops": drops, "objective": HOSTILE}}
    folder = altered(
        results, tmp_path / "<b>&amp; one", model=HOSTILE, dataset=HOSTILE, note=HOSTILE, rows=rows, norms=norms, fit=fit,
        below_naive=[HOSTILE], methods=[{"name": HOSTILE}], environment={HOSTILE: HOSTILE},
    )  # fmt: skip
    other = altered(results, tmp_path / "two", model=HOSTILE)
    report_job([folder, other], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    assert "<script>alert(1)</script>" in page.text
    assert "<b>&amp; one" in page.headings
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|" in text
    assert not re.search(r"<(?!!-- optimum)|(?<!\\)\[a\]", text)


def test_several_results_lie_side_by_side(results: dict[str, Any], tmp_path: Path) -> None:
    worse = [{**row, "accuracy": 0.5 * row["accuracy"]} for row in results["rows"]]
    altered(results, tmp_path / "a" / "w8a8")
    altered(results, tmp_path / "b" / "w8a8", rows=worse, dataset="others")
    altered(results, tmp_path / "b" / "w4a4", quantization="w4a4")
    report_job([tmp_path / "a" / "w8a8", tmp_path / "b"], tmp_path / "page.html")  # b holds two
    page = check_page(tmp_path / "page.html")
    assert page.headings[:2] == ["Side by side", "Overview"]
    labels = ["a/w8a8", "w4a4", "b/w8a8"]
    assert [h for h in page.headings if h in labels] == labels
    assert "These results differ in images: figures of different ones do not compare." in page.text
    alts = [alt for alt in page.values("aria-label") if alt.startswith(("Grouped bars", "Marks"))]
    last = 100 * results["rows"][-1]["accuracy"]
    assert f"saved {last:.4g}, {last:.4g}, {last / 2:.4g}" in alts[0]
    naive = next(row["cosine"] for row in results["rows"] if row["name"] == "naive")
    shown = f"{1 - naive:.3g}"
    assert alts[1].startswith(
        f"Marks, log axis, 1 - feature cosine: naive a/w8a8 {shown}, w4a4 {shown}, b/w8a8 {shown};"
    )
    assert len(alts) == 3


def test_cosines_close_to_one_are_told_apart(results: dict[str, Any], tmp_path: Path) -> None:
    cosines = dict(zip(("float", "naive", "per token"), (1.0, 0.95, 0.99), strict=True))
    rows = [{**row, "accuracy": None, "cosine": cosines.get(row["name"], 0.999)} for row in results["rows"]]
    folder = altered(results, tmp_path / "unlabelled", rows=rows, protocol=None)
    report_job([folder], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    (alt,) = [alt for alt in page.values("aria-label") if alt.startswith("Marks, log axis, 1 - feature cosine: ")]
    assert "naive 0.05, per token 0.01, " in alt
    assert alt.endswith("RegCache 0.001")
    assert "1 - cosine to float, log axis; further left is better" in page.text


def test_marks_of_losses() -> None:
    plotter = Plotter()
    groups = ["naive", "same", "unknown"]
    picture = plotter.losses(groups, {"a": ([0.5, 1 - 1e-8, None], [0.6, None, None])})
    assert picture is not None
    assert picture.alt == "Marks, log axis, 1 - feature cosine: a naive 0.5, same 1e-08, unknown -"
    assert plotter.losses(groups, {"a": ([1.0, 1.0, None], [None] * 3)}) is None


def test_an_older_result_says_what_it_lacks(results: dict[str, Any], tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "standard_error"} for row in results["rows"]]
    folder = altered(results, tmp_path / "old", rows=rows)
    stored = json.loads((folder / "results.json").read_text())
    del stored["norms"], stored["search_images"]
    (folder / "results.json").write_text(json.dumps(stored))
    text = report_job([folder], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    assert "written without standard errors" in page.text
    for reason in ("this result holds no norms per block", "no outliers.png in the folder", "no model in the folder"):
        assert reason in page.text
        assert reason in text
    assert (
        "±" not in page.text.partition("Accuracy Measured")[2].partition("written without")[0].partition("naive).")[2]
    )


def test_attention_needs_images_and_says_so(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(made, folder)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("model: planted-outlier", "model: local:mine"))
    report_job([folder], tmp_path / "without.html")
    assert "the images are not in the folder; give them with --dataset" in check_page(tmp_path / "without.html").text
    (tmp_path / "images").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    report_job([folder], tmp_path / "with.html", dataset=str(tmp_path / "images"), num_images=4)
    assert re.search(r"Measured for this page on \d unseen images of images;", check_page(tmp_path / "with.html").text)
    (folder / "model.safetensors").write_bytes(b"cut off")
    report_job([folder], tmp_path / "cut.html", dataset=str(tmp_path / "images"))
    assert (
        "Attention to the registers Left out: the model or the images do not open or run: "
        in check_page(tmp_path / "cut.html").text
    )


def test_a_benchmark_has_times(tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "results" / "cpu_int8_avx2_registers.json"
    report_job([path], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    assert page.headings == ["cpu_int8_avx2_registers", "What it is", "Speed"]
    for found in json.loads(path.read_text())["results"]:
        assert f"{found['median_ms']:.1f}" in page.text
        assert f"{found['ratio_to_float32']:.2f}" in page.text


def test_analyses_checks_and_evaluations_fit_in(results: dict[str, Any], tmp_path: Path) -> None:
    common = {"model": "m", "dataset": "d", "quantization": "w8a8", "environment": results["environment"]}
    norms = results["norms"]["float"]
    files = {
        "analysis/analysis.json": {
            **common, "images": 8, "report_images": 24, "sensitivity": results["fit"]["sensitivity"], "norms": norms,
            "outliers": {}, "rows": results["rows"][:3],
        },
        "check/check.json": {
            **common, "verdict": "fits partly", "advice": "Look.", "parts": {"registers": "fits partly"}, "notes": ["few"],
        },
        "results.json": {
            **common, "quantized_layers": 36, "images": 24, "accuracy": 0.75, "float_accuracy": 0.875, "norms": norms,
            "feature_cosine": 0.5, "retention": 6 / 7, "accuracy_note": None,
            "fused": {"int8 attention": {"how": "6 of 6 blocks", "accuracy": 0.625}},
        },
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(data))
    report_job([tmp_path / "analysis", tmp_path / "check", tmp_path / "results.json"], tmp_path / "page.html")
    page = check_page(tmp_path / "page.html")
    for text in ("Verdict: fits partly. Look.", "75.00 %", "87.50 %", "fused, int8 attention", "62.50 %", "85.7 %"):
        assert text in page.text
    assert page.headings == [  # one result with variants: nothing lies side by side
        "analysis", *SECTIONS[:5], "check", "What it is", "Does it fit", "results", "What it is", "Accuracy", "Token norms",
    ]  # fmt: skip


def test_plots_stay_plots_whatever_the_names() -> None:
    plotter = Plotter()
    picture = plotter.bars(
        ["<&>", "漢字"], {"$a_{": ([1.0, None], [None, None]), "b": ([1e3, 2e3], [0.1, None])}, "", "", x=""
    )
    assert "<&>" not in picture.svg
    assert "&lt;&amp;&gt;" in picture.svg
    assert picture.svg != plotter.bars(["<&>"], {"b": ([1.0], [None])}, "", "", x="").svg
    assert "#010203" not in picture.svg
