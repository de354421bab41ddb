"""What `evaluate` measures: each task on a model and its float original, over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch.nn import functional as F

from optimum_regcache.commands.dense_tasks import (
    depth,
    depth_problem,
    segmentation,
    segmentation_problem,
    token_problem,
)
from optimum_regcache.commands.detection_task import detection, detection_problem
from optimum_regcache.commands.harness import Harness, Score, Task
from optimum_regcache.config.validation import require
from optimum_regcache.data.captions import COLUMNS, caption_column, captions_of
from optimum_regcache.encoders.passes import Batch, FeatureEncoder
from optimum_regcache.evaluation.dense import ProjectedCosineObjective, mean_cosines, projector_problem
from optimum_regcache.evaluation.objective import encode_texts, label_ranks, zero_shot_problem
from optimum_regcache.evaluation.probes import LinearProbe, need_scikit_learn, neighbour_predictions
from optimum_regcache.evaluation.retrieval import first_ranks, own_texts, recalls
from optimum_regcache.evaluation.targets import NO_LABELS, label_problem

MANY_CLASSES = 10  # from which on top-5 says something


def run_tasks(harness: Harness, names: Sequence[str] = ()) -> dict[str, dict[str, Score]]:
    """Figures of the tasks ``names``; of those that are done by default, as far as they can be, where there are none.

    Raises:
        ValueError: a task that does not exist or cannot be done; nothing is computed then.
        ImportError: scikit-learn is missing.
    """
    check_tasks(names)
    problems = {name: TASKS[name].problem(harness) for name in names or TASKS if names or TASKS[name].by_default}
    for name, problem in problems.items():
        require(not names or problem is None, f"--task {name} is not possible: {problem}.")
    possible = [name for name, problem in problems.items() if problem is None]
    harness.tokens = frozenset(side for name in possible for side in TASKS[name].tokens)
    return {name: TASKS[name].run(harness) for name in possible}


def check_tasks(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a task that does not exist."""
    unknown = [name for name in names if name not in TASKS]
    require(not unknown, f"Unknown task {', '.join(map(repr, unknown))}; expected one of {', '.join(TASKS)}.")


def _accuracy_problem(harness: Harness) -> str | None:
    return None if harness.accuracy is not None else harness.targets.note


def _accuracy(harness: Harness) -> dict[str, Score]:
    accuracy: Any = harness.accuracy  # not None, as `_accuracy_problem` saw
    tops = (1, 5) if harness.logits().shape[1] >= MANY_CLASSES else (1,)

    def ranks(original: bool) -> torch.Tensor:
        return label_ranks(harness.logits(original), accuracy.labels)

    return {f"top-{k}": harness.score(lambda original, k=k: (ranks(original) < k).float()) for k in tops}


def _original_problem(harness: Harness) -> str | None:
    return "there is no float original to compare with; give it with --float-model" if harness.alone else None


def _cosine(harness: Harness) -> dict[str, Score]:
    cosines = F.cosine_similarity(harness.seen().features, harness.seen(True).features)
    return {"features": Score.of(cosines, share=False)}


def _patch_problem(harness: Harness) -> str | None:
    return token_problem(harness) or _original_problem(harness)


def _patch_cosine(harness: Harness) -> dict[str, Score]:
    ours, theirs, scores = harness.seen(), harness.seen(True), list[torch.Tensor]()
    for batch in range(len(ours.tokens)):
        tokens, reference = (F.normalize(seen.tokens[batch]["tokens"], dim=-1) for seen in (ours, theirs))
        scores += mean_cosines(tokens, reference, ours.lengths[batch], theirs.lengths[batch])
    return {"patch tokens": Score.of(torch.stack(scores), share=False)}


def _projector_problem(harness: Harness) -> str | None:
    return projector_problem(harness.model) or _original_problem(harness)


def _projector(harness: Harness) -> dict[str, Score]:
    objective = ProjectedCosineObjective(harness.source.model, harness.batches)
    return {"projected tokens": Score.of(objective.scores(harness.model), share=False)}


def _retrieval_problem(harness: Harness) -> str | None:
    problem = zero_shot_problem(harness.source.model, harness.source.processor)
    if problem is not None:
        exported = isinstance(harness.source.model, FeatureEncoder)
        return f"{problem}; give the float original with --float-model" if exported else problem
    if caption_column(harness.report, harness.columns.caption) is None:
        return f"the data set has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; name its captions with --caption-column"
    return None


