"""Detected objects judged by average precision, as COCO defines it (docs/method.md 12)."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from optimum_regcache.config.validation import require
from optimum_regcache.data.objects import Objects

GROUPS = 64  # of images that the jackknife leaves out, one after the other
FIGURES = {"AP": 0, "AP50": 1}  # their places among COCO's


def need_pycocotools(part: str) -> Any:
    """A part of pycocotools.

    Raises:
        ImportError: it is missing.
    """
    try:
        return import_module(f"pycocotools.{part}")
    except ImportError as error:
        raise ImportError(
            f"pycocotools is needed for --task detection and could not be imported ({error}): "
            'pip install "optimum-regcache[eval]"'
        ) from error


class AveragePrecision:
    """AP (over IoU .5 to .95) and AP50 of detections, computed by pycocotools.

    Args:
        truth: the objects of each image; their classes are the model's.
        found: of each image ``scores`` [q], ``labels`` [q] and ``boxes`` [q, 4] (left, top, right, bottom in pixels): what
            ``post_process_object_detection`` of an image processor gives.

    Raises:
        ValueError: no objects, or detections that are no numbers.
        ImportError: pycocotools is missing.
    """

    def __init__(self, truth: Sequence[Objects], found: Sequence[Mapping[str, torch.Tensor]]) -> None:
        require(
            any(len(o.classes) for o in truth), "No report image has an object to detect. Take more (--num-report)."
        )
        require(
            all(bool(f["boxes"].isfinite().all() and f["scores"].isfinite().all()) for f in found),
            "The model gives boxes or scores that are no numbers. Open it in float32.",
        )
        coco = need_pycocotools("coco").COCO
        with contextlib.redirect_stdout(io.StringIO()):
            truths, detections = coco(), coco()
            truths.dataset, detections.dataset = _data(truth, _truths(truth)), _data(truth, _detections(found))
            truths.createIndex()
            detections.createIndex()
            evaluation = need_pycocotools("cocoeval").COCOeval(truths, detections, "bbox")
            evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
            evaluation.evaluate()
        self._evaluation, self._images = evaluation, len(truth)

    def figures(self, images: Sequence[int] | None = None) -> dict[str, float]:
        """Name of :data:`FIGURES` -> its value over ``images`` (positions; all by default); nan where they hold no object."""
        chosen = list(range(self._images) if images is None else images)
        part = copy.copy(self._evaluation)
        part.params, part._paramsEval = (copy.copy(p) for p in (part.params, part._paramsEval))
        part.params.imgIds = part._paramsEval.imgIds = chosen
        matches = self._evaluation.evalImgs  # class after class, image after image
        part.evalImgs = [matches[start + i] for start in range(0, len(matches), self._images) for i in chosen]
        with contextlib.redirect_stdout(io.StringIO()):
            part.accumulate()
            part.summarize()
        return {
            name: float(part.stats[place]) if part.stats[place] >= 0 else float("nan")
            for name, place in FIGURES.items()
        }

    def influences(self) -> dict[str, torch.Tensor]:
        """Name -> float64 [g] whose mean is the figure, and whose standard error is that of the jackknife that leaves out one
        of g groups of images (each g-th image, g up to :data:`GROUPS`) after the other."""
        whole, g = self.figures(), min(self._images, GROUPS)
        if g == 1:
            return {name: torch.tensor([value], dtype=torch.float64) for name, value in whole.items()}
        without = [self.figures([i for i in range(self._images) if i % g != group]) for group in range(g)]
        found = {}
        for name, value in whole.items():
            parts = torch.tensor([part[name] for part in without], dtype=torch.float64).nan_to_num(
                value
            )  # no object is left
            found[name] = value + (g - 1) * (parts.mean() - parts)
        return found


def _data(truth: Sequence[Objects], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    classes = torch.cat([o.classes for o in truth]).unique()
    images = [{"id": i, "width": o.size[0], "height": o.size[1]} for i, o in enumerate(truth)]
    return {
        "images": images,
        "categories": [{"id": int(number)} for number in classes],
        "annotations": [{"id": number, **a} for number, a in enumerate(annotations, 1)],  # 0 would mean unmatched
    }


def _truths(truth: Sequence[Objects]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "category_id": int(c),
            "bbox": b.tolist(),
            "area": float(b[2] * b[3]),
            "iscrowd": int(crowd),
        }
        for image, o in enumerate(truth)
        for b, c, crowd in zip(o.boxes, o.classes, o.crowd, strict=True)
    ]


def _detections(found: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    boxes = []
    for image, f in enumerate(found):
        for score, label, corners in zip(f["scores"].tolist(), f["labels"].tolist(), f["boxes"].tolist(), strict=True):
            left, top, right, bottom = corners
            box = [left, top, right - left, bottom - top]
            area = box[2] * box[3]
            boxes.append(
                {"image_id": image, "category_id": label, "bbox": box, "area": area, "score": score, "iscrowd": 0}
            )
    return boxes
