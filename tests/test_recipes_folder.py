"""The files in recipes/: what they promise, and that each runs on a tiny model of its architecture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from models import BLOCKS, MODELS, PIXELS
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_regcache.config import (
    ActivationsConfig,
    AttentionConfig,
    DeletionConfig,
    ModulesConfig,
    RegistersConfig,
    RewritesConfig,
    WeightsConfig,
)
from optimum_regcache.config.expect import ExpectConfig
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.data import reference
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.quantizer import RegCacheQuantizer
from optimum_regcache.search.fit import FitResult

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
MODEL_OF = {name: str(Recipe.load(path).model) for name, path in FILES.items()}

# recipe model -> key in `models.MODELS`. google/siglip2-base-patch16-224 is a SiglipModel: only NaFlex checkpoints are not.
ARCHITECTURES = {
    "openai/clip-vit-base-patch16": "clip_dual",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "clip_dual",
    "google/siglip-base-patch16-224": "siglip_dual",
    "google/siglip2-base-patch16-224": "siglip_dual",
    "openai/clip-vit-base-patch32": "clip_dual",
    "openai/clip-vit-large-patch14-336": "clip_dual",
    "google/siglip-so400m-patch14-384": "siglip_dual",
    "facebook/dinov2-base": "dinov2",
    "facebook/dinov2-large": "dinov2",
    "facebook/dinov2-with-registers-base": "dinov2_registers",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "dinov3",
    "dinov2-small-imgfocus": "dinov2",
}
SMALL = (
    "search.num_copies=[1, 2]",
    "search.max_delete=1",
    "search.sensitivity=block",
    "data.num_samples=12",
    "data.batch_size=4",
)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Twelve random images without labels."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)) for _ in range(12)]
    return Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))


def fit_and_quantize(model: Any, processor: Any, images: Any, recipe: Recipe) -> tuple[FitResult, Any]:
    """What the main job does with a recipe; it searches even where there is nothing to repair."""
    recipe = dataclasses.replace(recipe, search=dataclasses.replace(recipe.search, always=True))
    quantizer = RegCacheQuantizer.from_pretrained(model, processor=processor)
    quantized = quantizer.quantize(recipe=recipe, calibration_dataset=images, progress=False)
    assert quantizer.fit_result is not None
    return quantizer.fit_result, quantized


def check(fit: FitResult, quantized: Any, recipe: Recipe, blocks: int) -> None:
    """The search tried what the recipe asks for; every linear layer of the blocks is quantized as it says."""
    search = recipe.search
    assert fit.sensitive_block is not None
    starts = list(range(max(0, fit.sensitive_block - search.blocks_before), fit.sensitive_block + 1))
    assert sorted(fit.mined) == starts
    setups = [trial.setup for trial in fit.search.trials]
    assert {setup.kind for setup in setups} == {"nothing", "prefix", "delete", "both"}
    assert {setup.start_block for setup in setups} <= {None, *starts}
    assert {setup.scope for setup in setups} <= {"onwards", *search.scopes}
    assert max(setup.count for setup in setups) <= search.max_delete
    assert fit.config.label == recipe.quantization.label
    assert fit.config.registers.mode in ("fixed", "none")
    layers = [module for _, module in quant_linears(quantized)]
    assert len(layers) == 6 * blocks  # q, k, v, out, fc1, fc2
    assert {layer.weights.bits for layer in layers} == {recipe.quantization.weights.bits}
    assert quantized.config.quantization_config == fit.config


def test_every_recipe_is_run_by_a_test_and_named_in_the_readme() -> None:
    assert set(ARCHITECTURES) | set(reference.names()) == set(MODEL_OF.values())
    listed = set()
    for row in re.findall(r"^\| `([^`]+)\.yaml` \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        stem, _, labels = row.partition("{")
        listed |= {stem + label for label in labels.removesuffix("}").split(",")}
    assert listed == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_survives_saving(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(FILES[name])
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", FILES)
def test_it_follows_the_paper_and_says_what_was_measured(name: str) -> None:
    recipe = Recipe.load(FILES[name])
    assert name.endswith(f"-{recipe.quantization.label}")
    activations = recipe.quantization.activations
    assert (activations.mode, activations.granularity, activations.observer) == ("static", "per_tensor", "minmax")
    assert recipe.quantization.registers.mode == "search"
    search = recipe.search
    assert (search.strategy, search.blocks_before, search.max_delete) == ("averaged_tokens", 3, 10)
    assert search.num_copies == tuple(float(tau) for tau in range(1, 16))
    assert recipe.model
    assert (recipe.dataset is None) == (recipe.model in reference.names())  # reference encoders render their own images
    if "/" not in MODEL_OF[name]:  # a model without a repository on the Hub
        assert "docs/results/accuracy.md" in recipe.notes
    else:
        assert recipe.notes.startswith("Not measured by this project: the weights need the Hub. ")
        assert recipe.expect is None or (recipe.expect.source, recipe.expect.metric) == ("published", "accuracy")
    zero_shot = ARCHITECTURES.get(str(recipe.model), "").endswith("_dual")
    assert search.objective == ("accuracy" if zero_shot else "cosine")
    assert search.scopes == (("onwards", "single") if "dino" in name else ("onwards",))


@pytest.mark.parametrize("name", [name for name, model in MODEL_OF.items() if model in ARCHITECTURES])
def test_it_runs_on_a_tiny_model_of_its_architecture(name: str, pictures: Dataset) -> None:
    recipe = Recipe.load(FILES[name]).override([*SMALL, "search.objective=cosine"])
    model = MODELS[ARCHITECTURES[str(recipe.model)]].build()
    side = {"height": PIXELS, "width": PIXELS}
    processor = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=side)
    fit, quantized = fit_and_quantize(model, processor, pictures, recipe)
    check(fit, quantized, recipe, BLOCKS)
    with torch.no_grad():
        pixel_values = processor(images=pictures[0]["image"], return_tensors="pt")["pixel_values"]
        tower = getattr(quantized, "vision_model", quantized)
        assert bool(tower(pixel_values).last_hidden_state.isfinite().all())


def test_the_siglip2_recipe_runs_on_the_variable_resolution_class_too() -> None:
    recipe = Recipe.load(FILES["siglip2-base-patch16-224-w8a8"]).override([*SMALL, "search.objective=cosine"])
    siglip2 = MODELS["siglip2"]
    fit, quantized = fit_and_quantize(siglip2.build(), None, [siglip2.inputs(batch=12)], recipe)
    check(fit, quantized, recipe, BLOCKS)
    assert bool(siglip2.run(quantized).isfinite().all())


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("clip-scenes-w8a8", "clip-scenes"),
        ("clip-scenes-induced-w6a6", "clip-scenes-induced"),
        ("siglip-scenes-induced-w4a4", "siglip-scenes-induced"),
        ("planted-outlier-w8a8", "planted-outlier"),
        (
            "clip-vit-base-patch16-w8a8",
            "clip-scenes-induced",
        ),  # a CLIPModel with its tokenizer: the zero-shot objective
    ],
)
def test_it_runs_on_a_reference_encoder(name: str, encoder: str) -> None:
    recipe = Recipe.load(FILES[name]).override(list(SMALL))
    source = reference.load(encoder)
    fit, quantized = fit_and_quantize(source.model, source.processor, source.dataset("search", 12, 0), recipe)
    vision = getattr(source.model.config, "vision_config", source.model.config)
    check(fit, quantized, recipe, vision.num_hidden_layers)
    if recipe.search.objective == "accuracy":
        assert {float(score) for trial in fit.search.trials for score in trial.scores} <= {0.0, 1.0}


def test_the_readme_lists_every_field() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    parts = {
        "search": SearchConfig,
        "data": DataConfig,
        "quantization.weights": WeightsConfig,
        "quantization.activations": ActivationsConfig,
        "quantization.registers": RegistersConfig,
        "quantization.deletion": DeletionConfig,
        "quantization.modules": ModulesConfig,
        "quantization.attention": AttentionConfig,
        "quantization.rewrites": RewritesConfig,
    }
    parts["expect"] = ExpectConfig
    known = {f"{part}.{f.name}" for part, cls in parts.items() for f in dataclasses.fields(cls)}
    assert {name for name, _ in rows} == known | {
        "model",
        "dataset",
        "revision",
        "notes",
        "preset",
        "quantization.methods",
    }
    for name, default in rows:
        part, _, field = name.partition(".")
        if part == "expect":  # a section that is not there
            assert yaml.safe_load(default.strip("`")) == getattr(ExpectConfig(), field), f"{name}: default"
        elif name != "preset":
            assert Recipe().override([f"{name}={default.strip('`')}"]) == Recipe(), f"{name}: default is not {default}"
