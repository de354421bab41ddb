"""Where a command line goes wrong: one line, an exit code of its own, nothing lost, nothing leaked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from optimum.commands.optimum_cli import main

from optimum_regcache.commands import sources
from optimum_regcache.config.output import MANIFEST
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.config.recipe_files import on_hub
from optimum_regcache.data import reference
from optimum_regcache.hub import loading

FEW = ("--num-samples", "16", "--num-report", "8", "--batch-size", "8")
PLAIN = ("--no-registers", *FEW)
SEARCH = (*FEW, "--set", "search.max_delete=1", "--set", "search.num_copies=[1]", "--set", "search.sensitive_block=3")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a float model, photos, and the model quantized with them."""
    folder = tmp_path_factory.mktemp("alice")
    encoder = reference.load("planted-outlier")
    encoder.model.save_pretrained(folder / "vit")
    encoder.processor.save_pretrained(folder / "vit")
    images: Any = encoder.dataset("search", 24, 0)
    for number, row in enumerate(images):
        target = folder / "imgs" / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        row["image"].save(target)
    arguments = ["--model", str(folder / "vit"), "--dataset", str(folder / "imgs"), "--output", str(folder / "q")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["optimum-cli", "regcache", "quantize", *arguments, *SEARCH])
        main()
    return folder


def test_nothing_that_is_uploaded_tells_where_it_was_made(home: Path) -> None:
    files = {p.name: p.read_bytes() for p in (home / "q").rglob("*") if p.is_file()}
    assert {"README.md", "recipe.yaml", "results.json", "analysis.png", "outliers.png", "config.json", MANIFEST} <= set(
        files
    )
    assert not [name for name, content in files.items() if str(home).encode() in content or b"/tmp/" in content]
    assert not (home / "q" / "search").exists()
    assert not (home / "q" / ".cache").exists()
    recipe = Recipe.load(home / "q" / "recipe.yaml")
    assert (recipe.model, recipe.dataset) == ("local:vit", "local:imgs")
    card = files["README.md"].decode()
    assert "`vit`, vision tower quantized to W8A8 " in card
    assert 'from_pretrained(".")' in card
    results = json.loads(files["results.json"])
    assert card.count("with RegCache") == (results["rows"][-1]["name"] == "RegCache")


