"""What `evaluate` measures: each task on a model and its float original, over the same images, with every pass made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch.nn import functional as F

from optimum_regcache.commands.sources import Source
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.config.validation import require
from optimum_regcache.data.captions import COLUMNS, caption_column, captions_of
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reading import store_batches
from optimum_regcache.encoders.passes import Batch, FeatureEncoder, encode
from optimum_regcache.encoders.tower import find_tower, reads_patches
from optimum_regcache.evaluation.dense import PatchCosineObjective, ProjectedCosineObjective, projector_problem
from optimum_regcache.evaluation.objective import AccuracyObjective, encode_texts, zero_shot_problem
from optimum_regcache.evaluation.probes import LinearProbe, need_scikit_learn, neighbour_predictions
from optimum_regcache.evaluation.retrieval import first_ranks, own_texts, recalls
from optimum_regcache.evaluation.targets import NO_LABELS, Targets, accuracy_targets, label_problem
from optimum_regcache.search.plan import space_of
from optimum_regcache.search.setups import mean_and_error

MANY_CLASSES = 10  # from which on top-5 says something


@dataclass(frozen=True)
class Score:
    """One figure of a model, beside that of its float original.

    Attributes:
        value: mean over ``count`` images or texts.
        standard_error: of it; None for a single one.
        count: images or texts.
        float_value: of the float original; None where there is none, or where the figure itself compares with it.
        difference: mean of value - float value, one by one.
        difference_error: its standard error.
        share: whether it is a share of hits, not a cosine.
    """

    value: float
    standard_error: float | None
    count: int
    float_value: float | None = None
    difference: float | None = None
    difference_error: float | None = None
    share: bool = True

    @classmethod
    def of(cls, values: torch.Tensor, float_values: torch.Tensor | None = None, *, share: bool = True) -> Score:
        """From one value for each image or text, float [n]."""
        value, error = _mean_and_error(values)
        if float_values is None:
            return cls(value, error, len(values), share=share)
        difference = _mean_and_error(values - float_values)
        return cls(value, error, len(values), _mean_and_error(float_values)[0], *difference, share=share)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return asdict(self)

    def describe(self) -> str:
        """For a line of text."""
        if not self.share:
            return f"{self.value:.4f}{'' if self.standard_error is None else f' +- {self.standard_error:.4f}'}"
        text = f"{100 * self.value:.2f} %{_points(self.standard_error)}"
        if self.float_value is None or self.difference is None:
            return text
        compared = f"{100 * self.difference:+.2f}{_points(self.difference_error)} points"
        return f"{text}, float {100 * self.float_value:.2f} %, difference {compared}"


def _points(error: float | None) -> str:
    return "" if error is None else f" +- {100 * error:.2f}"


def _mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    mean, error = mean_and_error(values.double())
    return mean, None if math.isinf(error) else error


@dataclass
class Harness:
    """A model and its float original on the report images.

    Attributes:
        model: float, quantized or exported.
        source: its float original and the images; where ``alone``, the model itself in the place of the original.
        alone: whether there is no float original.
        report: the images that are scored.
        data: how images are read.
        batches: those of ``report``.
        templates: zero-shot prompts, one or several; None for that of the source.
        column: of the captions; None to look for it.
    """

    model: Any
    source: Source
    alone: bool
    report: ImageInputs
    data: DataConfig
    batches: Sequence[Batch]
    templates: str | Sequence[str] | None = None
    column: str | None = None
    _features: dict[tuple[bool, bool], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def targets(self) -> Targets:
        """How the labels become classes of the model; warns where they do not."""
        source, templates = self.source, self.templates
        return accuracy_targets(source.model, source.processor, self.report, templates or source.template)

    @cached_property
    def accuracy(self) -> AccuracyObjective | None:
        """None where the labels cannot be predicted."""
        labels = self.targets.labels(self.report)
        return None if labels is None else AccuracyObjective(self.batches, labels, self.targets.text_features)

    @cached_property
    def train(self) -> ImageInputs:
        """The search side of the data set."""
        return ImageInputs(self.source.search_images, self.source.processor)

    @cached_property
    def train_batches(self) -> Sequence[Batch]:
        return store_batches(self.train, self.data, space_of(self.data), progress=True)

    def features(self, original: bool = False, train: bool = False) -> torch.Tensor:
        """Float32 [n, D] of the model or its float original, on the report or the training images."""
        original = original and not self.alone
        if (original, train) not in self._features:
            batches = self.train_batches if train else self.batches
            self._features[original, train] = encode(self.source.model if original else self.model, batches)
        return self._features[original, train]

    def score(self, hits: Callable[[bool], torch.Tensor]) -> Score:
        """Of what ``hits`` gives for the model (False) and for its float original (True)."""
        return Score.of(hits(False), None if self.alone else hits(True))


@dataclass(frozen=True)
class Task:
    """A kind of measurement.

    Attributes:
        problem: why it cannot be done, None if it can.
        run: name of a figure -> figure.
        by_default: whether it is done, where it can be, when nothing is asked for.
    """

    problem: Callable[[Harness], str | None]
    run: Callable[[Harness], dict[str, Score]]
    by_default: bool = True


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
    return {name: TASKS[name].run(harness) for name, problem in problems.items() if problem is None}


def check_tasks(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a task that does not exist."""
    unknown = [name for name in names if name not in TASKS]
    require(not unknown, f"Unknown task {', '.join(map(repr, unknown))}; expected one of {', '.join(TASKS)}.")


