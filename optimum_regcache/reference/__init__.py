"""Encoders that come with the package, so that everything runs without the Hub.

``clip-scenes`` is a small CLIP that the project trained on its own procedural scenes (see its model card).
``planted-outlier`` is a synthetic encoder with a planted outlier of known place: a test object, not a trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

DEFAULT = "clip-scenes"


@dataclass(frozen=True)
class Reference:
    """A reference encoder with its data.

    Attributes:
        name: name in :func:`names`.
        model: float model in evaluation mode.
        processor: processor with tokenizer, or image processor.
        dataset: (split, num_samples, seed) -> images; splits ``search`` and ``report`` are disjoint.
        template: zero-shot prompt template for its class names.
        note: one line on what it is, printed beside results.
    """

    name: str
    model: PreTrainedModel
    processor: Any
    dataset: Callable[[str, int, int], Dataset]
    template: str
    note: str


def _clip_scenes(dtype: torch.dtype) -> Reference:
    from transformers import CLIPModel, CLIPProcessor

    from optimum_regcache import scenes

    path = Path(__file__).parent / "clip-scenes"
    return Reference(
        name="clip-scenes",
        model=CLIPModel.from_pretrained(path, dtype=dtype).eval(),
        processor=CLIPProcessor.from_pretrained(path),
        dataset=lambda split, count, seed: scenes.load_dataset(split, count, seed=seed),
        template="{}",
        note="clip-scenes: trained on procedural scenes, no outlier tokens induced or planted",
    )


def _planted(dtype: torch.dtype) -> Reference:
    from optimum_regcache.reference import planted

    model: Any = planted.build_planted_model()
    return Reference(
        name="planted-outlier",
        model=model.to(dtype),
        processor=planted.build_processor(),
        dataset=planted.load_dataset,
        template="{}",
        note="planted-outlier: SYNTHETIC model, its outlier tokens are planted by construction",
    )


_REFERENCES: dict[str, Callable[[torch.dtype], Reference]] = {
    "clip-scenes": _clip_scenes,
    "planted-outlier": _planted,
}


def names() -> tuple[str, ...]:
    """Names that :func:`load` accepts."""
    return tuple(_REFERENCES)


def load(name: str = DEFAULT, *, dtype: torch.dtype = torch.float32) -> Reference:
    """Open a reference encoder.

    Raises:
        ValueError: unknown name.
    """
    if name not in _REFERENCES:
        raise ValueError(f"Unknown reference encoder {name!r}; available: {', '.join(_REFERENCES)}.")
    return _REFERENCES[name](dtype)
