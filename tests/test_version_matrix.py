"""scripts/version_matrix.py without installing anything: the table, what is repeated, what could not be installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import version_matrix as vm
from optimum_regcache.encoders.versions import REQUIRED, TESTED_TRANSFORMERS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the command with fake environments; returns (rows of the .json file, tests that ran)."""
    ran: list[str] = []

    def environment(work: Path, python: str, torch: str, full: bool) -> Path:
        if python == "3.99":
            raise vm.NotInstallableError("no interpreter python3.99 on PATH or in pyenv")
        return tmp_path / "bin" / "python"

    def tests(binary: Path, folder: Path, work: Path, result: vm.Result, jobs: int) -> None:
        ran.append(result.transformers)
        result.passed, result.seconds = 7, 1.5
        result.failed = int(result.transformers == "5.8.1")
        result.status = "failed" if result.failed else "passed"

    monkeypatch.setattr(vm, "base_environment", environment)
    monkeypatch.setattr(vm, "overlay", lambda binary, release: tmp_path)
    monkeypatch.setattr(vm, "run_tests", tests)

    def command(*arguments: str) -> tuple[list[dict], list[str]]:
        ran.clear()
        output = tmp_path / "versions.json"
        monkeypatch.setattr(sys, "argv", ["x", "--work", str(tmp_path / "work"), "--output", str(output), *arguments])
        vm.main()
        return json.loads(output.read_text()), list(ran)

    return command


NEW, OLD = ("--triple", "3.11", "2.13.0", "5.24.0"), ("--triple", "3.11", "2.13.0", "5.4.0")


def test_finished_results_are_not_repeated(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, ran = run(*NEW, *OLD)
    assert ran == ["5.24.0", "5.4.0"]
    assert [r["transformers"] for r in rows] == ["5.4.0", "5.24.0"]  # sorted as versions
    assert run(*NEW)[1] == []
    assert run("--again", *NEW)[1] == ["5.24.0"]
    assert run("--full", *NEW)[1] == ["5.24.0"]
    monkeypatch.setattr(vm, "fingerprint", lambda: "changed")
    assert run(*NEW)[1] == ["5.24.0"]
    text = (tmp_path / "versions.md").read_text()
    assert "| 5.4.0 | 2.13.0 | 3.11 | core | 7 | 0 | 0 | 2 | passed (earlier state of the code) |" in text
    assert "| 5.24.0 | 2.13.0 | 3.11 | core | 7 | 0 | 0 | 2 | passed |" in text


def test_what_cannot_be_installed_is_a_row_with_the_reason(run, tmp_path: Path) -> None:
    rows, ran = run("--triple", "3.99", "2.13.0", "5.24.0")
    assert ran == []
    assert (rows[0]["status"], rows[0]["reason"]) == (
        "not installable",
        "no interpreter python3.99 on PATH or in pyenv",
    )
    assert "| - | - | - | - | not installable: no interpreter" in (tmp_path / "versions.md").read_text()


def test_failures_end_with_an_error(run) -> None:
    with pytest.raises(SystemExit):
        run("--triple", "3.11", "2.13.0", "5.8.1")


def test_the_default_list_covers_the_bounds() -> None:
    releases = [release for _, _, release in vm.DEFAULT]
    assert all(any(r.startswith(f"{end}.") for r in releases) for end in TESTED_TRANSFORMERS)
    assert any(torch.startswith(f"{REQUIRED['torch']}.") for _, torch, _ in vm.DEFAULT)
    assert len(set(vm.DEFAULT)) == len(vm.DEFAULT)


def test_the_running_interpreter_is_found() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert vm.find_python(version) == sys.executable
    with pytest.raises(vm.NotInstallableError, match=r"no interpreter python3\.99"):
        vm.find_python("3.99")


def test_dependencies_are_those_of_setup_cfg() -> None:
    names = list(vm.requirements())
    assert any(n.startswith("datasets>=") for n in names)
    assert not any(n.startswith(("torch>", "transformers>", "optimum>")) for n in names)
