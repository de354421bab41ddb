"""Run the test suite with many versions of Python, PyTorch and transformers, and write docs/results/versions.md.

    python scripts/version_matrix.py                                  # the default list, tests marked "core"
    python scripts/version_matrix.py --triple 3.11 2.13.0 5.4.0       # one environment, as often as wanted
    python scripts/version_matrix.py --full --triple 3.11 2.13.0 5.24.0

Every (Python, PyTorch) gets one virtual environment with all dependencies; a transformers release is a folder put before it
on the import path, with the versions of huggingface_hub and tokenizers that it asks for. Finished results are kept in the
.json file and not repeated until the package or its tests change; whatever could not be installed is in the table with the
reason. Interpreters are looked for as python3.X on PATH and among those of pyenv.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = (
    "5.4.0",
    "5.5.4",
    "5.8.1",
    "5.9.0",
    "5.12.1",
    "5.15.1",
    "5.17.0",
    "5.18.0",
    "5.20.2",
    "5.22.2",
    "5.23.0",
    "5.24.0",
)
MAIN_PYTHON, MAIN_TORCH, NEWEST = "3.11", "2.13.0", "5.24.0"
DEFAULT = [
    *((MAIN_PYTHON, MAIN_TORCH, release) for release in RELEASES),
    (MAIN_PYTHON, "2.9.1", "5.4.0"),
    (MAIN_PYTHON, "2.14.1", NEWEST),
    ("3.10", MAIN_TORCH, "5.20.2"),  # later releases need Python 3.11
    ("3.12", MAIN_TORCH, NEWEST),
    ("3.13", MAIN_TORCH, NEWEST),
    ("3.14", MAIN_TORCH, NEWEST),
]
TEST_TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "matplotlib>=3.8")
FULL_TOOLS = ("onnx>=1.17", "onnxscript>=0.7", "onnxruntime>=1.20", "openvino>=2025.0")
INSTALL_TIMEOUT, TEST_TIMEOUT = 3600, 7200  # seconds


class NotInstallableError(Exception):
    """An environment that cannot be made here; the text is the reason."""


@dataclass
class Result:
    """One line of the table."""

    python: str
    torch: str
    transformers: str
    suite: str
    fingerprint: str
    status: str = "not installable"  # or "passed", "failed", "broken" (no test ran)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    install_seconds: float = 0.0
    reason: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it unique in the table."""
        return self.python, self.torch, self.transformers, self.suite


def run(command: list[str], timeout: float, **kwargs: object) -> str:
    """Output of a command.

    Raises:
        NotInstallableError: it failed; the last lines it printed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise NotInstallableError(f"no end after {timeout:.0f} s: {' '.join(command[:6])}") from None
    if done.returncode:
        lines = [x for x in (done.stdout + done.stderr).splitlines() if x.strip() and not x.startswith("WARNING")]
        raise NotInstallableError(" ".join(lines[-2:])[-300:] or f"exit status {done.returncode}")
    return done.stdout


def find_python(version: str) -> str:
    """Path of an interpreter of this version, for example ``3.12``.

    Raises:
        NotInstallableError: there is none.
    """
    roots = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    candidates = [p for root in roots for p in sorted(root.glob(f"{version}.*/bin/python"), reverse=True)]
    named = shutil.which(f"python{version}")
    for candidate in (sys.executable, *([named] if named else []), *map(str, candidates)):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        found = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if found.stdout.strip() == version:
            return candidate
    raise NotInstallableError(f"no interpreter python{version} on PATH or in pyenv")


def requirements() -> Iterator[str]:
    """The package's dependencies, except those that vary."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for line in config["options"]["install_requires"].split("\n"):
        if line.strip() and re.match(r"[\w-]+", line.strip()).group() not in ("torch", "transformers", "optimum"):  # type: ignore[union-attr]
            yield line.strip()


def base_environment(work: Path, python: str, torch: str, full: bool) -> Path:
    """Python of a virtual environment with this PyTorch and every dependency but transformers; made once."""
    folder = work / f"python{python}-torch{torch}"
    binary, ready = folder / "bin" / "python", folder / ("ready-full" if full else "ready")
    if ready.exists():
        return binary
    interpreter = find_python(python)
    print(f"  new environment: Python {python}, torch {torch} (a build with CUDA is several GB)", flush=True)
    run([interpreter, "-m", "venv", "--clear", str(folder)], INSTALL_TIMEOUT)
    pip = [str(binary), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, f"torch=={torch}"], INSTALL_TIMEOUT)
    run([*pip, f"torch=={torch}", *requirements(), *TEST_TOOLS, *(FULL_TOOLS if full else ())], INSTALL_TIMEOUT)
    run([*pip, "--no-deps", "optimum>=2.3,<3"], INSTALL_TIMEOUT)  # its only missing dependency is transformers
    ready.touch()
    return binary


# prints the requirements of the folders on the path that the environment does not meet
UNMET = """
import sys
from importlib import metadata
from packaging.requirements import Requirement
for dist in metadata.distributions(path=sys.argv[1:]):
    for text in dist.requires or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            met = need.specifier.contains(metadata.version(need.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            print(f"{need.name}{need.specifier}")
"""


