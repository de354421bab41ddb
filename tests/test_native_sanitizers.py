"""The tests of the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer; part of `make slow`.

Both libraries are built with the sanitizers into a folder of their own (other flags are another folder of the cache).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_regcache.kernels import native
from optimum_regcache.kernels.native import compiler

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = Path(__file__).parent
FILES = ("test_native.py", "test_native_arguments.py", "test_avx2.py", "test_fusion.py")
# not those that start processes of their own; of the fused blocks a few
CHOSEN = (
    "not where_others and not reasons and not test_fusion "
    "or whole_block or test_fused_equals_unfused and clip and not dual"
)


def runtime() -> str | None:
    """Libraries that must be loaded before everything else: the sanitizer's, and the C++ runtime, whose exceptions it follows.
    None where the compiler has no sanitizer."""
    found = shutil.which(os.environ.get("CXX") or "c++")
    paths = []
    for name in ("libasan.so", "libstdc++.so.6") if found else ():
        done = subprocess.run([str(found), f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        paths.append(Path(done.stdout.strip()))
    return " ".join(map(str, paths)) if paths and all(path.is_absolute() and path.exists() for path in paths) else None


MISSING = compiler.missing_reason() or (None if runtime() else "the compiler has no libasan.so.")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(MISSING is not None, reason=f"sanitizers: {MISSING}"),
]
UNUSABLE = {
    "avx512_vnni": "the CPU has no AVX-512 with VNNI" if native.library() is not native.VNNI else None,
    "avx2": "the CPU has no AVX2" if native.library() is None else None,
}


def run(*command: str, switch: str = "1") -> subprocess.CompletedProcess[str]:
    """A process with the sanitizers loaded; the first report ends it."""
    environment = {
        **os.environ,
        compiler.EXTRA_FLAGS: FLAGS,
        native.SWITCH: switch,
        "LD_PRELOAD": runtime() or "",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python and PyTorch keep memory on purpose
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parent,
        timeout=1500,
        check=False,
    )


@pytest.mark.parametrize("instructions", list(native.LIBRARIES))
def test_operators_under_sanitizers(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(compiler.EXTRA_FLAGS, FLAGS)
        (report,) = native.build(instructions)
    assert report.reason is None, report.reason
    if UNUSABLE[instructions] is not None:
        pytest.skip(f"built, not run: {UNUSABLE[instructions]}")
    switch = "avx2" if instructions == "avx2" else "1"
    used = run("-c", "from optimum_regcache.kernels import native; print(native.unavailable_reason())", switch=switch)
    assert used.stdout.strip() == "None", used.stderr[-3000:]
    files = [str(TESTS / name) for name in FILES]
    done = run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", CHOSEN, *files, switch=switch)
    text = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0, text
    assert "runtime error" not in text
    assert "AddressSanitizer" not in text


BROKEN = """
#include <cstdint>
#include <vector>
extern "C" int beyond(int64_t place) { return std::vector<int>(8)[place]; }
extern "C" int overflow(int value) { return value + 1; }
"""


@pytest.mark.parametrize(
    ("call", "report"), [("beyond(8)", "heap-buffer-overflow"), ("overflow(2147483647)", "signed integer overflow")]
)
def test_the_sanitizers_would_notice(call: str, report: str, tmp_path: Path) -> None:
    source, library = tmp_path / "broken.cpp", tmp_path / "broken.so"
    source.write_text(BROKEN)
    found = os.environ.get("CXX") or "c++"
    subprocess.run([found, *FLAGS.split(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = run("-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).{call})")
    assert done.returncode != 0
    assert report in done.stderr