def _retrieval(harness: Harness) -> dict[str, Score]:
    column: Any = caption_column(harness.report, harness.columns.caption)  # not None, as `_retrieval_problem` saw
    captions = captions_of(harness.report, column)
    texts, pairs = own_texts(captions, _same_pictures(harness.batches))
    require(
        len(texts) > 1 and len(harness.report) > 1,
        f"--task retrieval needs several images with different captions, got {len(harness.report)} and {len(texts)}. Take more "
        "(--num-report).",
    )
    text = encode_texts(harness.source.model, harness.source.processor, texts)
    found: dict[str, list[torch.Tensor]] = {}
    for original in (False,) if harness.alone else (False, True):
        image = F.normalize(harness.seen(original).features, dim=-1)
        ways = {
            "image to text": recalls(first_ranks(image, text, pairs), len(text)),
            "text to image": recalls(first_ranks(text, image, pairs.flip(1)), len(image)),
        }
        for way, hits in ways.items():
            for name, values in hits.items():
                found.setdefault(f"{way} {name}", []).append(values)
    return {name: Score.of(*values) for name, values in found.items()}


def _same_pictures(batches: Sequence[Batch]) -> torch.Tensor:
    """int64 [n], equal for images of equal pixels: a table may hold one for each of its captions."""
    numbers: dict[bytes, int] = {}
    found = []
    for batch in batches:
        for pixels in batch["pixel_values"]:
            digest = xxhash.xxh3_128_digest(pixels.numpy().tobytes())
            found.append(numbers.setdefault(digest, len(numbers)))
    return torch.tensor(found)


def _training_problem(harness: Harness) -> str | None:
    need_scikit_learn()
    for side, inputs in (("report", harness.report), ("search", harness.train)):
        problem = label_problem(inputs.label_values())
        if problem is not None:
            return problem if problem == NO_LABELS else f"{problem} ({side} side)"
    if harness.train.class_names() != harness.report.class_names():
        return "its search and report sides name their classes differently"
    return None


def _knn(harness: Harness) -> dict[str, Score]:
    labels: Any = harness.report.labels()
    train: Any = harness.train.labels()  # both are there, as `_training_problem` saw

    def hits(original: bool, weighted: bool) -> torch.Tensor:
        bank, features = harness.seen(original, train=True).pooled, harness.seen(original).pooled
        return neighbour_predictions(bank, train, features, weighted=weighted).eq(labels).float()

    ways = {"weighted votes": True, "plain votes": False}
    return {name: harness.score(lambda original, w=w: hits(original, w)) for name, w in ways.items()}


def _linear_probe(harness: Harness) -> dict[str, Score]:
    labels: Any = harness.report.labels()
    train: Any = harness.train.labels()  # both are there, as `_training_problem` saw
    probe = LinearProbe(harness.seen(train=True).pooled, train)
    own = probe.predictions(harness.seen().pooled).eq(labels).float()
    if harness.alone:
        return {"own probe": Score.of(own)}
    float_probe = LinearProbe(harness.seen(True, train=True).pooled, train)
    base = float_probe.predictions(harness.seen(True).pooled).eq(labels).float()
    moved = float_probe.predictions(harness.seen().pooled).eq(labels).float()
    return {"own probe": Score.of(own, base), "float probe": Score.of(moved, base)}


TASKS = {
    "accuracy": Task(_accuracy_problem, _accuracy),
    "cosine": Task(_original_problem, _cosine),
    "patch_cosine": Task(_patch_problem, _patch_cosine, tokens=("report",)),
    "projector": Task(_projector_problem, _projector),
    "retrieval": Task(_retrieval_problem, _retrieval, by_default=False),
    "knn": Task(_training_problem, _knn, by_default=False),
    "linear_probe": Task(_training_problem, _linear_probe, by_default=False),
    "segmentation": Task(segmentation_problem, segmentation, by_default=False, tokens=("train", "report")),
    "depth": Task(depth_problem, depth, by_default=False, tokens=("train", "report")),
    "detection": Task(detection_problem, detection, by_default=False),
}
FEATURES_ALONE = ("knn", "linear_probe", "segmentation", "depth")  # what an exported encoder needs nothing else for
COLUMNS_OF = {  # option -> (task that reads it, attribute of `Columns`)
    "--caption-column": ("retrieval", "caption"),
    "--mask-column": ("segmentation", "mask"),
    "--ignore-index": ("segmentation", "ignore"),
    "--depth-column": ("depth", "depth"),
    "--objects-column": ("detection", "objects"),
    "--box-format": ("detection", "box_format"),
}
