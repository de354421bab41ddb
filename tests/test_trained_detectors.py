"""Trained methods on encoders whose sequence is not only CLS and patches: detection tokens behind them, queries that join."""
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectors import DETECTOR, EOMT

from optimum_regcache import RegCacheConfig, RegCacheQuantizer

METHODS: dict[str, list[Any]] = {
    "light": [{"name": "light", "iterations": 2, "batch": 4, "loss": "block"}],
    "norm_tuning": [{"name": "norm_tuning", "iterations": 2, "batch": 2}],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("action", ["delete", "replace", "late"])
@pytest.mark.parametrize("model", [EOMT, DETECTOR], ids=["eomt", "yolos"])
def test_methods_train_wherever_tokens_are_deleted(model: Any, action: str, block: int, method: str) -> None:
    config = RegCacheConfig(
        weights={"bits": 4},
        activations={"bits": 4},
        registers={"mode": "fixed", "blocks": [block]},
        deletion={"block": block, "count": 2, "action": action},
        attention={"quantize": True, "probabilities": "dfq"},
        methods=METHODS[method],
    )
    pixels = model.inputs(batch=16)["pixel_values"]
    quantizer = RegCacheQuantizer(model.build(), None)
    images = [{"pixel_values": image} for image in pixels]
    result: Any = quantizer.quantize(quantization_config=config, calibration_dataset=images)
    with torch.no_grad():
        assert bool(result(**model.inputs()).last_hidden_state.isfinite().all())
