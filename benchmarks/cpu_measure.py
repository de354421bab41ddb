"""How the CPU benchmark measures: ceilings, interleaved rounds beside a probe of other load, memory in fresh processes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from optimum_regcache.commands.report import environment
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.kernels import onednn
from optimum_regcache.kernels.cpu import sums_saturate
from optimum_regcache.kernels.onednn import machine_reason

SLOW = 1.2  # a probe this many times the best one points to other load on the machine
BUSY = 0.1  # so does this share of all CPUs, used by other processes during a round
PAUSE = 1.0  # seconds before a round is repeated
SETTLE_BELOW = 8  # smaller batches run once untimed at each turn: the threads of the contender before may still spin
PACKAGES = ("numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao")

Forward = Callable[[Batch], torch.Tensor]


def describe_environment() -> dict[str, Any]:
    """CPU, threads and versions."""
    found: dict[str, Any] = {**environment(), "system": platform.system(), "cpu_model": cpu_model()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        **found,
        "threads": torch.get_num_threads(),
        "logical_cpus": os.cpu_count(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "int8_kernel": machine_reason() or ("our AVX2 operator" if sums_saturate() else "oneDNN qlinear"),
    }


def cpu_model() -> str:
    """Name of the CPU, with family and model number where Linux tells them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        values = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        if "model name" in values:
            return f"{values['model name']} (family {values.get('cpu family')}, model {values.get('model')})"
    return platform.processor() or platform.machine()


# ceilings


def best_time(call: Callable[[], Any], repeats: int) -> float:
    """Shortest of ``repeats`` runs, in seconds, after one that is not timed."""
    call()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


@torch.inference_mode()
def measure_ceilings(rows: int = 1576, width: int = 768, repeats: int = 20) -> dict[str, Any]:
    """The best rates of one matrix product, in GOP/s: float32, and int8 with u8 input and u8 output.

    Returns:
        ``float32`` and ``int8`` (None where the CPU has no int8 kernel), and every shape under ``shapes``.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, width), (width, 3 * width), (width, 4 * width), (4 * width, width)]
    found: dict[str, Any] = {"float32": 0.0, "int8": None, "shapes": {}}
    for inner, outer in shapes:
        operations, label = 2 * rows * inner * outer / 1e9, f"{rows}x{inner}x{outer}"
        x, w = torch.randn(rows, inner, generator=generator), torch.randn(outer, inner, generator=generator)
        rates = {"float32": operations / best_time(lambda x=x, w=w: F.linear(x, w), repeats)}
        if machine_reason() is None:
            codes = torch.randint(0, 256, (rows, inner), dtype=torch.uint8, generator=generator)
            weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8, generator=generator)
            packed = onednn.PackedWeight.pack(weight, torch.full((outer,), 1e-3), None, 255)
            leaving = onednn.Epilogue(out_scale=0.5, out_zero_point=128, as_codes=True)

            def product(codes: Any = codes, packed: Any = packed, leaving: Any = leaving) -> torch.Tensor:
                return onednn.int8_linear(codes, 0.1, 128, packed, leaving)

            rates["int8"] = operations / best_time(product, repeats)
        found["shapes"][label] = rates
    for kind in ("float32", "int8"):
        rates = [r[kind] for r in found["shapes"].values() if kind in r]
        found[kind] = max(rates) if rates else None
    return found


# rounds


class Probe:
    """A fixed float32 matrix product whose time tells whether something else uses the machine.

    Attributes:
        best: shortest time so far, in milliseconds.
    """

    def __init__(self, size: int = 768) -> None:
        self.left, self.right = torch.ones(size, size), torch.ones(size, size)
        self.best = min(self() for _ in range(5))

    def __call__(self) -> float:
        """Milliseconds of four products; not the shortest, which would find the gaps between other processes."""
        begun = time.perf_counter()
        for _ in range(4):
            _ = self.left @ self.right
        found = 1000 * (time.perf_counter() - begun)
        self.best = min(found, getattr(self, "best", found))
        return found


class OtherLoad:
    """What other processes use of the machine, between `start` and `share`, from Linux's accounts."""

    SHORTEST = 0.5  # seconds; the accounts advance in steps of 10 ms

    def start(self) -> None:
        """Begin to count."""
        self.before = self._read()

    def share(self) -> float | None:
        """Share of all CPUs since `start`, 0 to 1; None where the system does not tell, or too little time went by."""
        after, before = self._read(), self.before
        if after is None or before is None or after[0] - before[0] < self.SHORTEST:
            return None
        wall, busy, own = (a - b for a, b in zip(after, before, strict=True))
        return max(0.0, (busy - own) / wall / (os.cpu_count() or 1))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: wall clock, all CPUs' busy time (with time stolen by other virtual machines), this process's CPU time."""
        try:
            fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


@dataclass
class Rounds:
    """Times of one batch size.

    Attributes:
        times_ms: for each contender one time per kept round, for the whole batch.
        probes_ms: for each kept round the slower of the probes before and after it.
        other_load: for each kept round the share of all CPUs that other processes used; None where unknown.
        repeated: rounds that were dropped because of other load, and run again.
        noisy: kept rounds that were no better, because the allowance of repetitions was spent.
    """

    times_ms: dict[str, list[float]]
    probes_ms: list[float] = field(default_factory=list)
    other_load: list[float | None] = field(default_factory=list)
    repeated: int = 0
    noisy: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible, without the times."""
        return {
            "repeated": self.repeated,
            "noisy": self.noisy,
            "probes_ms": self.probes_ms,
            "other_load": self.other_load,
        }


