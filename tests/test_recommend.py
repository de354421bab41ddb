"""What `quantize` says about other quantizers, the command that it prints, and `--best`."""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optimum.commands.optimum_cli import main
from optimum.commands.register.regcache_base import resolve_recipe
from optimum.commands.register.register_regcache import QuantizeCommand

from optimum_regcache import Recipe, RegCacheConfig
from optimum_regcache.commands import recommend
from optimum_regcache.commands.recommend import Advice, ReportOptions, advice_note, advise, suggested_command
from optimum_regcache.commands.report import Row
from optimum_regcache.hub.loading import load_model
from optimum_regcache.search import alternatives
from optimum_regcache.search.alternatives import SCHEMES, Alternative, Recommendation
from optimum_regcache.search.plan import QuantizationPlan

# a search that cannot repair anything: one place, no deletion
POOR = [
    "--model", "planted-outlier", "--num-samples", "32", "--num-report", "16", "--batch-size", "16",
    "--set", "search.sensitive_block=3", "--set", "search.blocks_before=0", "--set", "search.max_delete=0",
    "--set", "search.num_copies=[1]",
]  # fmt: skip
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(alternatives, "SCHEMES", SCHEMES[:2])

    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", *args])
        main()
        return capsys.readouterr().out

    return call


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_advice_the_printed_command_and_best_agree(run: Run, tmp_path: Path) -> None:
    text = run("quantize", *POOR, "--output", str(tmp_path / "poor"))
    advice = results(tmp_path / "poor")["recommendation"]
    assert advice["better"] == "dynamic per token"
    assert not advice["saved"]
    assert advice["report"]["cosine"] > results(tmp_path / "poor")["rows"][-1]["cosine"] + 0.1
    assert [row["name"] for row in results(tmp_path / "poor")["rows"]][-1] in ("plain", "RegCache")
    flat = " ".join(text.split())
    assert "better here: dynamic per token (--no-registers --method dynamic): cosine 0.99" in flat
    command = next(line for line in text.splitlines() if line.startswith("dynamic per token: optimum-cli"))
    words = shlex.split(command.removeprefix("dynamic per token: "))
    assert str(tmp_path) not in (tmp_path / "poor" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "poor" / "results.json").read_text()
    run(*words[2:])
    made = tmp_path / "poor-dynamic"
    assert results(made)["recommendation"] is None  # nothing was searched
    text = run("quantize", *POOR, "--best", "--output", str(tmp_path / "best"))
    saved = results(tmp_path / "best")
    assert (made / "model.safetensors").read_bytes() == (tmp_path / "best" / "model.safetensors").read_bytes()
    assert saved["recommendation"]["saved"]
    assert saved["quantization"] == "w8a8-dynamic"
    assert saved["rows"][-1]["name"] == "dynamic per token"
    assert saved["rows"][-2]["name"] in ("plain", "RegCache")
    assert saved["recommendation"]["report"] == saved["rows"][-1]
    assert "saved in place of" in " ".join((tmp_path / "best" / "README.md").read_text().split())
    assert "dynamic per token: optimum-cli" not in text
    recipe = Recipe.load(tmp_path / "best" / "recipe.yaml")
    assert recipe.quantization.methods == ({"name": "dynamic"},)
    assert recipe.quantization.registers.mode == "none"
    opened: Any = load_model(str(tmp_path / "best"))
    assert opened.config.quantization_config == recipe.quantization


