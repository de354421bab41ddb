"""The rows of a report: variants of one model side by side on unseen images."""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.passes import Batch, ImageRange, count_images
from optimum_regcache.evaluation.norms import TokenNorms, block_flops, measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective, score_both, score_reference
from optimum_regcache.registers import RegisterCache
from optimum_regcache.registers.replay import Recorded
from optimum_regcache.search.progress import current
from optimum_regcache.search.setups import mean_and_error
from optimum_regcache.search.trials import TrialRunner

NOTHING = "nothing"
NORM_FLOPS = 1e12  # of the float model: about 28 images of CLIP ViT-B/16


@dataclass(frozen=True)
class Row:
    """One line of the table. The metric is top-1 accuracy where there are labels, else the feature cosine.

    Attributes:
        name: variant.
        cosine: mean feature cosine to the float model.
        accuracy: top-1, None without labels.
        retention: metric / metric of the float model; None where that is zero or no number.
        recovered_loss: (metric - naive) / (float - naive): the share of what round to nearest loses that the variant gains
            back; None where naive loses nothing, and for the float row.
        max_block_norm, mean_block_norm: largest l_inf norm of a patch token that any block computes on, and mean over tokens
            and blocks, in the float model with the same registers, deletion and rewrites.
        max_fc2_norm: largest at the MLP output projection's input of the sensitive block, in the same model.
        flops: of the blocks' matrix products for one image, registers and deletion included; None where it is not known.
        below_naive: whether the metric lies below round to nearest with nothing installed, by more than two paired standard
            errors.
        installed: what was installed.
        standard_error: of the metric over the report images; None for a single one.
    """

    name: str
    cosine: float
    accuracy: float | None
    retention: float | None
    recovered_loss: float | None
    max_block_norm: float
    mean_block_norm: float
    max_fc2_norm: float
    flops: float | None
    below_naive: bool
    installed: str
    standard_error: float | None = None

    @property
    def metric(self) -> float:
        """Accuracy, or the cosine without labels."""
        return self.cosine if self.accuracy is None else self.accuracy

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return asdict(self)


def expected_work(images: int, depth: int) -> float:
    """Block-forwards of a report: features, eight rows, and norms of a part of the images."""
    return 10.0 * images * depth


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
        batches: Sequence[Batch],
        labels: torch.Tensor | None,
        text_features: torch.Tensor | None,
        sensitive_block: int,
    ) -> None:
        self.runner, self.batches, self.block = runner, batches, sensitive_block
        self._ran(batches)
        self.cosine = CosineObjective(runner.float_model, batches)
        self.accuracy = None if labels is None else AccuracyObjective(batches, labels, text_features)
        self.norms: dict[str, TokenNorms] = {}
        self._scores: dict[str, torch.Tensor] = {}

    def _ran(self, batches: Sequence[Batch], first: int = 0) -> None:
        """Tell the progress that a model goes over ``batches`` from block ``first`` on."""
        current().advance(count_images(batches) * (self.runner.depth - first))

    def _measure(self, model: nn.Module, known: Recorded | None = None, before: TokenNorms | None = None) -> TokenNorms:
        self._ran(self.norm_batches, 0 if known is None else known.block)
        return measure_token_norms(model, self.norm_batches, known, before)

    @cached_property
    def norm_batches(self) -> Sequence[Batch]:
        """The images that token norms are taken on: the first ones, as many as take `NORM_FLOPS`."""
        one = ImageRange(self.batches, 1)
        flops = block_flops(self.runner.float_model, measure_token_norms(self.runner.float_model, one).tokens)
        count = count_images(self.batches)
        images = count if flops is None else min(count, max(16, int(NORM_FLOPS / flops)))
        return self.batches if images == count else ImageRange(self.batches, images)

    @cached_property
    def _plain_norms(self) -> TokenNorms:
        """Norms with nothing installed."""
        self.runner.reset()
        return self._measure(self.runner.float_model)

    def scores(self, model: nn.Module) -> torch.Tensor:
        """The metric of each image, float32 [n]."""
        return (self.accuracy or self.cosine).scores(model)

    def _row(self, name: str, model: nn.Module, installed: str, norms: TokenNorms, twin: nn.Module) -> Row:
        score = score_reference if name == "float" else score_both
        cosine, accuracy = score(model, self.cosine, self.accuracy)
        scores = self._scores[name] = cosine if accuracy is None else accuracy
        self.norms[name] = norms
        metric = float(scores.mean())
        naive, best = (float(self._scores[n].mean()) if n in self._scores else None for n in ("naive", "float"))
        return Row(
            name,
            float(cosine.mean()),
            None if self.accuracy is None else metric,
            retention(metric, best),
            None if name == "float" else recovered_loss(metric, naive, best),
            float(norms.max_block_input.max()),
            float(norms.mean_block_input.mean()),
            float(norms.max_fc2_input[self.block]),
            block_flops(twin, norms.tokens),
            naive is not None and clearly_below(scores, self._scores["naive"]),
            installed,
            mean_and_error(scores)[1] if len(scores) > 1 else None,
        )

    def float_row(self) -> Row:
        """The float model; must be asked for first, the figures of the others refer to it."""
        norms = self._plain_norms
        return self._row("float", self.runner.float_model, "-", norms, self.runner.float_model)

    def row(self, name: str, cache: RegisterCache | None, deletion: DeletionConfig, installed: str) -> Row:
        """Install, recalibrate, measure. The row ``naive`` comes before those that are compared with it."""
        runner, norms = self.runner, self._plain_norms
        runner.install(cache, deletion)
        if runner.first_change(cache, deletion) is not None:
            known = runner.float_inputs(cache, deletion, self.norm_batches)
            norms = self._measure(runner.float_model, known, known and norms)
        with runner.starting(cache, deletion, self.batches):
            row = self._row(name, runner.quantized, installed, norms, runner.float_model)
        runner.reset()
        return row

    def dynamic_row(self, name: str) -> Row:
        """Nothing installed, activation scales computed for each token at run time: outlier tokens then spoil only
        themselves, so this tells how much of the naive loss is theirs."""
        config = self.runner.config
        activations = replace(config.activations, mode="dynamic", granularity="per_token", observer="minmax")
        runner = TrialRunner(self.runner.float_model, config.replace(activations=activations), [])
        runner.install(None, DeletionConfig())
        self._ran(self.batches)
        return self._row(name, runner.quantized, NOTHING, self._plain_norms, runner.float_model)

    def model_row(self, name: str, model: nn.Module, float_twin: nn.Module, installed: str) -> Row:
        """Measure a finished model (for example one opened from disk); norms come from ``float_twin``, the float model with
        the same registers, deletion and rewrites."""
        self._ran(self.batches)
        return self._row(name, model, installed, self._measure(float_twin), float_twin)


