"""GPU time of W8A8 vision encoders, all contenders interleaved in one process.

    python benchmarks/bench_gpu_int8.py --output bench-gpu.json
    python benchmarks/bench_gpu_int8.py --max-autotune
    python benchmarks/bench_gpu_int8.py --smoke         # tiny shapes on the CPU: tests this script, measures nothing

Shapes: ViT-L/14 at 336 pixels (CLIP) and SigLIP-So400m at 384, random weights, bfloat16. Contenders: bfloat16 eager; bfloat16
compiled; static W8A8 through `torch._int_mm`, compiled; the same with one register row in the upper half of the blocks and
tokens deleted at its first block; torchao's dynamic int8, compiled, if torchao is installed. The ratio is
time(bfloat16 compiled) / time(contender), from the medians of the same run: larger is faster. The cosine is to the float32
model; with random weights it says nothing about a real one. Without a CUDA device nothing is measured or written.
"""
# pyright: reportArgumentType=false

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from encoder_shapes import Shape, clip, siglip
from optimum_regcache import RegCacheConfig, set_backend
from optimum_regcache.commands.report import environment
from optimum_regcache.config.files import write_json
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.search.mining import mine_tokens

EAGER, COMPILED = "bf16 eager", "bf16 compiled"
INT8, REGCACHE, TORCHAO = "int8 compiled", "int8 + registers + deletion, compiled", "torchao int8 dynamic, compiled"
Batch = dict[str, torch.Tensor]


SHAPES: dict[str, Shape] = {
    "clip-l14-336": clip(1024, 4096, 24, 16, 336, 14),
    "siglip-so400m-384": siglip(1152, 4304, 27, 16, 384, 14),
}
SMOKE: dict[str, Shape] = {
    "clip-smoke": clip(64, 128, 2, 4, 32, 8),
    "siglip-smoke": siglip(72, 268, 2, 4, 32, 8),  # widths that are no multiples of 16
}


@dataclass
class Result:
    """One contender at one batch size; times in milliseconds for the whole batch.

    Attributes:
        model, batch_size, contender: what ran.
        cosine: mean cosine of the pooled output to that of the float32 model.
        peak_mb: its weights and the largest memory of a pass, in 1e6 bytes; 0 without a GPU.
        median_ms, minimum_ms: over the repeats.
        ratio: median time of bfloat16 compiled / median time of the contender.
        times_ms: every repeat, in order.
        failed: why it did not run, "" if it did.
    """

    model: str
    batch_size: int
    contender: str
    cosine: float = 0.0
    peak_mb: float = 0.0
    median_ms: float = 0.0
    minimum_ms: float = 0.0
    ratio: float = 0.0
    times_ms: list[float] = field(default_factory=list)
    failed: str = ""


def random_pixels(count: int, side: int, device: str) -> torch.Tensor:
    """Standard normal images, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator).to(device, torch.bfloat16)


def compiled(model: nn.Module, arguments: argparse.Namespace) -> Callable[..., Any]:
    """One graph, a new one for each batch size."""
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if arguments.smoke:
        settings["backend"] = "eager"  # traces like inductor and needs no compiler
    elif arguments.max_autotune:
        settings["mode"] = "max-autotune"
    return torch.compile(model, **settings)


def quantized(model: PreTrainedModel, calibration: list[Batch], registers: bool, deleted: int) -> PreTrainedModel:
    """Static W8A8 in the int_mm backend, prepared by one eager pass."""
    config = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    cache = None
    if registers:
        depth = len(find_tower(model).blocks)
        upper = tuple(range(depth // 2, depth))
        found = {"mode": "fixed", "blocks": upper, "num_copies": 4.0}
        config = config.replace(registers=found, deletion={"block": upper[0], "count": deleted})
        mined = mine_tokens(model, calibration, [upper[0]], progress=False)[upper[0]]
        cache = mined.average(upper, depth).restricted(upper, 4.0)
    result = build_quantized(model, config, cache, calibration)
    set_backend(result, "int_mm")
    with torch.inference_mode():
        result(**calibration[0])
    return result


def torchao_dynamic(model: PreTrainedModel) -> nn.Module:
    """torchao's int8 weights and dynamic int8 inputs.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # pyright: ignore[reportMissingImports]

    twin = copy.deepcopy(model)
    quantize_(twin, Int8DynamicActivationInt8WeightConfig())
    return twin


def build_contenders(
    model: PreTrainedModel, calibration: list[Batch], arguments: argparse.Namespace
) -> tuple[dict[str, tuple[nn.Module, Callable[..., Any]]], dict[str, str]]:
    """(label -> model and what to call, label -> why it is missing)."""
    builders: dict[str, Callable[[], nn.Module]] = {
        COMPILED: lambda: model,
        INT8: lambda: quantized(model, calibration, False, 0),
        REGCACHE: lambda: quantized(model, calibration, True, arguments.deleted),
        TORCHAO: lambda: torchao_dynamic(model),
    }
    ready: dict[str, tuple[nn.Module, Callable[..., Any]]] = {EAGER: (model, model)}
    missing: dict[str, str] = {}
    for label, build in builders.items():
        try:
            built = build()
            ready[label] = (built, compiled(built, arguments))
        except (ImportError, RuntimeError, ValueError) as error:
            missing[label] = f"{type(error).__name__}: {error}"
    return ready, missing


