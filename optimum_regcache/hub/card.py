"""The model card: what was done, what was measured, and how the model is opened. What is not known is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from optimum_regcache.config import PRESETS, RegCacheConfig
from optimum_regcache.config.recipe import LOCAL
from optimum_regcache.config.validation import is_mapping
from optimum_regcache.data import reference
from optimum_regcache.encoders.tower import has_boxes, has_classifier
from optimum_regcache.hub.remote_code import SHIM

CARD = "README.md"
_METRICS = {"accuracy": "top-1 accuracy", "cosine_similarity": "mean cosine to the features of the float model"}
_TASKS = {
    "zero-shot-image-classification": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "image-segmentation": "AutoModelForUniversalSegmentation",
    "image-feature-extraction": "AutoModel",
}


@dataclass(frozen=True)
class Measured:
    """What was measured on images that neither search nor calibration saw.

    Attributes:
        table: of the variants, as Markdown.
        figures: of the saved model, by type: ``accuracy``, ``cosine_similarity``.
        count: of images.
        images: their name for readers.
        dataset: their Hub id, None if they have none.
        split: of the data set, None if it is not known.
    """

    table: str
    figures: dict[str, float]
    count: int
    images: str
    dataset: str | None = None
    split: str | None = None

    def describe(self) -> str:
        """Number, data set and split in words."""
        return f"{self.count} images of `{self.images}`" + (f" (split `{self.split}`)" if self.split else "")


def pipeline_tag(model: Any) -> str:
    """The task that the Hub lists the model under."""
    if hasattr(model, "get_text_features"):
        return "zero-shot-image-classification"
    if has_boxes(model):
        return "object-detection"
    if type(model).__name__.endswith("ForUniversalSegmentation"):
        return "image-segmentation"
    return "image-classification" if has_classifier(model) else "image-feature-extraction"


def write_card(  # noqa: PLR0913
    folder: Path,
    path: Path,
    config: RegCacheConfig,
    base: str | None,
    task: str,
    *,
    licence: dict[str, str] | None = None,
    measured: Measured | None = None,
    notes: Sequence[str] = (),
) -> None:
    """``README.md`` with the metadata that the Hub reads.

    Args:
        folder: holds the saved model.
        path: the folder that it will lie in.
        config: of the model.
        base: Hub id, name of an embedded encoder, or ``local:NAME`` of the float original; None if it has no name.
        task: see `pipeline_tag`.
        licence: see `known_licence`.
        measured: None where nothing was.
        notes: lines below the table.
    """
    path, title = path.resolve(), (base or "").removeprefix(LOCAL)
    name = f"{path.parent.name}-{path.name}" if path.name in PRESETS else path.name
    on_hub = "/" in title and title == base
    embedded = reference.load(title).note if title in reference.names() else None
    tags = ["optimum", "regcache", config.label] + (["embedded-encoder"] if embedded else [])
    fields: dict[str, Any] = {**(licence or {}), "library_name": "transformers", "pipeline_tag": task, "tags": tags}
    if on_hub:
        fields |= {"base_model": title, "base_model_relation": "quantized"}
    if measured is not None and measured.dataset is not None:
        fields["datasets"] = [measured.dataset]
    if measured is not None:
        fields |= {"model_name": name, "eval_results": _results(measured, task)}
    installs = config.registers.mode != "none" or config.deletion.active
    what = "with RegCache ([arXiv 2510.04547](https://arxiv.org/abs/2510.04547))" if installs else "without registers"
    subject = f"`{title}`" if title else "A model"
    metadata: Any = ModelCardData(**fields)
    lines = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n",
        f"{subject}, vision tower quantized to {config.label.upper()} {what} by optimum-regcache.\n",
        *([f"The float original is an encoder embedded in that package: {embedded}.\n"] if embedded else []),
        _how_to_open(_TASKS[task], (folder / SHIM.name).exists()),
        "## What was done\n",
        *(f"- {line}" for line in describe(config)),
        "\n## Measured\n",
        f"On {measured.describe()} that search and calibration never saw:\n\n{measured.table}\n"
        if measured is not None
        else "Nothing was measured on images that search and calibration never saw.\n",
        *(f"- {note}" for note in notes if note != embedded),
        "\n## Limits\n",
        *(f"- {line}" for line in _limits(folder, measured, licence)),
    ]
    ModelCard("\n".join(lines) + "\n").save(folder / CARD)


def _results(measured: Measured, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=measured.dataset or measured.images,
            dataset_name=measured.images,
            dataset_split=measured.split,
            metric_type=kind,
            metric_name=_METRICS[kind],
            metric_value=round(value, 6),
        )
        for kind, value in measured.figures.items()
    ]


def _how_to_open(auto: str, shim: bool) -> str:
    text = (
        "```python\nimport optimum_regcache  # pip install optimum-regcache; registers the quantization method\n"
        f"from transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained(".")  # this folder, or the repository that it was pushed to\n```\n'
    )
    if shim:
        text += (
            f"\nWithout the import, `{SHIM.name}` of this folder does it: "
            f'`{auto}.from_pretrained(".", trust_remote_code=True)`.\n'
        )
    return text


def at_hub(card: str, repo_id: str, revision: str | None = None) -> str:
    """The text of a card in which the model is opened from its repository."""
    where = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    return card.replace("  # this folder, or the repository that it was pushed to", "").replace(
        'from_pretrained("."', f"from_pretrained({where}"
    )


def describe(config: RegCacheConfig) -> list[str]:
    """Scheme, registers and deletion in words."""
    w, a, r, d = config.weights, config.activations, config.registers, config.deletion
    symmetric = {True: "symmetric", False: "asymmetric"}
    lines = [
        f"quantized: {config.protocol}; weights {w.bits} bits, {w.granularity.replace('_', ' ')}, {symmetric[w.symmetric]}; "
        f"activations {a.bits} bits, {a.mode}, {a.granularity.replace('_', ' ')}, {symmetric[a.symmetric]}",
    ]
    if r.mode == "fixed":
        taus = r.num_copies if isinstance(r.num_copies, tuple) else (r.num_copies,)
        count = "one register" if r.num_registers == 1 else f"{r.num_registers} registers"
        lines.append(
            f"registers: the cached key and value of {count} come first in the attention of {_blocks(r.blocks)}, and weigh as "
            f"much as tau = {', '.join(f'{tau:.3g}' for tau in taus)} copies"
            + (" (per block)" if len(taus) > 1 else "")
        )
    if d.active:
        most = "at most " if d.rule == "threshold" else ""
        filled = "filled in after the last block" if d.fill == "neighbour_mean" else "not filled in again"
        lines.append(
            f"deletion: {most}k~ = {d.count} tokens of largest norm leave each image at block {d.block}, {filled}"
        )
    if r.mode == "none" and not d.active:
        lines.append("no register and no deletion is installed")
    if config.methods:
        lines.append(f"methods: {', '.join(entry['name'] for entry in config.methods)}")
    if config.simulated_reason:
        lines.append(f"simulated, not run in integers: {config.simulated_reason}")
    return lines


def _blocks(blocks: tuple[int, ...]) -> str:
    whole = blocks == tuple(range(blocks[0], blocks[-1] + 1))
    if len(blocks) == 1:
        return f"block {blocks[0]}"
    return f"blocks {blocks[0]} to {blocks[-1]}" if whole else f"blocks {', '.join(map(str, blocks))}"


def _limits(folder: Path, measured: Measured | None, licence: dict[str, str] | None) -> list[str]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    known = (
        f"`{licence['license']}`, that of the float original" if licence else "not known here: see the float original"
    )
    return [
        "not measured: other data sets, tasks and image sizes" if measured is not None else "no accuracy is known",
        "not measured: speed. Integer kernels run on x86 with AVX2 or VNNI and on NVIDIA GPUs, elsewhere they are simulated",
        f"size of the weights on disk: {size / 1e6:.1f} MB",
        f"licence: {known}",
    ]


def known_licence(
    base: str | None, place: str | Path | None = None, revision: str | None = None
) -> dict[str, str] | None:
    """The licence fields of the float original's card, as far as it lies on this machine; nothing is downloaded.

    Args:
        base: Hub id, or name of an embedded encoder.
        place: folder of the original, if it was opened from one.
        revision: on the Hub.
    """
    card: Any = None
    if place is not None and Path(place).is_dir():
        card = Path(place, CARD)
    elif base in reference.names():
        card = reference.directory(str(base)) / CARD
    elif base is not None and base.count("/") == 1 and not base.startswith(LOCAL):
        card = try_to_load_from_cache(base, CARD, revision=revision)
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of whoever wrote the card
        return None
    found = {
        name: data[name] for name in ("license", "license_name", "license_link") if isinstance(data.get(name), str)
    }
    return found if "license" in found else None


def unfinished(folder: Path) -> bool:
    """Whether ``results.json`` in ``folder`` says that its search was interrupted."""
    path = folder / "results.json"
    if not path.exists():
        return False
    results = json.loads(path.read_text(encoding="utf-8"))
    fit: Any = results.get("fit") if is_mapping(results) else None
    return bool(fit and fit["search"].get("unfinished"))
