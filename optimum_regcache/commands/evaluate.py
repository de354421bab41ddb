"""The job behind `optimum-cli regcache evaluate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import evaluate
from torch.nn import functional as F
from transformers.utils import logging

from optimum_regcache.commands.harness import Columns, Harness, Score, Seen
from optimum_regcache.commands.report import environment, retention
from optimum_regcache.commands.sources import Hub, divided_alike, open_model, open_source, saved_recipe
from optimum_regcache.commands.tasks import COLUMNS_OF, FEATURES_ALONE, check_tasks, run_tasks
from optimum_regcache.config.files import write_json
from optimum_regcache.config.output import check_result_file
from optimum_regcache.config.recipe import LOCAL, Recipe, recorded_name
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reading import store_batches
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.evaluation.objective import check_template, predicted_classes
from optimum_regcache.export.layout import is_exported
from optimum_regcache.export.runner import ExportedEncoder
from optimum_regcache.fusion import fuse
from optimum_regcache.kernels import native
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.search.plan import space_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on which images.

    Attributes:
        model: directory, Hub id or reference name. An exported encoder takes the place of the image side; text features are
            those of the float original, without which classifiers and the tasks `FEATURES_ALONE` remain.
        original: the float original; default: the one in the recipe beside the model, if it can be opened.
        dataset: images; default: those of the recipe.
        template: zero-shot prompt, or several.
        device: ``cpu`` or ``cuda``.
        hub: for `load_model` and `load_processor`; ``revision`` is that of ``model``.
        columns: of captions, masks and depths, for the tasks ``retrieval``, ``segmentation`` and ``depth``.
    """

    model: str
    original: str | None = None
    dataset: str | None = None
    template: str | Sequence[str] | None = None
    device: str = "cpu"
    hub: Hub = field(default_factory=dict)
    columns: Columns = field(default_factory=Columns)


def evaluate_job(
    subject: Subject,
    recipe: Recipe,
    output: str | Path,
    *,
    tasks: Sequence[str] = (),
    metrics: Sequence[str] = (),
    fused: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, Any], str]:
    """Evaluate a saved model (float, quantized or exported); beside its float original if that is given, or recorded and to be
    had.

    Args:
        subject: model and images.
        recipe: amounts and seed.
        output: JSON file.
        tasks: names of `TASKS`; default: those that need nothing more than the images, as far as they can be done.
        metrics: further metrics: names that the `evaluate` library ships, or paths; they get predictions and labels.
        fused: evaluate the model twice more after `fuse`, with float32 and with int8 attention (simulated where this machine
            has no operator for it).
        overwrite: ``output`` may hold the result of another evaluation.

    Returns:
        (results, text).

    Raises:
        ValueError: ``metrics`` without labels or of another kind, ``fused`` with an exported model, a float original that is
            the model itself or quantized, or a task that cannot be done.
        OSError: a name that leads nowhere.
        ImportError: scikit-learn is missing.
    """
    check_tasks(tasks)
    for template in [subject.template] if isinstance(subject.template, str) else subject.template or ():
        check_template(template)
    for option, (task, name) in COLUMNS_OF.items():
        if getattr(subject.columns, name) != getattr(Columns(), name) and task not in tasks:
            raise ValueError(f"{option} has no effect without --task {task}. Leave it out, or give the task.")
    model_dir, device = subject.model, subject.device
    if subject.original is not None:
        refuse_itself(subject.original, model_dir)
    asked = {
        **asdict(subject),
        "hub": subject.hub.get("revision"),
        "recipe": recipe.to_dict(),
        "more": [*metrics, fused, *tasks],
    }
    job = check_result_file(output, asked, overwrite)
    loaded = {name: load_metric(name) for name in metrics}
    exported = is_exported(model_dir)
    if fused and exported:
        raise ValueError(f"--fused is for models that run in PyTorch; {model_dir} is exported.")
    if exported:
        model: Any = ExportedEncoder.from_pretrained(model_dir)
        processor: Any = model.processor
    else:
        network, processor = open_model(model_dir, subject.hub)
        model = cast("Any", network).to(device)
    original, opened, saved = _float_original(subject, model)
    if original is None and exported and not model.classifies and not (tasks and set(tasks) <= set(FEATURES_ALONE)):
        raise ValueError(
            f"{model_dir} is exported and predicts no classes: its features can be judged beside those of the float original, "
            f"or on labelled images. Give --float-model, or --task {' '.join(FEATURES_ALONE)}."
        )
    dataset = saved.dataset if subject.dataset is None else subject.dataset
    source = open_source(
        original or model_dir,
        dataset,
        divided_alike(recipe, saved, dataset),
        device=device,
        opened=opened or (model, processor),
    )
    report = ImageInputs(source.report_images, source.processor)
    batches = store_batches(report, recipe.data, space_of(recipe.data), progress=True)
    harness = Harness(model, source, original is None, report, recipe.data, batches, subject.template, subject.columns)
    labelled = not tasks or "accuracy" in tasks or bool(metrics) or fused
    accuracy: Any = harness.accuracy if labelled else None
    if metrics and accuracy is None:
        raise ValueError(
            f"Metrics {', '.join(metrics)} need labels that the model can predict; {source.dataset_name} gives none: "
            f"{harness.targets.note}."
        )
    found = run_tasks(harness, tasks)
    results: dict[str, Any] = {
        "job": job,
        "model": model_dir if model_dir in reference.names() else recorded_name(model_dir),
        "float_model": original and source.name,
        "dataset": source.dataset_name,
        "images": len(report),
        "dropped_images": source.dropped.get("report", 0),
        "accuracy_note": harness.targets.note if labelled else None,
        "quantized_layers": model.info["quantized_layers"] if exported else sum(1 for _ in quant_linears(model)),
        "environment": environment(),
        "tasks": {task: {name: score.to_dict() for name, score in scores.items()} for task, scores in found.items()},
    }
    if "accuracy" in found:
        top1 = found["accuracy"]["top-1"]
        results["accuracy"] = top1.value
        if top1.float_value is not None:
            results["float_accuracy"] = top1.float_value
            results["retention"] = retention(top1.value, top1.float_value)
    if "cosine" in found:
        results["feature_cosine"] = found["cosine"]["features"].value
    if accuracy is not None:
        for metric in loaded.values():
            results |= metric.compute(predictions=predicted_classes(harness.logits()), references=accuracy.labels) or {}
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
            seen = Seen.of(model, batches)
            if accuracy is not None:
                hits = predicted_classes(accuracy.logits_of(seen)).eq(accuracy.labels)
                again["accuracy"] = float(hits.float().mean())
            if original is not None:
                cosines = F.cosine_similarity(seen.features, harness.seen(True).features)
                again["feature_cosine"] = float(cosines.mean())
            results["fused"][f"{attention} attention"] = again
    write_json(output, results)
    return results, f"{_render(results, found)}\nwritten: {output}"


