"""Is this working tree slower than an earlier revision? Both measured in turn, in one run.

    python benchmarks/bench_revisions.py ad64e87                  # CLIP ViT-B/16, minutes on two cores
    python benchmarks/bench_revisions.py HEAD~20 --shape dinov2-s14 --rounds 15 --output revisions.json

The revision is checked out beside this one, and each of the two has a process that makes the same models with the same random
weights and then waits. Round after round the two do the same step, one after the other, in changing order; the ratio of a step
is the median over the rounds of before / after, so a machine that becomes slower meanwhile spoils none. Above 1: faster now.
"""
# pyright: reportCallIssue=false

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # width, MLP width, blocks, heads, image, patch
    "clip-b16": ("clip", 768, 3072, 12, 12, 224, 16),
    "siglip-b16": ("siglip", 768, 3072, 12, 12, 224, 16),
    "dinov2-s14": ("dinov2", 384, 1536, 12, 6, 224, 14),
    "tiny": ("clip", 64, 128, 4, 4, 32, 8),
}
ONCE = ("quantize", "save", "open")  # steps of seconds: a few rounds are enough


def work(shape: str, threads: int) -> None:
    """A process of one side: prints a line when it is ready, then the milliseconds of every step that it is told."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    import encoder_shapes
    from optimum_regcache import RegCacheConfig, RegCacheQuantizer, fuse

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind, *sizes = SHAPES[shape]
    model = getattr(encoder_shapes, kind)(*sizes)().eval()
    side, depth = sizes[4], sizes[2]
    images = [{"pixel_values": torch.rand(3, side, side)} for _ in range(8)]
    batches = {size: torch.rand(size, 3, side, side) for size in (1, 8)}
    upper = tuple(range(depth // 2, depth))
    config = RegCacheConfig(
        registers={"mode": "fixed", "blocks": upper}, deletion={"block": upper[0], "count": min(4, depth)}
    )

    def quantize() -> Any:
        quantizer = RegCacheQuantizer(model)
        return quantizer.quantize(quantization_config=config, calibration_dataset=images, progress=False)

    with tempfile.TemporaryDirectory() as folder:
        quantized, fused = quantize(), quantize()
        quantized.save_pretrained(folder)
        fuse(fused)
        steps: dict[str, Callable[[], Any]] = {
            "quantize": quantize,
            "save": lambda: quantized.save_pretrained(folder),
            "open": lambda: AutoModel.from_pretrained(folder),
        }
        for size, pixels in batches.items():
            steps[f"float32, batch {size}"] = lambda pixels=pixels: model(pixel_values=pixels)
            steps[f"int8 per layer, batch {size}"] = lambda pixels=pixels: quantized(pixel_values=pixels)
            steps[f"int8 fused, batch {size}"] = lambda pixels=pixels: fused(pixel_values=pixels)
        for step in steps.values():
            with torch.inference_mode():
                step()
        print(json.dumps(list(steps)), flush=True)
        for line in sys.stdin:
            name = line.strip()
            with torch.inference_mode():
                if name not in ONCE:
                    steps[name]()  # the other process had the caches
                begun = time.perf_counter()
                steps[name]()
            print(1000 * (time.perf_counter() - begun), flush=True)


class Side:
    """The process of one checkout."""

    def __init__(self, checkout: Path, shape: str, threads: int) -> None:
        command = [sys.executable, __file__, "--work", "--shape", shape, "--threads", str(threads)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._orders, self._answers = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        self.steps = json.loads(self._line())

    def _line(self) -> str:
        line = self._answers.readline()
        if not line:
            raise SystemExit("A side stopped; its error is above.")
        return line

    def __call__(self, step: str) -> float:
        """Milliseconds."""
        self._orders.write(step + "\n")
        self._orders.flush()
        return float(self._line())


def table(found: dict[str, dict[str, Any]], revision: str) -> str:
    """Medians and the ratio, as markdown."""
    lines = [f"| step | {revision}, ms | now, ms | ratio | quartiles |", "|---|---|---|---|---|"]
    for step, row in found.items():
        low, high = row["quartiles"]
        lines.append(
            f"| {step} | {row['before']:.1f} | {row['now']:.1f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines)


def compare(before: Side, now: Side, rounds: int) -> dict[str, dict[str, Any]]:
    """Every step of both sides, in turn."""
    found = {}
    for step in (s for s in now.steps if s in before.steps):
        times: dict[Side, list[float]] = {before: [], now: []}
        for number in range(max(3, rounds // 3) if step in ONCE else rounds):
            for side in (before, now) if number % 2 else (now, before):
                times[side].append(side(step))
        ratios = [b / n for b, n in zip(times[before], times[now], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[step] = {
            "before": statistics.median(times[before]),
            "now": statistics.median(times[now]),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
        }
        print(f"{step}: {found[step]['ratio']:.2f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="of git, to compare with")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="clip-b16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.shape, arguments.threads)
        return
    if arguments.revision is None:
        parser.error("which revision?")
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run(
        [*git, "rev-parse", "--short", arguments.revision], capture_output=True, text=True, check=True
    )
    revision = name.stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "before"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(checkout), revision], check=True)
        sides = []
        try:
            sides = [Side(path, arguments.shape, arguments.threads) for path in (checkout, ROOT)]
            found = compare(*sides, arguments.rounds)
        finally:
            for side in sides:
                side.process.kill()
            subprocess.run([*git, "worktree", "remove", "--force", str(checkout)], check=True)
    print(table(found, revision))
    if arguments.output:
        result = {"shape": arguments.shape, "revision": revision, "rounds": arguments.rounds, "steps": found}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
