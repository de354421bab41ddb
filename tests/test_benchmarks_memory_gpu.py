"""The benchmark scripts run; what they print elsewhere is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_gpu_int8

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_the_gpu_benchmark_measures_nothing_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench_gpu_int8.py", "--output", str(output)])
    assert bench_gpu_int8.main() == 0
    assert "sees no CUDA device" in capsys.readouterr().out
    assert not output.exists()


@pytest.mark.slow
def test_the_smoke_test_of_the_gpu_benchmark_runs_every_contender(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    assert "SMOKE TEST, not a measurement" in run("bench_gpu_int8.py", "--smoke", "--output", str(output))
    content = json.loads(output.read_text())
    assert content["smoke_test"]
    assert content["environment"]["device"] == "cpu"
    ours = [r for r in content["results"] if "torchao" not in r["contender"]]
    assert len(ours) == 2 * 2 * 4
    for result in ours:
        assert result["failed"] == ""
        assert len(result["times_ms"]) == 2
        assert result["cosine"] > (0.5 if "registers" in result["contender"] else 0.99)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_memory_benchmark_runs(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    assert "SMOKE TEST, not a measurement" in run("bench_memory.py", "--tiny", "--output", str(output))
    results = json.loads(output.read_text())["results"]
    assert [r["preset"] for r in results] == ["w8a8", "w8a8-dynamic"]
    assert all(r["int8_bytes"] < r["float_bytes"] for r in results)
