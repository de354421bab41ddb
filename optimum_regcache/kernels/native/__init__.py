"""C++ operators of the int8 runtime, built for this machine on first use and kept in PyTorch's extension cache.

Two libraries: for AVX-512 with VNNI (whole blocks as one operator), and for AVX2 (linear layers that do not saturate).
Where neither can be built the same operations run in plain PyTorch (`optimum_regcache.kernels.fused_ops`), more slowly.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers.utils import logging

from optimum_regcache.kernels import cpu
from optimum_regcache.kernels.native import compiler
from optimum_regcache.kernels.native.compiler import BuildError, Library, RefusedError
from optimum_regcache.kernels.native.fakes import register_fakes

logger = logging.get_logger(__name__)

SWITCH = "OPTIMUM_REGCACHE_NATIVE"
_FOLDER = Path(__file__).parent
# named instructions instead of -march=native: a home directory may be shared by different machines
_FLAGS = (
    "-O3", "-mavx2", "-mfma", "-fopenmp",
    "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-Wno-ignored-attributes",
)  # fmt: skip
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")


def _sources(*names: str) -> tuple[Path, ...]:
    return tuple(_FOLDER / f"{name}.cpp" for name in ("operators", "token_ops", *names))


VNNI = Library(
    "optimum_regcache_fused_ops",
    "AVX-512 VNNI",
    _sources("block_op", "vnni_rows", "vnni_attention"),
    (*_FLAGS, *_AVX512),
    blocks=True,
)
AVX2 = Library(
    "optimum_regcache_avx2_ops", "AVX2", _sources("avx2_linear", "avx2_rows", "avx2_attention"), _FLAGS, blocks=False
)
LIBRARIES = {"avx512_vnni": VNNI, "avx2": AVX2}


def library() -> Library | None:
    """The operators for this CPU; None where it has not even AVX2. OPTIMUM_REGCACHE_NATIVE=avx2 chooses those without VNNI."""
    found = cpu.capabilities()
    if (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and found.get("avx512_vnni")
        and os.environ.get(SWITCH) != "avx2"
    ):
        return VNNI
    return AVX2 if found.get("avx2") and found.get("fma3") else None


@lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """Why the operators cannot be used here, or None. The first call builds them (half a minute, once for a PyTorch version)
    and says so in one warning; `build` does it ahead of time.

    The environment variable OPTIMUM_REGCACHE_NATIVE=0 switches them off.
    """
    if os.environ.get(SWITCH) == "0":
        return f"the environment variable {SWITCH} is 0."
    if not sys.platform.startswith("linux"):
        return f"the operators are built on Linux only, this is {sys.platform}."
    chosen = library()
    if chosen is None:
        return "the CPU has no AVX2 instructions."
    try:
        _load(chosen, compiler.ensure(chosen))
    except RefusedError as error:
        logger.warning(f"The int8 operators are not used, which is slower: {error}")
        return str(error)
    except BuildError as error:
        return str(error)
    return None


def blocks_reason() -> str | None:
    """Why whole blocks are no single operator here, or None."""
    chosen = library()
    if unavailable_reason() is None and chosen is not None and not chosen.blocks:
        return "the CPU has no AVX-512 with VNNI."
    return unavailable_reason()


_loaded: dict[Path, int] = {}  # its file stays open: the loader knows libraries by their names, and this is a number


def _load(chosen: Library, path: Path) -> None:
    if path in _loaded:
        return
    descriptor = compiler.opened(path)
    try:
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")  # the file that was checked, by no other name
    except OSError as error:
        os.close(descriptor)
        raise RefusedError(
            f"loading the C++ operators failed: {str(error).strip().splitlines()[0]} Delete {path.parent}."
        ) from error
    register_fakes(chosen.blocks)
    _loaded[path] = descriptor


@dataclass(frozen=True)
class BuildReport:
    """What :func:`build` did for one library.

    Attributes:
        instructions: which it is for, in words.
        path: the library; None if there is none.
        seconds: how long it took.
        built: False if it was there already.
        reason: why it could not be built or loaded; None if all went well.
    """

    instructions: str
    path: Path | None = None
    seconds: float = 0.0
    built: bool = False
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.instructions}: not available: {self.reason}"
        done = f"built in {self.seconds:.0f} s" if self.built else "was built before"
        return f"{self.instructions}: {done}, {self.path}"


def build(instructions: str = "auto") -> list[BuildReport]:
    """Build the operators ahead of time, so that no first request waits for it.

    Args:
        instructions: "auto" builds what this CPU runs, and loads it; "avx512_vnni" and "avx2" one library, "all" both. Those
            need a compiler and no such CPU: an image may be built on one machine for others.

    Returns:
        One report for each library.

    Raises:
        ValueError: other instructions.
    """
    if instructions not in ("auto", "all", *LIBRARIES):
        raise ValueError(f"instructions must be one of auto, all, {', '.join(LIBRARIES)}, got {instructions!r}.")
    if instructions != "auto":
        chosen = list(LIBRARIES.values()) if instructions == "all" else [LIBRARIES[instructions]]
        return [_build(each) for each in chosen]
    own = library()
    if own is None:
        return [BuildReport("this CPU", reason=f"the CPU has no AVX2 instructions ({compiler.machine()}).")]
    report = _build(own)
    if report.path is not None:
        unavailable_reason.cache_clear()  # it may remember that there was no compiler
        reason = unavailable_reason()
        return [BuildReport(own.instructions, report.path, report.seconds, report.built, reason)]
    return [report]


def _build(chosen: Library) -> BuildReport:
    start = time.perf_counter()
    try:
        there = os.path.lexists(compiler.target(chosen))
        path = compiler.ensure(chosen, ahead=True)
        os.close(compiler.opened(path))
    except BuildError as error:
        return BuildReport(chosen.instructions, seconds=time.perf_counter() - start, reason=str(error))
    return BuildReport(chosen.instructions, path, time.perf_counter() - start, not there)
