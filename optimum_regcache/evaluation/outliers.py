"""Outlier tokens: how many an image has, from which block on, how alike they are, and whether they lie on the background.

These are the observations RegCache rests on (docs/method.md 1): a few tokens without content, nearly the same vector in
every image, far above the median from a middle block on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.visiting import patch_span, visit_tokens

REPORTED_RATIO = 20.0  # l_inf over the median: what reports call an outlier; calibration leaves out more tokens
MAX_COMPARED = 512  # images whose tokens are compared with each other, rounded up to whole batches
Boxes = Sequence[Sequence[float]]


@dataclass(frozen=True)
class OutlierReport:
    """Outlier tokens of a set of images, block by block. A token is an outlier if its l_inf norm is at least
    :data:`REPORTED_RATIO` times the median patch token of its image; CLS, trained registers, detection tokens and padding do
    not count.

    Attributes:
        ratio: float [blocks], largest token over median token at the block's input, median over images.
        per_image: float [blocks], outlier tokens an image, mean over images.
        images: float [blocks], share of images with at least one.
        fc2_ratio: float [blocks], the same as ``ratio`` at the input of the MLP output projection.
        block: block at whose input ``ratio`` is largest; the following attributes refer to it.
        cosine, normal_cosine: mean cosine between different images of the largest token, and of one random token of at
            most median norm; None with fewer than two images.
        on_background: share of outlier tokens whose centre lies outside the object's box; None without boxes or outliers.
        background: the same share of all patch tokens, that is what chance would give; None without boxes.
    """

    ratio: torch.Tensor
    per_image: torch.Tensor
    images: torch.Tensor
    fc2_ratio: torch.Tensor
    block: int
    cosine: float | None
    normal_cosine: float | None
    on_background: float | None
    background: float | None

    @property
    def first_block(self) -> int | None:
        """First block at whose input at least half of the images have an outlier token; None if there is no such block."""
        found = (self.images >= 0.5).nonzero().flatten()
        return int(found[0]) if len(found) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        result: dict[str, Any] = {"outlier_ratio": REPORTED_RATIO, "first_block": self.first_block}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            result[name] = [round(float(v), 5) for v in value] if isinstance(value, torch.Tensor) else value
        return result

    def describe(self) -> list[str]:
        """Lines for a terminal."""
        worst = int(self.fc2_ratio.argmax())
        fc2 = f"fc2 input: largest token {float(self.fc2_ratio[worst]):.0f}x the median in block {worst}"
        if self.first_block is None:
            return [
                f"no block input with outlier tokens (>= {REPORTED_RATIO:g}x the median) in half of the images; largest token, "
                f"median over images: {float(self.ratio.max()):.1f}x",
                fc2,
            ]
        block = self.block
        lines = [
            f"outlier tokens (>= {REPORTED_RATIO:g}x the median) from the input of block {self.first_block} on; at block "
            f"{block}: {float(self.per_image[block]):.1f} an image, largest {float(self.ratio[block]):.0f}x the median"
        ]
        if self.cosine is not None and self.normal_cosine is not None:
            lines.append(f"cosine between images: outlier tokens {self.cosine:.2f}, normal {self.normal_cosine:.2f}")
        if self.on_background is not None and self.background is not None:
            lines.append(f"on the background: {self.on_background:.0%} of them, {self.background:.0%} of all patches")
        return [*lines, fc2]


def cross_cosine(states: torch.Tensor, image: torch.Tensor) -> tuple[float, float] | None:
    """Mean and standard deviation of the cosine between ``states`` [k, D] of different images [k]; None if all are of one."""
    if len(states) < 2:
        return None
    unit = F.normalize(states.float(), dim=-1)
    pairs = (unit @ unit.T)[image[:, None] != image[None, :]]
    return (float(pairs.mean()), float(pairs.std())) if len(pairs) else None


def outside_box(boxes: torch.Tensor, patches: int) -> torch.Tensor | None:
    """bool [B, patches]: whether the centre of each patch of a square grid lies outside ``boxes`` [B, 4] (left, top, right,
    bottom as fractions of the image); None if ``patches`` is no square."""
    side = round(patches**0.5)
    if side * side != patches:
        return None
    number = torch.arange(patches)
    x, y = (number % side + 0.5) / side, (number // side + 0.5) / side
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)
    return (x < left) | (x > right) | (y < top) | (y > bottom)


def measure_outliers(
    model: nn.Module, batches: Iterable[Batch], boxes: Boxes | None = None, seed: int = 0
) -> OutlierReport:
    """Measure with whatever registers and deletion are installed.

    Args:
        model: model or tower.
        batches: images.
        boxes: where the object is in each image (:func:`outside_box`), in the order of the batches.
        seed: choice of the normal tokens.

    Raises:
        ValueError: no images.
    """
    tower = find_tower(model)
    depth = len(tower.blocks)
    generator = torch.Generator().manual_seed(seed)
    norms: dict[tuple[str, int], list[torch.Tensor]] = {}
    tops: list[list[torch.Tensor]] = [[] for _ in range(depth)]
    normals: list[list[torch.Tensor]] = [[] for _ in range(depth)]

    def record(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        places = patch_span(tower, block).positions
        found = x.abs().amax(-1).float().masked_fill(~valid, torch.nan)[:, places]
        norms.setdefault((site, block), []).append(found.cpu())
        if site == "block" and sum(map(len, tops[block])) < MAX_COMPARED:
            patches, rows = x[:, places], torch.arange(len(x))
            tops[block].append(patches[rows, found.nan_to_num(-1.0).argmax(1)].float().cpu())
            median = found.nanmedian(1, keepdim=True).values
            chance = torch.rand(found.shape, generator=generator).to(x.device).masked_fill(~(found <= median), -1.0)
            normals[block].append(patches[rows, chance.argmax(1)].float().cpu())

    visit_tokens(model, batches, record)
    if not norms:
        raise ValueError("No images to look for outlier tokens in.")
    # NaN at padding becomes 0: no outlier
    ratios = {
        key: [(n / n.nanmedian(1, keepdim=True).values).nan_to_num(0.0) for n in parts] for key, parts in norms.items()
    }
    largest = {key: torch.cat([r.amax(1) for r in parts]) for key, parts in ratios.items()}
    counts = [torch.cat([(r >= REPORTED_RATIO).sum(1) for r in ratios["block", b]]).float() for b in range(depth)]
    ratio = torch.stack([largest["block", b].median() for b in range(depth)])
    peak = int(ratio.argmax())
    image = torch.arange(sum(len(t) for t in tops[peak]))
    cosine, normal = (cross_cosine(torch.cat(rows[peak]), image) for rows in (tops, normals))
    on_background, background = _background(ratios["block", peak], boxes)
    return OutlierReport(
        ratio=ratio,
        per_image=torch.stack([c.mean() for c in counts]),
        images=torch.stack([(c > 0).float().mean() for c in counts]),
        fc2_ratio=torch.stack([largest["fc2", b].median() for b in range(depth)]),
        block=peak,
        cosine=cosine and cosine[0],
        normal_cosine=normal and normal[0],
        on_background=on_background,
        background=background,
    )


def _background(ratios: list[torch.Tensor], boxes: Boxes | None) -> tuple[float | None, float | None]:
    """(share of outlier tokens outside the boxes, share of all patches outside the boxes)."""
    if boxes is None or len({r.shape[1] for r in ratios}) != 1:
        return None, None
    values = torch.cat(ratios)
    outside = outside_box(torch.tensor([list(map(float, box)) for box in boxes]), values.shape[1])
    if outside is None:
        return None, None
    found = values >= REPORTED_RATIO
    return float(outside[found].float().mean()) if found.any() else None, float(outside.float().mean())
