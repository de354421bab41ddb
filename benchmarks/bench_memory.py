"""Resident memory of quantizing, saving, loading and running, each step in a process of its own.

    python benchmarks/bench_memory.py --output bench-memory.json
    python benchmarks/bench_memory.py --shapes clip-l14 --preset w8a8 w8a8-dynamic
    python benchmarks/bench_memory.py --tiny            # smoke test: seconds, its figures mean nothing

Random weights; one image at a time. The float model is built in memory, quantized, and saved; fresh processes load the
quantized checkpoint, and for comparison the float one, and run them. Everything is counted above the resident memory after
the imports and after a warm-up with a small model (which loads what is imported late). "peak" is the high-water mark of
the process, ``VmHWM``; "resident" is what is held afterwards. Needs Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, PreTrainedModel

from encoder_shapes import Shape, clip, clip_full_b16, dinov2
from optimum_regcache import RegCacheConfig, set_backend
from optimum_regcache.commands.report import environment
from optimum_regcache.config.files import write_json
from optimum_regcache.methods import quantize_with, resolve

Record = dict[str, Any]


SHAPES: dict[str, Shape] = {
    "clip-l14": clip(1024, 4096, 24, 16, 224, 14),
    "clip-b16": clip(768, 3072, 12, 12, 224, 16),
    "dinov2-b14": dinov2(768, 3072, 12, 12, 224, 14),
    "clip-full-b16": clip_full_b16,
    "clip-medium": clip(768, 3072, 6, 12, 64, 16),  # 170 MB, small images: the test of the bounds
    "clip-tiny": clip(64, 256, 2, 1, 64, 16),
}


def peak() -> int:
    """High-water mark of this process in bytes. Not ``ru_maxrss``, which begins at that of the parent process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def resident() -> int:
    """Resident memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(seen.values())


def images(model: PreTrainedModel, count: int) -> list[dict[str, torch.Tensor]]:
    """Random batches of one image."""
    side = getattr(model.config, "vision_config", model.config).image_size
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(1, 3, side, side, generator=generator)} for _ in range(count)]


def run_once(model: Any) -> None:
    """One forward pass of one image."""
    with torch.inference_mode():
        batch = images(model, 1)[0]
        model.get_image_features(**batch) if hasattr(model, "get_image_features") else model(**batch)


def settings(arguments: argparse.Namespace) -> RegCacheConfig:
    """The preset without registers, with the methods of the command line."""
    config = RegCacheConfig.from_preset(arguments.preset)
    methods = tuple({"name": name} for name in arguments.methods)
    return config.replace(registers={"mode": "none"}, methods=methods)


def warm_up(build: Shape, arguments: argparse.Namespace) -> None:
    """Everything that is imported or allocated once."""
    model = build().eval()
    quantized = quantize_with(model, resolve(settings(arguments)), None, images(model, 1), progress=False).model
    run_once(quantized)
    run_once(model)
    with tempfile.TemporaryDirectory() as folder:
        quantized.save_pretrained(folder)
        AutoModel.from_pretrained(folder)


def convert(arguments: argparse.Namespace, base: int) -> Record:
    """Build, quantize, save."""
    torch.manual_seed(0)
    model = SHAPES[arguments.shape]().eval()
    record: Record = {
        "float_bytes": tensor_bytes(model),
        "float_resident": resident() - base,
        "float_peak": peak() - base,
    }
    batches = images(model, arguments.calibration)
    result = quantize_with(model, resolve(settings(arguments)), None, batches, progress=False).model
    record |= {
        "quantize_peak": peak() - base,
        "quantize_resident": resident() - base,
        "int8_bytes": tensor_bytes(result),
    }
    result.save_pretrained(Path(arguments.folder) / "int8")
    record["save_peak"] = peak() - base
    model.save_pretrained(Path(arguments.folder) / "float")
    return record


def load(arguments: argparse.Namespace, base: int, folder: str) -> Record:
    """Open a checkpoint and run it."""
    model = AutoModel.from_pretrained(Path(arguments.folder) / folder)
    record = {"load_peak": peak() - base, "load_resident": resident() - base}
    if folder == "int8":
        set_backend(model, arguments.backend)
    run_once(model)
    return record | {"run_peak": peak() - base, "run_resident": resident() - base}


def child(arguments: argparse.Namespace) -> None:
    """One step; prints its record."""
    warm_up(SHAPES["clip-tiny"], arguments)
    base = max(resident(), peak())  # the warm-up's own peak must not hide the first megabytes
    if arguments.step == "convert":
        print(json.dumps(convert(arguments, base)))
    else:
        print(json.dumps(load(arguments, base, arguments.step)))


def step(name: str, arguments: argparse.Namespace, shape: str, preset: str, folder: str) -> Record:
    """Run one step in a fresh process.

    Raises:
        RuntimeError: it failed, with its messages.
    """
    command = [sys.executable, __file__, "--step", name, "--shape", shape, "--preset", preset, "--folder", folder]
    command += ["--calibration", str(arguments.calibration), "--backend", arguments.backend]
    command += ["--methods", *arguments.methods] if arguments.methods else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The step {name} of {shape} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, preset: str, arguments: argparse.Namespace) -> Record:
    """All steps of one shape; bytes."""
    with tempfile.TemporaryDirectory() as folder:
        found = step("convert", arguments, shape, preset, folder)
        found |= step("int8", arguments, shape, preset, folder)
        plain = step("float", arguments, shape, preset, folder)
        found["file_bytes"] = sum(f.stat().st_size for f in (Path(folder) / "int8").glob("*.safetensors"))
    return {"shape": shape, "preset": preset, **found, **{f"float_{k}": v for k, v in plain.items()}}


COLUMNS = {
    "quantize_peak": "quantize: peak",
    "save_peak": "with save: peak",
    "load_peak": "load: peak",
    "load_resident": "resident",
    "run_resident": "after a pass",
    "float_load_peak": "float load: peak",
    "float_run_resident": "float after a pass",
}


def render(records: list[Record], title: str) -> Table:
    """The table: megabytes for sizes, multiples of the float model for the rest."""
    table = Table(title=title, title_justify="left")
    for heading in ("shape", "preset", "float MB", "int8 MB", *COLUMNS.values()):
        table.add_column(heading, justify="left" if heading in ("shape", "preset") else "right")
    for r in records:
        sizes = [f"{r[key] / 1e6:.1f}" for key in ("float_bytes", "int8_bytes")]
        ratios = [f"{r[key] / r['float_bytes']:.2f}" for key in COLUMNS]
        table.add_row(r["shape"], r["preset"], *sizes, *ratios)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = ["clip-l14", "clip-b16", "dinov2-b14", "clip-full-b16"]
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=defaults, help="shapes, random weights")
    parser.add_argument(
        "--presets", nargs="+", default=["w8a8", "w8a8-dynamic"], help="default: static and dynamic W8A8"
    )
    parser.add_argument("--methods", nargs="*", default=[], help="methods of the pipeline (default: none)")
    parser.add_argument("--backend", default="auto", help="how the int8 model runs (default auto)")
    parser.add_argument("--calibration", type=int, default=2, help="calibration images (default 2)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a smoke test")
    parser.add_argument("--output", help="JSON file of all results")
    for name in ("--step", "--shape", "--preset", "--folder"):  # of the processes that measure
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.step:
        return child(arguments)
    shapes = ["clip-tiny"] if arguments.tiny else arguments.shapes
    records = [measure(shape, preset, arguments) for shape in shapes for preset in arguments.presets]
    console = Console(width=max(Console().width, 150))
    label = "SMOKE TEST, not a measurement: " if arguments.tiny else ""
    console.print(render(records, f"{label}memory over the size of the float model, random weights"))
    if arguments.output:
        keep = {k: getattr(arguments, k) for k in ("methods", "backend", "calibration")}
        threads = {"threads": torch.get_num_threads()}
        write_json(
            arguments.output, {"environment": {**environment(), **threads}, "settings": keep, "results": records}
        )
        console.print(f"written: {arguments.output}")
    return None


if __name__ == "__main__":
    main()
