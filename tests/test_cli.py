"""`optimum-cli regcache` as a user runs it, and the jobs behind it."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from transformers import AutoModel, AutoModelForImageClassification

from optimum_regcache.commands.sources import open_source, split_images
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data import reference
from optimum_regcache.data.reference import planted
from optimum_regcache.hub.loading import load_model, load_processor
from optimum_regcache.kernels.onednn import machine_reason

CLI = str(Path(sys.executable).with_name("optimum-cli"))


def run_process(*args: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    result = subprocess.run([CLI, "regcache", *args], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("cli") / "planted"
    result = run_process(
        "quantize", "--model", "planted-outlier", "--preset", "w8a8", "--output", str(output), "--num-samples", "48",
        "--num-report", "48", "--set", "search.max_delete=4", "--set", "search.num_copies=[1, 15]", "--no-recommend",
    )  # fmt: skip
    return output, result.stdout


def test_quantize_prints_the_table_and_writes_everything(quantized):
    output, stdout = quantized
    for text in (
        "float",
        "naive",
        "per token",
        "prefix only",
        "delete only",
        "RegCache",
        "SYNTHETIC",
        "sensitive block 3",
    ):
        assert text in stdout
    names = {p.name for p in output.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "results.json", "README.md"} <= names
    assert {"analysis.png", "outliers.png"} <= names
    rows = {row["name"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    halves = ["prefix only", "delete only", "best prefix", "best delete"]
    assert list(rows) == ["float", "naive", "per token", *halves, "RegCache"]
    assert rows["naive"]["accuracy"] < rows["float"]["accuracy"] / 2
    assert rows["RegCache"]["accuracy"] > 0.95 * rows["float"]["accuracy"]
    assert rows["naive"]["max_fc2_norm"] > 50 * rows["RegCache"]["max_fc2_norm"]
    recipe = Recipe.load(output / "recipe.yaml")
    assert recipe.model == "planted-outlier"
    assert recipe.search.num_copies == (1.0, 15.0)
    assert recipe.quantization.registers.mode == "fixed"
    card = (output / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| RegCache |" in card
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.quantization_config.registers.blocks


def test_evaluate_reads_the_recipe_beside_the_model(quantized, tmp_path, run):
    output, _ = quantized
    fused = ["--fused"] if machine_reason() is None else []
    code, out, _ = run(
        "evaluate", "--model", output, "--output", tmp_path / "results.json", "--num-report", "32", *fused
    )
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["float_model"] == "planted-outlier"
    assert results["accuracy"] > 0.9
    assert results["retention"] > 0.9
    assert results["feature_cosine"] > 0.98
    assert results["quantized_layers"] == 36
    assert results["quantization"] == "w8a8"
    if machine_reason() is None:
        assert "fused, float32 attention: how 6 of 6 blocks fused, float32 attention, accuracy" in out
        assert len(results["fused"]) == 2
        for found in results["fused"].values():
            assert found["how"].startswith("6 of 6 blocks fused")
            assert found["accuracy"] > 0.9
            assert found["feature_cosine"] == pytest.approx(results["feature_cosine"], abs=1e-3)


METRIC = """
import datasets
import evaluate


