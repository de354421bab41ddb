"""C++ operators for the fused int8 runtime, built for this machine on first use and kept in PyTorch's extension cache.

They exist where the CPU has AVX-512 with VNNI and a C++ compiler is installed. Everywhere else the same operations run in
plain PyTorch (`optimum_regcache.kernels.fused_ops`), more slowly.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers.utils import logging

from optimum_regcache.kernels.onednn import machine_reason

logger = logging.get_logger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("fused_ops.cpp", "block_op.cpp", "token_ops.cpp"))
HEADER = Path(__file__).with_name("fused_ops.h")
_NAME = "optimum_regcache_fused_ops"
SWITCH = "OPTIMUM_REGCACHE_NATIVE"
# named instructions instead of -march=native: a home directory may be shared by different machines
FLAGS = [
    "-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-fopenmp",
    "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-Wno-ignored-attributes",
]  # fmt: skip


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


@lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """Why the operators cannot be used here, or None. The first call builds them (about 10 s once for a PyTorch version).

    The environment variable OPTIMUM_REGCACHE_NATIVE=0 switches them off.
    """
    if os.environ.get(SWITCH) == "0":
        return f"the environment variable {SWITCH} is 0."
    if not sys.platform.startswith("linux"):
        return f"the operators are built on Linux only, this is {sys.platform}."
    reason = machine_reason()
    if reason is not None:
        return reason
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return f"the CPU capability is {torch.backends.cpu.get_cpu_capability()}, AVX512 is needed."
    if _compiler() is None:
        return "no C++ compiler was found (install g++, or set CXX)."
    with _ninja_on_path():
        if shutil.which("ninja") is None:
            return "the build tool ninja was not found (pip install ninja)."
        return _build()


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The ninja that pip installed beside this Python is found even if its environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, sysconfig.get_path("scripts")))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _directory() -> Path:
    """Where the operators are kept: one folder for each PyTorch, Python and version of the sources."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    content = "".join([*FLAGS, *(path.read_text() for path in (HEADER, *SOURCES))])
    digest, python = hashlib.sha256(content.encode()).hexdigest()[:12], f"py{sys.version_info[0]}{sys.version_info[1]}"
    return Path(root) / f"{_NAME}-torch{torch.__version__}-{python}-{digest}"


def _build() -> str | None:
    from torch.utils import cpp_extension

    directory = _directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # one process builds at a time; the system frees this lock when its holder dies, unlike the builder's own file "lock",
        # which a killed build leaves behind and for which the next one would wait for ever
        with FileLock(directory / "build.lock"), contextlib.redirect_stdout(io.StringIO()):
            (directory / "lock").unlink(missing_ok=True)
            if not (directory / f"{_NAME}.so").exists():
                logger.warning(
                    "Building the C++ operators for fused int8 execution; this happens once and takes a few seconds."
                )
            cpp_extension.load(
                _NAME,
                [str(path) for path in SOURCES],
                extra_cflags=FLAGS,
                build_directory=str(directory),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        return f"building the C++ operators failed: {str(error).strip().splitlines()[0]}"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Shapes for torch.compile."""

    def codes_of(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)

    def attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        inverse = rest[7]  # 0: real numbers leave
        return q.new_empty(q.shape, dtype=torch.uint8 if inverse > 0 else torch.float32)

    def block(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def delete_tokens(x: torch.Tensor, lead: int, count: int) -> tuple[torch.Tensor, ...]:
        (batch, tokens, width), left = x.shape, x.shape[1] - count
        positions, dropped = ((batch, left), torch.int64), ((batch, tokens), torch.bool)
        return x.new_empty(batch, left, width), *(x.new_empty(size, dtype=kind) for size, kind in (positions, dropped))

    def restore_tokens(x: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, *rest: Any) -> torch.Tensor:
        return x.new_empty(x.shape[0], dropped.shape[1], x.shape[2])

    shapes = {"quantize": codes_of, "layer_norm_quantize": codes_of}
    shapes |= {f.__name__: f for f in (attention, block, delete_tokens, restore_tokens)}
    for name, function in shapes.items():
        torch.library.register_fake(f"regcache::{name}", function)
