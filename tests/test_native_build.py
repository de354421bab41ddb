"""Building the C++ operators: for every instruction set on every x86-64 machine, ahead of time, and never without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from optimum.commands.optimum_cli import main
from tqdm import tqdm

from optimum_regcache.kernels import native
from optimum_regcache.kernels.native import compiler

MISSING = compiler.missing_reason()
needs_compiler = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[native.Library]:
    """A library without operators that takes a second to build, in a cache of its own."""
    source = tmp_path / "empty.cpp"
    source.write_text("int nothing() { return 0; }\n")
    library = native.Library("optimum_regcache_empty", "tests", (source,), (), False)
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(native, "register_fakes", lambda blocks: None)
    monkeypatch.setitem(native.LIBRARIES, "avx2", library)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    native.unavailable_reason.cache_clear()
    yield library
    native.unavailable_reason.cache_clear()


def cli(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Exit code of ``optimum-cli regcache build`` in this process."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", "build", *args])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@needs_compiler
@pytest.mark.parametrize("instructions", list(native.LIBRARIES))
def test_every_library_compiles_whatever_this_cpu_is(instructions: str) -> None:
    """Into the same cache as everywhere: the second run of the tests finds it there. Nothing is loaded."""
    (report,) = native.build(instructions)
    assert report.reason is None, report.reason
    assert report.path is not None
    assert report.path.read_bytes()[:4] == b"\x7fELF"
    listing = subprocess.run(["nm", "-DC", str(report.path)], capture_output=True, text=True, check=False).stdout
    assert not listing or "regcache::attend(" in listing


@needs_compiler
def test_a_compiler_that_fails_is_a_reason_not_a_crash(empty: native.Library, tmp_path: Path) -> None:
    empty.sources[0].write_text("this is not C++\n")
    reason = native.unavailable_reason() or ""
    assert reason.startswith("building the C++ operators failed: ")
    assert "error: " in reason
    log = compiler.target(empty).parent / "build.log"
    assert f"all of the output is in {log}" in reason
    assert "empty.cpp" in log.read_text()


def test_a_cache_that_cannot_be_written_is_a_reason(
    empty: native.Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiler, "missing_reason", lambda: None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    reason = native.unavailable_reason() or ""
    assert reason.startswith("building the C++ operators failed: ")
    assert reason.endswith("TORCH_EXTENSIONS_DIR chooses another folder.")


@needs_compiler
def test_a_build_that_was_killed_leaves_nothing_behind(empty: native.Library) -> None:
    folder = compiler.target(empty).parent
    folder.mkdir(parents=True)
    (folder / "build-killed").mkdir()
    (folder / "build.lock").touch()  # nobody holds it
    assert native.unavailable_reason() is None
    assert compiler.target(empty).exists()


@needs_compiler
def test_a_library_that_is_there_needs_no_compiler(empty: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.unavailable_reason() is None
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    native.unavailable_reason.cache_clear()
    assert native.unavailable_reason() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="built on Linux only")
def test_a_damaged_library_is_a_reason(empty: native.Library) -> None:
    path = compiler.target(empty)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    reason = native.unavailable_reason() or ""
    assert reason.startswith("loading the C++ operators failed: ")
    assert reason.endswith(f"Delete {path.parent}.")


@needs_compiler
def test_the_first_build_says_so_in_one_line(
    empty: native.Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a line of its own also where a progress bar runs."""
    seen: list[str] = []
    monkeypatch.setattr(compiler.logger, "warning", lambda text: (seen.append(text), print(text, file=sys.stderr)))
    with tqdm(total=10, desc="calibrating", file=sys.stderr, mininterval=0) as bar:
        bar.update(1)
        assert native.unavailable_reason() is None
        bar.update(1)
    expected = (
        f"Building the int8 operators for tests once (about half a minute; cached in {compiler.target(empty).parent}). "
        "Build ahead of time with: optimum-cli regcache build"
    )
    assert seen == [expected]
    error = capsys.readouterr().err
    before = error[: error.index(expected)]
    assert before.endswith("\r")  # the bar was wiped
    assert "calibrating" in before
    native.unavailable_reason.cache_clear()
    assert native.unavailable_reason() is None
    assert seen == [expected]


SHOWS = """
import sys
from pathlib import Path
from optimum_regcache.kernels import native
from optimum_regcache.kernels.native import compiler
compiler.ensure(native.Library("optimum_regcache_empty", "tests", (Path(sys.argv[1]),), (), False))
"""


@needs_compiler
def test_the_line_shows_by_default(empty: native.Library) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", SHOWS, str(empty.sources[0])]
    for count in (1, 0):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stderr.count("Building the int8 operators for tests once") == count


@needs_compiler
def test_waiting_for_another_process_says_so(empty: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler.target(empty)
    path.parent.mkdir(parents=True)
    other, seen = FileLock(path.parent / "build.lock", is_singleton=False), []
    other.acquire()

    def warning(text: str) -> None:
        seen.append(text)
        if len(seen) == 1:
            other.release()

    monkeypatch.setattr(compiler.logger, "warning", warning)
    assert compiler.ensure(empty) == path
    assert seen[0] == f"Waiting for another process that builds the int8 operators ({path.parent})."
    assert seen[1].startswith("Building the int8 operators for tests once")


def test_build_refuses_unknown_instructions() -> None:
    expected = "instructions must be one of auto, all, avx512_vnni, avx2, got 'neon'"
    with pytest.raises(ValueError, match=expected):
        native.build("neon")


def test_build_says_why_this_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(compiler, "machine", lambda: "aarch64")
    (report,) = native.build()
    assert str(report) == "this CPU: not available: the CPU has no AVX2 instructions (aarch64)."


@needs_compiler
def test_the_command_builds_and_says_what(
    empty: native.Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = compiler.target(empty)
    for said in (r"built in", "was built before"):
        assert cli(monkeypatch) == 0
        out = capsys.readouterr().out
        assert said in out
        assert f"tests: {said}" in out
        assert str(path) in out
    empty.sources[0].write_text("broken\n")
    assert cli(monkeypatch, "--instructions", "avx2") == 1
    captured = capsys.readouterr()
    assert "tests: not available: building the C++ operators failed: " in captured.err


def test_the_command_without_a_compiler(
    empty: native.Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler, "missing_reason", lambda: "no C++ compiler was found (install g++, or set CXX).")
    assert cli(monkeypatch) == 1
    assert "tests: not available: no C++ compiler was found (install g++, or set CXX)." in capsys.readouterr().err