def _accuracy_problem(harness: Harness) -> str | None:
    return None if harness.accuracy is not None else harness.targets.note


def _accuracy(harness: Harness) -> dict[str, Score]:
    accuracy: Any = harness.accuracy  # not None, as `_accuracy_problem` saw
    models = [harness.model] if harness.alone else [harness.model, harness.source.model]
    ranks = [accuracy.ranks(model) for model in models]
    tops = (1, 5) if accuracy.classes(harness.model) >= MANY_CLASSES else (1,)
    return {f"top-{k}": harness.score(lambda original, k=k: (ranks[original] < k).float()) for k in tops}


def _original_problem(harness: Harness) -> str | None:
    return "there is no float original to compare with; give it with --float-model" if harness.alone else None


def _cosine(harness: Harness) -> dict[str, Score]:
    return {"features": Score.of(F.cosine_similarity(harness.features(), harness.features(True)), share=False)}


def _patch_problem(harness: Harness) -> str | None:
    if isinstance(harness.model, FeatureEncoder):
        return "an exported encoder gives pooled features and no patch tokens"
    config: Any = getattr(harness.model.config, "quantization_config", None)
    if config is not None and config.deletion.count and config.deletion.fill == "none":
        return "deletion.fill='none' returns fewer patch tokens than there are places"
    return _original_problem(harness)


def _patch_cosine(harness: Harness) -> dict[str, Score]:
    objective = PatchCosineObjective(harness.source.model, harness.batches)
    return {"patch tokens": Score.of(objective.scores(harness.model), share=False)}


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
    if caption_column(harness.report, harness.column) is None:
        return f"the data set has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; name its captions with --caption-column"
    return None


def _retrieval(harness: Harness) -> dict[str, Score]:
    column: Any = caption_column(harness.report, harness.column)  # not None, as `_retrieval_problem` saw
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
        image = F.normalize(harness.features(original), dim=-1)
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
    model = harness.model
    if not isinstance(model, FeatureEncoder) and reads_patches(model, find_tower(model)):
        return f"{type(model).__name__} reads patch tokens and has no pooled feature"
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
        bank, features = harness.features(original, train=True), harness.features(original)
        return neighbour_predictions(bank, train, features, weighted=weighted).eq(labels).float()

    ways = {"weighted votes": True, "plain votes": False}
    return {name: harness.score(lambda original, w=w: hits(original, w)) for name, w in ways.items()}


def _linear_probe(harness: Harness) -> dict[str, Score]:
    labels: Any = harness.report.labels()
    train: Any = harness.train.labels()  # both are there, as `_training_problem` saw
    probe = LinearProbe(harness.features(train=True), train)
    own = probe.predictions(harness.features()).eq(labels).float()
    if harness.alone:
        return {"own probe": Score.of(own)}
    float_probe = LinearProbe(harness.features(True, train=True), train)
    base = float_probe.predictions(harness.features(True)).eq(labels).float()
    moved = float_probe.predictions(harness.features()).eq(labels).float()
    return {"own probe": Score.of(own, base), "float probe": Score.of(moved, base)}


TASKS = {
    "accuracy": Task(_accuracy_problem, _accuracy),
    "cosine": Task(_original_problem, _cosine),
    "patch_cosine": Task(_patch_problem, _patch_cosine),
    "projector": Task(_projector_problem, _projector),
    "retrieval": Task(_retrieval_problem, _retrieval, by_default=False),
    "knn": Task(_training_problem, _knn, by_default=False),
    "linear_probe": Task(_training_problem, _linear_probe, by_default=False),
}
FEATURES_ALONE = ("knn", "linear_probe")  # what an exported encoder needs nothing else for
