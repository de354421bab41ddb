"""Run an exported model in transformers.js and compare it with the quantized model in PyTorch, on four of the embedded scenes.

    python scripts/check_transformers_js.py               # quantizes an embedded encoder first
    python scripts/check_transformers_js.py --model out   # a CLIP or SigLIP that `optimum-cli regcache quantize` wrote

Needs Node.js 20 with npm, which installs @huggingface/transformers into --packages; nothing else leaves the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from optimum_regcache.commands.export import LEAST_COSINE
from optimum_regcache.data import scenes
from optimum_regcache.export import export_transformers_js
from optimum_regcache.hub.loading import load_model, load_processor

SCRIPT = Path(__file__).with_suffix(".mjs")
PACKAGE = "@huggingface/transformers"
QUICK = ("--quick", "--num-samples", "48", "--num-report", "32", "--no-recommend")


def run(*command: str, cwd: Path | None = None) -> str:
    """Output of a command; ends with its errors if it fails."""
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)
    if result.returncode:
        sys.exit(f"{' '.join(command[:4])} ... failed:\n{result.stderr}")
    return result.stdout


def in_transformers_js(folder: Path, images: list[Any], texts: list[str], packages: Path) -> dict[str, Any]:
    """Embeddings and logits that transformers.js computes from ``folder``."""
    packages.mkdir(parents=True, exist_ok=True)
    if not (packages / "node_modules" / PACKAGE).is_dir():
        run("npm", "install", "--no-fund", "--no-audit", PACKAGE, cwd=packages)
    shutil.copy(SCRIPT, packages)  # modules are looked for beside the script
    files = []
    for number, image in enumerate(images):
        image.save(packages / f"{number}.png")
        files.append(f"{number}.png")
    out = run("node", SCRIPT.name, os.fspath(folder.resolve()), json.dumps(texts), *files, cwd=packages)
    return json.loads(out.splitlines()[-1])


@torch.inference_mode()
def in_pytorch(model: Any, processor: Any, images: list[Any], texts: list[str]) -> dict[str, torch.Tensor]:
    """The same of the model itself."""
    padding = "max_length" if model.config.model_type == "siglip" else True
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=padding, truncation=True)
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    return {
        "image": model.get_image_features(pixel_values=pixels).pooler_output,
        "text": model.get_text_features(input_ids=ids).pooler_output,
        "logits": model(input_ids=ids, pixel_values=pixels).logits_per_image,
    }


def main(model_dir: str | None, packages: str | None) -> None:
    """Quantize, export, run, compare."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if model_dir is None:
            model_dir = str(place / "model")
            cli = str(Path(sys.executable).with_name("optimum-cli"))
            run(cli, "regcache", "quantize", "--model", "clip-scenes-induced", *QUICK, "--output", model_dir)
        model, processor = load_model(model_dir), load_processor(model_dir)
        folder = export_transformers_js(model, place / "exported", processor=processor)
        dataset = scenes.load_dataset("report", 4, seed=0)
        images, texts = list(dataset["image"]), ["a red ring", "a blue square", "two green circles"]
        found = in_transformers_js(folder, images, texts, place / "node" if packages is None else Path(packages))
        expected = in_pytorch(model, processor, images, texts)
    print(f"transformers.js {found['version']}, {model.config.quantization_config.label}")
    worst = 1.0
    for name, rows in expected.items():
        cosine = float(F.cosine_similarity(torch.tensor(found[name]), rows, dim=-1).min())
        worst = min(worst, cosine)
        print(f"{name}: smallest cosine {cosine:.6f}")
    if not worst >= LEAST_COSINE:
        sys.exit(f"transformers.js computes another function: cosine {worst:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a quantized model (default: an embedded encoder is quantized)")
    parser.add_argument("--packages", help="folder of the npm packages, kept (default: a temporary one)")
    arguments = parser.parse_args()
    main(arguments.model, arguments.packages)
