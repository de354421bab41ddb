"""C++ operators of the int8 runtime, built for this machine on first use and kept in PyTorch's extension cache.

Two libraries: for AVX-512 with VNNI (whole blocks as one operator), and for AVX2 (linear layers that do not saturate).
Where neither can be built the same operations run in plain PyTorch (`optimum_regcache.kernels.fused_ops`), more slowly.
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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers.utils import logging

from optimum_regcache.kernels import cpu

logger = logging.get_logger(__name__)

SWITCH = "OPTIMUM_REGCACHE_NATIVE"
_FOLDER = Path(__file__).parent
_COMMON = (_FOLDER / "schemas.cpp", _FOLDER / "token_ops.cpp")
# named instructions instead of -march=native: a home directory may be shared by different machines
_FLAGS = (
    "-O3", "-mavx2", "-mfma", "-fopenmp",
    "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-Wno-ignored-attributes",
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """Operators that are built together; one library is used in a process.

    Attributes:
        name: of the built file.
        sources: files to compile.
        flags: of the compiler.
        blocks: it holds whole blocks as one operator, for oneDNN's products; else the exact linear layer for CPUs without VNNI.
    """

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    blocks: bool


VNNI = Library(
    "optimum_regcache_fused_ops",
    (*_COMMON, _FOLDER / "fused_ops.cpp", _FOLDER / "block_op.cpp"),
    (*_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    blocks=True,
)
AVX2 = Library(
    "optimum_regcache_avx2_ops",
    (*_COMMON, _FOLDER / "avx2_ops.cpp", _FOLDER / "avx2_attention.cpp"),
    _FLAGS,
    blocks=False,
)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


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
    """Why the operators cannot be used here, or None. The first call builds them (half a minute, once for a PyTorch version).

    The environment variable OPTIMUM_REGCACHE_NATIVE=0 switches them off.
    """
    if os.environ.get(SWITCH) == "0":
        return f"the environment variable {SWITCH} is 0."
    if not sys.platform.startswith("linux"):
        return f"the operators are built on Linux only, this is {sys.platform}."
    chosen = library()
    if chosen is None:
        return "the CPU has no AVX2 instructions."
    if _compiler() is None:
        return "no C++ compiler was found (install g++, or set CXX)."
    with _ninja_on_path():
        if shutil.which("ninja") is None:
            return "the build tool ninja was not found (pip install ninja)."
        return _build(chosen)


def blocks_reason() -> str | None:
    """Why whole blocks are no single operator here, or None."""
    chosen = library()
    if unavailable_reason() is None and chosen is not None and not chosen.blocks:
        return "the CPU has no AVX-512 with VNNI."
    return unavailable_reason()


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The ninja that pip installed beside this Python is found even if its environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, sysconfig.get_path("scripts")))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _directory(chosen: Library) -> Path:
    """Where the operators are kept: one folder for each PyTorch, Python and version of the sources."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    headers = sorted(_FOLDER.glob("*.h"))
    content = "".join([*chosen.flags, *(path.read_text() for path in (*headers, *chosen.sources))])
    digest, python = hashlib.sha256(content.encode()).hexdigest()[:12], f"py{sys.version_info[0]}{sys.version_info[1]}"
    return Path(root) / f"{chosen.name}-torch{torch.__version__}-{python}-{digest}"


def _build(chosen: Library) -> str | None:
    from torch.utils import cpp_extension

    directory = _directory(chosen)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # one process builds at a time; the system frees this lock when its holder dies, unlike the builder's own file "lock",
        # which a killed build leaves behind and for which the next one would wait for ever
        with FileLock(directory / "build.lock"), contextlib.redirect_stdout(io.StringIO()):
            (directory / "lock").unlink(missing_ok=True)
            if not (directory / f"{chosen.name}.so").exists():
                logger.warning(
                    "Building the C++ operators for int8 execution; this happens once, for about half a minute."
                )
            cpp_extension.load(
                chosen.name,
                [str(path) for path in chosen.sources],
                extra_cflags=list(chosen.flags),
                build_directory=str(directory),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        return f"building the C++ operators failed: {str(error).strip().splitlines()[0]}"
    _register_fakes(chosen)
    return None


def _register_fakes(chosen: Library) -> None:
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

    def linear(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
        out, as_codes = rest[3].shape[0], rest[8]
        return codes.new_empty(*codes.shape[:-1], out, dtype=torch.uint8 if as_codes else torch.float32)

    shapes = {"quantize": codes_of, "layer_norm_quantize": codes_of}
    own = block if chosen.blocks else linear
    shapes |= {f.__name__: f for f in (own, attention, delete_tokens, restore_tokens)}
    for name, function in shapes.items():
        torch.library.register_fake(f"regcache::{name}", function)
