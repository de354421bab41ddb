"""The CPU benchmark: operation counts, registry, rounds, statistics, and the whole command on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOWERS
from torch.utils.flop_counter import FlopCounterMode

import bench_cpu_int8
import cpu_contenders
import cpu_measure
import cpu_peers
from cpu_job import Job, Runner, Settings, Skipped
from cpu_shapes import SHAPES, TINY, count_operations, make_inputs, make_model
from optimum_regcache.data.images import collate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    calibration = [collate([item]) for item in make_inputs("clip-tiny", None, 2, 64)]
    return Job(make_model("clip-tiny"), calibration, tmp_path, Settings(trials=1))


# operations


@pytest.mark.parametrize(
    ("shape", "tokens", "width", "patch"),
    [("clip-b16", 197, 768, 3 * 16 * 16), ("dinov2-s14", 257, 384, 3 * 14 * 14)],
)
def test_operations_of_the_published_shapes(shape: str, tokens: int, width: int, patch: int):
    with torch.device("meta"):
        found = count_operations(SHAPES[shape](), 224)
    # 12 blocks of four projections and an MLP of 4x: 12 width^2 weights a block
    assert found.linears == pytest.approx(2 * tokens * 12 * 12 * width**2 / 1e9)
    assert found.attention == pytest.approx(12 * 4 * tokens**2 * width / 1e9)
    assert found.patch_embedding == pytest.approx(2 * (tokens - 1) * width * patch / 1e9)
    assert found.total == pytest.approx({"clip-b16": 35.1, "dinov2-s14": 12.25}[shape], rel=2e-3)


@pytest.mark.parametrize("name", ["clip-tiny", "dinov2-tiny"])
def test_operations_agree_with_torchs_own_counter(name: str):
    model = make_model(name)
    model.set_attn_implementation("eager")  # the counter knows matrix products, not the CPU's sdpa
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**collate(make_inputs(name, None, 1, 64)))
    assert count_operations(model, 64).total == pytest.approx(counter.get_total_flops() / 1e9)


def test_operations_of_every_encoder_family():
    for tower in TOWERS.values():
        model = tower.build()
        found = count_operations(model, 32)
        assert found.linears > found.patch_embedding > 0
        assert found.attention > 0


# registry


def test_a_missing_package_is_named(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_contenders, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(Skipped, match=r"^not installed: nncf$"):
        cpu_contenders.build("openvino int8 (NNCF)", job)


def test_an_api_that_does_not_exist_is_skipped(job: Job, monkeypatch: pytest.MonkeyPatch):
    import optimum_regcache

    monkeypatch.delitem(optimum_regcache.__dict__, "fuse", raising=False)
    monkeypatch.setattr(optimum_regcache, "_LAZY", {k: v for k, v in optimum_regcache._LAZY.items() if k != "fuse"})
    with pytest.raises(Skipped, match="fuse is not available"):
        cpu_contenders.build(cpu_contenders.FUSED, job)
    monkeypatch.setitem(sys.modules, "optimum_regcache.export", None)
    with pytest.raises(Skipped, match="export_onnx is not available"):
        cpu_peers.our_onnx(job)


def test_a_model_that_takes_more_than_pixels_is_not_exported(job: Job):
    job.calibration = [{**batch, "spatial_shapes": torch.tensor([[8, 8]])} for batch in job.calibration]
    with pytest.raises(Skipped, match="pixel_values only"):
        cpu_peers.float_onnx(job)


def test_fusion_acts_on_a_copy(job: Job, monkeypatch: pytest.MonkeyPatch):
    import optimum_regcache

    seen = []

    def fuse(model: Any, attention: str = "auto", native: bool | None = None) -> str:
        seen.append((model, native))
        return "2 blocks"

    monkeypatch.setattr(optimum_regcache, "fuse", fuse, raising=False)
    first = cpu_contenders.build("int8 fused", job)
    second = cpu_contenders.build("int8 fused, torch only", job)
    assert [native for _, native in seen] == [None, False]
    assert first.module is seen[0][0]
    assert second.module is seen[1][0]
    assert job.plain not in (first.module, second.module)
    assert first.details == {"fuse": "2 blocks"}


def test_choice_of_contenders():
    assert cpu_contenders.choose(["int8 per layer"], set()) == ["float32 (sdpa)", "int8 per layer"]
    plain = cpu_contenders.choose(None, set())
    assert "simulated" not in plain
    assert "simulated" in cpu_contenders.choose(None, {"all"})
    assert set(cpu_contenders.choose(None, {"all", "compiled"})) == set(cpu_contenders.CONTENDERS)
    with pytest.raises(ValueError, match="Unknown contender int9; expected some of: float32"):
        cpu_contenders.choose(["int9"], set())


@pytest.mark.parametrize("name", [n for n, c in cpu_contenders.CONTENDERS.items() if c.ours and "fused" not in n])
def test_our_contenders_compute_the_models_function(name: str, job: Job):
    batch = collate(make_inputs("clip-tiny", None, 5, 64)[2:])
    reference = cpu_contenders.build("float32 (sdpa)", job)(batch)
    cosine = cpu_measure.mean_cosine(cpu_contenders.build(name, job), [batch], [reference])
    assert 0.99 < cosine < 0.9999999  # quantized, and still the model


def test_openvino_tries_parts_of_large_batches_only():
    assert cpu_peers.plans(1, 2, ("f32", None)) == [cpu_peers.Plan(0, 1, "f32"), cpu_peers.Plan(0, 1, None)]
    assert [(p.streams, p.part) for p in cpu_peers.plans(8, 2, (None,))] == [(0, 8), (0, 1), (2, 1), (2, 4)]
    assert [(p.streams, p.part) for p in cpu_peers.plans(9, 2, (None,))] == [(0, 9), (0, 1), (2, 1)]
    assert cpu_peers.Plan(2, 4, "f32").config(2) == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": 2,
        "INFERENCE_NUM_THREADS": 2,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    assert cpu_peers.Plan(0, 8, None).config(2) == {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2}


# rounds


class FakeProbe:
    """Returns the given times, then the last one for ever."""

    def __init__(self, *values: float) -> None:
        self.values, self.best = list(values), min(values)

    def __call__(self) -> float:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


class FakeLoad:
    """Other processes use the given shares, then none."""

    def __init__(self, *shares: float | None) -> None:
        self.shares = list(shares)

    def start(self) -> None:
        pass

    def share(self) -> float | None:
        return self.shares.pop(0) if self.shares else None


def run_rounds(probe: FakeProbe, images: int = 8, **options: Any) -> tuple[cpu_measure.Rounds, list[str]]:
    calls: list[str] = []

    def runner(name: str) -> Any:
        return lambda batch: calls.append(name)

    batch = {"pixel_values": torch.zeros(images, 1)}
    settings = {"repeats": 3, "warmup": 0, "allowance": 2, "pause": 0.0, "load": FakeLoad(), **options}
    return cpu_measure.interleave({n: runner(n) for n in "abc"}, batch, probe=probe, **settings), calls


def test_every_round_begins_with_another_contender():
    rounds, calls = run_rounds(FakeProbe(1.0), repeats=4)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in rounds.times_ms.items()} == {"a": 4, "b": 4, "c": 4}
    assert (rounds.repeated, rounds.noisy) == (0, 0)


def test_warm_up_rounds_and_settling_calls_are_not_timed():
    rounds, calls = run_rounds(FakeProbe(1.0), images=1, repeats=2, warmup=1)
    assert "".join(calls) == "aabbcc" + "aabbcc" + "bbccaa"
    assert len(rounds.times_ms["a"]) == 2


def test_a_round_beside_other_load_is_repeated_in_the_same_order():
    # before; after round 0; after round 1 (slow); before its repetition; then quiet
    rounds, calls = run_rounds(FakeProbe(1.0, 1.1, 1.5, 1.0, 1.0))
    assert "".join(calls) == "abc" + "bca" + "bca" + "cab"
    assert (rounds.repeated, rounds.noisy) == (1, 0)
    assert rounds.probes_ms == [1.1, 1.0, 1.0]


def test_a_round_during_which_others_used_the_cpus_is_repeated():
    rounds, calls = run_rounds(FakeProbe(1.0), load=FakeLoad(0.05, 0.4, 0.05, 0.3, 0.3))
    assert "".join(calls) == "abc" + "bca" + "bca" + "cab" + "cab"
    assert (rounds.repeated, rounds.noisy) == (2, 1)  # the allowance of two ends before the last round is quiet
    assert rounds.other_load == [0.05, 0.05, 0.3]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux only")
def test_other_load_counts_other_processes_only(monkeypatch: pytest.MonkeyPatch):
    clock = iter([(10.0, 100.0, 5.0), (20.0, 112.0, 9.0), (20.1, 113.0, 9.0)])
    load = cpu_measure.OtherLoad()
    assert load._read() is not None
    monkeypatch.setattr(cpu_measure.OtherLoad, "_read", staticmethod(lambda: next(clock)))
    monkeypatch.setattr(cpu_measure.os, "cpu_count", lambda: 4)
    load.start()
    assert load.share() == pytest.approx((12 - 4) / 10 / 4)
    load.before = (20.0, 112.0, 9.0)
    assert load.share() is None  # too short to tell


def test_repetitions_end_and_the_noise_is_reported():
    probe = FakeProbe(1.3)
    probe.best = 1.0
    rounds, calls = run_rounds(probe)
    assert len(calls) == 3 * (3 + 2)
    assert (rounds.repeated, rounds.noisy) == (2, 3)
    assert all(len(times) == 3 for times in rounds.times_ms.values())


def test_the_probe_keeps_its_best_time():
    probe = cpu_measure.Probe(size=8)
    values = [probe() for _ in range(3)]
    assert 0 < probe.best <= min(values)


def test_ceilings_are_the_best_of_their_shapes():
    found = cpu_measure.measure_ceilings(rows=16, width=32, repeats=1)
    assert found["float32"] == max(rates["float32"] for rates in found["shapes"].values())
    assert (found["int8"] is None) == (cpu_measure.machine_reason() is not None)
    assert set(found["shapes"]) == {"16x32x32", "16x32x96", "16x32x128", "16x128x32"}


# statistics


def test_statistics_against_a_hand_computation():
    def result(name: str, *times: float) -> cpu_measure.Result:
        return cpu_measure.Result("m", 4, name, "", 1.0, list(times))

    found = [result("fast", 10.0, 12.0, 20.0), result("float", 40.0, 30.0, 36.0)]
    cpu_measure.summarise(found, "float", gop_per_image=0.6, ceiling=400.0)
    fast, base = found
    assert (fast.median_ms, fast.minimum_ms, fast.ms_per_image) == (12.0, 10.0, 3.0)
    assert fast.spread == pytest.approx((16 - 11) / 12)  # quartiles 11 and 16
    assert fast.ratio_to_float32 == pytest.approx(36 / 12)
    assert fast.ratio_of_minima == pytest.approx(30 / 10)
    assert fast.int8_ceiling_fraction == pytest.approx(0.6 / 0.003 / 400)  # 200 GOP/s of 400
    assert (base.ratio_to_float32, base.ratio_of_minima) == (1.0, 1.0)
    cpu_measure.summarise(found, "float", gop_per_image=0.6, ceiling=None)
    assert cpu_measure.Result("m", 1, "x", "", 1.0, [1.0]).int8_ceiling_fraction is None


def test_cosine_is_the_mean_over_images():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    output = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    batches = [{"pixel_values": torch.zeros(2)}] * 2
    assert cpu_measure.mean_cosine(lambda b: output, batches, [reference, reference]) == pytest.approx(0.5)


# command line and memory


def test_one_broken_contender_does_not_cost_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Broken(Runner):
        def __call__(self, batch: Any) -> torch.Tensor:
            raise RuntimeError("no such kernel")

    def missing(job: Job) -> Runner:
        raise Skipped("not on this machine")

    entries = {
        "float32 (sdpa)": cpu_contenders.CONTENDERS["float32 (sdpa)"],
        "broken": cpu_contenders.Contender(lambda job: Broken()),
        "missing": cpu_contenders.Contender(missing),
        "slow": cpu_contenders.Contender(cpu_contenders.float32, max_batch=1),
    }
    for name in set(cpu_contenders.CONTENDERS) - set(entries):
        monkeypatch.delitem(cpu_contenders.CONTENDERS, name)
    for name, entry in entries.items():
        monkeypatch.setitem(cpu_contenders.CONTENDERS, name, entry)
    monkeypatch.setattr(bench_cpu_int8, "TINY", {"clip-tiny": TINY["clip-tiny"]})
    values = ["--tiny", "--batch-sizes", "2", "--repeats", "1", "--output", str(tmp_path / "b.json")]
    args = bench_cpu_int8.parse_arguments(values)
    args.all = False
    monkeypatch.setattr(bench_cpu_int8, "parse_arguments", lambda values: args)
    assert bench_cpu_int8.main(values) == 1
    found = json.loads((tmp_path / "b.json").read_text())
    place = {"model": "clip-tiny", "batch_size": 2}
    assert found["failed"] == [{**place, "contender": "broken", "reason": "RuntimeError: no such kernel"}]
    assert found["skipped"] == [
        {**place, "contender": "missing", "batch_size": None, "reason": "not on this machine"},
        {**place, "contender": "slow", "reason": "slow: timed up to batch 1 only; --all times it"},
    ]
    assert [r["contender"] for r in found["results"]] == ["float32 (sdpa)"]
    assert found["environment"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["--images", "x"], "--images needs --model"),
        (["--repeats", "0"], "must be at least 1"),
        (["--only", "int9"], "Unknown contender int9"),
    ],
)
def test_bad_arguments_are_refused(values: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_cpu_int8.parse_arguments(values)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_memory_counts_what_the_contender_keeps():
    kept: list[torch.Tensor] = []

    def make() -> Any:
        kept.append(torch.ones(20_000_000))  # 80 MB
        return (lambda batch: torch.ones(10_000_000)), {"pixel_values": torch.zeros(2, 1)}  # 40 MB for a moment

    found = cpu_measure.measure_memory((), make)
    assert 75 < found["steady"] < 100
    assert found["build_peak"] > 75
    assert found["run_peak"] is None or 110 < found["run_peak"] < 160
    assert found["batch_size"] == 2


# the commands as users run them


@pytest.mark.slow
def test_benchmark_runs_on_tiny_models(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "bench_cpu_int8.py"), "--tiny", "--output", str(tmp_path / "b.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ratio to fp32" in done.stdout
    found = json.loads((tmp_path / "b.json").read_text())
    ran = {r["contender"] for r in found["results"]}
    known = set(cpu_contenders.choose(None, {"all"}))
    assert ran | {s["contender"] for s in found["skipped"]} == known  # whatever did not run says why
    assert {"float32 (sdpa)", "simulated", "int8 per layer"} <= ran
    for r in found["results"]:
        assert len(r["times_ms"]) == 3
        assert r["cosine"] > 0.98, r["contender"]


@pytest.mark.slow
def test_memory_and_profile_run_as_commands(tmp_path: Path):
    only = [
        "--only",
        "int8 per layer",
        "--tiny",
        "--batch-sizes",
        "1",
        "--memory",
        "--output",
        str(tmp_path / "b.json"),
    ]
    subprocess.run([sys.executable, str(BENCHMARKS / "bench_cpu_int8.py"), *only], check=True, timeout=600)
    memory = json.loads((tmp_path / "b.json").read_text())["memory_mb"]
    assert set(memory) == {"clip-tiny", "dinov2-tiny"}
    assert all(set(m) == {"float32 (sdpa)", "int8 per layer"} for m in memory.values())
    command = [sys.executable, str(BENCHMARKS / "profile_cpu_int8.py"), "--shape", "clip-tiny", "--image-size", "64"]
    command += ["--contender", "int8 per layer", "--output", str(tmp_path / "p.json")]
    subprocess.run(command, check=True, timeout=600)
    assert "attention" in json.loads((tmp_path / "p.json").read_text())["ms_per_image"]
