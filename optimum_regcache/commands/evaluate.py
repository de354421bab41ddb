"""The job behind `optimum-cli regcache evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
from torch.nn import functional as F

from optimum_regcache.commands.report import environment
from optimum_regcache.commands.sources import open_source, saved_recipe, targets_of
from optimum_regcache.config.files import write_json
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import encode
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective
from optimum_regcache.export.layout import is_exported
from optimum_regcache.export.runner import ExportedEncoder
from optimum_regcache.fusion import fuse
from optimum_regcache.hub.loading import load_model
from optimum_regcache.kernels import native
from optimum_regcache.layers.linear import quant_linears


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on which images.

    Attributes:
        model: directory, Hub id or reference name. An exported encoder takes the place of the image side; text features are
            those of the float original.
        original: the float original; default: the one in the recipe beside the model.
        dataset: images; default: those of the recipe.
        template: zero-shot prompt.
        device: ``cpu`` or ``cuda``.
    """

    model: str
    original: str | None = None
    dataset: str | None = None
    template: str | None = None
    device: str = "cpu"


def evaluate_job(
    subject: Subject, recipe: Recipe, output: str | Path, *, metrics: Sequence[str] = (), fused: bool = False
) -> tuple[dict[str, Any], str]:
    """Evaluate a saved model (float, quantized or exported); beside its float original if that is given or recorded.

    Args:
        subject: model and images.
        recipe: amounts and seed.
        output: JSON file.
        metrics: further metrics of the `evaluate` library, by name or path; they get predictions and labels.
        fused: evaluate the model twice more after `fuse`, with float32 and with int8 attention (simulated where this machine
            has no operator for it).

    Returns:
        (results, text).

    Raises:
        ValueError: ``metrics`` without labels, or ``fused`` with an exported model.
    """
    model_dir, device = subject.model, subject.device
    saved = saved_recipe(model_dir)
    original = subject.original or (model_dir if model_dir in reference.names() else saved.model)
    dataset = saved.dataset if subject.dataset is None else subject.dataset
    source = open_source(original or model_dir, dataset, recipe, template=subject.template, device=device)
    exported = is_exported(model_dir)
    if fused and exported:
        raise ValueError(f"--fused is for models that run in PyTorch; {model_dir} is exported.")
    model: Any = ExportedEncoder.from_pretrained(model_dir) if exported else load_model(model_dir).to(device)  # type: ignore
    report = ImageInputs(source.report_images, source.processor)
    batches = list(report.batches(recipe.data.batch_size))
    targets = targets_of(source, report)
    labels, text = targets.labels(report), targets.text_features
    results: dict[str, Any] = {
        "model": model_dir,
        "float_model": original,
        "dataset": source.dataset_name,
        "images": len(report),
        "dropped_images": source.dropped.get("report", 0),
        "accuracy_note": targets.note,
        "quantized_layers": model.info["quantized_layers"] if exported else sum(1 for _ in quant_linears(model)),
        "environment": environment(),
    }
    if labels is not None:
        accuracy = AccuracyObjective(batches, labels, text)
        results["accuracy"] = float(accuracy.scores(model).mean())
        if original is not None:
            results["float_accuracy"] = float(accuracy.scores(source.model).mean())
            results["recovery"] = results["accuracy"] / results["float_accuracy"] if results["float_accuracy"] else None
        for name in metrics:
            results |= evaluate.load(name).compute(predictions=accuracy.predictions(model), references=labels) or {}
    elif metrics:
        raise ValueError(
            f"Metrics {', '.join(metrics)} need labels that the model can predict; {source.dataset_name} gives none: "
            f"{targets.note}."
        )
    if original is not None:
        ours, theirs = encode(model, batches), encode(source.model, batches)
        results["feature_cosine"] = float(F.cosine_similarity(ours, theirs).mean())
    if exported:
        results["quantization"], results["format"] = model.info["quantization"], model.format
    else:
        results["norms"] = measure_token_norms(model, batches).to_dict()
        config = getattr(model.config, "quantization_config", None)
        results["quantization"] = config.label if config else None
    if fused:
        results["fused"] = {}
        for attention in ("float32", "simulated" if native.unavailable_reason() else "int8"):
            again: dict[str, Any] = {"how": str(fuse(model, attention=attention))}
            if labels is not None:
                again["accuracy"] = float(accuracy.scores(model).mean())
            if original is not None:
                again["feature_cosine"] = float(F.cosine_similarity(encode(model, batches), theirs).mean())
            results["fused"][f"{attention} attention"] = again
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    shown = {k: v for k, v in results.items() if k not in ("norms", "environment", "fused")}
    shown |= {f"fused, {k}": ", ".join(f"{n} {x}" for n, x in v.items()) for k, v in results.get("fused", {}).items()}
    return results, "\n".join(f"{k}: {v}" for k, v in shown.items()) + f"\nwritten: {path}"
