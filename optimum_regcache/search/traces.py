"""Outlier tokens behind every block, and how their keys and values compare with stored register rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.parts import CALIBRATION_OUTLIER_RATIO
from optimum_regcache.encoders.passes import Batch, PaddingMask, run_tower
from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.encoders.visiting import patch_span
from optimum_regcache.registers import RegisterCache
from optimum_regcache.registers.mlp_output import own_scale_tokens
from optimum_regcache.search.mining import TokenRecorder

MAX_COMPARED = 512  # images whose rows are compared, rounded up to whole batches
# a token of more than this many times the median l_inf norm of its image is an outlier
OUTLIER_RATIO = CALIBRATION_OUTLIER_RATIO


@dataclass
class Trace:
    """Patch tokens behind every block, batch by batch; CLS, trained registers, padding and deleted tokens are left out.

    Attributes:
        norms: block -> float [B, patches] of each batch, l_inf norm of the block's output, nan where there is no token.
        dropped: bool [B, patches] of each batch, what the deletion took; empty without one.
    """

    norms: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    dropped: list[torch.Tensor] = field(default_factory=list)

    def ratios(self, block: int) -> list[torch.Tensor]:
        """Norm over the median of the image, [B, patches] of each batch, nan where there is no token."""
        return [_ratios(norms) for norms in self.norms[block]]

    def outliers(self, block: int) -> list[torch.Tensor]:
        """bool [B, patches] of each batch: tokens of more than :data:`OUTLIER_RATIO` times the median."""
        return [_outliers(norms) for norms in self.norms[block]]

    def largest_ratio(self, block: int) -> torch.Tensor:
        """Largest token over median of each image, float [images]."""
        return torch.cat([ratios.nan_to_num(0.0).amax(1) for ratios in self.ratios(block)])

    def counts(self, block: int) -> torch.Tensor:
        """Outlier tokens of each image, int64 [images]."""
        return torch.cat([outliers.sum(1) for outliers in self.outliers(block)])

    def largest(self, block: int) -> float:
        """Largest norm of all."""
        return max(float(norms.nan_to_num(0.0).amax()) for norms in self.norms[block])


def require_numbers(values: torch.Tensor, place: str) -> None:
    """Raise ``ValueError`` if the float tensor ``values``, which ``place`` computed, holds nan or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"On these images {place} computes values that are no numbers. Look for pixels that are none, or open the model in "
            "float32."
        )


def _ratios(norms: torch.Tensor) -> torch.Tensor:
    return norms / norms.nanmedian(1, keepdim=True).values


def _outliers(norms: torch.Tensor) -> torch.Tensor:
    return _ratios(norms) > OUTLIER_RATIO


