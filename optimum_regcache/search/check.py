"""Whether what a quantized model stores still fits a set of images: register rows, deletion, activation scales.

Registers and deletion are judged in the model's own float network: its stored weights and rewrites, activations not quantized.
A checkpoint alone is enough for that, whatever methods made it. The float original may take its place. Activation scales are
judged in the quantized model as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, num_images
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.door import require_float
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.float_activations import float_activations
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.methods.base import Method
from optimum_regcache.methods.registry import METHODS
from optimum_regcache.registers import RegisterCache, get_register_cache, prepare_tower, set_deletion, set_registers
from optimum_regcache.search.clipping import Clipping, measure_clipping
from optimum_regcache.search.traces import OUTLIER_RATIO, RowCosine, Trace, compare_rows, trace_tokens

FITS, PARTLY, UNFIT = "fits", "fits partly", "does not fit"
VERDICTS = (FITS, PARTLY, UNFIT)  # the later the worse

# limits: (fits, fits partly); beyond the second it does not fit
COSINE_SHARE = (0.9, 0.7)  # at least; cosine to the stored rows over the attainable one
RECALL = (0.9, 0.7)  # at least; share of the outlier tokens that the deletion takes
IMAGES_LEFT = (0.05, 0.25)  # at most; share of images that keep an outlier token with all that is installed
CLIPPED = (0.001, 0.01)  # at most; share of values outside the range, mean over the static scales
CLIPPED_ON_PURPOSE = (0.02, 0.05)  # the same where observer or method leave values outside on the images of the fit too
WORST = 10.0  # one scale may clip this many times what the mean may
MIN_OUTLIERS = (
    8  # with fewer images with outlier tokens registers are not judged, with fewer such tokens a deletion is not
)

ADVICE = {
    FITS: "Nothing to do.",
    PARTLY: "Compare with the float original (optimum-cli regcache evaluate); if too much is lost, fit again on images of this "
    "kind: optimum-cli regcache quantize --model FLOAT_MODEL --dataset IMAGES --output NEW_MODEL",
    UNFIT: "Fit again on images of this kind: optimum-cli regcache quantize --model FLOAT_MODEL --dataset IMAGES --output "
    "NEW_MODEL",
}


@dataclass(frozen=True)
class TokenState:
    """Patch tokens behind the judged block, under one choice of what is installed.

    Attributes:
        largest: largest l_inf norm.
        ratio: largest token over median token of an image, median over images.
        per_image: outlier tokens of an image, mean.
        images: share of images with at least one.
    """

    largest: float
    ratio: float
    per_image: float
    images: float

    @classmethod
    def of(cls, trace: Trace, block: int) -> TokenState:
        """Behind ``block``."""
        counts = trace.counts(block).float()
        ratio = float(trace.largest_ratio(block).median())
        return cls(trace.largest(block), ratio, float(counts.mean()), float((counts > 0).float().mean()))


@dataclass(frozen=True)
class DeletionCheck:
    """What the deletion takes, with the registers installed.

    Attributes:
        count: k~.
        outliers: outlier tokens behind the delete block if nothing is deleted.
        recall: share of them that is deleted; None without any.
        images_over: share of images with more of them than ``count``.
    """

    count: int
    outliers: int
    recall: float | None
    images_over: float


@dataclass(frozen=True)
class FitCheck:
    """Result of :func:`check_fit`.

    Attributes:
        images: number of images.
        block: block behind which outlier tokens are counted: that of the deletion; without one, of those with registers and
            behind, where tokens stick out most. None for a model without registers and deletion.
        float_model: whether the float original took the place of the model's own float network.
        nothing, registers, installed: without registers and deletion, with the registers, with both; None where that is not
            installed.
        rows: register rows beside the images' outlier tokens; None without registers, or with fewer than two such images.
        deletion: None without one.
        clipping: None where no activation scale is static.
        on_purpose: whether the scales were chosen to leave values outside on the images of the fit too.
        notes: what was not judged, and why.
    """

    images: int
    block: int | None
    float_model: bool
    nothing: TokenState | None = None
    registers: TokenState | None = None
    installed: TokenState | None = None
    rows: RowCosine | None = None
    deletion: DeletionCheck | None = None
    clipping: Clipping | None = None
    on_purpose: bool = False
    notes: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, str]:
        """Verdict of each part that was judged."""
        found: dict[str, str] = {}
        if self.rows is not None and self.rows.images >= MIN_OUTLIERS:
            found["registers"] = _at_least(self.rows.share, COSINE_SHARE)
        if self.deletion is not None and self.deletion.recall is not None and self.deletion.outliers >= MIN_OUTLIERS:
            found["deletion"] = _at_least(self.deletion.recall, RECALL)
        if self.installed is not None:
            found["outliers left"] = _at_most(self.installed.images, IMAGES_LEFT)
        if self.clipping is not None:
            share = max(self.clipping.mean, self.clipping.shares[self.clipping.worst] / WORST)
            found["activation scales"] = _at_most(share, self.clipped_limits)
        return found

    @property
    def clipped_limits(self) -> tuple[float, float]:
        """:data:`CLIPPED` or :data:`CLIPPED_ON_PURPOSE`."""
        return CLIPPED_ON_PURPOSE if self.on_purpose else CLIPPED

    @property
    def verdict(self) -> str | None:
        """The worst of :meth:`parts`, one of :data:`VERDICTS`; None if nothing could be judged."""
        return max(self.parts().values(), key=VERDICTS.index, default=None)

    @property
    def advice(self) -> str | None:
        """One line: what to do; None if nothing could be judged."""
        return ADVICE.get(self.verdict or "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible, with the limits."""
        result = asdict(self)
        result["clipping"] = None if self.clipping is None else self.clipping.to_dict()
        if self.rows is not None:
            result["rows"] |= {"cosine": self.rows.cosine, "share": self.rows.share}
        limits = {"outlier_ratio": OUTLIER_RATIO, "cosine_share": COSINE_SHARE, "recall": RECALL}
        limits |= {
            "images_left": IMAGES_LEFT,
            "clipped": self.clipped_limits,
            "worst": WORST,
            "min_outliers": MIN_OUTLIERS,
        }
        return {"verdict": self.verdict, "advice": self.advice, "parts": self.parts(), **result, "limits": limits}


