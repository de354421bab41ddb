"""Exit codes: interrupted, no space, read-only, out of memory, a fault of ours; the work and the earlier model are kept."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.commands.optimum_cli import main

from optimum_regcache.commands import sources
from optimum_regcache.commands.failures import explain
from optimum_regcache.config.output import WORK
from optimum_regcache.hub import loading
from optimum_regcache.search.trials import TrialRunner

FEW = ("--num-samples", "16", "--num-report", "8", "--batch-size", "8")
PLAIN = ("--no-registers", *FEW)
SEARCH = (*FEW, "--set", "search.max_delete=1", "--set", "search.num_copies=[1]", "--set", "search.sensitive_block=3")


def test_an_interrupted_search_is_kept_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    options = ("quantize", "--model", "planted-outlier", "--output", tmp_path / "out", *SEARCH)
    score, calls = TrialRunner.score, []

    def interrupted(self: TrialRunner, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:  # nothing to choose from yet
            raise KeyboardInterrupt
        return score(self, *args)

    monkeypatch.setattr(TrialRunner, "score", interrupted)
    code, out, line = run(*options)
    assert (code, out) == (3, "")
    assert (
        line
        == f"interrupted. Finished steps are kept in {tmp_path / 'out' / WORK}; the same command goes on from there."
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".cache"]
    calls[:] = [1] * 10
    assert run(*options)[0] == 0
    resumed = len(calls) - 10
    assert not (tmp_path / "out" / ".cache").exists()
    calls[:] = [1] * 10
    assert run(*options)[0] == 0
    assert len(calls) - 10 == resumed + 1


def test_an_interrupted_search_saves_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    options = ("quantize", "--model", "planted-outlier", "--output", tmp_path / "out", *SEARCH)
    score, calls = TrialRunner.score, []

    def interrupted(self: TrialRunner, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, *args)

    monkeypatch.setattr(TrialRunner, "score", interrupted)
    code, out, line = run(*options)
    assert code == 3
    assert "unfinished, interrupted after" in " ".join(out.split())
    assert line == (
        "interrupted: the best so far is saved, marked unfinished. The same command with --overwrite goes on with the search."
    )
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["fit"]["search"]["unfinished"] is True
    assert "unfinished" in (tmp_path / "out" / "README.md").read_text()
    assert list((tmp_path / "out" / WORK).glob("*.jsonl"))
    assert run(*options, "--overwrite")[0] == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["fit"]["search"]["unfinished"] is False
    assert not (tmp_path / "out" / ".cache").exists()


@pytest.mark.parametrize("place", ["work", "save", "swap"])
def test_a_full_disk_keeps_the_earlier_model_and_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    options = ("quantize", "--model", "planted-outlier", "--output", tmp_path, *PLAIN)
    assert run(*options)[0] == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    names = {
        "work": "optimum_regcache.config.output.Output.require_space",
        "save": "optimum_regcache.commands.quantize.write_model",
        "swap": "optimum_regcache.config.output._move",
    }
    monkeypatch.setattr(names[place], full)
    code, _, line = run(*options)
    assert code == 4
    assert line.startswith(
        "error: [Errno 28] No space left on device: 'model.safetensors'. Free some space, or use another"
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_small_disk_is_found_out_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("optimum_regcache.commands.quantize.run_plan", lambda *args, **kwargs: pytest.fail("began"))
    code, _, line = run("quantize", "--model", "planted-outlier", "--output", tmp_path / "out", *PLAIN)
    assert (code, "No space left on device: 0 MB are needed, 0 MB are free" in line) == (4, True)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(
        sources, "load_model", lambda *args, **kwargs: pytest.fail("opened before the output was checked")
    )
    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, line = run("quantize", "--output", tmp_path / "out", "--model", tmp_path, "--dataset", "some/images")
    assert (code, "It is mounted read-only; use another --output." in line) == (4, True)


def test_a_saved_model_that_opens_as_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    def other(*args: Any, **kwargs: Any) -> Any:
        model = loading.load_model(*args, **kwargs)
        next(model.parameters()).data[0] += 1
        return model

    monkeypatch.setattr("optimum_regcache.commands.quantize.load_model", other)
    code, _, line = run("quantize", "--model", "planted-outlier", "--output", tmp_path / "out", *PLAIN)
    assert (code, "is another one when the saved model is opened again; nothing was replaced" in line) == (4, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 3, "interrupted. Nothing was written."),
        (ValueError("bad\n  value"), 2, "error: bad value."),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'."),
        (
            PermissionError(13, "Permission denied", "x"),
            4,
            "error: [Errno 13] Permission denied: 'x'. You may not read or write",
        ),
        (
            Exception("I/O error: No space left on device (os error 28)"),
            4,
            "error: I/O error: No space left on device (os err",
        ),
        (RuntimeError("CUDA out of memory. Tried"), 4, "error: out of memory. Use a smaller --batch-size"),
        (MemoryError(), 4, "error: out of memory."),
        (KeyError("depth"), 1, "error: KeyError: 'depth'. This is unexpected: run the command again with --debug"),
        (RecursionError(), 1, "error: RecursionError: RecursionError. This is unexpected"),
    ],
)
def test_every_exception_has_a_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    found = explain(error)
    assert found[0] == code
    assert found[1].startswith(line)
    assert "\n" not in found[1]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Any) -> None:
    monkeypatch.setattr("optimum_regcache.kernels.native.build", lambda *args: {}["gone"])
    assert run("build")[0] == 1
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", "build", "--debug"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.strip().splitlines()[-1].startswith("error: KeyError: 'gone'. This is unexpected")


@pytest.mark.slow
def test_a_real_interrupt(tmp_path: Path) -> None:
    """Ctrl-C in a process of its own, in the middle of the search; the same command then goes on."""
    cli = str(Path(sys.executable).with_name("optimum-cli"))
    out = tmp_path / "out"
    command = [
        cli,
        "regcache",
        "quantize",
        "--model",
        "clip-scenes-induced",
        "--output",
        str(out),
        "--num-report",
        "32",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in out.rglob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.strip().splitlines()[-1].startswith("interrupted. Finished steps are kept in")
    assert [p.name for p in out.iterdir()] == [".cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0
    assert (out / "model.safetensors").exists()
    assert not (out / ".cache").exists()