def overlay(binary: Path, release: str) -> Path:
    """Folder with a transformers release and what it needs in other versions than the environment has."""
    folder = binary.parent.parent / f"transformers{release}"
    if (folder / "ready").exists():
        return folder
    pip = [str(binary), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    shutil.rmtree(folder, ignore_errors=True)
    run([*pip, "--target", str(folder), f"transformers=={release}"], INSTALL_TIMEOUT)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    for _ in range(6):  # what was added may need more
        unmet = sorted(set(run([str(binary), "-c", UNMET, str(folder)], 60, env=environment).split("\n")) - {""})
        if not unmet:
            (folder / "ready").touch()
            return folder
        run([*pip, "--upgrade", "--target", str(folder), *unmet], INSTALL_TIMEOUT)
    raise NotInstallableError(f"dependencies of transformers {release} do not settle: {', '.join(unmet)}")


def run_tests(binary: Path, folder: Path, work: Path, result: Result, jobs: int) -> None:
    """Fill ``result`` with what pytest says."""
    report = work / "report.xml"
    report.unlink(missing_ok=True)
    marker = "not slow" if result.suite == "full" else "core and not slow"
    command = [str(binary), "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_TIMEOUT)
    except subprocess.TimeoutExpired:
        result.status, result.reason = "broken", f"no end after {TEST_TIMEOUT} s"
        return
    result.seconds = round(time.monotonic() - start, 1)
    if not report.exists():
        result.status, result.reason = "broken", " ".join((done.stdout + done.stderr).split()[-40:])
        return
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result.failed += 1
            result.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            result.skipped += 1
        else:
            result.passed += 1
    result.status = "broken" if not result.passed else "failed" if result.failed else "passed"


def fingerprint() -> str:
    """Changes when the package or its tests do (committed or not)."""
    tracked = ["optimum_regcache", "tests", "setup.cfg", "pyproject.toml"]
    commit = subprocess.run(["git", "ls-files", "-s", *tracked], cwd=ROOT, capture_output=True, check=True).stdout
    changes = subprocess.run(["git", "diff", "HEAD", "--", *tracked], cwd=ROOT, capture_output=True, check=True).stdout
    hashed = subprocess.run(["git", "hash-object", "--stdin"], input=commit + changes, capture_output=True, check=True)
    return hashed.stdout.decode().strip()[:12]


def table(results: list[Result], mark: str) -> str:
    """docs/results/versions.md; ``mark``: `fingerprint` of the code as it is now."""
    lines = [
        "# Versions",
        "",
        "Written by `python scripts/version_matrix.py`: the tests marked `core`, or all of them, with each combination; "
        "warnings are errors. CPU only; the names of failed tests are in `versions.json`.",
        "",
        "| transformers | PyTorch | Python | tests | passed | failed | skipped | seconds | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        numbers = (
            f"{r.passed} | {r.failed} | {r.skipped} | {r.seconds:.0f}" if r.passed or r.failed else "- | - | - | -"
        )
        word = r.status if r.status in ("passed", "failed") else f"{r.status}: {r.reason}".replace("|", "/")
        word += "" if r.fingerprint == mark else " (earlier state of the code)"
        lines.append(f"| {r.transformers} | {r.torch} | {r.python} | {r.suite} | {numbers} | {word} |")
    return "\n".join(lines) + "\n"


def order(result: Result) -> tuple:
    """Rows by transformers, PyTorch and Python, newest last."""
    return tuple(
        tuple(int(x) for x in re.findall(r"\d+", v)) for v in (result.transformers, result.torch, result.python)
    )


def write(results: dict[tuple, Result], output: Path, mark: str) -> None:
    """Both files, after every result."""
    rows = sorted(results.values(), key=order)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (output, json.dumps([asdict(r) for r in rows], indent=1) + "\n"),
        (output.with_suffix(".md"), table(rows, mark)),
    ):
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triple", nargs=3, action="append", metavar=("PYTHON", "TORCH", "TRANSFORMERS"))
    parser.add_argument("--full", action="store_true", help='the whole suite instead of the tests marked "core"')
    parser.add_argument("--again", action="store_true", help="repeat results that are there already")
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    parser.add_argument("--discard", action="store_true", help="delete every environment after its last line")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".version-matrix", help="environments; can be deleted any time"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "versions.json")
    arguments = parser.parse_args()
    work, suite, mark = arguments.work.resolve(), "full" if arguments.full else "core", fingerprint()
    work.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    results = {r.key: r for r in (Result(**entry) for entry in known)}
    triples = [tuple(t) for t in arguments.triple] if arguments.triple else DEFAULT
    for number, (python, torch, release) in enumerate(triples, 1):
        result = Result(python, torch, release, suite, mark)
        old = results.get(result.key)
        print(f"[{number}/{len(triples)}] transformers {release}, torch {torch}, Python {python}", flush=True)
        if old is not None and old.fingerprint == mark and not arguments.again:
            print(f"  done before: {old.status}", flush=True)
            continue
        start = time.monotonic()
        try:
            binary = base_environment(work, python, torch, arguments.full)
            folder = overlay(binary, release)
            result.install_seconds = round(time.monotonic() - start, 1)
            run_tests(binary, folder, work, result, arguments.jobs)
        except NotInstallableError as error:
            result.reason = str(error)
        results[result.key] = result
        write(results, arguments.output, mark)
        print(
            f"  {result.status}: {result.passed} passed, {result.failed} failed, {result.skipped} skipped, "
            f"{result.seconds:.0f} s {result.reason}",
            flush=True,
        )
        for name in result.failures[:20]:
            print(f"    {name}", flush=True)
        rest = {t[:2] for t in triples[number:]}
        if arguments.discard and (python, torch) not in rest:
            shutil.rmtree(work / f"python{python}-torch{torch}", ignore_errors=True)
    if any(r.status in ("failed", "broken") and r.fingerprint == mark for r in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
