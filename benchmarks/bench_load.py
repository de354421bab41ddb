"""What opening a checkpoint costs with its fingerprint compared, and without. Rounds in turn, in one process.

python benchmarks/bench_load.py              # CLIP ViT-B/16, W8A8, random weights
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging

import encoder_shapes
from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.hub import checks


@contextmanager
def without_digests() -> Iterator[None]:
    """Names, dtypes and shapes are compared; the content is not."""
    with mock.patch.object(checks, "_check_saved", return_value=True):
        yield


def milliseconds(folder: Path) -> float:
    begun = time.perf_counter()
    AutoModel.from_pretrained(folder)
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = encoder_shapes.clip(768, 3072, 12, 12, 224, 16)().eval()
    config = RegCacheConfig.from_preset("w8a8-dynamic").replace(registers={"mode": "none"})
    quantized = RegCacheQuantizer(model).quantize(quantization_config=config, progress=False)
    with tempfile.TemporaryDirectory() as name:
        saved, plain = Path(name) / "saved", Path(name) / "plain"
        for folder in (saved, plain):
            quantized.save_pretrained(folder)
        file = plain / "model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
        ways: dict[str, tuple[Path, Callable[[], object]]] = {
            "without the fingerprint": (saved, without_digests),
            "with it": (saved, nullcontext),
            "an older file, ranges instead": (plain, nullcontext),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(arguments.rounds + 1):
            for way, (folder, context) in ways.items():
                with context():  # type: ignore[attr-defined]
                    found = milliseconds(folder)
                if number:
                    times[way].append(found)
        size = (saved / "model.safetensors").stat().st_size / 2**20
    base = times["without the fingerprint"]
    print(f"{size:.0f} MiB, {arguments.rounds} rounds, {torch.get_num_threads()} threads")
    print("| | median ms | ratio to without |\n|---|---|---|")
    for way, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"| {way} | {statistics.median(found):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
