"""Frozen patch tokens judged pixel by pixel: linear heads for classes and depth, and their figures (docs/method.md 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from optimum_regcache.config.validation import require
from optimum_regcache.evaluation.probes import LinearProbe, RidgeProbe, need_scikit_learn

DELTA = 1.25  # of Eigen et al., arXiv 1406.2283


@dataclass(frozen=True)
class PatchGrid:
    """How the patches lie in a picture [3, H, W]; pixels that fill no whole patch are left out.

    Attributes:
        rows, columns: patches.
        height, width: pixels of a patch.
    """

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, size: Sequence[int], patch: tuple[int, int]) -> PatchGrid:
        """Of a picture of ``size`` (H, W)."""
        return cls(size[0] // patch[0], size[1] // patch[1], *patch)

    @property
    def places(self) -> int:
        """Number of patches."""
        return self.rows * self.columns

    def covered(self, target: torch.Tensor) -> torch.Tensor:
        """The pixels of [H, W] that patches cover."""
        return target[: self.rows * self.height, : self.columns * self.width]

    def patches(self, target: torch.Tensor) -> torch.Tensor:
        """[H, W] as [places, pixels of a patch]."""
        tiles = self.covered(target).reshape(self.rows, self.height, self.columns, self.width)
        return tiles.transpose(1, 2).reshape(self.places, -1)

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens of an image [places, D]; several states or feature maps, which follow one another in ``rows``, side by side.

        Raises:
            ValueError: ``rows`` are no multiple of the patches.
        """
        require(
            len(rows) > 0 and len(rows) % self.places == 0,
            f"The model gives {len(rows)} patch tokens for {self.rows} x {self.columns} patches: their places are not known. "
            "Dense tasks are for models with a token for each patch.",
        )
        return rows.unflatten(0, (-1, self.places)).transpose(0, 1).flatten(1)

    def upsample(self, values: torch.Tensor) -> torch.Tensor:
        """[places, C] as [C, H, W] of the covered pixels, bilinear."""
        grid = values.T.reshape(1, -1, self.rows, self.columns)
        return F.interpolate(grid, (self.rows * self.height, self.columns * self.width), mode="bilinear")[0]


def class_shares(mask: torch.Tensor, count: int, grid: PatchGrid) -> torch.Tensor:
    """float64 [places, count]: the share of a patch's pixels that each class of ``mask`` has (int [H, W]; -1 is none)."""
    patches = grid.patches(mask)
    return torch.stack([(patches == number).double().mean(1) for number in range(count)], 1)


class SegmentationProbe:
    """Logistic regression of the class of a pixel on the standardised token of its patch; the scores are upsampled.

    Args:
        tokens: float [m, D] of the training patches.
        shares: float64 [m, classes], as `class_shares` gives them; each patch counts for its classes by them.

    Raises:
        ValueError: tokens that are no numbers, or one class only.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, tokens: torch.Tensor, shares: torch.Tensor) -> None:
        places, classes = shares.nonzero(as_tuple=True)
        self._probe = LinearProbe(tokens[places], classes, shares[places, classes], "patches")

    def predictions(self, tokens: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
        """Classes of the covered pixels, int64 [H, W], of the tokens [places, D]; -1 where one nearby is no number."""
        scores = grid.upsample(self._probe.scores(tokens))
        return self._probe.classes[scores.argmax(0)].masked_fill(scores.isnan().any(0), -1)


def confusion(mask: torch.Tensor, predictions: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [count + 1, count + 1], pixels of a class (row) that are predicted as one (column); the last one is none.

    Args:
        mask, predictions: int [H, W]; pixels of -1 in ``mask`` are left out.
        count: of classes.
    """
    valid = mask >= 0
    if not valid.any():
        return torch.zeros(count + 1, count + 1, dtype=torch.int64)
    found = predictions[valid]
    pairs = mask[valid].numpy(), found.masked_fill(found < 0, count).numpy()
    matrix = need_scikit_learn(".metrics").confusion_matrix(*pairs, labels=list(range(count + 1)))
    return torch.from_numpy(matrix)


def mean_iou(matrix: torch.Tensor) -> float:
    """Mean over the classes that occur of intersection / union, of a matrix of `confusion`."""
    hits, truth = matrix.diagonal().double(), matrix.sum(1)
    return float((hits / (truth + matrix.sum(0) - hits))[truth > 0].mean())


def pixel_accuracy(matrix: torch.Tensor) -> float:
    """Share of pixels that are predicted right, of a matrix of `confusion`."""
    return float(matrix.diagonal().sum() / matrix.sum())


def influences(parts: torch.Tensor, figure: Callable[[torch.Tensor], float]) -> torch.Tensor:
    """float64 [n] whose mean is ``figure`` of the sum of ``parts`` [n, ...], and whose standard error is that of the jackknife.

    Entry i is ``figure(all) + (n - 1) (mean over j of figure(all but j) - figure(all but i))``.
    """
    total, n = parts.sum(0), len(parts)
    if n == 1:
        return torch.tensor([figure(total)], dtype=torch.float64)
    without = torch.tensor([figure(total - part) for part in parts], dtype=torch.float64)
    return figure(total) + (n - 1) * (without.mean() - without)


class DepthProbe:
    """Ridge regression of the log depth of a patch, the mean over its measured pixels, on its standardised token.

    Args:
        tokens: float [m, D] of the training patches.
        depths: float [m, pixels of a patch], nan where nothing was measured; a patch counts by the share of those that are.

    Raises:
        ValueError: tokens that are no numbers, or no depth at all.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, tokens: torch.Tensor, depths: torch.Tensor) -> None:
        logs = depths.double().log()
        shares = logs.isfinite().double().mean(1)
        used = shares > 0
        require(bool(used.any()), "No training image has a depth. Depths are numbers above 0; see --depth-column.")
        self._probe = RidgeProbe(tokens[used], logs[used].nanmean(1), shares[used])

    def predictions(self, tokens: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
        """Depths of the covered pixels, float64 [H, W], of the tokens [places, D]; the log depth is upsampled."""
        return grid.upsample(self._probe.predictions(tokens)[:, None])[0].exp()


def depth_errors(depth: torch.Tensor, predictions: torch.Tensor) -> dict[str, float]:
    """RMSE, mean of |prediction - depth| / depth (AbsRel), and the share of pixels with max(ratio, 1 / ratio) < 1.25.

    Args:
        depth, predictions: float [H, W]; pixels of nan in ``depth`` are left out, one at least must be left.

    Raises:
        ValueError: predictions that are no numbers.
    """
    metrics = need_scikit_learn(".metrics")
    known = depth.isfinite()
    truth, found = depth[known].double(), predictions[known].double()
    require(
        bool(found.isfinite().all()),
        "The model gives no numbers for patch tokens of a report image, and so no depth. Open the model in float32.",
    )
    ratio = torch.maximum(truth / found, found / truth)
    return {
        "RMSE": float(metrics.root_mean_squared_error(truth.numpy(), found.numpy())),
        "AbsRel": float(metrics.mean_absolute_percentage_error(truth.numpy(), found.numpy())),
        "delta1": float((ratio < DELTA).double().mean()),
    }
