"""Whatever a job writes: beside, read back, swapped in; nothing foreign is touched, nothing stale remains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from optimum_regcache.config import files
from optimum_regcache.config.files import write_json, write_text
from optimum_regcache.config.output import MANIFEST, WORK, Output, check_result_file

OURS = '{"quantization_config": {"quant_method": "regcache"}}'
JOB = {"model": "a", "recipe": {"bits": 8}}


def fill(folder: Path, value: float = 1.0, more: tuple[str, ...] = ()) -> None:
    (folder / "config.json").write_text(OURS)
    save_file({"w": torch.full((4,), value)}, folder / "model.safetensors")
    for name in ("results.json", *more):
        (folder / name).write_text(json.dumps(value))


def write(path: Path, value: float = 1.0, job: Any = JOB, more: tuple[str, ...] = (), **options: Any) -> None:
    with Output(path, job, **options) as out:
        fill(out.stage, value, more)


def failing(path: Path, error: BaseException, journal: str = "") -> None:
    with Output(path, JOB) as out:
        fill(out.stage, 2.0)
        if journal:
            (out.work / "abc.jsonl").write_text(journal)
        raise error


def damaged(path: Path, name: str, data: bytes) -> None:
    with Output(path, JOB) as out:
        fill(out.stage, 2.0)
        (out.stage / name).write_bytes(data)


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    with Output(tmp_path / "out", JOB) as out:
        fill(out.stage)
        (out.stage / "model.safetensors").chmod(0o600)
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert modes["model.safetensors"] == modes["results.json"] == modes[MANIFEST]


def test_a_result_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    write(out, 1.0, more=("old.png", "sub/deep.json")[:1])
    (out / "mine.txt").write_text("kept")
    write(out, 2.0)
    assert sorted(content(out)) == ["config.json", "mine.txt", "model.safetensors", MANIFEST, "results.json"]
    assert (out / "results.json").read_text() == "2.0"
    assert "a" not in json.loads((out / MANIFEST).read_text())["job"].values()


def test_a_failed_job_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        failing(tmp_path / "x" / "out", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    before = content(tmp_path)
    with pytest.raises(RuntimeError, match="boom"):
        failing(tmp_path, RuntimeError("boom"))
    assert content(tmp_path) == before


def test_the_journal_of_a_failed_job_is_kept_until_one_succeeds(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        failing(tmp_path, KeyboardInterrupt(), journal="step")
    assert (
        f"Finished steps are kept in {tmp_path / WORK}; the same command goes on" in vars(stopped.value)["__notes__"][0]
    )
    with Output(tmp_path, JOB) as out:
        assert (out.work / "abc.jsonl").read_text() == "step"
        fill(out.stage)
    assert not (tmp_path / ".cache").exists()
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    assert not list(filter_repo_objects([f"{WORK.as_posix()}/abc.jsonl"], ignore_patterns=DEFAULT_IGNORE_PATTERNS))


@pytest.mark.parametrize("fails", range(8))
@pytest.mark.parametrize("kill", [False, True])
def test_a_swap_that_is_cut_off_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, kill: bool
) -> None:
    """At every rename: an exception is undone at once, a kill at the next start; between them no model opens."""
    write(tmp_path, 1.0, more=("old.png",))
    before, real, calls = content(tmp_path), os.replace, []

    def replace(source: Any, target: Any) -> None:
        if "tmp" not in Path(source).suffix:
            calls.append(target)
            if len(calls) == fails + 1 or (kill and len(calls) > fails):
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if kill:  # nothing more is done after it
        monkeypatch.setattr(Output, "_recover", lambda self: None)
        monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        monkeypatch.setattr(Output, "_release", lambda self: self._lock.release())
    out = Output(tmp_path, JOB)
    with pytest.raises(KeyboardInterrupt), out:
        fill(out.stage, 2.0)
    if kill:
        assert not (tmp_path / "config.json").exists() or content(tmp_path)["config.json"] == before["config.json"]
        monkeypatch.undo()
        Output(tmp_path, JOB)
    assert content(tmp_path) == before


def test_a_swap_killed_after_its_last_rename_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1.0, more=("old.png",))
    with monkeypatch.context() as patch:
        patch.setattr(Output, "_recover", lambda self: None)
        write(tmp_path, 2.0)
    Output(tmp_path, JOB)
    assert sorted(content(tmp_path)) == ["config.json", "model.safetensors", MANIFEST, "results.json"]
    assert (tmp_path / "results.json").read_text() == "2.0"


def test_a_power_cut_finds_everything_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their names and the plan before the first rename; the renames before the plan is forgotten."""
    write(tmp_path, 1.0)
    on_disk: set[int] = set()
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink
    moved: list[Path] = []

    def note_sync(number: int) -> None:
        fsync(number)
        on_disk.add(os.fstat(number).st_ino)

    def note_replace(source: Any, target: Any) -> None:
        if not moved and not str(source).endswith(".tmp"):
            stage = tmp_path / WORK / "new"
            assert {
                p.stat().st_ino for p in (stage, *stage.iterdir(), stage.parent / "swap.json", stage.parent)
            } <= on_disk
            on_disk.clear()
        moved.extend([Path(source)] if not str(source).endswith(".tmp") else [])
        replace(source, target)

    def note_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == "swap.json":
            assert {tmp_path.stat().st_ino, (tmp_path / WORK / "old").stat().st_ino} <= on_disk
        unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Path, "unlink", note_unlink)
    write(tmp_path, 2.0)
    assert len(moved) == 8
    assert (tmp_path / "results.json").read_text() == "2.0"


