"""A fit in several processes: the same bits as in one, every error in all of them, and one journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from safetensors.torch import load_file

from optimum_regcache.search import processes
from optimum_regcache.search.journal import Journal

HERE = Path(__file__).parent
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(count: int, *command: str, code: bool = False) -> subprocess.CompletedProcess[str]:
    """A command in ``count`` processes of one thread each."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    launch += ["--no-python"] if code else []
    return subprocess.run(
        [*launch, *command], env=environment, capture_output=True, text=True, check=False, timeout=500
    )


def several_do(count: int, what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return run(count, str(HERE / "several.py"), what, str(folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this process finds by itself."""
    folder = tmp_path_factory.mktemp("alone")
    several.search(folder)
    return folder


def require_same(alone: Path, folder: Path, count: int) -> None:
    expected = load_file(alone / "model" / "model.safetensors")
    saved = load_file(folder / "model" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    state = torch.load(alone / "state-0.pt")
    for number in range(count):
        assert (folder / f"fit-{number}.json").read_text() == (alone / "fit-0.json").read_text()
        theirs = torch.load(folder / f"state-{number}.pt")
        assert all(torch.equal(theirs[name], state[name]) for name in state)


def test_two_processes_find_the_same_bits_as_one(alone: Path, tmp_path: Path) -> None:
    done = several_do(2, "search", tmp_path)
    assert done.returncode == 0, done.stderr
    require_same(alone, tmp_path, 2)
    assert json.loads((alone / "fit-0.json").read_text())["search"]["chosen"]["text"] != "nothing"


@pytest.mark.slow
def test_four_processes_find_the_same_bits_as_one(alone: Path, tmp_path: Path) -> None:
    done = several_do(4, "search", tmp_path)
    assert done.returncode == 0, done.stderr
    require_same(alone, tmp_path, 4)


def test_an_error_of_one_ends_all_and_another_number_of_processes_goes_on(alone: Path, tmp_path: Path) -> None:
    done = several_do(2, "cut", tmp_path)
    assert done.returncode != 0
    assert "ValueError: the third configuration of the last process" in done.stderr
    errors = [(tmp_path / f"error-{number}.txt").read_text() for number in range(2)]
    assert errors == ["the third configuration of the last process"] * 2
    assert not (tmp_path / "model").exists()
    (path,) = (tmp_path / "work").glob("*.jsonl")
    finished = path.read_text().splitlines()
    assert len(finished) > 5
    several.search(tmp_path)  # in this process alone
    require_same(alone, tmp_path, 1)
    (whole,) = (alone / "work").glob("*.jsonl")
    assert path.name == whole.name
    assert path.read_text().splitlines()[: len(finished)] == finished
    assert set(whole.read_text().splitlines()) <= set(path.read_text().splitlines())


def test_exchanges(tmp_path: Path) -> None:
    done = several_do(2, "exchange", tmp_path)
    assert done.returncode == 0, done.stderr
    for number in range(2):
        found = json.loads((tmp_path / f"found-{number}.json").read_text())
        steps = found.pop("steps")
        assert steps.startswith(
            "RuntimeError: The processes of this run are at different steps: 2 items, 1 items. Start all"
        )
        unsendable = found.pop("unsendable")
        assert unsendable == (
            "UnsendableError: this and that" if number else "RuntimeError: UnsendableError: this and that"
        )
        assert found == {
            "size": 2,
            "shares": ["a0", "b1", "c0", "d1", "e0"],
            "none": [],
            "together": number,
            "on_main": None if number else "done",
            "from_main": "of 0",
            "gathered": [0, 1],
            "alone": [1, number, number],
            "last": "ValueError: no good",
            "main": "OSError: [Errno 28] full: 'disk'",
            "after": [0, 1],
        }


def test_other_images_are_noticed(tmp_path: Path) -> None:
    done = several_do(2, "images", tmp_path)
    assert done.returncode == 0, done.stderr
    for number in range(2):
        text = (tmp_path / f"error-{number}.txt").read_text()
        assert text.startswith("ValueError: The processes of this fit read other images, or have other settings")


def test_the_command_line_writes_once(tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("optimum-cli"))
    options = ["--model", "planted-outlier", "--num-samples", "24", "--num-report", "12", "--batch-size", "12"]
    options += ["--set", "search.max_delete=1", "--set", "search.num_copies=[1]", "--no-recommend"]
    quantize = [command, "regcache", "quantize", *options]
    done = run(2, *quantize, "--output", str(tmp_path / "out"), code=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    assert (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / ".cache").exists()
    again = run(2, *quantize, "--seed", "1", "--output", str(tmp_path / "out"), code=True)
    assert again.returncode != 0
    assert again.stderr.count("holds the result of another job (other search)") == 1


def test_other_commands_stay_alone(tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("optimum-cli"))
    done = run(2, command, "regcache", "analyze", "--output", str(tmp_path / "out"), code=True)
    assert done.returncode != 0
    assert done.stderr.count("analyze runs in one process. Start it with optimum-cli, without torchrun.") == 1
    assert not (tmp_path / "out").exists()


def test_every_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"2 processes on this machine need as many GPUs; there are 1\. Give torchrun a"
    ):
        processes.start("cuda")


def test_one_process_makes_no_process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else: nobody was launched
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.launched(), processes.local_processes(), processes.world_size(), processes.rank()) == (1, 1, 1, 0)
    assert processes.is_main()
    assert processes.spread([1, 2, 3], lambda item: item * 2) == [2, 4, 6]
    assert processes.gathered(1) == [1]
    value = object()
    assert processes.from_main(value) is value
    assert processes.on_main(lambda: value) is value
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)
    Journal.shared(tmp_path, "abc").close()
    processes.start("cuda")
    processes.end()
    assert not torch.distributed.is_initialized()