def test_photos_are_drawn_on_request_only(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    drawn: list[Any] = []
    frame = "optimum_regcache.commands.pictures.frame_outliers"
    monkeypatch.setattr(frame, lambda picture, *rest: drawn.append(picture) or picture)
    options = (
        "analyze",
        "--model",
        home / "vit",
        "--dataset",
        home / "imgs",
        *FEW,
        "--set",
        "search.sensitivity=block",
    )
    assert run(*options, "--output", tmp_path / "a")[0] == 0
    assert drawn
    assert all(image.getextrema() == ((235, 235),) * 3 for image in drawn)
    drawn.clear()
    assert run(*options, "--output", tmp_path / "b", "--show-photos")[0] == 0
    assert all(max(high - low for low, high in image.getextrema()) > 100 for image in drawn)


def test_a_moved_model_is_evaluated_without_comparison(home: Path, tmp_path: Path, run: Any, caplog: Any) -> None:
    options = ("evaluate", "--dataset", home / "imgs", *FEW)
    caplog.set_level("WARNING")
    code, _, _ = run(*options, "--model", home / "q", "--output", tmp_path / "r.json")
    assert code == 0
    assert (
        "No comparison with a float original (vit): it was a folder of the machine where the model was" in caplog.text
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["float_model"] is None
    assert "feature_cosine" not in results
    assert results["model"] == "local:q"
    code, _, line = run(*options, "--model", home / "q", "--float-model", home / "vit", "--output", tmp_path / "r.json")
    assert (code, "holds the result of another job. Use another name, or --overwrite" in line) == (2, True)
    both = (*options, "--model", home / "q", "--output", tmp_path / "r.json", "--overwrite")
    assert run(*both, "--float-model", home / "vit")[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["feature_cosine"] < 0.9999
    for same in (home / "q", f"{home}/./q/"):
        code, _, line = run(*both, "--float-model", same)
        assert (code, "is the model itself. Give the float original" in line) == (2, True)
    (tmp_path / "copy").symlink_to(home / "q")
    again = ("evaluate", "--model", home / "vit", "--dataset", home / "imgs", "--float-model", home / "q", *FEW)
    code, _, line = run(*again, "--output", tmp_path / "s.json")
    assert (code, "is quantized; give the float original, or leave it out" in line) == (2, True)


def test_a_recorded_path_is_never_opened(home: Path, tmp_path: Path, run: Any) -> None:
    """Version 0.1.0 recorded paths; on another machine they lead elsewhere."""
    import shutil

    shutil.copytree(home / "q", tmp_path / "q")
    Recipe(model=str(home / "vit")).save(tmp_path / "q" / "recipe.yaml")
    code, _, _ = run(
        "evaluate", "--model", tmp_path / "q", "--dataset", home / "imgs", *FEW, "--output", tmp_path / "r.json"
    )
    assert code == 0
    assert json.loads((tmp_path / "r.json").read_text())["float_model"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("quantize", "--model", "", "--output", "x"),
            "--model is empty or holds a NUL. Give a value, or leave the option out.",
        ),
        (("quantize", "--dataset", " ", "--output", "x"), "--dataset is empty or holds a NUL. Give a value"),
        (("quantize", "--output", ""), "--output is empty or holds a NUL. Give a value"),
        (("quantize", "--output", "x", "--method", "gptq", ""), "--method is empty or holds a NUL. Give a value"),
        (("evaluate", "--output", "x", "--metric", ""), "--metric is empty or holds a NUL. Give a value"),
        (
            ("export", "--model", "", "--format", "onnx", "--output", "x"),
            "--model is empty or holds a NUL. Give a value",
        ),
        (
            ("quantize", "--output", "x", "--revision", "main"),
            "--revision has no effect: clip-scenes-induced is not on the",
        ),
        (
            ("quantize", "--output", "x", "--template", "a dog"),
            "The template must hold {} once",
        ),
        (("quantize", "--output", "x", "--template", "{x}"), "The template must hold {} once"),
        (
            ("quantize", "--output", "x", "--num-samples", "99999999"),
            "data.num_samples must be at most 10000000, got 99999",
        ),
        (("quantize", "--output", "x\0y"), "--output is empty or holds a NUL. Give a value"),
        (
            ("quantize", "--output", "x", "--recipe", "/proc/self/status"),
            "/proc/self/status is not valid YAML in line 1, ",
        ),
        (
            ("quantize", "--model", "/dev/null", "--dataset", "d", "--output", "x"),
            "--model: /dev/null is a file; give the",
        ),
        (("evaluate", "--output", "/dev/full"), "The output /dev/full is a file that optimum-regcache did not write."),
        (
            ("quantize", "--model", "planted-outlier", "--output", "x", "--set", "search.sensitive_block=99", *FEW),
            "search.sensitive_block=99, but the encoder has blocks 0 to 5.",
        ),
        (("quantize", "--output", "x", "--report-seeds", "0"), "--report-seeds must be at least 1, got 0."),
        (("quantize", "--output", "x", "--seed", "-1"), "search.seed must lie between 0 and 2**32 - 1, got -1."),
        (("quantize", "--output", "x", "--set", "quantization.methods=5"), "methods must be a list of names"),
        (
            ("quantize", "--model", "./nowhere", "--dataset", ".", "--output", "/tmp/x"),
            "--model: there is no directory ./no",
        ),
        (
            ("evaluate", "--model", "a/b/c", "--dataset", ".", "--output", "x"),
            "--model: there is no directory a/b/c (the",
        ),
        (
            ("export", "--model", "clip-w8a8", "--format", "onnx", "--output", "x"),
            "--model: there is no directory clip-w8a8 (the",
        ),
        (
            ("quantize", "--model", "planted-outliers", "--output", "x"),
            "--model: there is no directory planted-outliers",
        ),
        (
            ("quantize", "--model", "local:vit", "--dataset", "d", "--output", "x"),
            "local:vit stands for a folder of the",
        ),
        (
            ("evaluate", "--output", "x", "--metric", "some/space"),
            "--metric some/space: give the name of a metric that",
        ),
        (("evaluate", "--output", "x", "--metric", "./no.py"), "--metric ./no.py: there is no such file."),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    args: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, line = run(*args)
    assert (code, line[: len(message) + 7]) == (2, f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_name_without_owner_is_no_question_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_model", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=r"no embedded encoder has that name \(.*planted-outlier.*OWNER/NAME"):
        sources.open_model("planted-outliers", {})


def test_the_hub_is_not_waited_for_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(name: str, **options: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(sources, "load_model", nothing)
    with pytest.raises(OSError, match=r"--model: some/vit is .* Check the spelling and .* The error was: no route"):
        sources.open_model("some/vit", {})
    assert capsys.readouterr().err == "Asking the Hub for some/vit ...\n"
    offline = (
        r"the cache does not hold all of it, and the Hub is not asked \(.*HF_HUB_OFFLINE\).* `hf download some/vit`"
    )
    with pytest.raises(OSError, match=offline):
        sources.open_model("some/vit", {"local_files_only": True})
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=offline):
        sources.open_model("some/vit", {})
    assert capsys.readouterr().err == ""


def test_recipes_and_data_sets_of_the_hub_are_named_before_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach it (no route)")

    monkeypatch.setattr("datasets.load_dataset", nothing)
    recipe = Recipe(dataset="some/pets")
    with pytest.raises(ConnectionError, match=r"some/pets is no file .* give it: .*\(no route\)\. Check the name and"):
        sources.open_source("planted-outlier", None, recipe)
    assert capsys.readouterr().err == "Asking the Hub for the data set some/pets ...\n"
    assert on_hub("some/recipe@v1")
    assert not any(on_hub(name) for name in ("w8a8", "planted-outlier-w8a8", "a/b.yaml", "a/b/c", tmp_path))


def test_a_metric_of_the_working_directory_needs_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr(
        "evaluate.load", lambda name: loaded.append(name) or (_ for _ in ()).throw(ConnectionError("off"))
    )
    (tmp_path / "accuracy.py").write_text("raise SystemExit('ran')")
    code, _, line = run("evaluate", "--output", "x", "--metric", "accuracy")
    assert (code, "accuracy.py of the working directory has that name and would run" in line) == (2, True)
    (tmp_path / "evaluate-metric" / "f1").mkdir(parents=True)
    assert "evaluate-metric/f1 of the working directory" in run("evaluate", "--output", "x", "--metric", "f1")[2]
    assert loaded == []
    code, _, line = run("evaluate", "--output", "x", "--metric", "recall")
    assert (code, loaded, "ships no such metric, or the Hub cannot be reached" in line) == (
        2,
        ["evaluate-metric/recall"],
        True,
    )


def test_the_source_is_never_overwritten(home: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (home / "vit" / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        sources, "load_model", lambda *args, **kwargs: pytest.fail("opened before the output was checked")
    )
    for output, more in ((home / "vit", ()), (f"{home}/./vit/", ("--overwrite",))):
        options = ("--model", home / "vit", "--dataset", home / "imgs", "--output", output, *more)
        for command in ("quantize", "analyze"):
            code, _, line = run(command, *options)
            assert (code, "is the source model itself, which would be lost" in line) == (2, True)
    code, _, line = run("export", "--model", home / "q", "--format", "onnx", "--output", home / "vit")
    assert (code, "holds a model that optimum-regcache did not write" in line) == (2, True)
    code, _, line = run(
        "quantize", "--dataset", home / "imgs", "--output", home / "imgs" / "q", "--model", home / "vit"
    )
    assert (code, "lies inside the data set" in line) == (2, True)
    code, _, line = run("evaluate", "--model", home / "q", "--output", home / "vit" / "config.json")
    assert (code, "is a file that optimum-regcache did not write" in line) == (2, True)
    assert (home / "vit" / "model.safetensors").read_bytes() == before


def test_a_second_run_needs_the_same_job(tmp_path: Path, run: Any) -> None:
    options = ("quantize", "--model", "planted-outlier", "--output", tmp_path, *PLAIN)
    assert run(*options)[0] == 0
    first = (tmp_path / "model.safetensors").read_bytes()
    assert run(*options)[0] == 0
    code, _, line = run(*options, "--preset", "w4a4")
    assert (code, "holds the result of another job (other quantization)" in line) == (2, True)
    assert (tmp_path / "model.safetensors").read_bytes() == first
    assert run(*options, "--preset", "w4a4", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "results.json").read_text())["quantization"] == "w4a4"


def test_hub_options_reach_model_processor_and_recipe(home: Path, tmp_path: Path, monkeypatch: Any, run: Any) -> None:
    seen: dict[str, Any] = {}
    encoder = reference.load("planted-outlier")

    def model(name: str, **kwargs: Any) -> Any:
        seen["model"] = (name, kwargs)
        return encoder.model

    def processor(name: str, **kwargs: Any) -> Any:
        seen["processor"] = (name, kwargs)
        return encoder.processor

    monkeypatch.setattr(sources, "load_model", model)
    monkeypatch.setattr(sources, "load_processor", processor)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    options = (
        "--revision",
        "abc",
        "--token",
        "secret-token",
        "--cache-dir",
        tmp_path / "c",
        "--offline",
        "--trust-remote-code",
        "--code-revision",
        "def",
    )
    splits = sources.load_splits
    monkeypatch.setattr(sources, "load_splits", lambda name, token: seen.update(token=token) or splits(name))
    out = tmp_path / "out"
    assert run("quantize", "--model", "some/vit", "--dataset", home / "imgs", "--output", out, *PLAIN, *options)[0] == 0
    expected = {
        "revision": "abc",
        "token": "secret-token",
        "cache_dir": str(tmp_path / "c"),
        "local_files_only": True,
        "trust_remote_code": True,
        "code_revision": "def",
    }
    assert seen.pop("token") == "secret-token"
    assert seen == dict.fromkeys(("model", "processor"), ("some/vit", expected))
    recipe = Recipe.load(out / "recipe.yaml")
    assert (recipe.model, recipe.revision) == ("some/vit", "abc")
    card = (out / "README.md").read_text()
    assert "base_model: some/vit" in card
    assert "float original at revision `abc`" in card
    assert "opened with `trust_remote_code`: code of the original's repository ran" in card
    assert not [p for p in out.iterdir() if b"secret-token" in p.read_bytes()]
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_DATASETS_OFFLINE"]) == ("1", "1")
    where = ("evaluate", "--model", out, "--dataset", home / "imgs", *FEW)
    monkeypatch.setattr(
        sources,
        "load_model",
        lambda name, **kw: loading.load_model(name, **kw) if name == str(out) else model(name, **kw),
    )
    seen.clear()
    assert run(*where, "--output", tmp_path / "r.json", "--token", "t")[0] == 0
    assert seen["model"] == ("some/vit", {"token": "t", "revision": "abc"})
