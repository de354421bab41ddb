"""The report of a model whose methods train: it trains once, and shows what training gained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimum_regcache.methods._reconstruction import train

SMALL = ("--num-samples", "48", "--num-report", "32", "--batch-size", "16")
PLACE = ("search.num_copies=[1]", "search.max_delete=4", "search.blocks_before=0", "search.sensitive_block=3")


@pytest.mark.parametrize("methods", ["[mse, {name: light, iterations: 2}]", "[{name: light, iterations: 2}]"])
@pytest.mark.parametrize("registers", [True, False])
def test_a_report_trains_nothing_again(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: str, registers: bool
) -> None:
    trained, own = [], train.Reconstruction.run

    def counted(self: train.Reconstruction, kept: Any) -> Any:
        trained.append(len(self.fit.training))
        return own(self, kept)

    monkeypatch.setattr(train.Reconstruction, "run", counted)
    how = [f"--set={text}" for text in PLACE] if registers else ["--no-registers"]
    common = ("quantize", "--model", "planted-outlier", "--preset", "w4a4", *SMALL, *how, "--no-recommend")
    code, printed, error = run(*common, f"--set=quantization.methods={methods}", "--output", str(tmp_path / "m"))
    assert code == 0, error
    assert len(trained) == 1
    rows = [row["name"] for row in json.loads((tmp_path / "m" / "results.json").read_text())["rows"]]
    assert rows[-2] == "without training"
    assert "what is saved; nothing was trained for the rows above it" in " ".join(printed.split())