class Hits(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"hits": sum(p == r for p, r in zip(predictions, references))}
"""


def test_evaluate_takes_metrics_of_the_evaluate_library(quantized, tmp_path, run, monkeypatch):
    (tmp_path / "hits.py").write_text(METRIC)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    options = ("--output", str(tmp_path / "r.json"), "--num-report", "16", "--metric", str(tmp_path / "hits.py"))
    assert run("evaluate", "--model", quantized[0], *options)[0] == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["hits"] == round(16 * results["accuracy"])


def test_analyze_writes_json_and_pictures(tmp_path, run):
    options = ("--num-samples", "24", "--set", "search.sensitivity=block")
    code, stdout, _ = run("analyze", "--model", "planted-outlier", "--output", tmp_path, *options)
    assert code == 0
    assert "sensitive block 3" in stdout
    data = json.loads((tmp_path / "analysis.json").read_text())
    assert data["sensitivity"]["sensitive_block"] == 3
    assert len(data["norms"]["max_block_input"]) == 6
    assert [row["name"] for row in data["rows"]] == ["float", "naive", "per token"]
    assert (
        data["rows"][1]["accuracy"] < 0.3 < 0.9 < data["rows"][2]["accuracy"]
    )  # the outliers spoil static scales only
    assert data["outliers"]["fc2_ratio"][3] > 100
    assert f"on {data['report_images']} unseen images:" in stdout
    assert (tmp_path / "analysis.png").stat().st_size > 10_000
    assert (tmp_path / "outliers.png").stat().st_size > 1_000


def test_no_registers_gives_plain_quantization(tmp_path, run):
    options = ("--no-registers", "--num-samples", "16", "--num-report", "16")
    code, stdout, _ = run("quantize", "--model", "planted-outlier", "--output", tmp_path, *options)
    assert code == 0
    assert "│ naive" in stdout
    assert "│ RegCache" not in stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.quantization_config.registers.mode == "none"


def test_several_presets_make_one_model_each(tmp_path, run):
    options = ("--no-registers", "--num-samples", "16", "--num-report", "16", "--preset", "w8a8", "w4a4")
    code, stdout, _ = run("quantize", "--model", "planted-outlier", "--output", tmp_path, *options)
    assert code == 0
    for preset in ("w8a8", "w4a4"):
        assert f"saved to {tmp_path / preset}" in stdout
        model = AutoModelForImageClassification.from_pretrained(tmp_path / preset)
        assert model.config.quantization_config.label == preset
        rows = json.loads((tmp_path / preset / "results.json").read_text())["rows"]
        assert [row["name"] for row in rows] == ["float", "naive", "per token", "plain"]
    assert {p.name for p in tmp_path.iterdir()} == {"w8a8", "w4a4"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("quantize", "--output", "x", "--recipe", "no-such.yaml"), "No recipe 'no-such.yaml'"),
        (("quantize", "--output", "x", "--set", "search.depth=3"), "Unknown recipe field 'search.depth'"),
        pytest.param(
            ("quantize", "--output", "x", "--device", "cuda"),
            "--device cuda: this machine or this PyTorch build has no CUDA. Use --device cpu.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
        (("quantize", "--output", "x", "--dataset", "./no-such-folder"), "No such data set file or directory"),
        (
            ("quantize", "--output", "x", "--no-registers", "--set", "search.max_delete=3"),
            "search.max_delete=3 has no effect: nothing is searched with registers.mode='none'",
        ),
        (("evaluate", "--output", "x", "--preset", "w4a4"), "--preset has no effect: evaluate opens a finished model"),
    ],
)
def test_user_errors_are_one_line(args, message, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, line = run(*args)
    assert code == 2
    assert line.startswith(f"error: {message}")


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['optimum-cli', 'regcache', 'quantize', '--help'];"
        "from optimum.commands.optimum_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = [m for m in ('torch', 'transformers', 'optimum_regcache') if m in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--no-registers" in result.stdout
    assert "HEAVY []" in result.stdout


@pytest.mark.parametrize(
    ("name", "kind"),
    [("clip-scenes-induced", "CLIPModel"), ("siglip-scenes-induced", "SiglipModel"), ("clip-scenes", "CLIPModel")],
)
def test_embedded_encoder_opens_by_name_with_its_processor(name: str, kind: str):
    model, processor = load_model(name), load_processor(name)
    assert type(model).__name__ == kind
    assert model.dtype == torch.float32
    assert processor.tokenizer("a red circle").input_ids[-1] == model.config.text_config.eos_token_id
    with pytest.raises(ValueError, match="Unknown reference encoder 'clip'; available: clip-scenes-induced, "):
        reference.load("clip")


@pytest.mark.parametrize("name", ["clip-scenes-induced", "siglip-scenes-induced", "clip-scenes"])
def test_embedded_encoder_recognises_unseen_scenes(name: str):
    from optimum_regcache.data.images import ImageInputs, class_names
    from optimum_regcache.evaluation import AccuracyObjective
    from optimum_regcache.evaluation.objective import zero_shot_features

    ref = reference.load(name)
    images = ref.dataset("report", 96, 0)
    inputs = ImageInputs(images, ref.processor)
    text = zero_shot_features(ref.model, ref.processor, class_names(images), ref.template)
    accuracy = AccuracyObjective(list(inputs.batches(48)), inputs.labels(), text).scores(ref.model).mean()
    assert accuracy > 0.9  # chance is 1/64


def parquet(path: Path, split: str, count: int, offset: int = 0) -> None:
    images = [planted.render("train", offset + i)[0] for i in range(count)]
    Dataset.from_dict({"image": images}).cast_column("image", Image()).to_parquet(path / f"{split}.parquet")


def pixels_of(dataset) -> set[bytes]:
    return {row["image"].tobytes() for row in dataset}


def test_report_images_come_from_the_test_split_or_are_held_back(tmp_path):
    (tmp_path / "two").mkdir()
    parquet(tmp_path / "two", "train", 12)
    parquet(tmp_path / "two", "test", 6, offset=12)
    search, report = split_images(str(tmp_path / "two"), 10, 5, 0)
    assert (len(search), len(report)) == (10, 5)
    assert not pixels_of(search) & pixels_of(report)
    (tmp_path / "one").mkdir()
    parquet(tmp_path / "one", "all", 12)
    search, report = split_images(str(tmp_path / "one"), 100, 100, 0)
    assert (len(search), len(report)) == (8, 4)
    assert not pixels_of(search) & pixels_of(report)
    for number, seed in ((1, 0), (2, 5), (4, 9)):  # another report never meets an image of this search
        assert not pixels_of(search) & pixels_of(split_images(str(tmp_path / "one"), 8, number, seed)[1])
    (tmp_path / "few").mkdir()
    parquet(tmp_path / "few", "all", 5)
    with pytest.raises(ValueError, match="has 5 images; at least 8 are needed"):
        split_images(str(tmp_path / "few"), 4, 4, 0)


def test_a_model_of_the_users_needs_a_data_set(tmp_path):
    reference.load("planted-outlier").model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"--dataset is needed for .*: a Hub id, a folder of images, a folder written by save_to_disk"
    ):
        open_source(str(tmp_path), None, Recipe())


def test_saved_clip_opens_with_automodel_and_vision_tower(tmp_path):
    from transformers import CLIPVisionModel

    from optimum_regcache import RegCacheConfig, RegCacheQuantizer

    quantizer = RegCacheQuantizer.from_pretrained("clip-scenes")
    images = reference.load("clip-scenes").dataset("search", 16, 0)
    model = quantizer.quantize(
        tmp_path, quantization_config=RegCacheConfig(registers={"mode": "none"}), calibration_dataset=images
    )
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
        assert torch.equal(AutoModel.from_pretrained(tmp_path).get_image_features(pixels).pooler_output, expected)
        tower = CLIPVisionModel.from_pretrained(tmp_path)
        assert torch.equal(tower(pixels).pooler_output, model.vision_model(pixels).pooler_output)
