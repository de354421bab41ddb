"""One linear layer on the CPU: float32 (PyTorch's own choice, and oneDNN), oneDNN's int8 kernel and our AVX2 operator.

    python benchmarks/bench_linear.py --output linear.json
    OPTIMUM_REGCACHE_NATIVE=avx2 python benchmarks/bench_linear.py      # our operator on a CPU with VNNI
    python benchmarks/bench_linear.py --gradients                       # float32, forward and all gradients

Codes are uniform over the whole range, so that sums of two products often leave 16 bits: without VNNI, oneDNN saturates then.
"error" is the largest difference to exact sums, relative to the largest sum. Kernels are timed in turns; the shortest of all
repeats counts, since other load only adds.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from cpu_measure import describe_environment
from optimum_regcache.config.files import write_json
from optimum_regcache.kernels import native, onednn
from optimum_regcache.math.linear import fast_linears, linear

SHAPES = {  # rows of one and eight images, input and output features
    "CLIP-B/16 qkv": [(197, 768, 2304), (1576, 768, 2304)],
    "CLIP-B/16 out": [(197, 768, 768), (1576, 768, 768)],
    "CLIP-B/16 fc1": [(197, 768, 3072), (1576, 768, 3072)],
    "CLIP-B/16 fc2": [(197, 3072, 768), (1576, 3072, 768)],
    "DINOv2-S fc1": [(257, 384, 1536), (2056, 384, 1536)],
}


def kernels(rows: int, inner: int, outer: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Calls by name, and the exact result."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, inner), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8, generator=generator)
    x, w, one = codes.float(), weight.float(), torch.ones(outer)
    zero = torch.zeros(outer, dtype=torch.int64)
    found: dict[str, Any] = {"float32": lambda: F.linear(x, w), "float32 oneDNN": lambda: linear(x, w)}
    library = native.library()
    if onednn.kernel_reason() is None:
        packed = onednn.PackedWeight(torch.ops.onednn.qlinear_prepack(weight, None), one, zero, None)
        found["oneDNN"] = lambda: onednn.int8_linear(codes, 1.0, 0, packed)
    if native.unavailable_reason() is None and library is not None and not library.blocks:
        ours = onednn.PackedWeight(onednn.panels(weight), one, zero, None, own=True)
        found["ours"] = lambda: onednn.int8_linear(codes, 1.0, 0, ours)
    return found, codes.double() @ weight.double().T


@torch.inference_mode()
def measure(rows: int, inner: int, outer: int, repeats: int) -> dict[str, Any]:
    """Milliseconds and error of every kernel."""
    calls, exact = kernels(rows, inner, outer)
    errors = {name: float((call() - exact).abs().max() / exact.abs().max()) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - begun))
    return {"ms": {name: min(values) for name, values in times.items()}, "error": errors}


def measure_training(rows: int, inner: int, outer: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a float32 layer and its gradients for input, weight and bias, as PyTorch and as our passes compute it."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator) for size in ((rows, inner), (outer, inner), (outer,))]
    leaves, ones = [t.requires_grad_() for t in drawn], torch.ones(rows, outer)
    times: dict[str, float] = {}
    for _ in range(repeats):
        for name, context in (("float32", nullcontext), ("float32 oneDNN", fast_linears)):
            begun = time.perf_counter()
            with context():
                torch.autograd.grad(F.linear(*leaves), leaves, ones)
            times[name] = min(times.get(name, math.inf), 1000 * (time.perf_counter() - begun))
    return times


def show_training(repeats: int) -> None:
    """Print a table of `measure_training`."""
    title = f"{describe_environment()['cpu_model']}, {torch.get_num_threads()} threads: forward and gradients"
    table = Table(
        "layer", "rows x in x out", "float32 ms", "float32 oneDNN ms", "ratio", title=title, title_justify="left"
    )
    for layer, shapes in SHAPES.items():
        for shape in shapes:
            own, ours = measure_training(*shape, repeats).values()
            table.add_row(layer, " x ".join(map(str, shape)), f"{own:.2f}", f"{ours:.2f}", f"{own / ours:.2f}")
    Console(width=150).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--gradients", action="store_true", help="float32 alone, forward and backward")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.gradients:
        return show_training(args.repeats)
    results: dict[str, Any] = {"environment": describe_environment(), "layers": []}
    table = Table(
        title=f"{results['environment']['cpu_model']}, {torch.get_num_threads()} threads", title_justify="left"
    )
    for column in (
        "layer",
        "rows x in x out",
        "float32 ms",
        "float32 oneDNN ms",
        "oneDNN int8 ms",
        "ours ms",
        "float32 / int8",
        "float32 / ours",
    ):
        table.add_column(column)
    for column in ("error of oneDNN", "error of ours"):
        table.add_column(column)
    for layer, shapes in SHAPES.items():
        for shape in shapes:
            found = measure(*shape, args.repeats)
            results["layers"].append({"layer": layer, "shape": shape, **found})
            ms, error = found["ms"], found["error"]
            row = [
                layer,
                " x ".join(map(str, shape)),
                *(f"{ms[k]:.2f}" if k in ms else "-" for k in ("float32", "float32 oneDNN", "oneDNN", "ours")),
            ]
            row += [f"{ms['float32'] / ms[k]:.2f}" if k in ms else "-" for k in ("oneDNN", "ours")]
            table.add_row(*row, *(f"{error[k]:.1e}" if k in error else "-" for k in ("oneDNN", "ours")))
    Console(width=150).print(table)
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
