"""Where the time of one of our models goes, per image: int8 products by role, attention, norms, quantization, the rest.

    python benchmarks/profile_cpu_int8.py --contender "int8 fused" --shape clip-b16 --batch-size 8 --output profile.json

Times are those of the operators themselves, summed over a forward pass by torch.profiler, then divided by the images; the
median over the passes is shown. A linear layer's product counts under its role; whatever else the layer does to its input and
output (scale, round, clamp, cast, reshape) counts as "quantize". Fused blocks call products without a layer around them:
their role comes from the shape of the weight, so equal shapes ("query, key, value" one by one and "attention out") share a
line there. "python and dispatch" is what the wall clock has beyond all operators. The profiler itself slows small operators:
compare shares, and take total times from bench_cpu_int8.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cpu_contenders import CONTENDERS, FLOAT, FUSED, build
from cpu_job import Job, Settings, Skipped
from cpu_measure import describe_environment
from cpu_shapes import SHAPES, TINY, count_operations, make_inputs, make_model
from optimum_regcache.config.files import write_json
from optimum_regcache.data.images import collate
from optimum_regcache.encoders.tower import Tower, find_tower

SCOPE = "role: "
ROLES = {
    "norm1": "query, key, value",
    "attention": "attention out",
    "norm2": "MLP in (fc1)",
    "activation": "MLP out (fc2)",
}
OTHER, DISPATCH = "rest", "python and dispatch"
# parts of operator names, in the order in which they are tried
GROUPS = (
    ("attention", ("scaled_dot_product", "flash_attention", "attention", "softmax", "sdpa", "bmm")),
    ("LayerNorm", ("layer_norm",)),
    ("patch convolution", ("conv",)),
    ("activation function", ("gelu", "sigmoid", "silu")),
    ("quantize", ("quantize", "round", "clamp")),
)
PRODUCTS = ("qlinear", "int_mm", "addmm", "::mm", "linear")


def roles(tower: Tower) -> Iterator[tuple[str, nn.Module]]:
    """Role and module of the linear layers that still are modules of their own."""
    f = tower.family
    attention = f"{f.attention}."
    for index in range(len(tower.blocks)):
        for name, module in tower.block_linears(index).items():
            if name in {attention + n for n in f.projections}:
                yield ROLES["norm1"], module
            elif name == attention + f.out:
                yield ROLES["attention"], module
            elif name in f.mlp_out:
                yield ROLES["activation"], module
            elif name in f.mlp_in:
                yield ROLES["norm2"], module


@contextmanager
def scopes(tower: Tower) -> Iterator[None]:
    """Every linear layer runs inside a profiler range with its role as name."""
    hooks = []
    for role, module in roles(tower):
        stack: list[Any] = []

        def enter(_: nn.Module, __: Any, role: str = role, stack: list[Any] = stack) -> None:
            stack.append(record_function(SCOPE + role))
            stack[-1].__enter__()

        def leave(_: nn.Module, __: Any, ___: Any, stack: list[Any] = stack) -> None:
            stack.pop().__exit__(None, None, None)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scope_of(event: Any) -> str | None:
    """Role of the linear layer that an operator runs in."""
    while event is not None:
        if event.name.startswith(SCOPE):
            return event.name.removeprefix(SCOPE)
        event = event.cpu_parent
    return None


def role_by_shape(shapes: Any, hidden: int, intermediate: int) -> str:
    """Role of a product outside any layer, from the shapes of its arguments: input [.., K], then per-channel [N]."""
    sizes = [list(s) for s in shapes or [] if s and all(isinstance(n, int) for n in s)]
    inner = sizes[0][-1] if sizes else 0
    outer = next((s[0] for s in sizes[1:] if len(s) == 1 and s[0] > 1), 0)
    table = {
        (hidden, 3 * hidden): ROLES["norm1"],
        (hidden, hidden): ROLES["attention"],
        (hidden, intermediate): ROLES["norm2"],
        (intermediate, hidden): ROLES["activation"],
    }
    return table.get((inner, outer), f"{inner} x {outer}")


def group_of(event: Any, hidden: int, intermediate: int) -> str:
    """The line of the table that an operator belongs to."""
    name, scope = event.name.lower(), scope_of(event)
    if event.name.startswith(SCOPE):
        return DISPATCH
    product = any(part in name for part in PRODUCTS)
    if scope is not None:
        return f"product: {scope}" if product else "quantize"
    if product:
        return f"product: {role_by_shape(event.input_shapes, hidden, intermediate)}"
    found = next((group for group, parts in GROUPS if any(part in name for part in parts)), None)
    if found is None and name.startswith("regcache"):
        return event.name  # an operator of ours that says itself what it is
    return found or OTHER


@torch.inference_mode()
def take_apart(model: Any, batch: dict[str, torch.Tensor], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Milliseconds per image by group, the median over ``repeats`` passes; their sum is about the wall time."""
    tower = find_tower(model)
    hidden = int(tower.config.hidden_size)
    intermediate = int(getattr(tower.config, "intermediate_size", 0) or hidden * getattr(tower.config, "mlp_ratio", 4))
    images = len(batch["pixel_values"])
    passes: list[dict[str, float]] = []
    with scopes(tower):
        for _ in range(warmup):
            model(**batch)
        for _ in range(repeats):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
                begun = time.perf_counter()
                model(**batch)
                wall = 1000 * (time.perf_counter() - begun) / images
            found: dict[str, float] = defaultdict(float)
            for event in record.events() or []:
                found[group_of(event, hidden, intermediate)] += event.self_cpu_time_total / 1000 / images
            found.pop(DISPATCH, None)
            found[DISPATCH] = max(0.0, wall - sum(found.values()))
            passes.append(found)
    groups = {g for found in passes for g in found}
    medians = {g: statistics.median(found.get(g, 0.0) for found in passes) for g in groups}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def main(values: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [FLOAT, *(name for name, c in CONTENDERS.items() if c.ours)]
    parser.add_argument("--contender", choices=names, default=FUSED, help=f"default {FUSED!r}")
    parser.add_argument("--shape", choices=[*SHAPES, *TINY], default="clip-b16", help="random weights (clip-b16)")
    parser.add_argument("--model", help="directory or Hub id of real weights, instead of --shape")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="profiled passes (default 5)")
    parser.add_argument(
        "--calibration", type=int, default=4, help="random images for the activation scales (default 4)"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args(values)
    if min(args.batch_size, args.repeats, args.calibration) < 1:
        parser.error("--batch-size, --repeats and --calibration must be at least 1.")
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.model or args.shape
    inputs = make_inputs(name, None, args.calibration + args.batch_size, args.image_size)
    with tempfile.TemporaryDirectory() as workdir:
        calibration = [collate([item]) for item in inputs[: args.calibration]]
        job = Job(make_model(name), calibration, Path(workdir), Settings(torch.get_num_threads()))
        try:
            model = build(args.contender, job).module
        except Skipped as reason:
            parser.error(f"{args.contender} cannot run: {reason}.")
    found = take_apart(model, collate(inputs[args.calibration :]), args.repeats)
    total = sum(found.values())
    operations = count_operations(job.model, args.image_size)
    table = Table(title=f"{name}, {args.contender}, batch {args.batch_size}: {total:.2f} ms an image")
    for heading in ("part", "ms / image", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for group, value in found.items():
        table.add_row(group, f"{value:.3f}", f"{value / total:.1%}")
    Console().print(table)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        write_json(
            args.output,
            {
                "environment": describe_environment(),
                "settings": settings,
                "gop_per_image": operations.to_dict(),
                "ms_per_image": found,
                "total_ms_per_image": total,
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