def _at_least(value: float, limits: tuple[float, float]) -> str:
    return FITS if value >= limits[0] else PARTLY if value >= limits[1] else UNFIT


def _at_most(value: float, limits: tuple[float, float]) -> str:
    return FITS if value <= limits[0] else PARTLY if value <= limits[1] else UNFIT


@contextmanager
def _installed(model: nn.Module, cache: RegisterCache | None, deletion: DeletionConfig) -> Iterator[None]:
    """Other registers and another deletion inside the ``with`` block; what was there comes back as it was."""
    runtime, tower = prepare_tower(model), find_tower(model)
    modules: list[Any] = [tower.attention(index) for index in range(len(tower.blocks))]
    before = [(m.register_key, m.register_value) for m in modules], runtime.num_copies, runtime.deletion
    try:
        set_registers(model, cache)
        set_deletion(model, deletion)
        yield
    finally:
        rows, runtime.num_copies, deletion = before
        set_deletion(model, deletion)
        for module, (key, value) in zip(modules, rows, strict=True):
            module.register_key, module.register_value = key, value


def require_quantized(model: Any) -> None:
    """Make sure that a model is quantized by this package.

    Raises:
        TypeError: no PyTorch model.
        ValueError: a float model, or one that holds no supported encoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"A model is needed, got {type(model).__name__}. Pass the quantized model that was opened.")
    find_tower(model)
    if not any(True for _ in quant_linears(model)) and not any(True for _ in attention_products(model)):
        raise ValueError(
            f"This {type(model).__name__} is a float model: nothing is stored in it that could fit images or not. Give a model "
            "that optimum-regcache quantized; for a float model there is analyze --model."
        )


def _require_original(model: Any, float_model: Any) -> None:
    """Make sure that register rows of ``model`` can be compared with keys and values of ``float_model``."""
    require_float(float_model)
    changed = [method.name for method in _methods(model) if not method.cache_effect.startswith("none")]
    require(
        not changed,
        f"The registers of this model were rewritten ({', '.join(changed)}): keys and values of the float original are others. "
        "Leave the float model out; the quantized model is enough.",
    )


def _methods(model: Any) -> list[type[Method]]:
    """What a quantized model was made with, as its config says."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return [METHODS[entry["name"]] for entry in getattr(config, "methods", ()) if entry["name"] in METHODS]


