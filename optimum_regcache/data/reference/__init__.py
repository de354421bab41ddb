"""Encoders that come with the package, so that everything runs without the Hub.

The project trained them on its own procedural scenes (``scripts/train_reference.py``; see their model cards):

- ``clip-scenes-induced``, the default, and ``siglip-scenes-induced``: outlier tokens were INDUCED by training.
- ``clip-scenes``: the same CLIP before that, without outlier tokens: the control, where nothing is to be repaired.

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

DEFAULT = "clip-scenes-induced"


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


def directory(name: str) -> Path:
    """Where a trained encoder is saved, with its model card."""
    return Path(__file__).parent / name


def _trained(name: str, note: str) -> Callable[[torch.dtype], Reference]:
    """An encoder saved beside this file."""

    def build(dtype: torch.dtype) -> Reference:
        from transformers import AutoModel, AutoProcessor

        from optimum_regcache.data import scenes

        path = directory(name)
        return Reference(
            name=name,
            model=AutoModel.from_pretrained(path, dtype=dtype).eval(),
            processor=AutoProcessor.from_pretrained(path),
            dataset=lambda split, count, seed: scenes.load_dataset(split, count, seed=seed),
            template="{}",
            note=f"{name}: {note}",
        )

    return build


def _planted(dtype: torch.dtype) -> Reference:
    from optimum_regcache.data.reference import planted

    model: Any = planted.build_planted_model()
    return Reference(
        name="planted-outlier",
        model=model.to(dtype),
        processor=planted.build_processor(),
        dataset=planted.load_dataset,
        template="{}",
        note="planted-outlier: SYNTHETIC model, its outlier tokens are planted by construction",
    )


_INDUCED = "trained on procedural scenes; its outlier tokens were INDUCED by training, they are not natural"

_REFERENCES: dict[str, Callable[[torch.dtype], Reference]] = {
    "clip-scenes-induced": _trained("clip-scenes-induced", _INDUCED),
    "siglip-scenes-induced": _trained("siglip-scenes-induced", _INDUCED),
    "clip-scenes": _trained("clip-scenes", "trained on procedural scenes, no outlier tokens induced or planted"),
    "planted-outlier": _planted,
}


def names() -> tuple[str, ...]:
    """Names that :func:`load` accepts."""
    return tuple(_REFERENCES)


def name_of(path: str) -> str | None:
    """The name of the encoder that was opened from ``path``; None for any other model."""
    return next((name for name in names() if Path(path).resolve() == directory(name).resolve()), None)


def load(name: str = DEFAULT, *, dtype: torch.dtype = torch.float32) -> Reference:
    """Open a reference encoder.

    Raises:
        ValueError: unknown name.
    """
    if name not in _REFERENCES:
        raise ValueError(f"Unknown reference encoder {name!r}; available: {', '.join(_REFERENCES)}.")
    return _REFERENCES[name](dtype)
