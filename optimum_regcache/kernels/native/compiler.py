"""Compiles the C++ operators: one folder of the cache for each PyTorch, Python, set of flags and version of the sources.

The cache may be shared with other users: what is loaded belongs to this user or root, nobody else may write it, and it is
whole (its SHA-256 is beside it).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers.utils import logging

logger = logging.get_logger(__name__)

EXTRA_FLAGS = "OPTIMUM_REGCACHE_CXXFLAGS"  # environment variable: further flags, such as -fsanitize=address
_OTHER_FOLDER = "TORCH_EXTENSIONS_DIR chooses another folder."
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_LAYOUT = "2"  # of the folder; 2: with a checksum
_FLAGS = ("-std=c++20", "-fPIC")
_LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch")


class BuildError(RuntimeError):
    """The operators cannot be built; the message says why and what to do."""


class RefusedError(BuildError):
    """What is in the cache must not be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Library:
    """Operators that are built together; one library is used in a process.

    Attributes:
        name: of the built file.
        instructions: what it is for, in words.
        sources: files to compile.
        flags: of the compiler.
        blocks: it holds whole blocks as one operator, for oneDNN's products; else the exact linear layer for CPUs without VNNI.
    """

    name: str
    instructions: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    blocks: bool


def machine() -> str:
    """The processor's architecture, such as x86_64."""
    return platform.machine()


def missing_reason() -> str | None:
    """Why nothing can be compiled here, or None. Which instructions this CPU has does not matter."""
    if not sys.platform.startswith("linux"):
        return f"the operators are built on Linux only, this is {sys.platform}."
    if machine().lower() not in ("x86_64", "amd64"):
        return f"the operators are for x86-64 processors, this is {machine()}."
    return None if _compiler() else "no C++ compiler was found (install g++, or set CXX)."


def target(library: Library) -> Path:
    """Where the built library is, or will be.

    Raises:
        BuildError: this user has no home directory, and no other folder is given.
    """
    try:
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    except RuntimeError as error:
        raise BuildError(
            f"building the C++ operators failed: this user has no home directory. {_OTHER_FOLDER}"
        ) from error
    headers = sorted({header for source in library.sources for header in source.parent.glob("*.h")})
    content = "".join([_LAYOUT, *_all_flags(library), *(path.read_text() for path in (*headers, *library.sources))])
    digest, python = hashlib.sha256(content.encode()).hexdigest()[:12], f"py{sys.version_info[0]}{sys.version_info[1]}"
    return Path(root) / f"{library.name}-torch{torch.__version__}-{python}-{digest}" / f"{library.name}.so"


def ensure(library: Library, ahead: bool = False) -> Path:
    """Build ``library`` unless it is there; a library that is there needs no compiler. One warning says that a build starts, or
    that this process waits for another that builds: it shows by default, also beside a progress bar.

    Args:
        library: what to build.
        ahead: this is the command that builds ahead of time; else the warning names it.

    Returns:
        The built file.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be written.
    """
    path = target(library)
    if os.path.lexists(path):  # also a link to nowhere; `opened` judges it
        return path
    reason = missing_reason()
    if reason is not None:
        raise BuildError(reason)
    try:
        _own_folder(path.parent)
        lock = FileLock(path.parent / "build.lock")  # the system frees it when its holder dies
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with tqdm.external_write_mode(file=sys.stderr):
                logger.warning(f"Waiting for another process that builds the int8 operators ({path.parent}).")
            lock.acquire()
        try:
            if not os.path.lexists(path):
                hint = "" if ahead else " Build ahead of time with: optimum-cli regcache build"
                with tqdm.external_write_mode(file=sys.stderr):
                    logger.warning(
                        f"Building the int8 operators for {library.instructions} once (about half a minute; cached in "
                        f"{path.parent}).{hint}"
                    )
                _compile(library, path)
        finally:
            lock.release()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise BuildError(f"building the C++ operators failed: {error}. {_OTHER_FOLDER}") from error
    return path


def opened(path: Path) -> int:
    """The built library, opened and checked: an open file stays what it is, whatever happens to its name meanwhile.

    Returns:
        File descriptor, for reading.

    Raises:
        RefusedError: a link, a file that another user owns or may write, or one that is not what was built.
    """
    digest = _open_own(checksum(path))
    with open(digest, "rb") as file:
        expected = file.read()
    found = _open_own(path)
    with open(found, "rb", closefd=False) as file:
        if hashlib.sha256(file.read()).hexdigest().encode() == expected:
            return found
    os.close(found)
    raise RefusedError(f"loading the C++ operators failed: {path} is damaged. Delete {path.parent}.")


def checksum(path: Path) -> Path:
    """The file beside a built library with its SHA-256."""
    return path.with_suffix(".sha256")


def _open_own(path: Path) -> int:
    """File descriptor of a file that nobody but this user and root may have written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe does not wait
    except OSError as error:
        raise RefusedError(f"loading the C++ operators failed: {error}. Delete {path.parent}.") from error
    found, fault = os.fstat(descriptor), None
    if not stat.S_ISREG(found.st_mode):
        fault = "is not a file"
    elif found.st_uid not in (0, os.geteuid()):
        fault = f"belongs to another user ({found.st_uid})"
    elif found.st_mode & _OTHERS_WRITE:
        fault = "can be written by other users"
    if fault is None:
        return descriptor
    os.close(descriptor)
    raise RefusedError(f"loading the C++ operators failed: {path} {fault}. Delete {path.parent}, or {_OTHER_FOLDER}")


def _own_folder(folder: Path) -> None:
    """Make ``folder``, which others cannot write, whatever the umask."""
    folder.mkdir(parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        raise BuildError(f"building the C++ operators failed: {folder} is a link or another user's. {_OTHER_FOLDER}")
    if found.st_mode & _OTHERS_WRITE:
        folder.chmod(0o755)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


def _all_flags(library: Library) -> list[str]:
    return [*_FLAGS, *library.flags, *os.environ.get(EXTRA_FLAGS, "").split()]


def _compile(library: Library, path: Path) -> None:
    """Every source by itself, then the link; the library appears at ``path`` only when it is complete."""
    from torch.utils import cpp_extension

    command = [_compiler() or "c++", *_all_flags(library)]
    includes = [part for folder in cpp_extension.include_paths() for part in ("-isystem", folder)]
    libraries = [part for folder in cpp_extension.library_paths() for part in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        objects = [str(Path(folder, f"{source.stem}.o")) for source in library.sources]
        compile_one = [
            [*command, *includes, "-c", str(source), "-o", made]
            for source, made in zip(library.sources, objects, strict=True)
        ]
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(_run, each, path.parent) for each in compile_one]:
                done.result()
        made = Path(folder, path.name)
        _run([*command, "-shared", *objects, "-o", str(made), *libraries, *_LIBRARIES], path.parent)
        digest = Path(folder, checksum(path).name)
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        for each, place in ((digest, checksum(path)), (made, path)):  # the library last
            each.chmod(0o644)
            each.replace(place)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    log = folder / "build.log"
    log.write_text(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
    first = next((line for line in lines if "error" in line), lines[0])
    raise BuildError(f"building the C++ operators failed: {first} (all of the output is in {log})")
