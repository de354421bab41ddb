"""sentence-transformers opens the folder of a quantized model and computes the same embeddings."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.data import reference
from optimum_regcache.quantizer import build_quantized

TEXTS = ["a red ring", "a blue square"]


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_images_and_texts_are_encoded_by_the_quantized_model(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    ref = reference.load("clip-scenes-induced")
    images = [row["image"] for row in ref.dataset("report", 4, 0)]
    inputs = ref.processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
    config = RegCacheConfig.from_preset("w8a8").replace(
        registers={"mode": "fixed", "blocks": (1,), "num_copies": 2.0}, deletion={"block": 1, "count": 2}
    )
    rows = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(0))
    cache = RegisterCache({1: rows[0]}, {1: rows[1]}, 6, 2.0)
    pixels = {"pixel_values": inputs["pixel_values"]}
    model = build_quantized(ref.model, config, cache, [pixels])
    model.save_pretrained(tmp_path)
    ref.processor.save_pretrained(tmp_path)
    opened = SentenceTransformer(str(tmp_path), device="cpu")
    with torch.no_grad():
        expected = {
            "images": (images, model.get_image_features(**pixels).pooler_output),
            "texts": (TEXTS, model.get_text_features(inputs["input_ids"]).pooler_output),
        }
    for given, features in expected.values():
        found = torch.as_tensor(opened.encode(given))
        assert F.cosine_similarity(found, features.float(), dim=-1).min() > 0.9999
