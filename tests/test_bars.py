"""Progress of a loop with and without a terminal."""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import TOWERS

from optimum_regcache.config import bars
from optimum_regcache.config.bars import bar
from optimum_regcache.search.progress import watching

FEW = (
    "--num-samples", "24", "--num-report", "8", "--batch-size", "8", "--set", "search.max_delete=1",
    "--set", "search.num_copies=[1]", "--set", "search.sensitive_block=3",
)  # fmt: skip


def entered(shown: bool) -> None:
    with bar(name="images", total=6, shown=shown) as steps:
        steps.total -= 2
        steps.update(3)
        steps.update()


def iterated(shown: bool) -> None:
    assert list(bar((number for number in range(4)), "images", total=4, shown=shown)) == [0, 1, 2, 3]


@pytest.mark.parametrize("loop", [entered, iterated])
def test_a_log_gets_a_line_a_loop(loop: Callable[[bool], None], capsys: pytest.CaptureFixture[str]) -> None:
    loop(True)
    assert capsys.readouterr().err == "images: 4 done in 0 s\n"
    loop(False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("loop", [entered, iterated])
def test_a_terminal_gets_a_bar(
    loop: Callable[[bool], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    loop(True)
    assert "\rimages: 100%|" in capsys.readouterr().err
    loop(False)
    assert capsys.readouterr().err == ""


def test_a_notebook_gets_its_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    widget = type(
        "tqdm_notebook", (), {"__module__": "tqdm.notebook", "__init__": lambda self, *_, **k: shown.append(k)}
    )
    monkeypatch.setattr(bars, "tqdm", widget)
    assert isinstance(bar(range(2), "images"), widget)
    assert shown == [{"desc": "images", "total": None, "unit": "it", "disable": False}]


def test_a_long_loop_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    for _ in bar(range(4), "GPTQ"):
        now[0] += 50
    assert capsys.readouterr().err == "GPTQ: 2 of 4 after 2 min\nGPTQ: 4 of 4 after 3 min\nGPTQ: 4 done in 3 min\n"


def test_a_loop_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), bar(name="images", total=2) as steps:
        steps.update(1 // 0)
    assert list(bar([], "nothing")) == []
    assert capsys.readouterr().err == "nothing: 0 done in 0 s\n"


def test_a_stage_within_one_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with watching("job", True) as job, job.stage("outer"), job.stage("inner"):
        pass
    assert capsys.readouterr().err == "job: outer done in 0 s\n"


def test_the_log_of_a_command_holds_plain_lines(tmp_path: Path) -> None:
    cli = str(Path(sys.executable).with_name("optimum-cli"))
    options = ("--model", "planted-outlier", "--method", "smoothquant", "gptq", "--output", str(tmp_path / "made"))
    own = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    with (tmp_path / "log").open("w") as log:  # a process of its own: libraries read what they are told when imported
        subprocess.run([cli, "regcache", "quantize", *options, *FEW], check=True, env=own, stderr=log, timeout=300)
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "reading images: 12 done in 0 s\n" in text
    assert "GPTQ: 6 done in " in text
    assert "\r" not in text
    assert "it/s" not in text


def test_methods_say_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    from optimum_regcache import RegCacheConfig
    from optimum_regcache.methods import quantize_with, resolve

    tower: Any = TOWERS["vit"]
    config = RegCacheConfig(registers={"mode": "none"}, methods=("smoothquant",))
    quantize_with(tower.build(), resolve(config), None, [tower.inputs(seed=1)], progress=True)
    assert capsys.readouterr().err == "SmoothQuant: 4 done in 0 s\n"


def test_a_postfix_is_said_with_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(name="training", total=3) as shown:
        shown.update(2)
        shown.set_postfix_str("block 1: loss x 0.5")
    assert capsys.readouterr().err == "training: 2 done in 0 s; block 1: loss x 0.5\n"


def test_no_module_of_the_package_draws_a_bar_of_its_own() -> None:
    package = Path(bars.__file__).parents[1]
    drawing = [path for path in package.rglob("*.py") if re.search(r"\btqdm\(", path.read_text(encoding="utf-8"))]
    assert sorted(path.name for path in drawing) == ["bars.py", "progress.py"]
