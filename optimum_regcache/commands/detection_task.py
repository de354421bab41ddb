"""The task `detection` of `evaluate`: average precision of a detector's boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from optimum_regcache.commands.harness import Harness, Score
from optimum_regcache.data.labels import is_generic, match_classes
from optimum_regcache.data.objects import COLUMNS, object_class_names
from optimum_regcache.encoders.passes import FeatureEncoder
from optimum_regcache.encoders.tower import has_boxes
from optimum_regcache.evaluation.detection import AveragePrecision, need_pycocotools


def detection_problem(harness: Harness) -> str | None:
    """Why detected objects cannot be judged; None if they can."""
    need_pycocotools("cocoeval")
    model, report = harness.model, harness.report
    if isinstance(model, FeatureEncoder):
        return "an exported encoder gives no boxes; evaluate the model that it came from"
    if not has_boxes(model):
        return f"{type(model).__name__} is no detector (...ForObjectDetection)"
    if not hasattr(_image_processor(harness), "post_process_object_detection"):
        return "the processor has no post_process_object_detection, which turns what the model gives into boxes"
    if not report.decodes or report.source.format["type"] == "custom":
        return "the data set holds ready pixel_values or a transform: the sizes of its pictures are not known"
    if harness.objects_column is None:
        return f"the data set has no column {' or '.join(COLUMNS)}; name it with --objects-column"
    return _class_numbers(harness)[1]


def detection(harness: Harness) -> dict[str, Score]:
    """AP and AP50."""
    numbers, truth = _class_numbers(harness)[0], harness.objects
    if numbers is not None:
        truth = [replace(objects, classes=numbers[objects.classes]) for objects in truth]

    def values(original: bool) -> dict[str, torch.Tensor]:
        return AveragePrecision(truth, _boxes(harness, original)).influences()

    ours = values(False)
    theirs = {} if harness.alone else values(True)
    return {name: replace(Score.of(found, theirs.get(name)), count=len(truth)) for name, found in ours.items()}


def _image_processor(harness: Harness) -> Any:
    return getattr(harness.source.processor, "image_processor", harness.source.processor)


def _boxes(harness: Harness, original: bool) -> list[Mapping[str, torch.Tensor]]:
    """Of each image all boxes, as the processor gives them."""
    detections: Any = harness.seen(original).detections  # there are some, as `detection_problem` saw
    sizes = torch.tensor([objects.size[::-1] for objects in harness.objects])
    output = SimpleNamespace(logits=detections[0], pred_boxes=detections[1])
    return _image_processor(harness).post_process_object_detection(output, threshold=-1.0, target_sizes=sizes)


def _class_numbers(harness: Harness) -> tuple[torch.Tensor | None, str | None]:
    """(the model's number of each class of the data set, None where both number alike; why there are none)."""
    config: Any = harness.model.config
    id2label = {int(number): str(name) for number, name in config.id2label.items()}
    count, generic = len(id2label), is_generic(list(id2label.values()))
    names = object_class_names(harness.report, str(harness.objects_column))
    used = torch.cat([objects.classes for objects in harness.objects]).unique().tolist()
    highest = max(used, default=0)
    if names is None:
        if highest < count and (generic or highest == count - 1):
            return None, None
        return None, (
            f"its classes are numbers without names, up to {highest}, and the model's {count} classes may be numbered in "
            "another way. Name them: ClassLabel(names=...)"
        )
    if highest >= len(names):
        return None, f"class {highest} of the data set is none of its {len(names)} classes"
    found = match_classes(names, id2label, config.label2id or {})
    unknown = [names[number] for number in used if found[number] is None]
    if not unknown:
        return torch.tensor([-1 if number is None else number for number in found]), None
    if generic and len(names) == count:
        return None, None
    listed = ", ".join(map(repr, unknown[:5]))
    return None, f"classes of the data set are unknown to the model ({listed}). Rename them after config.id2label"
