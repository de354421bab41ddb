"""The main job's report: float, naive, per token, prefix only, delete only and RegCache side by side on unseen images."""

from __future__ import annotations

import io
import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.evaluation.norms import TokenNorms, measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.trials import TrialRunner

NOTHING = "nothing"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: variant.
        cosine: mean feature cosine to the float model.
        accuracy: top-1, None without labels.
        recovery: quantized metric / float metric (accuracy if there is one, else cosine); None if that of the float model is 0.
        max_block_norm, max_fc2_norm: largest patch-token l_inf norm at the input of any block, and at the MLP output
            projection's input of the sensitive block, measured in the float model with the same registers and deletion.
        installed: what was installed.
    """

    name: str
    cosine: float
    accuracy: float | None
    recovery: float | None
    max_block_norm: float
    max_fc2_norm: float
    installed: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return dict(self.__dict__)


class Reporter:
    """Measures variants on report images that no search or calibration saw.

    Args:
        runner: models and calibration data.
        batches: report images.
        labels, text_features: for accuracy; None to leave it out.
        sensitive_block: l_q.
    """

    def __init__(
        self,
        runner: TrialRunner,
        batches: list[Batch],
        labels: torch.Tensor | None,
        text_features: torch.Tensor | None,
        sensitive_block: int,
    ) -> None:
        self.runner, self.batches, self.block = runner, batches, sensitive_block
        self.cosine = CosineObjective(runner.float_model, batches)
        self.accuracy = None if labels is None else AccuracyObjective(batches, labels, text_features)
        self.norms: dict[str, TokenNorms] = {}
        self._float_metric = 1.0

    def _row(self, name: str, model: nn.Module, installed: str, float_twin: nn.Module | None = None) -> Row:
        cosine = float(self.cosine.scores(model).mean())
        accuracy = None if self.accuracy is None else float(self.accuracy.scores(model).mean())
        norms = self.norms[name] = measure_token_norms(float_twin or self.runner.float_model, self.batches)
        metric = cosine if accuracy is None else accuracy
        if name == "float":
            self._float_metric = metric
        return Row(
            name,
            cosine,
            accuracy,
            metric / self._float_metric if self._float_metric else None,
            float(norms.max_block_input.max()),
            float(norms.max_fc2_input[self.block]),
            installed,
        )

    def float_row(self) -> Row:
        """The float model; must be asked for first, the recovery of the others refers to it."""
        self.runner.reset()
        return self._row("float", self.runner.float_model, "-")

    def row(self, name: str, cache: RegisterCache | None, deletion: DeletionConfig, installed: str) -> Row:
        """Install, recalibrate, measure."""
        self.runner.install(cache, deletion)
        row = self._row(name, self.runner.quantized, installed)
        self.runner.reset()
        return row

    def dynamic_row(self, name: str) -> Row:
        """Nothing installed, activation scales computed for each token at run time: outlier tokens then spoil only
        themselves, so this tells how much of the naive loss is theirs."""
        config = self.runner.config
        activations = replace(config.activations, mode="dynamic", granularity="per_token", observer="minmax")
        runner = TrialRunner(self.runner.float_model, config.replace(activations=activations), [])
        runner.install(None, DeletionConfig())
        return self._row(name, runner.quantized, NOTHING)

    def model_row(self, name: str, model: nn.Module, float_twin: nn.Module, installed: str) -> Row:
        """Measure a finished model (for example one opened from disk); norms come from ``float_twin``, the float model with
        the same registers, deletion and rewrites."""
        return self._row(name, model, installed, float_twin)


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def render_table(rows: list[Row], title: str, notes: list[str], width: int | None = None) -> str:
    """The summary as text for a terminal."""
    caption = escape("\n".join(notes))  # class names and paths may hold brackets, which rich takes for styles
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("variant")
    with_accuracy = any(r.accuracy is not None for r in rows)
    if with_accuracy:
        table.add_column("top-1", justify="right")
    for heading in ("cosine", "recovery", "max norm", "max fc2 input"):
        table.add_column(heading, justify="right")
    table.add_column("installed")
    for r in rows:
        accuracy = [_percent(r.accuracy, 2)] if with_accuracy else []
        table.add_row(
            r.name,
            *accuracy,
            f"{r.cosine:.4f}",
            _percent(r.recovery, 1),
            f"{r.max_block_norm:.2f}",
            f"{r.max_fc2_norm:.2f}",
            r.installed,
        )
    console = Console(width=width or 120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def markdown_table(rows: list[Row]) -> str:
    """The summary for a model card."""
    lines = [
        "| variant | top-1 | feature cosine | recovery | max token norm | max fc2 input | installed |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.name} | {_percent(r.accuracy, 2)} | {r.cosine:.4f} | {_percent(r.recovery, 1)} | {r.max_block_norm:.2f} | "
            f"{r.max_fc2_norm:.2f} | {r.installed} |"
        )
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """Versions and machine, for results."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("optimum-regcache", "torch", "transformers", "optimum", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found