def test_what_cannot_be_read_back_is_not_swapped_in(tmp_path: Path) -> None:
    write(tmp_path)
    before = content(tmp_path)
    index = json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}).encode()
    for name, data in (
        ("model.safetensors", before["model.safetensors"][:-3]),
        ("model.safetensors.index.json", index),
    ):
        with pytest.raises(OSError, match=f"{name} could not be read back"):
            damaged(tmp_path, name, data)
    assert content(tmp_path) == before


FOREIGN = {
    "config.json": '{"model_type": "vit"}',
    "pytorch_model.bin": "x",
    "model-00001-of-00002.safetensors": "x",
    "model.onnx": "x",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_a_foreign_model_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text(FOREIGN[name])
    with pytest.raises(ValueError, match="holds a model that optimum-regcache did not write"):
        Output(tmp_path, JOB, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_float_model_saved_over_our_result_is_foreign(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(FOREIGN["config.json"])
    with pytest.raises(ValueError, match="holds a model that optimum-regcache did not write"):
        Output(tmp_path, JOB, overwrite=True)


def test_the_source_and_the_data_set_are_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for name in ("model", "./model/", str(tmp_path / "model"), "link", "model/../model"):
        with pytest.raises(ValueError, match="is the source model itself, which would be lost"):
            Output(name, JOB, models=[None, "model", "some/hub-id"], overwrite=True)
    with pytest.raises(ValueError, match=r"model/out lies inside the data set model"):
        Output("model/out", JOB, dataset="model")
    with pytest.raises(ValueError, match="The output is empty"):
        Output("", JOB)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; a folder is written here"):
        Output("file", JOB)


def test_another_job_needs_overwrite(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"another job \(other recipe\)\. Use another folder, or --overwrite"):
        Output(tmp_path, {**JOB, "recipe": {"bits": 4}})
    write(tmp_path, 3.0, {"kind": "export"}, overwrite=True)
    (tmp_path / "results.json").write_text("edited")
    with pytest.raises(ValueError, match=r"was changed since it was written: results\.json\. Use another folder, or"):
        Output(tmp_path, {"kind": "export"})
    write(tmp_path, 4.0, {"kind": "export"}, overwrite=True)


def test_a_result_of_an_earlier_version_needs_overwrite_and_leaves_nothing(tmp_path: Path) -> None:
    fill(tmp_path, more=("analysis.png", "notes.txt"))
    with pytest.raises(ValueError, match="holds the result of another job"):
        Output(tmp_path, JOB)
    write(tmp_path, 2.0, overwrite=True)
    assert not (tmp_path / "analysis.png").exists()
    assert (tmp_path / "notes.txt").exists()


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with Output(tmp_path, JOB) as out:
        with pytest.raises(ValueError, match="Another process is writing to"):
            Output(tmp_path, JOB)
        fill(out.stage)
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / WORK).mkdir(parents=True)
    (tmp_path / WORK / "lock").symlink_to(target)
    with pytest.raises(ValueError, match="lock is a link"):
        Output(tmp_path, JOB)
    assert target.read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(PermissionError):
            Output(tmp_path / "out", JOB)
    out = Output(tmp_path / "out", JOB)
    with out, pytest.raises(OSError, match=r"No space left on device: \d+ MB are needed, \d+ MB are free"):
        out.require_space(1 << 60)


def test_texts_are_written_beside_and_never_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "target", tmp_path / "link.json"
    target.write_text("kept")
    link.symlink_to(target)
    write_json(link, {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(link.read_text()) == {"a": None, "b": [None, 1.5]}
    assert not link.is_symlink()
    assert target.read_text() == "kept"
    monkeypatch.setattr(files.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_text(link, "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "target"]


def test_a_result_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    job = check_result_file(path, JOB)
    write_json(path, {"quantized_layers": 3, "job": job})
    check_result_file(path, JOB)
    with pytest.raises(ValueError, match=r"holds the result of another job\. Use another name, or --overwrite"):
        check_result_file(path, {"model": "b"})
    check_result_file(path, {"model": "b"}, overwrite=True)
    path.write_text('{"architectures": []}')
    for bad in (path, Path(__file__)):
        with pytest.raises(ValueError, match="is a file that optimum-regcache did not write"):
            check_result_file(bad, JOB, overwrite=True)
    with pytest.raises(ValueError, match="is a folder; a JSON file is written here"):
        check_result_file(tmp_path, JOB)
