"""Observers: statistics of a static activation in, (scale, zero_point) out. All are per tensor.

Shape contract: ``update`` takes any float tensor and never keeps it; ``qparams`` returns two 0-dim tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from optimum_regcache.config import ActivationsConfig, AttentionConfig
from optimum_regcache.encoders.tower import PatchSpan
from optimum_regcache.math import uniform
from optimum_regcache.math.nonuniform import focus_ends, focused_unit, quantize_probabilities

_BINS = 16384
_SHRINK_STEPS = 100


class Observer(ABC):
    """Accumulates statistics of one activation site over calibration batches."""

    def __init__(self, config: ActivationsConfig) -> None:
        self.config = config

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Take one batch of activations, any shape."""

    @abstractmethod
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen ends (low, high), 0-dim float32.

        Raises:
            ValueError: nothing was observed yet.
        """

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(scale float32 [], zero_point int32 [])`` for the configured bits and symmetry."""
        low, high = self.range()
        return uniform.choose_qparams(low, high, self.config.bits, self.config.symmetric)


def _nothing_observed() -> ValueError:
    return ValueError("The observer has seen no activation. Run at least one calibration batch through the model.")


def _not_finite() -> ValueError:
    return ValueError("An activation is not finite; the model or its input is damaged.")


class MinMaxObserver(Observer):
    """Running minimum and maximum (docs/method.md 11.1). Independent of batch order."""

    def __init__(self, config: ActivationsConfig) -> None:
        super().__init__(config)
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        low, high = x.amin().float(), x.amax().float()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._low is None or self._high is None:
            raise _nothing_observed()
        return self._low, self._high


class MovingAverageObserver(MinMaxObserver):
    """Exponential moving average of each batch's minimum and maximum; depends on batch order and size."""

    def update(self, x: torch.Tensor) -> None:
        low, high, past = x.amin().float(), x.amax().float(), self.config.momentum
        self._low = low if self._low is None else past * self._low + (1 - past) * low
        self._high = high if self._high is None else past * self._high + (1 - past) * high