def _render(results: dict[str, Any], found: dict[str, dict[str, Score]]) -> str:
    """What a reader at the terminal wants; a figure that a task describes stands there once."""
    left_out = {"job", "norms", "environment", "fused", "tasks"}
    left_out |= {"accuracy", "float_accuracy"} if "accuracy" in found else set()
    left_out |= {"feature_cosine"} if "cosine" in found else set()
    shown: dict[str, Any] = {k: v for k, v in results.items() if k not in left_out and v is not None}
    shown |= {k: f"{v:.4f}" for k, v in shown.items() if isinstance(v, float)}
    shown |= {k: v.removeprefix(LOCAL) for k, v in shown.items() if isinstance(v, str)}
    shown |= {f"{task}, {name}": score.describe() for task, scores in found.items() for name, score in scores.items()}
    shown |= {f"fused, {k}": ", ".join(f"{n} {x}" for n, x in v.items()) for k, v in results.get("fused", {}).items()}
    return "\n".join(f"{k}: {v}" for k, v in shown.items())


def _float_original(subject: Subject, model: Any) -> tuple[str | None, tuple[Any, Any] | None, Recipe]:
    """(name, (model, processor), recipe beside the model); no name where there is nothing to compare with."""
    saved = saved_recipe(subject.model, subject.hub)
    hub = {k: v for k, v in subject.hub.items() if k != "revision"}
    if subject.original is not None:
        opened = open_model(subject.original, hub, "--float-model")
        if getattr(opened[0], "is_quantized", False):
            raise ValueError(
                f"--float-model {subject.original} is quantized; give the float original, or leave it out."
            )
        return subject.original, opened, saved
    if subject.model in reference.names() or (
        saved.model is None and not (isinstance(model, ExportedEncoder) or getattr(model, "is_quantized", False))
    ):
        return None, None, saved  # it is a float model itself
    name = "" if saved.model is None else recorded_name(saved.model)
    try:
        if saved.model is None:
            raise ValueError("none is recorded.")
        if name.startswith(LOCAL) and saved.model not in reference.names():
            raise ValueError("it was a folder of the machine where the model was quantized.")
        return saved.model, open_model(saved.model, hub | _revision(saved), "--float-model"), saved
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        logger.warning(
            f"No comparison with a float original{f' ({name.removeprefix(LOCAL)})' if name else ''}: {reason} Give it with "
            "--float-model."
        )
        return None, None, saved


def _revision(saved: Recipe) -> Hub:
    return {} if saved.revision is None else {"revision": saved.revision}


def refuse_itself(original: str, model: str) -> None:
    """Raise ``ValueError`` if both names are those of one model: the comparison would show no loss."""
    paths = Path(original), Path(model)
    same = original == model or (all(p.exists() for p in paths) and paths[0].resolve() == paths[1].resolve())
    if same:
        raise ValueError(f"--float-model {original} is the model itself. Give the float original, or leave it out.")


def load_metric(name: str) -> Any:
    """A metric that the `evaluate` library ships (its own name space on the Hub), or the script of a path.

    Raises:
        ValueError: another name; somebody else's code is run where its path is given only.
        FileNotFoundError: a path that does not exist.
    """
    if name.startswith(".") or Path(name).is_absolute() or name.endswith(".py"):
        if not Path(name).exists():
            raise FileNotFoundError(f"--metric {name}: there is no such file.")
        return evaluate.load(str(Path(name).resolve()))
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(
            f"--metric {name}: give the name of a metric that the evaluate library ships (accuracy, f1, ...), or the path of a "
            f"script on purpose (./{name})."
        )
    planted = [p for p in (Path(name), Path(f"{name}.py"), Path(f"evaluate-metric/{name}")) if p.exists()]
    if planted:
        raise ValueError(
            f"--metric {name}: {planted[0]} of the working directory has that name and would run. Give ./{planted[0]} to run "
            "it, or work in another directory."
        )
    try:
        return evaluate.load(f"evaluate-metric/{name}")
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"--metric {name}: the evaluate library ships no such metric, or the Hub cannot be reached."
        ) from error
