"""CPU time and memory of W8A8 vision encoders, all contenders interleaved in one process.

    python benchmarks/bench_cpu_int8.py --output bench.json             # everything: make bench
    python benchmarks/bench_cpu_int8.py --only "int8 per layer" --shapes clip-b16 --batch-sizes 1 --repeats 5
    python benchmarks/bench_cpu_int8.py --model DIR --images FOLDER_OR_PARQUET
    python benchmarks/bench_cpu_int8.py --tiny                          # smoke test: its figures mean nothing

Every round runs each contender once; the one that goes first changes with every round. A fixed float32 product is timed
before and after each round, and the CPU time that other processes took during the round is read from the system. If the
product is slower than 1.2 x its best time, or others took more than a tenth of the CPUs, the round is dropped and repeated.
How often that happened is reported.

How to read the table:
- ratio = median time of float32 / median time of the contender, in the same run; larger is faster. Ratios carry over between
  machines of one kind, milliseconds do not.
- spread = interquartile range / median. A difference below the spreads of both rows is none.
- ceiling = operations of the float model / (time x rate of the fastest int8 product of this run). An encoder cannot reach
  1: attention, norms and quantization take time beside the products. Contenders that delete tokens do fewer operations than
  they are credited with.
- cosine = pooled output against float32. Speed without it means nothing. Weights are random without ``--model``; the cosine
  then only shows that a contender computes the same function.
- variant = how a contender ran. OpenVINO tries several settings for each batch size and the fastest one competes; the times
  of the others are in the JSON. OpenVINO computes in bfloat16 by default where the CPU has it; the variant says so.
- memory (MB, above the imports) comes from a fresh process per contender: "run peak" during three forward passes, "steady"
  after them; the JSON also has the peak while building.

Contenders whose packages are missing are skipped by name. A contender that breaks is reported, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpu_contenders import CONTENDERS, FLOAT, build, choose
from cpu_job import DELETED_TOKENS, Job, Runner, Settings, Skipped
from cpu_measure import (
    Probe,
    Result,
    Rounds,
    describe_environment,
    interleave,
    mean_cosine,
    measure_ceilings,
    measure_memory,
    summarise,
)
from cpu_shapes import SHAPES, TINY, count_operations, make_inputs, make_model
from optimum_regcache.config.files import write_json
from optimum_regcache.data.images import collate
from optimum_regcache.encoders.passes import Batch

COSINE_IMAGES = 16


class Bench:
    """One run of the command.

    Attributes:
        results, skipped, failed, rounds, memory, models: sections of the JSON.
    """

    def __init__(self, arguments: argparse.Namespace, workdir: Path) -> None:
        self.args, self.workdir = arguments, workdir
        self.errors = Console(stderr=True)
        self.results: list[Result] = []
        self.skipped: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.memory: dict[str, dict[str, Any]] = {}
        self.models: dict[str, Any] = {}
        self.environment = describe_environment()
        self.ceilings = measure_ceilings(**({"rows": 256, "width": 64, "repeats": 3} if arguments.tiny else {}))
        self.probe = Probe()

    def run(self, name: str) -> None:
        """Measure one model."""
        label = Path(name).name if self.args.model else name
        job, held_out = make_job(name, self.args, self.workdir / label)
        operations = count_operations(job.model, held_out[0]["pixel_values"].shape[-1])
        self.models[label] = {
            "weights": "checkpoint" if self.args.model else "random",
            "parameters": sum(p.numel() for p in job.model.parameters()),
            "gop_per_image": operations.to_dict(),
        }
        runners: dict[str, Runner] = {}
        for contender in track(choose(self.args.only, options(self.args)), f"{label}: building", console=self.errors):
            runner = self.guarded(label, contender, None, lambda contender=contender: build(contender, job))
            if runner is not None:
                runners[contender] = runner
        if FLOAT not in runners:
            raise RuntimeError("float32 itself could not run; see the messages above.")
        for batch_size in self.args.batch_sizes:
            self.measure(label, runners, held_out, batch_size, operations.total)
        if self.args.memory:
            self.memory[label] = {}
            for contender in track(list(runners), f"{label}: memory", console=self.errors):
                found = self.guarded(
                    label, contender, None, lambda contender=contender: self.memory_of(name, contender, job.workdir)
                )
                if found is not None:
                    self.memory[label][contender] = found

    def guarded(self, model: str, contender: str, batch_size: int | None, call: Any) -> Any:
        """What ``call`` returns, or None after noting that the contender was skipped or broke."""
        place = {"model": model, "contender": contender, "batch_size": batch_size}
        try:
            return call()
        except Skipped as reason:
            self.skipped.append({**place, "reason": str(reason)})
        except Exception as error:  # one broken contender must not cost the run
            self.failed.append({**place, "reason": f"{type(error).__name__}: {error}"[:2000]})
        return None

    def measure(
        self, label: str, runners: dict[str, Runner], held_out: list[Batch], batch_size: int, gop_per_image: float
    ) -> None:
        """Rounds and statistics of one batch size."""
        batch = collate(held_out[:batch_size])
        count = max(1, COSINE_IMAGES // batch_size)
        parts = [collate(held_out[i : i + batch_size]) for i in range(0, len(held_out) - batch_size + 1, batch_size)]
        parts = parts[:count]
        reference = [runners[FLOAT](b).float() for b in parts]
        cosines: dict[str, float] = {}
        for name, runner in runners.items():
            limit = CONTENDERS[name].max_batch
            if limit is not None and batch_size > limit and not self.args.all:
                reason = f"slow: timed up to batch {limit} only; --all times it"
                self.skipped.append({"model": label, "contender": name, "batch_size": batch_size, "reason": reason})
                continue

            def check(runner: Runner = runner) -> float:
                runner.prepare(batch)
                return mean_cosine(runner, parts, reference)

            cosine = self.guarded(label, name, batch_size, check)
            if cosine is not None:
                cosines[name] = cosine
        rounds: Rounds = interleave(
            {name: runners[name] for name in cosines}, batch, self.args.repeats, self.args.warmup, self.probe,
            allowance=0 if self.args.tiny else 2 * self.args.repeats,
            progress=lambda r: track(r, f"{label}: batch {batch_size}", console=self.errors),
        )  # fmt: skip
        self.rounds.append({"model": label, "batch_size": batch_size, **rounds.to_dict()})
        found = [
            Result(label, batch_size, n, runners[n].variant, c, rounds.times_ms[n], details=dict(runners[n].details))
            for n, c in cosines.items()
        ]
        summarise(found, FLOAT, gop_per_image, self.ceilings["int8"])
        self.results += found

    def memory_of(self, name: str, contender: str, workdir: Path) -> dict[str, Any]:
        """Memory of one contender, from a process of its own that takes the exported files from this one."""
        a = self.args
        command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", contender, "--workdir", str(workdir)]
        command += ["--model", name, "--threads", str(torch.get_num_threads()), "--tau", str(a.tau)]
        command += ["--image-size", str(a.image_size), "--calibration", str(a.calibration)]
        command += ["--batch-sizes", str(min(8, max(a.batch_sizes)))] + (["--images", a.images] if a.images else [])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the memory process ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def to_dict(self) -> dict[str, Any]:
        """The JSON file."""
        left_out = ("output", "model", "memory_of", "workdir")
        return {
            "environment": self.environment,
            "ceilings_gops": self.ceilings,
            "settings": {k: v for k, v in vars(self.args).items() if k not in left_out},
            "deleted_tokens": DELETED_TOKENS,
            "models": self.models,
            "skipped": self.skipped,
            "failed": self.failed,
            "rounds": self.rounds,
            "memory_mb": self.memory,
            "results": [asdict(r) for r in self.results],
        }


def make_job(name: str, args: argparse.Namespace, workdir: Path) -> tuple[Job, list[Batch]]:
    """The job of one model, and the images that calibration did not see."""
    inputs = make_inputs(name, args.images, args.calibration + max(args.batch_sizes), args.image_size)
    calibration = [collate([item]) for item in inputs[: args.calibration]]
    settings = Settings(torch.get_num_threads(), args.tau, 0 if args.memory_of else args.trials)
    return Job(make_model(name), calibration, workdir, settings), inputs[args.calibration :]


def options(args: argparse.Namespace) -> set[str]:
    """Options that bring in further contenders."""
    return {name for name in ("all", "compiled") if getattr(args, name)}


def memory_child(args: argparse.Namespace) -> None:
    """Print the memory of one contender as the last line."""

    def make() -> tuple[Runner, Batch]:
        job, held_out = make_job(args.model, args, Path(args.workdir))
        batch = collate(held_out[: args.batch_sizes[0]])
        runner = build(args.memory_of, job)
        runner.prepare(batch)
        runner.settle()
        return runner, batch

    print(json.dumps(measure_memory(CONTENDERS[args.memory_of].packages, make)))


def render(bench: Bench, model: str, batch_size: int) -> Table:
    """The table of one model and batch size."""
    gop = bench.models[model]["gop_per_image"]["total"]
    smoke = "SMOKE TEST, not a measurement: " if bench.args.tiny else ""
    table = Table(title=f"{smoke}{model}, batch {batch_size}, {gop:.2f} GOP an image", title_justify="left")
    table.add_column("contender")
    numbers = ("median ms", "min ms", "spread", "ms / image", "ratio to fp32", "(minima)", "ceiling", "cosine")
    memory = bench.memory.get(model, {})
    for heading in (*numbers, *(("run peak MB", "steady MB") if memory else ())):
        table.add_column(heading, justify="right")
    table.add_column("variant")
    for r in (r for r in bench.results if (r.model, r.batch_size) == (model, batch_size)):
        ceiling = "" if r.int8_ceiling_fraction is None else f"{r.int8_ceiling_fraction:.2f}"
        used = memory.get(r.contender, {})
        table.add_row(
            r.contender, f"{r.median_ms:.2f}", f"{r.minimum_ms:.2f}", f"{r.spread:.0%}", f"{r.ms_per_image:.2f}",
            f"{r.ratio_to_float32:.2f}", f"{r.ratio_of_minima:.2f}", ceiling, f"{r.cosine:.4f}",
            *(f"{used[k]:.0f}" if used.get(k) is not None else "" for k in ("run_peak", "steady") if memory),
            r.variant,
        )  # fmt: skip
    return table


def report(bench: Bench) -> None:
    """Tables, ceilings, and everything that did not run or was disturbed."""
    console, e = Console(width=max(Console().width, 170)), bench.environment
    for place in bench.rounds:
        console.print(render(bench, place["model"], place["batch_size"]))
    console.print(f"W8A8 on {e['cpu_model']}, {e['cpu_capability']}, {e['threads']} threads, torch {e['torch']}.")
    rates = ", ".join(f"{k} {bench.ceilings[k]:.0f} GOP/s" for k in ("float32", "int8") if bench.ceilings[k])
    console.print(f"fastest matrix products: {rates}. Weights: {'checkpoint' if bench.args.model else 'random'}.")
    console.print("ratio = median time of float32 / median time of the contender, in this run; larger is faster.")
    for label, entries in (("skipped", bench.skipped), ("FAILED", bench.failed)):
        for s in entries:
            batch = "" if s["batch_size"] is None else f", batch {s['batch_size']}"
            console.print(f"{label}: {s['model']}{batch}, {s['contender']}: {s['reason']}", markup=False)
    for r in bench.rounds:
        if r["repeated"] or r["noisy"]:
            console.print(
                f"{r['model']}, batch {r['batch_size']}: {r['repeated']} rounds repeated because of other load, "
                f"{r['noisy']} of {len(r['probes_ms'])} kept rounds still noisy."
            )


def parse_arguments(values: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="shapes, random weights")
    add("--model", help="directory or Hub id of real weights, instead of --shapes")
    add("--images", help="image folder, parquet or Hub id (default: random pixels); needs --model")
    add("--image-size", type=int, default=224, help="side of random images (default 224)")
    add("--batch-sizes", nargs="+", type=int, default=[1, 8, 32], help="default 1 8 32")
    add("--only", nargs="+", metavar="NAME", help=f"contenders beside {FLOAT}: {'; '.join(CONTENDERS)}")
    add("--all", action="store_true", help="also the slow contenders")
    add("--compiled", action="store_true", help="also the contenders that torch.compile builds (minutes)")
    add("--repeats", type=int, default=15, help="rounds over all contenders (default 15)")
    add("--warmup", type=int, default=2, help="rounds before the timed ones (default 2)")
    add("--trials", type=int, default=3, help="runs per setting where OpenVINO has a choice (default 3)")
    add("--calibration", type=int, default=16, help="images for the activation scales (default 16)")
    add("--tau", type=float, default=4.0, help="copies of the register; 1 needs no mask (default 4)")
    add("--threads", type=int, help="threads of every contender (default: torch's own choice)")
    add("--memory", action=argparse.BooleanOptionalAction, help="measure memory, one process each (default: yes)")
    add("--tiny", action="store_true", help="tiny random models, all contenders, three rounds: a smoke test")
    add("--output", help="JSON file of all results")
    add("--memory-of", help=argparse.SUPPRESS)
    add("--workdir", help=argparse.SUPPRESS)
    args = parser.parse_args(values)
    if args.images and not args.model:
        parser.error("--images needs --model: random weights have no image processor.")
    if min(*args.batch_sizes, args.repeats, args.calibration, args.trials) < 1 or args.warmup < 0:
        parser.error("--batch-sizes, --repeats, --calibration and --trials must be at least 1, --warmup at least 0.")
    try:
        choose(args.only, set())
    except ValueError as error:
        parser.error(str(error))
    if args.tiny:
        args.image_size, args.repeats, args.warmup, args.calibration, args.trials = 64, min(args.repeats, 3), 1, 4, 1
        args.all = True
    args.memory = not args.tiny if args.memory is None else args.memory
    return args


def main(values: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if a contender broke."""
    args = parse_arguments(values)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        memory_child(args)
        return 0
    names = [args.model] if args.model else list(TINY) if args.tiny else args.shapes
    with tempfile.TemporaryDirectory(prefix="bench-cpu-int8-") as workdir:
        bench = Bench(args, Path(workdir))
        for name in names:
            bench.run(name)
            if args.output:  # a long run that is cut short leaves the models that were finished
                write_json(args.output, bench.to_dict())
    report(bench)
    if args.output:
        Console().print(f"written: {args.output}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
