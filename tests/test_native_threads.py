"""The number of OpenMP threads after a C++ operator has failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_regcache.kernels import native

THREADS = """
import torch
from optimum_regcache.kernels import native
import test_native_arguments as cases

assert native.unavailable_reason() is None
torch.set_num_threads(2)
before = cases.call(cases.block)
try:
    cases.call(cases.block, eps=[1e-5, -1.0])  # noticed in the middle of the threads' work
except RuntimeError as error:
    assert "`eps` must be at least 0" in str(error), error
else:
    raise SystemExit("no error")
assert torch.get_num_threads() == 2, torch.get_num_threads()
assert "omp_get_max_threads() : 2" in torch.__config__.parallel_info()
assert torch.equal(cases.call(cases.block), before)
"""


@pytest.mark.skipif(native.blocks_reason() is not None, reason=f"whole blocks: {native.blocks_reason()}")
def test_an_error_inside_the_threads_leaves_their_number_alone() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


GUARD = """
#include "threads.h"

#include <cstdio>
#include <stdexcept>

int main() {
  omp_set_num_threads(3);
  try {
    const regcache::OneThread one;
    if (omp_get_max_threads() != 1) return 1;
    throw std::runtime_error("in a kernel");
  } catch (const std::runtime_error&) {
  }
  return omp_get_max_threads() == 3 ? 0 : 2;
}
"""


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "c++") is None, reason="no C++ compiler")
def test_the_number_of_threads_comes_back_after_an_exception(tmp_path: Path) -> None:
    """The guard by itself: in a parallel region OpenMP would forget the number anyway."""
    source, program = tmp_path / "guard.cpp", tmp_path / "guard"
    source.write_text(GUARD)
    include = str(Path(native.__file__).parent)
    compiler = os.environ.get("CXX") or "c++"
    subprocess.run([compiler, "-std=c++20", "-fopenmp", f"-I{include}", str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], check=False).returncode == 0
