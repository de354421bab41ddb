"""Procedural scenes: the project's own images, so that nothing third-party has to be shipped or downloaded.

A scene is one coloured shape on a plain or textured background, with a caption. The class is ``(colour, shape)``: 8 x 8 = 64
zero-shot classes. Image ``i`` of a split is a pure function of ``(split, seed, i)``; splits draw from separate random streams
(:class:`numpy.random.SeedSequence` spawn keys), hence they are disjoint by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from datasets import Dataset

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 208, 40),
    "purple": (136, 58, 178),
    "orange": (240, 134, 32),
    "cyan": (48, 200, 214),
    "pink": (240, 128, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (128, 128, 128),
    "white": (238, 238, 238),
    "black": (24, 24, 24),
    "brown": (104, 78, 54),
    "beige": (214, 200, 170),
    "slate": (72, 84, 98),
}
TEXTURES = ("plain", "striped", "checkered", "dotted", "noisy", "shaded")
SPLITS = ("train", "search", "calibration", "report")
CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
MASK_NAMES = ("background", *SHAPES)  # what the numbers of `Scene.mask` mean
WALL = 3000  # depth of the background, in thousandths
SIZE = 64
MOST_SHAPES = 4  # of `Shapes`
_ATTEMPTS = 40  # at a place for a shape that touches no other
_SUPERSAMPLING = 2


def prompt(name: str) -> str:
    """Zero-shot prompt of a class name: ``"red circle"`` -> ``"a red circle"``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: RGB picture of ``size`` x ``size`` pixels.
        label: index into :data:`CLASS_NAMES`.
        caption: a sentence that always names colour and shape, sometimes size, place and background.
        box: left, top, right, bottom of the shape, as fractions of the image; everything outside is background.
        mask: uint8, index into :data:`MASK_NAMES`; a pixel belongs to the shape that covers half of it.
        depth: SYNTHETIC, uint16 in thousandths. All shapes are taken for objects of one radius (0.3 image widths at a distance
            of 1), flat and facing the camera: half the apparent radius is twice as far. The background is at :data:`WALL`.
    """

    image: Image.Image
    label: int
    caption: str
    box: tuple[float, float, float, float]
    mask: Image.Image
    depth: Image.Image


@dataclass(frozen=True)
class Shapes:
    """One rendered picture of one to :data:`MOST_SHAPES` shapes that do not touch.

    Attributes:
        image: RGB picture of ``size`` x ``size`` pixels.
        categories: index into :data:`SHAPES` of each shape.
        boxes: left, top, width, height of each shape in pixels, as COCO has them.
        instances: uint8, 0 for the background and 1 + number of the shape that covers half of the pixel.
    """

    image: Image.Image
    categories: tuple[int, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    instances: Image.Image


def _generator(split: str, seed: int, *key: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"Unknown scene split {split!r}; expected one of {', '.join(SPLITS)}.")
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(SPLITS.index(split), *key)))


def _background(rng: np.random.Generator, texture: str, base: tuple[int, int, int], size: int) -> Image.Image:
    """Fill a canvas: two tones of ``base`` arranged by ``texture``."""
    colour = np.asarray(base, dtype=np.float32)
    other = np.clip(colour + rng.choice([-1, 1]) * rng.uniform(14, 34), 0, 255)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    period = rng.uniform(10, 24)
    phase = rng.uniform(0, period)
    if texture == "plain":
        mix = np.zeros((size, size), np.float32)
    elif texture == "striped":
        angle = rng.uniform(0, math.pi)
        mix = (((x * math.cos(angle) + y * math.sin(angle) + phase) % period) < period / 2).astype(np.float32)
    elif texture == "checkered":
        mix = ((((x + phase) // period) + ((y + phase) // period)) % 2).astype(np.float32)
    elif texture == "dotted":
        mix = (np.hypot((x + phase) % period - period / 2, (y + phase) % period - period / 2) < period / 4).astype(
            np.float32
        )
    elif texture == "noisy":
        mix = rng.random((size, size), dtype=np.float32)
    else:  # shaded
        angle = rng.uniform(0, 2 * math.pi)
        ramp = x * math.cos(angle) + y * math.sin(angle)
        mix = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    canvas = colour + mix[..., None] * (other - colour)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _polygon(n: int, radii: tuple[float, ...], angle: float, cx: float, cy: float) -> list[tuple[float, float]]:
    points = []
    for i in range(n):
        r, a = radii[i % len(radii)], angle + 2 * math.pi * i / n
        points.append((cx + r * math.cos(a), cy + r * math.sin(a)))
    return points


def _shape_mask(shape: str, r: float, angle: float, cx: float, cy: float, size: int) -> Image.Image:
    """Draw ``shape`` of radius ``r`` around (cx, cy) as an 8-bit mask."""
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring", "crescent"):
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape == "ring":
            inner = 0.55 * r
            draw.ellipse((cx - inner, cy - inner, cx + inner, cy + inner), fill=0)
        elif shape == "crescent":
            dx, dy = 0.55 * r * math.cos(angle), 0.55 * r * math.sin(angle)
            draw.ellipse((cx + dx - r, cy + dy - r, cx + dx + r, cy + dy + r), fill=0)
    elif shape == "square":
        draw.polygon(_polygon(4, (r * 1.1,), math.pi / 4 + 0.25 * math.sin(angle), cx, cy), fill=255)
    elif shape == "diamond":
        draw.polygon([(cx, cy - 1.25 * r), (cx + 0.7 * r, cy), (cx, cy + 1.25 * r), (cx - 0.7 * r, cy)], fill=255)
    elif shape == "triangle":
        draw.polygon(_polygon(3, (r * 1.15,), angle, cx, cy), fill=255)
    elif shape == "star":
        draw.polygon(_polygon(10, (r * 1.2, r * 0.5), angle, cx, cy), fill=255)
    else:  # cross
        tilt = 0.25 * math.sin(angle)
        for a in (tilt, tilt + math.pi / 2):
            c, s, w = math.cos(a), math.sin(a), 0.3 * r
            draw.polygon(
                [
                    (cx + 1.1 * r * c - w * s, cy + 1.1 * r * s + w * c),
                    (cx + 1.1 * r * c + w * s, cy + 1.1 * r * s - w * c),
                    (cx - 1.1 * r * c + w * s, cy - 1.1 * r * s - w * c),
                    (cx - 1.1 * r * c - w * s, cy - 1.1 * r * s + w * c),
                ],
                fill=255,
            )
    return mask


def _caption(rng: np.random.Generator, name: str, large: bool, place: str, texture: str, background: str) -> str:
    subject = f"a {'large' if large else 'small'} {name}" if rng.random() < 0.3 else prompt(name)
    if rng.random() < 0.3:
        subject += f" at the {place}"
    if rng.random() < 0.5:
        subject += f" on a {texture} {background} background"
    return subject


def render(split: str, index: int, *, seed: int = 0, size: int = SIZE) -> Scene:
    """Draw scene ``index`` of ``split``.

    Args:
        split: one of :data:`SPLITS`; their images never coincide.
        index: position within the split, >= 0.
        seed: entropy shared by all splits.
        size: side in pixels.

    Returns:
        The scene; the same arguments always give the same pixels.

    Raises:
        ValueError: ``split`` is not one of :data:`SPLITS`.
    """
    rng = _generator(split, seed, index)
    label = int(rng.integers(len(CLASS_NAMES)))
    colour, shape = CLASS_NAMES[label].split(" ")
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    big = size * _SUPERSAMPLING
    canvas = _background(rng, texture, BACKGROUNDS[background], big)
    radius = rng.uniform(0.13, 0.30) * big
    margin = 1.25 * radius
    cx, cy = rng.uniform(margin, big - margin, size=2)
    fill = Image.new("RGB", (big, big), _tone(rng, COLOURS[colour]))
    mask = _shape_mask(shape, radius, rng.uniform(0, 2 * math.pi), cx, cy, big)
    canvas.paste(fill, mask=mask)
    left, top, right, bottom = (float(v) / big for v in mask.getbbox() or (0, 0, big, big))
    image = canvas.resize((size, size), Image.Resampling.BOX)
    vertical = "top" if cy < big / 2 else "bottom"
    place = f"{vertical} {'left' if cx < big / 2 else 'right'}"
    caption = _caption(rng, CLASS_NAMES[label], radius > 0.215 * big, place, texture, background)
    covered = np.asarray(mask.resize((size, size), Image.Resampling.BOX)) >= 128
    classes = np.where(covered, 1 + SHAPES.index(shape), 0).astype(np.uint8)
    depth = np.where(covered, round(1000 * 0.3 * big / radius), WALL).astype(np.uint16)
    return Scene(image, label, caption, (left, top, right, bottom), Image.fromarray(classes), Image.fromarray(depth))


def render_shapes(split: str, index: int, *, seed: int = 0, size: int = SIZE) -> Shapes:
    """Draw picture ``index`` of ``split`` with several shapes; arguments as for :func:`render`, whose scenes these are not.

    Raises:
        ValueError: ``split`` is not one of :data:`SPLITS`.
    """
    rng = _generator(split, seed, index, MOST_SHAPES)
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    big = size * _SUPERSAMPLING
    canvas = _background(rng, texture, list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))], big)
    places: list[tuple[float, float, float]] = []
    categories, boxes = [], []
    instances = np.zeros((size, size), np.uint8)
    wanted = int(rng.integers(1, MOST_SHAPES + 1))
    for _ in range(_ATTEMPTS):
        radius = rng.uniform(0.1, 0.2) * big
        cx, cy = rng.uniform(1.25 * radius, big - 1.25 * radius, size=2)
        if any(math.hypot(cx - x, cy - y) < 1.25 * (radius + r) for x, y, r in places):
            continue
        category, tone = int(rng.integers(len(SHAPES))), list(COLOURS.values())[rng.integers(len(COLOURS))]
        mask = _shape_mask(SHAPES[category], radius, rng.uniform(0, 2 * math.pi), cx, cy, big)
        canvas.paste(_tone(rng, tone), (0, 0, big, big), mask)
        left, top, right, bottom = (v / _SUPERSAMPLING for v in mask.getbbox() or (0, 0, big, big))
        places.append((cx, cy, radius))
        categories.append(category)
        boxes.append((left, top, right - left, bottom - top))
        instances[np.asarray(mask.resize((size, size), Image.Resampling.BOX)) >= 128] = len(places)
        if len(places) == wanted:
            break
    image = canvas.resize((size, size), Image.Resampling.BOX)
    return Shapes(image, tuple(categories), tuple(boxes), Image.fromarray(instances))


def _tone(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.asarray(colour) * rng.uniform(0.85, 1.1), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def load_dataset(split: str, num_samples: int, *, seed: int = 0, size: int = SIZE) -> Dataset:
    """Render the first ``num_samples`` scenes of a split as a ``datasets.Dataset`` (columns image, label, caption, box, mask,
    depth).

    The class names are zero-shot prompts such as ``"a red circle"``; the other columns are those of :class:`Scene`.
    """
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    scenes = [render(split, i, seed=seed, size=size) for i in range(num_samples)]
    return Dataset.from_dict(
        {
            "image": [s.image for s in scenes],
            "label": [s.label for s in scenes],
            "caption": [s.caption for s in scenes],
            "box": [list(s.box) for s in scenes],
            "mask": [s.mask for s in scenes],
            "depth": [s.depth for s in scenes],
        },
        features=Features(
            {
                "image": ImageFeature(),
                "label": ClassLabel(names=[prompt(n) for n in CLASS_NAMES]),
                "caption": Value("string"),
                "box": List(Value("float32"), length=4),
                "mask": ImageFeature(),
                "depth": ImageFeature(),
            }
        ),
    )


def load_shapes(split: str, num_samples: int, *, seed: int = 0, size: int = SIZE) -> Dataset:
    """Render the first ``num_samples`` pictures of several shapes as a ``datasets.Dataset`` for object detection (columns
    image, objects: {bbox, category}, instances; see :class:`Shapes`)."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    found = [render_shapes(split, i, seed=seed, size=size) for i in range(num_samples)]
    objects = {"bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=list(SHAPES)))}
    return Dataset.from_dict(
        {
            "image": [s.image for s in found],
            "objects": [{"bbox": [list(b) for b in s.boxes], "category": list(s.categories)} for s in found],
            "instances": [s.instances for s in found],
        },
        features=Features({"image": ImageFeature(), "objects": objects, "instances": ImageFeature()}),
    )
