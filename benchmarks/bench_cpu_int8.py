"""CPU time of W8A8 vision encoders, all contenders interleaved in one process.

    python benchmarks/bench_cpu_int8.py --output bench.json
    python benchmarks/bench_cpu_int8.py --model DIR --images FOLDER_OR_PARQUET
    python benchmarks/bench_cpu_int8.py --tiny          # smoke test: seconds, its figures mean nothing

Contenders: torch float32 (sdpa attention); the same model with static W8A8, simulated ("fake-quant"); int8 (oneDNN where
the CPU has it); int8 with one register row in the upper half of the blocks and four tokens deleted at its first block.
The ratio is time(float32) / time(contender), from the medians of the same run: larger is faster. Without ``--model`` the
weights are random, which is fine for time; the cosine to float then says nothing about a real model.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, PreTrainedModel

from optimum_regcache import RegCacheConfig, set_backend
from optimum_regcache.architectures import find_tower
from optimum_regcache.data import Batch, ImageInputs, collate, load_images
from optimum_regcache.evaluation.features import encode
from optimum_regcache.files import write_json
from optimum_regcache.kernels.onednn import machine_reason
from optimum_regcache.loading import load_model, load_processor
from optimum_regcache.modules import quant_linears
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.report import environment
from optimum_regcache.search.mining import mine_tokens

DELETED_TOKENS = 4
NOISY = 1.25  # a median this many times the minimum points to other load on the machine

FLOAT, SIMULATED, INT8, REGCACHE = "float32 (sdpa)", "simulated", "int8", "int8 + registers + deletion"


def clip_b16() -> PreTrainedModel:
    """CLIP ViT-B/16 at 224 pixels."""
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                            num_attention_heads=12, image_size=224, patch_size=16))  # fmt: skip


def dinov2_s14() -> PreTrainedModel:
    """DINOv2-small; position embeddings for 518 pixels, as published."""
    return Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
                                    image_size=518, patch_size=14))  # fmt: skip


def clip_tiny() -> PreTrainedModel:
    """For the smoke test."""
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                                            num_attention_heads=4, image_size=64, patch_size=8))  # fmt: skip


def dinov2_tiny() -> PreTrainedModel:
    """For the smoke test."""
    return Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2,
                                    image_size=64, patch_size=8))  # fmt: skip


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {"clip-b16": clip_b16, "dinov2-s14": dinov2_s14}
TINY: dict[str, Callable[[], PreTrainedModel]] = {"clip-tiny": clip_tiny, "dinov2-tiny": dinov2_tiny}


@dataclass
class Result:
    """One contender at one batch size; times in milliseconds for the whole batch.

    Attributes:
        model, batch_size, contender: what ran.
        backend: class that computed the linear layers.
        cosine: mean cosine of the pooled output to that of the float model.
        median_ms, minimum_ms: over the repeats.
        ratio_to_float32: median time of float32 / median time of the contender.
        times_ms: every repeat, in order.
    """

    model: str
    batch_size: int
    contender: str
    backend: str
    cosine: float
    median_ms: float = 0.0
    minimum_ms: float = 0.0
    ratio_to_float32: float = 0.0
    times_ms: list[float] = field(default_factory=list)

    def summarise(self, float_median: float | None) -> float:
        """Fill in the statistics; ``float_median`` is None for float32 itself. Returns the median."""
        self.median_ms, self.minimum_ms = statistics.median(self.times_ms), min(self.times_ms)
        self.ratio_to_float32 = (self.median_ms if float_median is None else float_median) / self.median_ms
        return self.median_ms


def random_inputs(count: int, side: int) -> list[Batch]:
    """Standard normal images, one mapping each."""
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, side, side, generator=generator)} for _ in range(count)]


def real_inputs(name: str, processor: Any, count: int) -> list[Batch]:
    """Images of a data set through the model's processor, one mapping each, without labels.

    Raises:
        ValueError: too few images.
    """
    images = ImageInputs(load_images(name, num_samples=count), processor)
    if len(images) < count:
        raise ValueError(f"{name} has {len(images)} images; {count} are needed. Lower --calibration or --batch-sizes.")
    return [{k: v for k, v in images[i].items() if k not in ("labels", "label")} for i in range(count)]


def build_contenders(model: PreTrainedModel, calibration: list[Batch], tau: float) -> dict[str, PreTrainedModel]:
    """The float model and its quantized variants, in the order of the table."""
    tower = find_tower(model)
    depth = len(tower.blocks)
    upper = tuple(range(depth // 2, depth))
    plain = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    prefixed = plain.replace(
        registers={"mode": "fixed", "blocks": upper, "num_copies": tau},
        deletion={"block": upper[0], "count": DELETED_TOKENS},
    )
    mined = mine_tokens(model, calibration, [upper[0]], progress=False)[upper[0]]
    cache = mined.average(upper, depth).restricted(upper, tau)
    int8 = build_quantized(model, plain, None, calibration)
    simulated = copy.deepcopy(int8)
    set_backend(simulated, "simulated")
    return {
        FLOAT: model,
        SIMULATED: simulated,
        INT8: int8,
        REGCACHE: build_quantized(model, prefixed, cache, calibration),
    }


def backend_name(model: PreTrainedModel) -> str:
    """Class that runs the linear layers (all layers of a contender run in the same one)."""
    names = {type(module.runtime()).__name__ for _, module in quant_linears(model)}
    return ", ".join(sorted(names)) or "torch"


@torch.inference_mode()
def measure(
    name: str, contenders: dict[str, PreTrainedModel], held_out: list[Batch], batch_size: int, repeats: int, warmup: int
) -> list[Result]:
    """Time the contenders in turn; the one that goes first changes with every repeat."""
    batch = collate(held_out[:batch_size])
    reference = F.normalize(encode(contenders[FLOAT], [collate(held_out)]), dim=-1)
    results = {}
    for label, model in contenders.items():
        features = F.normalize(encode(model, [collate(held_out)]), dim=-1)
        cosine = float((features * reference).sum(-1).mean())
        results[label] = Result(name, batch_size, label, backend_name(model), cosine)
    order = list(contenders)
    for repeat in track(range(-warmup, repeats), f"{name}, batch {batch_size}", console=Console(stderr=True)):
        shift = repeat % len(order)
        for label in order[shift:] + order[:shift]:
            begun = time.perf_counter()
            contenders[label](**batch)
            elapsed = 1000 * (time.perf_counter() - begun)
            if repeat >= 0:
                results[label].times_ms.append(elapsed)
    float_median = results[FLOAT].summarise(None)
    for label in order[1:]:
        results[label].summarise(float_median)
    return list(results.values())


def render(results: list[Result], title: str) -> Table:
    """The table for the terminal."""
    table = Table(title=title, title_justify="left")
    for heading in ("model", "batch", "contender", "backend"):
        table.add_column(heading, justify="right" if heading == "batch" else "left")
    for heading in ("median ms", "min ms", "ms / image", "ratio to fp32", "cosine"):
        table.add_column(heading, justify="right")
    for position, r in enumerate(results):
        table.add_row(
            r.model,
            str(r.batch_size),
            r.contender,
            r.backend,
            f"{r.median_ms:.2f}",
            f"{r.minimum_ms:.2f}",
            f"{r.median_ms / r.batch_size:.2f}",
            f"{r.ratio_to_float32:.2f}",
            f"{r.cosine:.4f}",
            end_section=position % 4 == 3,
        )
    return table


def describe_environment() -> dict[str, Any]:
    """Versions, CPU and threads, for the JSON file."""
    return {
        **environment(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "logical_cpus": os.cpu_count(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "int8_kernel": machine_reason() or "oneDNN qlinear",
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="shapes, random weights"
    )
    parser.add_argument("--model", help="directory or Hub id of real weights, instead of --shapes")
    parser.add_argument("--images", help="image folder, parquet or Hub id (default: random pixels); needs --model")
    parser.add_argument("--image-size", type=int, default=224, help="side of random images (default 224)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default 1 8")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds over all contenders (default 15)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones (default 2)")
    parser.add_argument("--calibration", type=int, default=16, help="images for the activation scales (default 16)")
    parser.add_argument("--tau", type=float, default=4.0, help="copies of the register; 1 needs no mask (default 4)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--tiny", action="store_true", help="tiny random models, three repeats: a smoke test")
    parser.add_argument("--output", help="JSON file of all results")
    arguments = parser.parse_args()
    if arguments.images and not arguments.model:
        parser.error("--images needs --model: random weights have no image processor.")
    if min(*arguments.batch_sizes, arguments.repeats, arguments.calibration, 1) < 1 or arguments.warmup < 0:
        parser.error("--batch-sizes, --repeats and --calibration must be at least 1, --warmup at least 0.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.tiny:
        arguments.image_size, arguments.repeats, arguments.warmup = 64, min(arguments.repeats, 3), 1
    count = arguments.calibration + max(arguments.batch_sizes)
    shapes = TINY if arguments.tiny else {name: SHAPES[name] for name in arguments.shapes}
    names = [arguments.model] if arguments.model else list(shapes)
    found, results = describe_environment(), []
    for name in names:
        torch.manual_seed(0)
        if arguments.model:
            model: Any = find_tower(load_model(name)).module
        else:
            model = shapes[name]().eval().requires_grad_(False)
        model.set_attn_implementation("sdpa")
        if arguments.images:
            inputs = real_inputs(arguments.images, load_processor(name), count)
        else:
            inputs = random_inputs(count, arguments.image_size)
        held_out = inputs[arguments.calibration :]
        calibration = [collate([item]) for item in inputs[: arguments.calibration]]
        contenders = build_contenders(model, calibration, arguments.tau)
        for batch_size in arguments.batch_sizes:
            label = Path(name).name if arguments.model else name
            results += measure(label, contenders, held_out, batch_size, arguments.repeats, arguments.warmup)
    weights = "weights of the checkpoint" if arguments.model else "random weights"
    title = f"W8A8 on {found['cpu_capability']}, {found['threads']} threads, torch {found['torch']}, {weights}"
    console = Console(width=max(Console().width, 120))
    console.print(render(results, ("SMOKE TEST, not a measurement: " if arguments.tiny else "") + title))
    console.print("ratio = median time of float32 / median time of the contender, in this run; larger is faster.")
    noisy = [r for r in results if r.median_ms > NOISY * r.minimum_ms]
    if noisy:
        console.print(
            f"{len(noisy)} of {len(results)} medians exceed {NOISY} x their minimum: other load? Measure again."
        )
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "shapes", "model")}
        write_json(
            arguments.output,
            {
                "environment": found,
                "settings": settings,
                "models": names,
                "weights": weights,
                "deleted_tokens": DELETED_TOKENS,
                "results": [asdict(r) for r in results],
            },
        )
        console.print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
