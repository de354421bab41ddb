"""The cache of built C++ operators: what others put there is not loaded, and what is damaged does not end the process."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optimum_regcache.kernels import native
from optimum_regcache.kernels.native import compiler

MISSING = compiler.missing_reason()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    folder = tmp_path_factory.mktemp("built")
    (folder / "empty.cpp").write_text("int nothing() { return 0; }\n")
    library = native.Library("optimum_regcache_empty", "tests", (folder / "empty.cpp",), (), False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))
        compiler.ensure(library)
    return library


@pytest.fixture
def path(built: native.Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A built library in a cache of its own, chosen for this CPU."""
    shutil.copytree(built.sources[0].parent / "cache", tmp_path / "cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "library", lambda: built)
    monkeypatch.setattr(native, "register_fakes", lambda blocks: None)
    native.unavailable_reason.cache_clear()
    yield compiler.target(built)
    native.unavailable_reason.cache_clear()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(native.logger, "warning", seen.append)
    monkeypatch.setattr(compiler.logger, "warning", seen.append)
    return seen


def test_what_was_built_here_is_loaded(path: Path, warnings: list[str]) -> None:
    assert native.unavailable_reason() is None
    assert not warnings
    assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def without_checksum(path: Path) -> None:
    compiler.checksum(path).unlink()


def with_another_checksum(path: Path) -> None:
    compiler.checksum(path).write_text("0" * 64)


def linked(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere.so")))


def linked_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def writable(path: Path) -> None:
    path.chmod(0o666)


def writable_checksum(path: Path) -> None:
    compiler.checksum(path).chmod(0o664)


DAMAGES: list[Callable[[Path], None]] = [
    truncated,
    emptied,
    changed,
    without_checksum,
    with_another_checksum,
    linked,
    linked_to_nothing,
    a_folder,
    a_pipe,
    writable,
    writable_checksum,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_anything_else_is_refused_with_one_warning(
    damage: Callable[[Path], None], path: Path, warnings: list[str]
) -> None:
    damage(path)
    reason = native.unavailable_reason() or ""
    assert reason.startswith("loading the C++ operators failed: ")
    assert f"Delete {path.parent}" in reason
    assert native.unavailable_reason() == reason
    assert warnings == [f"The int8 operators are not used, which is slower: {reason}"]
    assert path not in native._loaded
    (report,) = native.build()
    assert report.reason == reason


def test_a_file_of_another_user_is_refused(path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(path, 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    owner = path.stat().st_uid
    assert f"belongs to another user ({owner})" in (native.unavailable_reason() or "")
    assert len(warnings) == 1


@pytest.mark.parametrize("kind", ["link", "owner"])
def test_nothing_is_built_in_a_folder_of_others(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.rmtree(path.parent)
    if kind == "link":
        (tmp_path / "mine").mkdir()
        path.parent.symlink_to(tmp_path / "mine")
    else:
        path.parent.mkdir()
        os.chown(path.parent, 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    reason = native.unavailable_reason() or ""
    assert reason.startswith(f"building the C++ operators failed: {path.parent} is a link or another user's.")
    assert not (tmp_path / "mine" / path.name).exists()


def test_a_shared_umask_does_not_open_the_folder(path: Path) -> None:
    shutil.rmtree(path.parent.parent)
    before = os.umask(0)
    try:
        assert native.unavailable_reason() is None
    finally:
        os.umask(before)
    for each in (path.parent, path, compiler.checksum(path)):
        assert not each.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_no_home_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiler.Path, "home", home)
    expected = (
        "building the C++ operators failed: this user has no home directory. "
        "TORCH_EXTENSIONS_DIR chooses another folder."
    )
    assert native.unavailable_reason() == expected
    (report,) = native.build()
    assert report.reason == expected