def rotated(names: Sequence[str], shift: int) -> list[str]:
    """The names in order, beginning with number ``shift`` (modulo their count)."""
    start = shift % len(names)
    return [*names[start:], *names[:start]]


def interleave(  # noqa: PLR0913 (the settings of a measurement, each with its name)
    runners: Mapping[str, Forward],
    batch: Batch,
    repeats: int,
    warmup: int,
    probe: Any,
    allowance: int,
    pause: float = PAUSE,
    load: Any = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Rounds:
    """Time the contenders in turn; the one that goes first changes with every round.

    Args:
        runners: forward passes by name.
        batch: what they run on.
        repeats: rounds to keep.
        warmup: rounds before them.
        probe: `Probe` or alike: callable, with ``best``.
        allowance: how many rounds may be repeated because of other load.
        pause: seconds before such a repetition.
        load: `OtherLoad` or alike (the default).
        progress: wraps the rounds, for a progress bar.
    """
    names = list(runners)
    settle = next(iter(batch.values())).shape[0] < SETTLE_BELOW
    rounds, load = Rounds({name: [] for name in names}), load or OtherLoad()

    def disturbed(probe_ms: float, share: float | None) -> bool:
        return probe_ms > SLOW * probe.best or (share is not None and share > BUSY)

    def run(shift: int) -> dict[str, float]:
        gc.collect()
        gc.disable()
        try:
            return {name: timed(runners[name], batch, settle) for name in rotated(names, shift)}
        finally:
            gc.enable()

    for number in range(warmup):
        run(number)
    before = probe()
    for number in progress(range(repeats)):
        while True:
            load.start()
            found = run(number)
            share, after = load.share(), probe()
            worst, before = max(before, after), after
            if not disturbed(worst, share) or rounds.repeated >= allowance:
                break
            rounds.repeated += 1
            time.sleep(pause)
            before = probe()
        for name, value in found.items():
            rounds.times_ms[name].append(value)
        rounds.probes_ms.append(worst)
        rounds.other_load.append(share)
    rounds.noisy = sum(disturbed(*kept) for kept in zip(rounds.probes_ms, rounds.other_load, strict=True))
    return rounds


def timed(forward: Forward, batch: Batch, settle: bool) -> float:
    """Milliseconds of one call, after one untimed call if ``settle``."""
    if settle:
        forward(batch)
    begun = time.perf_counter()
    forward(batch)
    return 1000 * (time.perf_counter() - begun)


# statistics


@dataclass
class Result:
    """One contender at one batch size; times in milliseconds for the whole batch.

    Attributes:
        model, batch_size, contender, variant: what ran, and how.
        cosine: mean cosine of the pooled output to that of the float model.
        times_ms: every kept round, in order.
        median_ms, minimum_ms, ms_per_image: of these; per image from the median.
        spread: interquartile range / median.
        ratio_to_float32: median of float32 / median of the contender; larger is faster.
        ratio_of_minima: the same from the minima.
        int8_ceiling_fraction: operations of the float model / (median time x the int8 ceiling); None without a ceiling.
        details: what the runner tells of itself.
    """

    model: str
    batch_size: int
    contender: str
    variant: str
    cosine: float
    times_ms: list[float]
    median_ms: float = 0.0
    minimum_ms: float = 0.0
    ms_per_image: float = 0.0
    spread: float = 0.0
    ratio_to_float32: float = 0.0
    ratio_of_minima: float = 0.0
    int8_ceiling_fraction: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def summarise(results: Sequence[Result], reference: str, gop_per_image: float, ceiling: float | None) -> None:
    """Fill in the statistics of all results of one model and batch size.

    Args:
        results: with times.
        reference: the contender that ratios refer to.
        gop_per_image: operations of the float model per image, in 1e9.
        ceiling: int8 GOP/s, None where there is no int8 kernel.
    """
    for r in results:
        r.median_ms, r.minimum_ms = statistics.median(r.times_ms), min(r.times_ms)
        r.ms_per_image = r.median_ms / r.batch_size
        if len(r.times_ms) > 1:
            first, _, third = statistics.quantiles(r.times_ms, n=4, method="inclusive")
            r.spread = (third - first) / r.median_ms
        if ceiling is not None:
            r.int8_ceiling_fraction = gop_per_image / (r.ms_per_image / 1000) / ceiling
    base = next(r for r in results if r.contender == reference)
    for r in results:
        r.ratio_to_float32 = base.median_ms / r.median_ms
        r.ratio_of_minima = base.minimum_ms / r.minimum_ms


def mean_cosine(forward: Forward, batches: Sequence[Batch], references: Sequence[torch.Tensor]) -> float:
    """Mean cosine between the outputs of ``forward`` and ``references`` [B, D]."""
    found = [F.cosine_similarity(forward(b).float(), r, dim=-1) for b, r in zip(batches, references, strict=True)]
    return float(torch.cat(found).mean())


# memory


def resident_mb(key: str = "VmRSS") -> float:
    """This process's memory from /proc, in MB (1e6 bytes): ``VmRSS`` now, ``VmHWM`` the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/self/status has no {key}; memory is measured on Linux only.")


def release() -> None:
    """Give freed memory back to the system, so that resident memory means memory in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure_memory(
    packages: Sequence[str], make: Callable[[], tuple[Forward, Batch]], passes: int = 3
) -> dict[str, Any]:
    """Memory of one contender, to be called in a fresh process that has imported the common packages.

    Args:
        packages: the contender's own packages; imported before the baseline is taken.
        make: builds the contender; what it leaves behind is freed before the forward passes.
        passes: forward passes.

    Returns:
        In MB: ``baseline`` after imports; ``build_peak``; ``run_peak`` during the passes and ``steady`` after them, both
        minus the baseline. ``run_peak`` is None where the kernel does not let the peak be reset.
    """
    for package in packages:
        importlib.import_module(package)
    release()
    baseline = resident_mb()
    forward, batch = make()
    found = {"baseline": baseline, "build_peak": resident_mb("VmHWM") - baseline}
    release()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        reset = resident_mb("VmHWM") <= resident_mb() + 1
    except OSError:
        reset = False
    for _ in range(passes):
        forward(batch)
    peak = resident_mb("VmHWM") - baseline if reset else None
    release()
    return {**found, "run_peak": peak, "steady": resident_mb() - baseline, "batch_size": len(batch["pixel_values"])}