def _clips_on_purpose(model: Any) -> bool:
    """Whether the static scales cover less than all values that they were made on."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    observer = getattr(getattr(config, "activations", None), "observer", "minmax")
    chosen = any(m.provides == "input scales" and m.name not in ("rtn", "oracle") for m in _methods(model))
    return chosen or observer not in ("minmax", "moving_average")


def check_fit(
    model: nn.Module,
    batches: Sequence[Batch],
    float_model: nn.Module | None = None,
    *,
    score_site: str = "block_input",
) -> FitCheck:
    """Measure whether the registers, the deletion and the activation scales of a quantized model fit these images.

    Four passes over the images; the model is left as it was.

    Args:
        model: quantized by this package.
        batches: images, float [B, 3, H, W] as ``pixel_values``.
        float_model: the float original, to look for outlier tokens in; default: the model's own float network, its stored
            weights with activations that are not quantized.
        score_site: where the registers were mined, `SearchConfig.score_site`.

    Raises:
        TypeError: ``model`` is no PyTorch model.
        ValueError: it is a float model, ``float_model`` is not or has other keys and values than the stored rows are made of,
            no images, or values that are no numbers.
    """
    require_quantized(model)
    require(len(batches) > 0, "No images to check the model with.")
    require(score_site in ("block_input", "fc2_input"), f"Unknown score_site {score_site!r}.")
    if float_model is not None:
        _require_original(model, float_model)
    cache, deletion = get_register_cache(model), prepare_tower(model).deletion
    network = model if float_model is None else float_model
    notes: list[str] = []
    found: dict[str, Any] = {"images": 0, "block": None}
    if cache is not None or deletion.active:
        with float_activations(network):
            found |= _check_tokens(network, batches, cache, deletion, score_site)
        notes += _too_few(cache, found["rows"])
    else:
        notes.append("this model has no registers and deletes nothing: only its activation scales are judged")
    clipping = measure_clipping(model, batches)
    if clipping is None:
        notes.append("no activation scale is stored (dynamic, or one for each outlier token): nothing to be clipped")
    elif clipping.unbounded:
        notes.append(f"{clipping.unbounded} scales clip nothing: a token beyond them gets one of its own")
    found["images"] = sum(num_images(batch) for batch in batches)
    given, on_purpose = float_model is not None, _clips_on_purpose(model)
    return FitCheck(**found, float_model=given, clipping=clipping, on_purpose=on_purpose, notes=notes)


def _too_few(cache: RegisterCache | None, rows: RowCosine | None) -> list[str]:
    """A note where the registers cannot be judged."""
    images = 0 if rows is None else rows.images
    if cache is None or images >= MIN_OUTLIERS:
        return []
    return [
        f"{images} images have an outlier token (more than {OUTLIER_RATIO:g}x the median of the image): too few to judge the "
        f"registers by ({MIN_OUTLIERS} are needed); images without them need no registers"
    ]


def _check_tokens(
    network: nn.Module, batches: Sequence[Batch], cache: RegisterCache | None, deletion: DeletionConfig, score_site: str
) -> dict[str, Any]:
    """Fields of a `FitCheck` that are about tokens."""
    depth = len(find_tower(network).blocks)
    first = min(cache.blocks) if cache else 0
    blocks = (deletion.block or 0,) if deletion.active else tuple(range(first, depth))
    found: dict[str, Any] = {"rows": None}
    with _installed(network, None, DeletionConfig()):
        if cache is None:
            bare = trace_tokens(network, batches)
        else:
            bare, found["rows"] = compare_rows(network, batches, cache, blocks, score_site)
    block = found["block"] = max(blocks, key=lambda b: float(bare.largest_ratio(b).median()))
    found["nothing"] = TokenState.of(bare, block)
    kept = bare
    if cache is not None:
        with _installed(network, cache, DeletionConfig()):
            kept = trace_tokens(network, batches)
        found["registers"] = found["installed"] = TokenState.of(kept, block)
    if deletion.active:
        with _installed(network, cache, deletion):
            both = trace_tokens(network, batches)
        found["installed"] = TokenState.of(both, block)
        found["deletion"] = _deletion(kept.outliers(block), both.dropped, deletion.count)
    return found


def _deletion(outliers: list[torch.Tensor], dropped: list[torch.Tensor], count: int) -> DeletionCheck:
    """From bool [B, patches] of each batch."""
    number = sum(int(o.sum()) for o in outliers)
    taken = sum(int((o & d).sum()) for o, d in zip(outliers, dropped, strict=True))
    over = torch.cat([o.sum(1) > count for o in outliers]).float().mean()
    return DeletionCheck(count, number, taken / number if number else None, float(over))
