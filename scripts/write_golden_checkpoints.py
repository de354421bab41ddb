"""Write the golden checkpoints of ``tests/golden/checkpoints``: tiny quantized models that every later version must open to
the same bits and the same outputs.

    PYTHONPATH=tests python scripts/write_golden_checkpoints.py NEW_FOLDER

The committed ones were written by version 0.1.0 and are never written again; a change of format adds a folder beside them.
"""
# pyright: reportArgumentType=false

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from models import HEAD_DIM, TOWERS, image_inputs
from safetensors.torch import save_file

from optimum_regcache import RegCacheConfig, RegisterCache
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.layers.linear import quant_linears, set_backend
from optimum_regcache.quantizer import build_quantized

REGISTERS = {
    "registers": {"mode": "fixed", "blocks": (1,), "num_copies": 3.0},
    "deletion": {"block": 1, "count": 2},
}
CASES: dict[str, dict] = {
    "w8a8-registers": REGISTERS,
    "w6a6": {"weights": {"bits": 6}, "activations": {"bits": 6}, "registers": {"mode": "none"}},
    "w4a4": {"weights": {"bits": 4, "symmetric": False}, "activations": {"bits": 4}, "registers": {"mode": "none"}},
    "rotation": {**REGISTERS, "methods": ["rotation"]},
    "noisyquant": {**REGISTERS, "methods": [{"name": "noisyquant"}], "activations": {"bits": 6}},
}
# the families spell their sizes differently
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "clip": {**SMALL, "intermediate_size": 64},
    "siglip": {**SMALL, "intermediate_size": 64},
    "dinov2": SMALL,
}


def register_cache() -> RegisterCache:
    """One register in block 1 of 2, three copies."""
    key, value = torch.randn(2, 2, 1, HEAD_DIM, generator=torch.Generator().manual_seed(3)) * 1.5
    return RegisterCache({1: key}, {1: value}, 2, 3.0)


def write(folder: Path) -> None:
    """All combinations of `FAMILIES` and `CASES`, each with its recipe, inputs and outputs."""
    for family, sizes in FAMILIES.items():
        tiny = TOWERS[family]
        model = tiny.build(seed=7, **sizes)
        for case, parts in CASES.items():
            config = RegCacheConfig(**parts)
            cache = register_cache() if config.registers.mode == "fixed" else None
            quantized = build_quantized(model, config, cache, [image_inputs(11, 4)])
            path = folder / f"{family}-{case}"
            quantized.save_pretrained(path)
            resolved = quantized.config.quantization_config
            Recipe(quantization=resolved, notes="golden").save(path / "recipe.yaml")
            set_backend(quantized, "simulated")
            pixels = image_inputs(5, 3)["pixel_values"].half()
            output = tiny.run(quantized, {"pixel_values": pixels.float()})
            save_file({"pixel_values": pixels, "output": output}, path / "expected.safetensors")
            weights = {
                name: hashlib.sha256(layer.dequantized_weight().numpy().tobytes()).hexdigest()
                for name, layer in quant_linears(quantized)
            }
            (path / "expected_weights.json").write_text(json.dumps(weights, indent=1) + "\n")
            print(path, sum(f.stat().st_size for f in path.iterdir()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    torch.set_num_threads(1)
    write(parser.parse_args().folder)
