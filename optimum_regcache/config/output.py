"""One transaction for everything a job writes: written beside, read back, swapped in; nothing of an earlier result remains.

What lies in a folder of ours is listed in ``regcache.json``: names, sizes, and a digest of each part of the job. While a job
runs, its journal and the files to come are in a folder that huggingface_hub leaves out of uploads; it is gone afterwards. What
is swapped in is on disk first, so that a power cut leaves one result or the other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from filelock import FileLock, Timeout
from safetensors import safe_open

from optimum_regcache.config.files import sync_file, sync_folder, write_json
from optimum_regcache.config.model import QUANT_METHOD
from optimum_regcache.config.validation import is_mapping, require

MANIFEST = "regcache.json"
WORK = Path(".cache", "huggingface", "regcache")
_CONFIG = "config.json"  # without it no model opens: the first to go and the last to come
_WEIGHTS = ("*.safetensors", "*.bin", "*.onnx", "openvino_model.xml", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf")
# what version 0.1.0 wrote, without a list
_EARLIER = (
    _CONFIG, "model*.safetensors", "model*.safetensors.index.json", "*processor_config.json", "tokenizer*.json", "vocab.json",
    "merges.txt", "spiece.model", "special_tokens_map.json", "recipe.yaml", "results.json", "README.md", "analysis.json",
    "analysis.png", "outliers.png", "export.json", "model.onnx*", "openvino_model.*", "search/search.json",
)  # fmt: skip


def digests(job: Mapping[str, Any]) -> dict[str, str]:
    """A short digest of each part of a job: tells jobs apart, and no path can be read from it."""
    texts = {name: json.dumps(part, sort_keys=True, default=str) for name, part in job.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def note(error: BaseException, text: str) -> None:
    """Add a sentence that the command line prints after the message (``add_note`` of Python 3.11)."""
    error.__notes__ = [*getattr(error, "__notes__", []), text]  # type: ignore[attr-defined]


class Output:
    """A folder that gets the result of a job, or stays as it is.

    The constructor finds out whether the folder may be written, before any work. Inside the ``with`` block files go to
    :attr:`stage`; at its end they are read back and take the place of the earlier result. After an exception the folder is as
    it was, and :attr:`work` is kept for the next run of the same job.

    Args:
        path: the folder; made if it does not exist. Files that no job of ours wrote are left alone.
        job: what is made, by parts; a result of another job is replaced with ``overwrite`` only.
        overwrite: replace a result of ours whatever made it.
        models: names or paths of the models that are read; none of them may be the folder.
        dataset: name or path of the images, which may not contain the folder.

    Attributes:
        stage: folder of the files to come.
        work: folder of the journal.
        keep_journal: leave the journal there for another run, though the result is complete.

    Raises:
        ValueError: the folder is the source, holds a model that is not ours or another job's result, or is being written.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        job: Mapping[str, Any],
        *,
        overwrite: bool = False,
        models: Iterable[str | Path | None] = (),
        dataset: str | None = None,
    ) -> None:
        require(bool(str(path).strip()), "The output is empty; name a folder.")
        self.path, self.job, self.overwrite = Path(path), digests(job), overwrite
        self.work, self.keep_journal = self.path / WORK, False
        self.stage, self._aside, self._plan = self.work / "new", self.work / "old", self.work / "swap.json"
        self._lock = FileLock(self.work / "lock", timeout=0)
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        require(
            not self.path.exists() or self.path.is_dir(), f"The output {self.path} is a file; a folder is written here."
        )
        here = self.path.resolve()
        for model in models:
            require(
                model is None or not Path(model).exists() or Path(model).resolve() != here,
                f"The output {self.path} is the source model itself, which would be lost. Use another folder.",
            )
        inside = dataset is not None and Path(dataset).is_dir() and here.is_relative_to(Path(dataset).resolve())
        require(
            not inside, f"The output {self.path} lies inside the data set {dataset}, whose images are read from there."
        )
        self._acquire()
        try:
            self._recover()
            self._check_content()
            (self.work / "probe").write_bytes(b"\0" * 4096)
            (self.work / "probe").unlink()
        finally:
            self._release()

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What an earlier job of ours left here; None if there is no list."""
        try:
            found = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        good = is_mapping(found) and is_mapping(found.get("files")) and is_mapping(found.get("job"))
        return found if good else None

    def _check_content(self) -> None:
        """Whose files are there?"""
        manifest, ours = self.manifest, _is_ours(self.path)
        files = _files(self.path, (_CONFIG, *_WEIGHTS)) - set(manifest["files"] if manifest and ours else ())
        require(
            ours or not files,
            f"The output {self.path} holds a model that optimum-regcache did not write. Use another folder.",
        )
        if self.overwrite or not (ours or manifest):
            return
        theirs: dict[str, str] = manifest["job"] if manifest else {}
        other = sorted(k for k in {*self.job, *theirs} if self.job.get(k) != theirs.get(k))
        require(
            not other,
            f"The output {self.path} holds the result of another job (other {', '.join(other)}). Use another folder, or "
            "--overwrite (overwrite=True).",
        )
        sizes: dict[str, Any] = manifest["files"] if manifest else {}
        changed = [n for n, size in sizes.items() if (self.path / n).is_file() and _state(self.path / n) != size]
        require(
            not changed,
            f"The output {self.path} was changed since it was written: {', '.join(changed)}. Use another folder, or "
            "--overwrite (overwrite=True).",
        )

    def require_space(self, needed: int) -> None:
        """Find out early that the disk is too small.

        Raises:
            OSError: fewer than ``needed`` bytes are free.
        """
        free = shutil.disk_usage(self.work).free
        if free < needed:
            text = f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {text}", str(self.path))

    def _acquire(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        require(not (self.work / "lock").is_symlink(), f"{self.work / 'lock'} is a link. Remove it.")
        try:
            self._lock.acquire()  # pyright: ignore[reportUnknownMemberType]
        except Timeout:
            raise ValueError(
                f"Another process is writing to {self.path}. Wait for it, or use another folder."
            ) from None

    def _release(self) -> None:
        """Give the lock back, and remove the folders that are empty and ours."""
        if self.work.is_dir() and {p.name for p in self.work.iterdir()} <= {"lock"}:
            with suppress(OSError):
                (self.work / "lock").unlink(missing_ok=True)
            with suppress(OSError):
                for path in (self.work, self.work.parent, self.work.parent.parent, *self._made):
                    path.rmdir()
        self._lock.release()

    def __enter__(self) -> Output:
        self._acquire()
        self.stage.mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
                for journal in () if self.keep_journal else self.work.glob("*.jsonl*"):
                    journal.unlink()
        except BaseException as failure:
            error = failure
            raise
        finally:
            shutil.rmtree(self.stage, ignore_errors=True)
            if error is not None and not any(self.work.glob("*.jsonl")):
                for lock in self.work.glob("*.jsonl.lock"):
                    lock.unlink()
            elif error is not None:
                note(error, f"Finished steps are kept in {self.work}; the same command goes on from there.")
            self._release()

    def _commit(self) -> None:
        read_back(self.stage)
        names = [p.relative_to(self.stage).as_posix() for p in sorted(self.stage.rglob("*")) if p.is_file()]
        files = {name: _state(self.stage / name) for name in names}
        write_json(self.stage / MANIFEST, {"format": 1, "job": self.job, "files": files})
        mode = (self.stage / MANIFEST).stat().st_mode  # by the umask; safetensors hides its files from others
        for name in names:
            (self.stage / name).chmod(mode)
        manifest = self.manifest
        earlier = (
            {*manifest["files"], MANIFEST} if manifest else _files(self.path, _EARLIER) if _is_ours(self.path) else ()
        )
        new = sorted({*names, MANIFEST}, key=lambda n: n == _CONFIG)
        old = sorted((n for n in {*earlier, *new} if (self.path / n).is_file()), key=lambda n: n != _CONFIG)
        for name in new:
            sync_file(self.stage / name)
        _sync_folders(self.stage, new)
        write_json(
            self._plan, {"old": old, "new": new}, sync=True
        )  # from here on a power cut is made good by `_recover`
        try:
            for name in old:
                _move(self.path / name, self._aside / name)
            for name in new:
                _move(self.stage / name, self.path / name)
            for folder, names in ((self._aside, old), (self.path, new)):
                _sync_folders(folder, names)
        finally:
            self._recover()

    def _recover(self) -> None:
        """After a swap: if it was cut off, put the earlier result back; else forget it. A stage that was left goes too."""
        with suppress(FileNotFoundError):
            plan = json.loads(self._plan.read_text(encoding="utf-8"))
            if any((self.stage / name).exists() for name in plan["new"]):
                for name in reversed(plan["new"]):
                    if not (self.stage / name).exists():
                        (self.path / name).unlink(missing_ok=True)
                for name in reversed(plan["old"]):
                    if (self._aside / name).exists():
                        _move(self._aside / name, self.path / name)
                _sync_folders(self.path, {*plan["old"], *plan["new"]})
            self._plan.unlink()
        shutil.rmtree(self._aside, ignore_errors=True)
        shutil.rmtree(self.stage, ignore_errors=True)


def read_back(folder: Path) -> None:
    """Read every tensor file and every JSON file of ``folder``.

    Raises:
        OSError: a file is not what was written: cut off, missing, or not readable.
    """
    for path in sorted(folder.rglob("*.*")):
        try:
            if path.suffix == ".json":
                data = json.loads(path.read_text(encoding="utf-8"))
                for shard in set(data["weight_map"].values()) if path.name.endswith(".index.json") else ():
                    (folder / shard).stat()
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np"):  # compares the header with the size of the file
                    pass
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass
        except Exception as error:
            raise OSError(errno.EIO, f"{path.name} could not be read back ({error})", str(folder)) from error


def check_result_file(path: str | Path, job: Mapping[str, Any], overwrite: bool = False) -> dict[str, str]:
    """Whether the JSON file ``path`` may be written with the result of ``job``; returns the digests to store as ``job``.

    Raises:
        ValueError: a folder, a file that no job of ours wrote, or the result of another job without ``overwrite``.
        OSError: it cannot be written.
    """
    path, parts = Path(path), digests(job)
    require(not path.is_dir(), f"The output {path} is a folder; a JSON file is written here.")
    if path.exists():
        found = None
        if path.is_file() and path.stat().st_size < 1 << 26:
            with suppress(ValueError):
                found = json.loads(path.read_text(encoding="utf-8"))
        ours = isinstance(found, dict) and "quantized_layers" in found
        require(ours, f"The output {path} is a file that optimum-regcache did not write. Use another name.")
        same = cast("dict[str, Any]", found).get("job") == parts
        require(
            overwrite or same, f"The output {path} holds the result of another job. Use another name, or --overwrite."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f".{path.name}.probe")
    probe.touch()
    probe.unlink()
    return parts


def _files(folder: Path, patterns: Iterable[str]) -> set[str]:
    return {p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern) if p.is_file()}


def _is_ours(folder: Path) -> bool:
    """Whether config.json is that of a quantized or of an exported model; without one, whether an analysis is there."""
    info = folder / "export.json"
    exported = info.exists() and not _files(folder, ("*.safetensors", "pytorch_model*.bin"))
    if exported or not (folder / _CONFIG).exists():
        return exported or (folder / "analysis.json").exists()
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        method = config["quantization_config"]["quant_method"]
        return method == QUANT_METHOD or (info.exists() and method == json.loads(info.read_text("utf-8"))["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _state(path: Path) -> list[Any]:
    """Size of a file, and a digest if it is small: whether somebody changed it since."""
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest()[:16] if size <= 1 << 20 else None]


def _sync_folders(folder: Path, names: Iterable[str]) -> None:
    """Of the files ``names`` in ``folder``."""
    for place in sorted(
        {folder, *(parent for n in names for parent in (folder / n).parents if folder in parent.parents)}
    ):
        sync_folder(place)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