class _HistogramObserver(Observer):
    """Histogram over [-R, R] with R a power of two that doubles on demand, so batch order cannot change the result."""

    def __init__(self, config: ActivationsConfig) -> None:
        super().__init__(config)
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._radius = 0.0  # 0 until the first value that is not zero
        self._zeros = 0

    def update(self, x: torch.Tensor) -> None:
        x = x.detach().float().flatten()
        peak = float(x.abs().amax())
        if not math.isfinite(peak):
            raise _not_finite()
        if peak == 0.0 and self._radius == 0.0:
            self._zeros += x.numel()
            return
        needed = 2.0 ** math.frexp(peak)[1] if peak else self._radius
        if self._radius == 0.0:
            self._radius = needed
            self._counts[_BINS // 2] += self._zeros
        while self._radius < needed:  # merge pairs of bins around the centre
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[_BINS // 4 : 3 * _BINS // 4] = merged
            self._radius *= 2
        # the bin width is a power of two, so this division is exact
        bins = torch.floor(x * (_BINS / (2 * self._radius))).long() + _BINS // 2
        self._counts += torch.bincount(bins.cpu(), minlength=_BINS)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._radius == 0.0:
            if self._zeros == 0:
                raise _nothing_observed()
            return torch.tensor(0.0), torch.tensor(0.0)
        return self._histogram_range()

    @abstractmethod
    def _histogram_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends from a histogram that holds values."""

    def _centres(self) -> torch.Tensor:
        width = 2 * self._radius / _BINS
        return -self._radius + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)

    def _quantiles(self, keep: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends that keep this share of the values, to a bin's outer edge; of |x| if symmetric, else on each side."""
        centres, half = self._centres(), self._radius / _BINS
        if self.config.symmetric:
            folded = self._counts[: _BINS // 2].flip(0) + self._counts[_BINS // 2 :]
            index = _quantile_bin(folded, keep)
            edge = (centres[_BINS // 2 + index] + half).float()
            return -edge, edge
        high = (centres[_quantile_bin(self._counts, keep)] + half).float()
        low = (centres[_BINS - 1 - _quantile_bin(self._counts.flip(0), keep)] - half).float()
        return low, high

    def _occupied(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest observed value, to a bin's outer edge."""
        centres, half = self._centres(), self._radius / _BINS
        seen = centres[self._counts > 0]
        return (seen[0] - half).float(), (seen[-1] + half).float()


class PercentileObserver(_HistogramObserver):
    """Range that leaves ``100 - percentile`` percent of the values outside (docs/method.md 11.1).

    Symmetric: percentile of |x|; otherwise that share is cut from each tail separately.
    """

    def _histogram_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._quantiles(self.config.percentile / 100)


def _quantile_bin(counts: torch.Tensor, keep: float) -> int:
    cumulative = counts.cumsum(0)
    return int(torch.searchsorted(cumulative, keep * cumulative[-1]).clamp(max=len(counts) - 1))


class MSEObserver(_HistogramObserver):
    """Range that minimises the squared quantization error over 100 shrink factors of the full range (docs/method.md 11.1)."""

    def _histogram_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        centres = self._centres().float()
        low, high = self._occupied()
        used = self._counts > 0
        values, weights = centres[used], self._counts[used].float()
        factors = torch.arange(1, _SHRINK_STEPS + 1) / _SHRINK_STEPS
        scale, zero = uniform.choose_qparams(low * factors, high * factors, self.config.bits, self.config.symmetric)
        rebuilt = uniform.fake_quantize(values, scale[:, None], zero[:, None], self.config.bits, self.config.symmetric)
        best = int(((rebuilt - values).pow(2) * weights).sum(1).argmin())
        return low * factors[best], high * factors[best]


class PercentileMSEObserver(_HistogramObserver):
    """The range of least squared error among a few percentiles, to a bin's width (docs/method.md 11.5)."""

    def _histogram_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        used = self._counts > 0
        values, weights = self._centres().float()[used], self._counts[used].float()
        best, best_error = self._occupied(), math.inf
        for keep in uniform.PERCENTILES:
            low, high = self._quantiles(keep)
            scale, zero = uniform.choose_qparams(low, high, self.config.bits, self.config.symmetric)
            rebuilt = uniform.fake_quantize(values, scale, zero, self.config.bits, self.config.symmetric)
            error = float(((rebuilt - values).pow(2) * weights).sum())
            if error < best_error:
                best, best_error = (low, high), error
        return best


OBSERVERS: dict[str, Callable[[ActivationsConfig], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "percentile_mse": PercentileMSEObserver,
}


class ProbabilityObserver:
    """Parameter of a probability quantizer from a sample of the probabilities.

    ``uniform``: the upper end by ``config.observer``; ``log2``, ``log_sqrt2``: the scale among a few upper percentiles with
    the smallest squared error (docs/method.md 11.5); ``twin``: the split 2^-i, i = 0 .. 19, with the smallest squared error
    (docs/method.md 11.4; the method searches it again by the error of AV).
    """

    LIMIT = 2**20

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self._values: list[torch.Tensor] = []
        self._observer = make_observer(ActivationsConfig(bits=config.bits, symmetric=False, observer=config.observer))

    def update(self, x: torch.Tensor) -> None:
        """Take one batch of probabilities; every k-th value is kept for the error."""
        if self.config.probabilities == "uniform":
            self._observer.update(x)
        flat = x.detach().float().flatten()
        self._values.append(flat[:: max(1, 8 * flat.numel() // self.LIMIT)].cpu())

    def qparams(self) -> tuple[torch.Tensor, None]:
        """(scale or split, 0-dim float32; no zero point).

        Raises:
            ValueError: nothing was observed.
        """
        if not self._values:
            raise _nothing_observed()
        form, values = self.config.probabilities, torch.cat(self._values)
        if form == "uniform":
            return self._observer.range()[1].clamp(min=1e-6), None
        if form == "twin":
            candidates = torch.exp2(-torch.arange(20.0))
        else:
            ordered = values.sort().values
            places = [min(int(p * len(ordered)), len(ordered) - 1) for p in uniform.PERCENTILES]
            candidates = ordered[places].clamp(min=1e-6)
        errors = [
            (quantize_probabilities(values, c, self.config.bits, form) - values).pow(2).mean() for c in candidates
        ]
        return candidates[int(torch.stack(errors).argmin())], None


def _shares(valid: torch.Tensor) -> torch.Tensor:
    """Weights [B, N] of the tokens that are valid, of sum 1 in each row; 0 where there is none."""
    return valid.float() / valid.sum(1, keepdim=True).clamp(min=1)


class FocusObserver:
    """Interval [0, b2] of `dfq` probabilities with the least squared error of the product AV (docs/method.md 11.14).

    b2 is one of `focus_ends`; the first 16 images decide. The tokens that are no patches, which carry the output, count
    together as much as all patches.

    Args:
        config: bits.
        patches: which tokens are patches.
    """

    IMAGES = 16

    def __init__(self, config: AttentionConfig, patches: PatchSpan) -> None:
        self.config, self.patches, self._images = config, patches, 0
        self._ends = focus_ends()
        self._errors = torch.zeros(len(self._ends), dtype=torch.float64)

    def update(self, probabilities: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> None:
        """Take one batch.

        Args:
            probabilities: A [B, H, N, N], columns of image tokens only.
            values: V [B, H, N, d].
            valid: bool [B, N], false at queries that are padding.
        """
        count = min(len(values), self.IMAGES - self._images)
        if count <= 0:
            return
        self._images += count
        a, v = probabilities[:count].float(), values[:count].float()
        patches = self.patches.mask(valid.shape[1], valid.device)
        weights = _shares(valid[:count] & patches) + _shares(valid[:count] & ~patches)
        for place, end in enumerate(self._ends):
            error = (focused_unit(a, 0.0, end, self.config.bits) - a) @ v
            self._errors[place] += float((error.pow(2).sum((1, 3)) * weights).sum(dtype=torch.float64))

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(b2, b1), 0-dim float32.

        Raises:
            ValueError: nothing was observed, or an activation that is not finite.
        """
        if not self._images:
            raise _nothing_observed()
        if not bool(self._errors.isfinite().all()):
            raise _not_finite()
        return self._ends[int(self._errors.argmin())], torch.zeros(())


def make_observer(config: ActivationsConfig) -> Observer:
    """The observer named by ``config.observer``."""
    return OBSERVERS[config.observer](config)