class _Watcher:
    """Hooks that fill a `Trace`; in a rotated residual stream states are turned back, where outliers stand out."""

    def __init__(self, tower: Tower, padding: PaddingMask) -> None:
        self.tower, self.padding, self.trace = tower, padding, Trace()
        self.spans, self.last = [patch_span(tower, b) for b in range(len(tower.blocks))], len(tower.blocks) - 1
        self.inputs: dict[int, torch.Tensor] = {}
        self.handles: list[Any] = []
        for index, block in enumerate(tower.blocks):
            self.handles.append(tower.norm(index, 0).register_forward_pre_hook(self._input(index)))
            self.handles.append(block.register_forward_hook(self._output(index)))
            self.handles.append(tower.mlp_out(index).register_forward_pre_hook(_choose))

    def original_basis(self, states: torch.Tensor) -> torch.Tensor:
        """States between the blocks as they are without a rotation."""
        rotation = getattr(self.tower.blocks[0], "rotation", None)
        return states if rotation is None else states @ rotation.T.to(states)

    def _input(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = self.padding.unpack(args[0].detach())
            self.inputs[index] = self.original_basis(x).abs().amax(-1).float()

        return hook

    def _output(self, index: int) -> Any:
        runtime: Any = getattr(self.tower.blocks[index], "regcache", None)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = self.padding.unpack((output[0] if isinstance(output, tuple) else output).detach())
            at_end = index == self.last  # there the runtime has turned back, filled up, and taken its own token out
            norms = (x if at_end else self.original_basis(x)).abs().amax(-1).float()
            valid = self.padding.valid(norms.shape[0], norms.shape[1], norms.device)
            require_numbers(norms[valid], f"block {index}")
            norms = norms.masked_fill(~valid, torch.nan)
            norms = norms[:, (self.tower.patches if at_end else self.spans[index]).positions].cpu()
            deletion: Any = getattr(runtime, "deletion", DeletionConfig())
            if deletion.active and index == deletion.block:
                self.trace.dropped.append(runtime.current.chosen[:, self.spans[index].positions].cpu())
            gone = deletion.active and index >= deletion.block and deletion.action != "replace"
            if gone and self.trace.dropped[-1].shape == norms.shape:  # they stay in place, or were filled in
                norms = norms.masked_fill(self.trace.dropped[-1], torch.nan)
            self.trace.norms.setdefault(index, []).append(norms)

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _choose(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Lets the runtime note the tokens with a scale of their own, which float activations do not ask for."""
    own_scale_tokens(module, args[0])


@contextmanager
def _watching(tower: Tower, padding: PaddingMask) -> Iterator[_Watcher]:
    watcher = _Watcher(tower, padding)
    try:
        yield watcher
    finally:
        watcher.remove()


@torch.inference_mode()
def trace_tokens(model: nn.Module, batches: Iterable[Batch]) -> Trace:
    """Run ``batches`` with whatever registers and deletion are installed. The blocks may not be fused."""
    tower, padding = find_tower(model), PaddingMask()
    with _watching(tower, padding) as watcher:
        for batch in batches:
            padding.start(batch)
            run_tower(tower, batch)
    return watcher.trace


@dataclass(frozen=True)
class RowCosine:
    """Stored register rows beside the outlier tokens of some images: cosine of key with key and value with value, mean over
    register blocks, heads and images. Of an image with outlier tokens the token with the largest norm at the start block
    takes part; where there are several registers, the nearest one counts.

    Attributes:
        images: images with outlier tokens, at most about :data:`MAX_COMPARED`.
        keys, values: mean cosines.
        attainable: mean cosine, keys and values together, of each token to the average rows of the tokens of all other
            images: what a register mined on images like these would have.
        normal: the same as ``cosine`` of one token of median norm from each of these images.
    """

    images: int
    keys: float
    values: float
    attainable: float
    normal: float

    @property
    def cosine(self) -> float:
        """Keys and values together."""
        return (self.keys + self.values) / 2

    @property
    def share(self) -> float:
        """Cosine over what is attainable; 0 where nothing is."""
        return self.cosine / self.attainable if self.attainable > 0 else 0.0


class _RowTable:
    """Rows of the tokens of a `RowCosine`, up to :data:`MAX_COMPARED` images, rounded up to whole batches."""

    def __init__(self, cache: RegisterCache) -> None:
        self.blocks = cache.blocks
        # [2, registers, blocks, H, d]
        rows = [cache.rows(block) for block in cache.blocks]
        self.stored = torch.stack([torch.stack([r[i].float().cpu() for r in rows]).movedim(2, 0) for i in (0, 1)])
        self.tokens: list[torch.Tensor] = []
        self.normal: list[torch.Tensor] = []

    @property
    def full(self) -> bool:
        """Whether there are enough images."""
        return sum(rows.shape[1] for rows in self.tokens) >= MAX_COMPARED

    def _nearest(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cosines [2, k] of rows [2, k, blocks, H, d] to the nearest register."""
        cosines = torch.stack([_cosine(tokens, stored.unsqueeze(1)) for stored in self.stored.unbind(1)], -1)
        nearest = cosines.mean(0).argmax(-1)
        return cosines[:, torch.arange(len(nearest)), nearest]

    def result(self) -> RowCosine | None:
        """None with fewer than two images: nothing is attainable by others."""
        tokens, normal = (torch.cat(rows, 1) for rows in (self.tokens, self.normal))
        images = tokens.shape[1]
        if images < 2:
            return None
        keys, values = self._nearest(tokens).mean(1).tolist()
        attainable = _cosine(tokens, tokens.sum(1, keepdim=True) - tokens).mean()
        return RowCosine(images, keys, values, float(attainable), float(self._nearest(normal).mean()))


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[2, k] from rows [2, k, blocks, H, d]: mean over blocks and heads."""
    return F.cosine_similarity(a, b, dim=-1).mean((-1, -2))


@torch.inference_mode()
def compare_rows(
    model: nn.Module,
    batches: Iterable[Batch],
    cache: RegisterCache,
    blocks: tuple[int, ...],
    score_site: str = "block_input",
) -> tuple[Trace, RowCosine | None]:
    """Run ``batches`` and compare the outlier tokens with the rows of ``cache``.

    Args:
        model: with float activations, without registers and deletion.
        batches: images.
        cache: registers.
        blocks: an image has outlier tokens if it has one behind any of these blocks.
        score_site: where tokens are ranked in the first register block, ``block_input`` or ``fc2_input``.

    Returns:
        (trace, comparison; None where fewer than two images have an outlier token).
    """
    tower, padding, table = find_tower(model), PaddingMask(), _RowTable(cache)
    start = min(cache.blocks)
    recorder = TokenRecorder(tower, [start], score_site == "fc2_input")
    recorder.padding = padding
    try:
        with _watching(tower, padding) as watcher:
            for batch in batches:
                padding.start(batch)
                run_tower(tower, batch)
                if table.full:
                    continue
                scores = watcher.inputs[start] if score_site == "block_input" else recorder.fc2[start]
                valid = padding.valid(scores.shape[0], scores.shape[1], scores.device)
                valid = valid & watcher.spans[start].mask(scores.shape[1], scores.device)
                scores = scores.masked_fill(~valid, torch.nan)
                found = torch.stack([_outliers(watcher.trace.norms[b][-1]).any(1) for b in blocks]).any(0)
                image = found.nonzero().flatten().to(scores.device)
                median = scores.nanmedian(1).indices
                largest = scores.nan_to_num(-1.0).argmax(1)
                table.tokens.append(_rows(recorder, table.blocks, image, largest[image]))
                table.normal.append(_rows(recorder, table.blocks, image, median[image]))
    finally:
        recorder.remove()
    return watcher.trace, table.result()


def _rows(
    recorder: TokenRecorder, blocks: tuple[int, ...], image: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Keys and values of one token of each image, [2, k, blocks, H, d] on the CPU."""
    stores = (recorder.keys, recorder.values)
    return torch.stack([torch.stack([s[b][image, position].float().cpu() for b in blocks], 1) for s in stores])
