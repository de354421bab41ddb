"""The tasks `segmentation` and `depth` of `evaluate`: linear heads on frozen patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from optimum_regcache.commands.harness import Harness, Score
from optimum_regcache.config.validation import require
from optimum_regcache.data.loading import DEPTHS, MASKS
from optimum_regcache.data.pixels import class_masks, depth_maps, geometry_problem, target_column
from optimum_regcache.encoders.passes import FeatureEncoder
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation.pixels import (
    DepthProbe,
    PatchGrid,
    SegmentationProbe,
    class_shares,
    confusion,
    depth_errors,
    influences,
    mean_iou,
    need_scikit_learn,
    pixel_accuracy,
)

Probe = SegmentationProbe | DepthProbe


def token_problem(harness: Harness) -> str | None:
    """Why the model gives no token for each patch; None if it does."""
    if isinstance(harness.model, FeatureEncoder):
        return None if harness.model.gives_tokens else "this exported encoder gives pooled features and no patch tokens"
    config: Any = getattr(harness.model.config, "quantization_config", None)
    if config is not None and config.deletion.count and config.deletion.fill == "none":
        return "deletion.fill='none' returns fewer patch tokens than there are places"
    return None


def segmentation_problem(harness: Harness) -> str | None:
    """Why pixels cannot be classified; None if they can."""
    return _problem(harness, MASKS, "--mask-column", harness.columns.mask)


def depth_problem(harness: Harness) -> str | None:
    """Why depths cannot be predicted; None if they can."""
    return _problem(harness, DEPTHS, "--depth-column", harness.columns.depth)


def _problem(harness: Harness, names: Sequence[str], option: str, wanted: str | None) -> str | None:
    need_scikit_learn()
    problem = token_problem(harness)
    if problem is None and (_patch_size(harness) is None or harness.batches[0]["pixel_values"].ndim != 4):
        problem = (
            f"{type(harness.model).__name__} does not take pictures [3, H, W] that are cut into patches of one size"
        )
    for inputs in (harness.report, harness.train):
        if problem is None:
            problem = geometry_problem(inputs)
        if problem is None and target_column(inputs, names, option, wanted) is None:
            listed = f"{', '.join(names[:-1])} or {names[-1]}"
            problem = f"the data set has no column of pictures {listed}; name it with {option}"
    return problem


def _patch_size(harness: Harness) -> tuple[int, int] | None:
    model = harness.model
    return model.patch_size if isinstance(model, FeatureEncoder) else find_tower(model).patch_size


def segmentation(harness: Harness) -> dict[str, Score]:
    """mIoU and pixel accuracy of a linear head on patch tokens."""
    train, masks = (
        class_masks(
            inputs, str(target_column(inputs, MASKS, "--mask-column", harness.columns.mask)), harness.columns.ignore
        )
        for inputs in (harness.train, harness.report)
    )
    numbers = [torch.cat([mask.unique() for mask in part]).unique() for part in (train, masks)]
    classes = torch.cat(numbers).unique()
    classes = classes[classes >= 0]
    for side, found in zip(("search", "report"), numbers, strict=True):
        held = found[found >= 0].tolist()
        require(
            len(held) > 1,
            f"--task segmentation needs masks of several classes; beside the ignored {harness.columns.ignore} those of the "
            f"{side} side hold {held}. Take more images, or another --ignore-index (-1: none).",
        )
    train, masks = ([_numbered(mask, classes) for mask in part] for part in (train, masks))

    def fit(tokens: torch.Tensor, grids: Sequence[PatchGrid]) -> SegmentationProbe:
        shares = [class_shares(mask, len(classes), grid) for mask, grid in zip(train, grids, strict=True)]
        return SegmentationProbe(tokens, torch.cat(shares))

    def judge(probe: Any, original: bool) -> dict[str, torch.Tensor]:
        found = torch.stack(
            [
                confusion(grid.covered(mask), probe.predictions(tokens, grid), len(classes))
                for mask, (tokens, grid) in zip(masks, _images(harness, original), strict=True)
            ]
        )
        return {"mIoU": influences(found, mean_iou), "pixel accuracy": influences(found, pixel_accuracy)}

    return _probes(harness, fit, judge, frozenset({"mIoU", "pixel accuracy"}))


def _numbered(mask: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Positions in ``classes``, which are sorted; -1 stays."""
    return torch.searchsorted(classes, mask).masked_fill(mask < 0, -1)


def depth(harness: Harness) -> dict[str, Score]:
    """RMSE, AbsRel and delta1 of a linear head on patch tokens."""
    train, maps = (
        depth_maps(inputs, str(target_column(inputs, DEPTHS, "--depth-column", harness.columns.depth)))
        for inputs in (harness.train, harness.report)
    )

    def fit(tokens: torch.Tensor, grids: Sequence[PatchGrid]) -> DepthProbe:
        return DepthProbe(tokens, torch.cat([grid.patches(map_) for map_, grid in zip(train, grids, strict=True)]))

    def judge(probe: Any, original: bool) -> dict[str, torch.Tensor]:
        found: dict[str, list[float]] = {}
        for map_, (tokens, grid) in zip(maps, _images(harness, original), strict=True):
            truth = grid.covered(map_)
            if truth.isfinite().any():
                for name, value in depth_errors(truth, probe.predictions(tokens, grid)).items():
                    found.setdefault(name, []).append(value)
        require(bool(found), "No report image has a depth. Depths are numbers above 0; see --depth-column.")
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}

    return _probes(harness, fit, judge, frozenset({"delta1"}))


def _images(harness: Harness, original: bool, train: bool = False) -> Iterator[tuple[torch.Tensor, PatchGrid]]:
    """(tokens [places, D], grid) of each image of the report or the training side."""
    seen, patch = harness.seen(original, train), _patch_size(harness)
    batches = harness.train_batches if train else harness.batches
    for batch, stored, lengths in zip(batches, seen.tokens, seen.lengths, strict=True):
        grid = PatchGrid.of(batch["pixel_values"].shape[-2:], patch or (1, 1))  # known, as `_problem` saw
        for rows in stored["tokens"].split(list(lengths)):
            yield grid.tokens(rows), grid


def _probes(
    harness: Harness,
    fit: Callable[[torch.Tensor, Sequence[PatchGrid]], Probe],
    judge: Callable[[Probe, bool], dict[str, torch.Tensor]],
    shares: frozenset[str],
) -> dict[str, Score]:
    """The figures of the model's own probe, and of that of the float original on the model's tokens; ``shares``: in percent."""

    def probe(original: bool) -> Probe:
        tokens, grids = zip(*_images(harness, original, train=True), strict=True)
        return fit(torch.cat(tokens), grids)

    own = judge(probe(False), False)
    if harness.alone:
        return {f"own probe {name}": Score.of(values, share=name in shares) for name, values in own.items()}
    float_probe = probe(True)
    base, moved = judge(float_probe, True), judge(float_probe, False)
    return {
        f"{which} {name}": Score.of(values, base[name], share=name in shares)
        for which, found in (("own probe", own), ("float probe", moved))
        for name, values in found.items()
    }