def retention(metric: float, best: float | None) -> float | None:
    """Metric of a quantized model / that of the float model; None where it is not defined."""
    return metric / best if best and math.isfinite(metric / best) else None


def recovered_loss(metric: float, naive: float | None, best: float | None) -> float | None:
    """Share of the loss of round to nearest that is gained back; None where it loses nothing."""
    if naive is None or best is None or not best > naive or not math.isfinite(metric):
        return None
    return (metric - naive) / (best - naive)


def clearly_below(scores: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the mean of ``scores`` [n] lies below that of ``others`` [n] by more than two paired standard errors; scores
    that are no numbers do."""
    difference = (scores - others).double()
    mean = float(difference.mean())
    if math.isnan(mean):
        return True
    return len(difference) > 1 and -mean > 2 * float(difference.std()) / math.sqrt(len(difference))


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and texts of the table."""
    headings = ["variant", "top-1", "cosine", "retention", "recovered", "max norm", "mean norm", "max fc2", "FLOPs"]
    base = rows[0].flops
    lines = [
        [
            r.name + (" (below naive)" if r.below_naive else ""),
            _percent(r.accuracy, 2),
            f"{r.cosine:.4f}",
            _percent(r.retention),
            _percent(r.recovered_loss),
            f"{r.max_block_norm:.2f}",
            f"{r.mean_block_norm:.2f}",
            f"{r.max_fc2_norm:.2f}",
            f"{100 * (r.flops / base - 1):+.1f} %" if r.flops and base else "-",
            r.installed,
        ]
        for r in rows
    ]
    return [*headings, "installed"], lines


def render_table(rows: list[Row], title: str, notes: list[str], width: int | None = None) -> str:
    """The summary as text for a terminal."""
    headings, lines = _cells(rows)
    caption = escape("\n".join(notes))  # class names and paths may hold brackets, which rich takes for styles
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    shown = [i for i, name in enumerate(headings) if name != "top-1" or any(r.accuracy is not None for r in rows)]
    for i in shown:
        table.add_column(headings[i], justify="left" if i in (0, len(headings) - 1) else "right")
    for line in lines:
        table.add_row(*(line[i] for i in shown))
    console = Console(width=width or 150, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def markdown_table(rows: list[Row]) -> str:
    """The summary for a model card."""
    headings, lines = _cells(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))


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