@pytest.mark.parametrize(
    ("searched", "options", "begins"),
    [
        (False, ReportOptions(), False),
        (False, ReportOptions(best=True), True),
        (True, ReportOptions(), True),
        (True, ReportOptions(recommend=False), False),
    ],
)
def test_alternatives_are_tried_after_a_search_or_when_asked_for(
    searched: bool, options: ReportOptions, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    def find(*args: Any, **more: Any) -> Recommendation:
        begun.append(args)
        return advice().found

    monkeypatch.setattr(recommend, "find_alternatives", find)
    made = SimpleNamespace(model=None, config=RegCacheConfig())
    anything: Any = SimpleNamespace(model=None, recipe=Recipe(), quantized=made)
    search = SimpleNamespace(unfinished=False)
    anything.fit = SimpleNamespace(search=search) if searched else None
    found = advise(anything, anything, anything, options, False)
    assert bool(begun) == begins == (found is not None)
    search.unfinished = True  # somebody pressed Ctrl-C
    begun.clear()
    found = advise(anything, anything, anything, options, False)
    assert bool(begun) == (begins and not searched) == (found is not None)


def command(options: str, scheme: int = 0, registers: bool = False) -> tuple[str, Recipe, Recipe]:
    """The command beside a run with ``options``; the recipes that it stands for, and that of the alternative."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    QuantizeCommand.parse_args(parser)
    args = parser.parse_args(["--output", "out", *shlex.split(options)])
    resolve = partial(resolve_recipe, preset=(args.preset or [None])[0])
    made = QuantizationPlan.of(resolve(args)).recipe
    quantization = made.quantization.replace(registers={"mode": "none"})
    if registers:
        quantization = made.quantization.replace(registers={"mode": "fixed", "blocks": [3], "num_copies": 2})
    candidates = alternatives._candidates(Recipe(quantization, made.search, made.data))
    better = next(c for c in candidates if c.scheme is SCHEMES[scheme] and c.registers == registers)
    text = suggested_command(args, parser.get_default, resolve, better)
    words = shlex.split(text)
    assert words[:3] == ["optimum-cli", "regcache", "quantize"]
    return text, resolve(parser.parse_args(words[3:])), better.recipe


@pytest.mark.parametrize(
    ("options", "scheme", "text"),
    [
        ("", 0, "--output out-dynamic --no-registers --method dynamic"),
        (
            "--preset w4a4 --best",
            3,
            "--preset w4a4 --output out-smoothquant-gptq --no-registers --method smoothquant gptq",
        ),
        ("--method gptq --set search.max_delete=3 --set search.seed=5", 1, "--set search.seed=5"),
        ("--objective accuracy --quick", 1, "--num-samples 96"),
        ("--set quantization.activations.observer=mse", 1, "quantization.activations.observer=minmax"),
        ("--set 'quantization.methods=[{name: gptq, damping: 0.1}]'", 2, "quantization.methods="),
        ("--preset w8a8-dynamic", 1, '"static"'),
        ("--no-registers --set quantization.activations.observer=mse", 0, "minmax"),
        ("--thorough --token secret --device cpu --skip-broken", 2, "--skip-broken"),
    ],
)
def test_the_command_stands_for_the_recipe(options: str, scheme: int, text: str) -> None:
    found, asked, wanted = command(options, scheme)
    assert text.replace('"', "") in found.replace('"', "")
    assert "secret" not in found
    made = QuantizationPlan.of(asked).recipe
    assert made.quantization == QuantizationPlan.of(wanted).recipe.quantization
    assert (made.data, made.search.seed) == (wanted.data, wanted.search.seed)


@pytest.mark.parametrize("options", ["", "--quick --preset w4a4", "--set quantization.weights.observer=mse"])
def test_registers_are_searched_again_by_the_command(options: str) -> None:
    found, asked, wanted = command(options, 1, registers=True)
    assert "--no-registers" not in found
    assert asked.quantization.registers.mode == "search"
    made, other = (QuantizationPlan.of(r).recipe for r in (asked, wanted))
    assert (made.quantization.activations, made.quantization.weights) == (
        other.quantization.activations, other.quantization.weights,
    )  # fmt: skip
    assert made.quantization.methods == other.quantization.methods
    assert (made.search, made.data) == (wanted.search, wanted.data)


ROW = Row("RegCache", 0.9957, None, 0.99, 0.9, 10.0, 2.0, 5.0, 1e9, False, "delete 2")


def advice(*tried: Alternative, save: bool = False) -> Advice:
    return Advice(Recommendation("feature cosine", 24, 1.0, 0.99, 0.001, list(tried)), None, save, None)


def test_the_note_says_what_was_found() -> None:
    unfit = Alternative("mse", SCHEMES[2], False, Recipe(), reason="no such layer")
    small = Alternative("percentile", SCHEMES[1], False, Recipe(), 0.991, 0.001, 0.002, 0.004)
    assert advice_note(advice(), None, ROW).startswith(
        "no alternative was tried: the result loses only 0.0100 on held-out"
    )
    note = advice_note(advice(small, unfit), None, ROW)
    assert note == (
        "alternatives, not clearly better on 24 held-out search images: percentile; the best one gains +0.0010, needed 0.0040; "
        "not applicable: mse"
    )


def test_opposites_are_refused() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    QuantizeCommand.parse_args(parser)
    with pytest.raises(argparse.ArgumentError, match="not allowed with argument"):
        parser.parse_args(["--output", "out", "--best", "--no-recommend"])