def weights_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def timed(call: Callable[..., Any], batch: Batch) -> float:
    """Milliseconds of one pass."""
    if batch["pixel_values"].is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(**batch)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begun = time.perf_counter()
    call(**batch)
    return 1000 * (time.perf_counter() - begun)


def first_pass(
    model: nn.Module, call: Callable[..., Any], batch: Batch, reference: torch.Tensor, found: Result
) -> None:
    """Compile, then note cosine and memory of a second pass."""
    call(**batch)
    on_gpu = batch["pixel_values"].is_cuda
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    features = F.normalize(call(**batch).pooler_output.float(), dim=-1)
    found.cosine = float((features * reference).sum(-1).mean())
    if on_gpu:
        found.peak_mb = (torch.cuda.max_memory_allocated() - before + weights_bytes(model)) / 1e6


@torch.inference_mode()
def measure(
    name: str, build: Callable[[], PreTrainedModel], arguments: argparse.Namespace, device: str
) -> list[Result]:
    """All contenders at all batch sizes; the one that goes first changes with every repeat."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False).to(device)
    model.set_attn_implementation("sdpa")
    pixels = random_pixels(max(arguments.batch_sizes), model.config.image_size, device)
    size = min(8, len(pixels))
    reference = torch.cat([model(pixel_values=part.float()).pooler_output for part in pixels.split(size)])
    reference = F.normalize(reference, dim=-1)
    model = model.to(torch.bfloat16)
    calibration = [{"pixel_values": part} for part in random_pixels(8, model.config.image_size, device).split(1)]
    ready, missing = build_contenders(model, calibration, arguments)
    results: list[Result] = []
    for batch_size in arguments.batch_sizes:
        torch.compiler.reset()
        batch = {"pixel_values": pixels[:batch_size]}
        found = {label: Result(name, batch_size, label, failed=reason) for label, reason in missing.items()}
        for label, (built, call) in ready.items():
            found[label] = Result(name, batch_size, label)
            try:
                first_pass(built, call, batch, reference[:batch_size], found[label])
            except Exception as error:  # one contender must not take the others with it
                found[label].failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        order = [label for label in ready if not found[label].failed]
        for repeat in range(-arguments.warmup, arguments.repeats):
            shift = repeat % len(order)
            for label in order[shift:] + order[:shift]:
                elapsed = timed(ready[label][1], batch)
                if repeat >= 0:
                    found[label].times_ms.append(elapsed)
        for label in order:
            found[label].median_ms = statistics.median(found[label].times_ms)
            found[label].minimum_ms = min(found[label].times_ms)
        for label in order if COMPILED in order else ():
            found[label].ratio = found[COMPILED].median_ms / found[label].median_ms
        results += [found[label] for label in (EAGER, COMPILED, INT8, REGCACHE, TORCHAO)]
    return results


def render(results: list[Result], title: str) -> Table:
    """The table for the terminal."""
    table = Table(title=title, title_justify="left")
    for heading in ("model", "batch", "contender"):
        table.add_column(heading)
    for heading in ("median ms", "min ms", "ratio to bf16 compiled", "cosine", "peak MB"):
        table.add_column(heading, justify="right")
    for r in results:
        numbers = (f"{r.median_ms:.3f}", f"{r.minimum_ms:.3f}", f"{r.ratio:.2f}", f"{r.cosine:.4f}", f"{r.peak_mb:.0f}")
        cells = ("did not run:", r.failed[:60], "", "", "") if r.failed else numbers
        table.add_row(r.model, str(r.batch_size), r.contender, *cells)
    return table


def describe_environment(device: str) -> dict[str, Any]:
    """Versions and device."""
    found: dict[str, Any] = environment()
    for package in ("torchao", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = torch.version.cuda
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found["capability"] = list(torch.cuda.get_device_capability()) if device == "cuda" else None
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="random weights")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32, 128], help="default 1 32 128")
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds over all contenders (default 30)")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before the timed ones (default 5)")
    parser.add_argument("--deleted", type=int, default=4, help="tokens that RegCache deletes (default 4)")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile(mode='max-autotune'): minutes")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: tests the script")
    parser.add_argument("--output", help="JSON file of all results")
    arguments = parser.parse_args()
    if min(*arguments.batch_sizes, arguments.repeats) < 1 or min(arguments.warmup, arguments.deleted) < 0:
        parser.error("--batch-sizes and --repeats must be at least 1, --warmup and --deleted at least 0.")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if not arguments.smoke and not torch.cuda.is_available():
        print(
            f"Nothing measured: PyTorch {torch.__version__} sees no CUDA device. --smoke tests the script on the CPU."
        )
        return 0
    shapes, device = {name: SHAPES[name] for name in arguments.shapes}, "cuda"
    if arguments.smoke:
        shapes, device = SMOKE, "cpu"
        arguments.batch_sizes, arguments.repeats, arguments.warmup, arguments.deleted = [1, 3], 2, 1, 2
    results = [r for name, build in shapes.items() for r in measure(name, build, arguments, device)]
    found = describe_environment(device)
    label = "SMOKE TEST, not a measurement: " if arguments.smoke else ""
    console = Console(width=max(Console().width, 130))
    console.print(render(results, f"{label}W8A8 on {found['device']}, torch {found['torch']}, random weights"))
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "shapes")}
        content = {"environment": found, "settings": settings, "smoke_test": arguments.smoke}
        write_json(arguments.output, {**content, "results": [asdict(r) for r in results]})
        console.print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
