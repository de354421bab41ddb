"""Quantized checkpoints in transformers pipelines give what the model gives when called directly."""
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CLIP_CLASSIFIER, MODELS, PIXELS, TinyModel, quantized, random_cache
from PIL import Image
from transformers import pipeline
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.data import reference
from optimum_regcache.quantizer import build_quantized

SIZES = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}


@pytest.fixture
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in (40, 56)]


def saved(tiny: TinyModel, processor: Any, folder: Path) -> Any:
    model = quantized(tiny, modules={"head": True})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize("processor_class", [CLIPImageProcessorPil, BitImageProcessorPil])
@pytest.mark.parametrize("name", ["clip", "dinov2", "vit"])
def test_image_feature_extraction(name: str, processor_class: type, images: list, tmp_path: Path) -> None:
    processor = processor_class(**SIZES)
    model = saved(MODELS[name], processor, tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    assert type(extract.image_processor) is processor_class
    assert type(extract.model) is type(model)
    for image, features in zip(images, extract(images, return_tensors=True), strict=True):
        with torch.no_grad():
            expected = model(**processor(image, return_tensors="pt")).last_hidden_state
        assert torch.equal(features, expected)
    with torch.no_grad():
        pooled = model(**processor(images[0], return_tensors="pt")).pooler_output
    assert torch.equal(extract(images[0], pool=True, return_tensors=True), pooled)


@pytest.mark.parametrize(
    "tiny", [MODELS["dinov2_classifier"], MODELS["vit_classifier"], CLIP_CLASSIFIER], ids=lambda t: t.name
)
def test_image_classification(tiny: TinyModel, images: list, tmp_path: Path) -> None:
    processor = BitImageProcessorPil(**SIZES)
    model = saved(tiny, processor, tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path))
    for image, answers in zip(images, classify(images, top_k=5), strict=True):
        with torch.no_grad():
            expected = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
        found = {answer["label"]: answer["score"] for answer in answers}
        assert found == {model.config.id2label[i]: pytest.approx(float(p), rel=1e-6) for i, p in enumerate(expected)}
        scores = [answer["score"] for answer in answers]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", ["clip-scenes-induced", "siglip-scenes-induced"])
def test_zero_shot_image_classification(name: str, tmp_path: Path) -> None:
    encoder = reference.load(name)
    data = encoder.dataset("search", 6, 0)
    names, images = data.features["label"].names, list(data["image"])
    tower = encoder.model.config.vision_config
    config = RegCacheConfig(
        registers={"mode": "fixed", "blocks": (5,), "num_copies": 2.0}, deletion={"block": 5, "count": 2}
    )
    rows = random_cache((5,), num_blocks=tower.num_hidden_layers).rows(5)
    wide = [row.repeat(1, 1, tower.hidden_size // tower.num_attention_heads // row.shape[-1]) for row in rows]
    cache = RegisterCache({5: wide[0]}, {5: wide[1]}, tower.num_hidden_layers, 2.0)
    batch = encoder.processor(images=images, return_tensors="pt")
    model = build_quantized(encoder.model, config, cache, [dict(batch)])
    model.save_pretrained(tmp_path)
    encoder.processor.save_pretrained(tmp_path)

    siglip = name.startswith("siglip")  # trained with full padding; its scores are sigmoids
    padding = {"padding": "max_length", "max_length": 64, "truncation": True} if siglip else {"padding": True}
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    for image, answers in zip(images, classify(images, names, hypothesis_template="{}"), strict=True):
        inputs = encoder.processor(images=image, text=list(names), return_tensors="pt", **padding)
        with torch.no_grad():
            logits = model(**inputs).logits_per_image[0]
        expected = logits.sigmoid() if siglip else logits.softmax(-1)
        found = {answer["label"]: answer["score"] for answer in answers}
        assert found == {name: pytest.approx(float(p), rel=1e-5) for name, p in zip(names, expected, strict=True)}
