"""Markdown tables of one or several runs of `bench_cpu_int8.py`, as they stand in docs/results/performance.md.

python benchmarks/cpu_report.py benchmarks/results/cpu_int8_fused_run1.json benchmarks/results/cpu_int8_fused_run2.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def cell(runs: Sequence[Run], model: str, batch: int, contender: str) -> list[Run]:
    """The results of one contender at one batch size, one for each run that has it."""
    found = []
    for run in runs:
        found += [
            r for r in run["results"] if (r["model"], r["batch_size"], r["contender"]) == (model, batch, contender)
        ]
    return found


def slashed(values: Sequence[Any], form: str) -> str:
    """The values of all runs in one cell."""
    return " / ".join(format(v, form) for v in values) if values else "-"


def memory_of(runs: Sequence[Run], model: str, contender: str) -> str:
    """Peak and steady memory of the first run that measured it."""
    for run in runs:
        found = run["memory_mb"].get(model, {}).get(contender)
        if found and found.get("run_peak") is not None:
            return f"{found['run_peak']:.0f} / {found['steady']:.0f}"
    return "-"


def table(runs: Sequence[Run], model: str) -> list[str]:
    """Rows are contenders, columns batch sizes; a cell holds the ratio to float32 of each run."""
    mine = [r for run in runs for r in run["results"] if r["model"] == model]
    batches = sorted({r["batch_size"] for r in mine})
    contenders = list(dict.fromkeys(r["contender"] for r in mine))
    heads = [f"B{b}" for b in batches]
    lines = [
        "| contender | "
        + " | ".join(heads)
        + " | ms an image, B"
        + str(batches[-1])
        + " | ceiling | cosine | MB peak / steady |",
        "|---|" + "---|" * (len(batches) + 4),
    ]
    for contender in contenders:
        cells = [cell(runs, model, b, contender) for b in batches]
        last = next(c for c in reversed(cells) if c)
        row = [
            contender,
            *(slashed([r["ratio_to_float32"] for r in c], ".2f") for c in cells),
            slashed([r["ms_per_image"] for r in cells[-1]], ".1f"),
            slashed([r["int8_ceiling_fraction"] for r in cells[-1] if r["int8_ceiling_fraction"]], ".2f"),
            f"{last[0]['cosine']:.4f}",
            memory_of(runs, model, contender),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def report(runs: Sequence[Run]) -> str:
    """All tables, with machine and versions."""
    found = runs[0]["environment"]
    names = ("torch", "transformers", "onnxruntime", "openvino", "nncf", "torchao")
    lines = [
        f"{found['cpu_model']}, {found['threads']} threads; "
        + ", ".join(f"{n} {found[n]}" for n in names if n in found)
        + ".",
        "Fastest products in GOP/s: "
        + "; ".join(
            f"float32 {r['ceilings_gops']['float32']:.0f}, int8 {r['ceilings_gops']['int8'] or 0:.0f}" for r in runs
        )
        + ". "
        + "Weights: "
        + ", ".join(f"{name} {m['weights']}" for name, m in runs[0]["models"].items())
        + ". "
        + "Noisy rounds kept: "
        + ", ".join(str(sum(e["noisy"] for e in r["rounds"])) for r in runs)
        + ".",
    ]
    for model in dict.fromkeys(r["model"] for run in runs for r in run["results"]):
        lines += ["", f"**{model}**, ratio to float32 of run 1 / run 2 (larger is faster)", "", *table(runs, model)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
