"""Curating and caching: find outlier tokens in reference images and keep their K and V (docs/method.md 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, PaddingMask, lone_token, run_tower
from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.evaluation.outliers import cross_cosine
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.kmeans import kmeans
from optimum_regcache.search.progress import current

_PLAIN = ("norms", "image", "position", "states", "normal_states")


@dataclass
class MinedTokens:
    """The largest tokens at one block, with everything needed to build caches from them.

    Attributes:
        block: block at which they were ranked.
        norms: float [k], descending.
        image, position: int64 [k], where they came from (position in the sequence, CLS included).
        states: float [k, D], hidden states at the input of the block.
        keys, values: block >= ``block`` -> float [k, H, d], in context, after projection and bias.
        normal_states: float [m, D]: one random token that is no outlier from each image.
    """

    block: int
    norms: torch.Tensor
    image: torch.Tensor
    position: torch.Tensor
    states: torch.Tensor
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    normal_states: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @staticmethod
    def pack(mined: dict[int, MinedTokens]) -> dict[str, torch.Tensor]:
        """All of them as named tensors, for a file; `unpack` is the way back."""
        found: dict[str, torch.Tensor] = {}
        for block, tokens in mined.items():
            found |= {f"{block} {name}": getattr(tokens, name) for name in _PLAIN}
            for name in ("keys", "values"):
                found |= {f"{block} {name} {b}": rows for b, rows in getattr(tokens, name).items()}
        return found

    @staticmethod
    def unpack(tensors: dict[str, torch.Tensor]) -> dict[int, MinedTokens]:
        """From what `pack` made; by ascending block."""
        parts: dict[int, dict[str, Any]] = {}
        for text in tensors:
            block, name, *other = text.split()
            part = parts.setdefault(int(block), {"keys": {}, "values": {}})
            if other:
                part[name][int(other[0])] = tensors[text]
            else:
                part[name] = tensors[text]
        for part in parts.values():
            for name in ("keys", "values"):
                part[name] = dict(sorted(part[name].items()))
        return {block: MinedTokens(block, **parts[block]) for block in sorted(parts)}

    def first(self, count: int) -> MinedTokens:
        """The ``count`` largest tokens."""
        return replace(
            self,
            **{name: getattr(self, name)[:count] for name in ("norms", "image", "position", "states")},
            keys={b: rows[:count] for b, rows in self.keys.items()},
            values={b: rows[:count] for b, rows in self.values.items()},
        )

    def outlier_cosine(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the cosine between mined tokens of different images; None if all are of one."""
        return cross_cosine(self.states, self.image)

    def normal_cosine(self) -> tuple[float, float] | None:
        """The same for the normal tokens, one per image."""
        return cross_cosine(self.normal_states, torch.arange(len(self.normal_states)))

    def average(self, blocks: tuple[int, ...], num_blocks: int) -> RegisterCache:
        """K and V averaged over all mined tokens, after projection (strategy ``averaged_tokens``, docs/method.md 4)."""
        return RegisterCache(
            {b: self.keys[b].mean(0).unsqueeze(1) for b in blocks},
            {b: self.values[b].mean(0).unsqueeze(1) for b in blocks},
            num_blocks,
        )

    def clusters(self, k: int, blocks: tuple[int, ...], num_blocks: int, seed: int = 0) -> RegisterCache:
        """Several distinct registers: K and V averaged, as `average` does, over each of ``k`` clusters of the mined tokens.

        Tokens are clustered by k-means (docs/method.md 4) in the space of their keys and values in ``blocks``, each of
        length 1 and one behind the other, so that every block counts the same. One cluster is `average`, bit for bit.

        Args:
            k: rows per block. There are fewer, as many as distinct tokens, where these are fewer than ``k``.
            blocks: blocks that get registers, not before the block of the tokens.
            num_blocks: blocks of the encoder.
            seed: of the k-means starts.

        Returns:
            Rows [H, <= k, d], of the largest cluster first; tau is 1 for each.

        Raises:
            ValueError: k below 1, or no blocks.
        """
        require(bool(blocks), "Clusters of mined tokens need blocks whose keys and values are compared.")
        parts = [store[b].flatten(1) for b in blocks for store in (self.keys, self.values)]
        labels = kmeans(torch.cat([nn.functional.normalize(part, dim=-1) for part in parts], 1), k, seed)
        members = [labels == cluster for cluster in range(int(labels.max()) + 1)]

        def rows(store: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
            return {b: torch.stack([store[b][m].mean(0) for m in members], 1) for b in blocks}

        return RegisterCache(rows(self.keys), rows(self.values), num_blocks)

    def single(self, index: int, blocks: tuple[int, ...], num_blocks: int) -> RegisterCache:
        """K and V of one mined token (strategy ``single_token``)."""
        require(0 <= index < len(self.norms), f"There are {len(self.norms)} mined tokens, no number {index}.")
        return RegisterCache(
            {b: self.keys[b][index].unsqueeze(1) for b in blocks},
            {b: self.values[b][index].unsqueeze(1) for b in blocks},
            num_blocks,
        )


class TokenRecorder:
    """Hooks that keep, for the batch under way, block inputs, fc2 input norms and projected K and V.

    Where query and key are rotated by their position, K is kept as it is before: a register has no position, like CLS.
    """

    def __init__(self, tower: Tower, blocks: list[int], need_fc2: bool) -> None:
        self.padding = PaddingMask()
        self.inputs: dict[int, torch.Tensor] = {}
        self.fc2: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.handles: list[Any] = []
        for index in range(min(blocks), len(tower.blocks)):
            for (projection, columns), store in zip(tower.key_value(index), (self.keys, self.values), strict=True):
                hook = self._projected(store, index, columns, tower.head_dim)
                self.handles.append(projection.register_forward_hook(hook))
            if index in blocks:
                self.handles.append(tower.blocks[index].register_forward_pre_hook(self._input(self.inputs, index)))
                if need_fc2:
                    self.handles.append(tower.mlp_out(index).register_forward_pre_hook(self._norms(self.fc2, index)))

    def _projected(self, store: dict[int, torch.Tensor], index: int, columns: slice, width: int) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            rows = self.padding.unpack(output.detach()[..., columns])
            store[index] = rows.reshape(*rows.shape[:-1], -1, width)  # [B, N, H, d]

        return hook

    def _input(self, store: dict[int, torch.Tensor], index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            store[index] = self.padding.unpack(args[0].detach())

        return hook

    def _norms(self, store: dict[int, torch.Tensor], index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            store[index] = self.padding.unpack(args[0].detach().abs().amax(-1).float())

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def mine_tokens(  # noqa: PLR0913 (exported: every way to rank tokens has its name)
    float_model: nn.Module,
    batches: Iterable[Batch],
    blocks: list[int],
    *,
    top: int = 100,
    per_image: int = 1,
    score_site: str = "block_input",
    seed: int = 0,
    progress: bool = True,
) -> dict[int, MinedTokens]:
    """One pass over the images; keeps only the ``top`` tokens per block, so the stream may be of any length.

    Args:
        float_model: unquantized, without registers.
        batches: model inputs.
        blocks: blocks at which tokens are ranked.
        top: tokens kept per block.
        per_image: at most this many tokens per image on average. The paper takes 100 tokens from 50,000 images; the 100
            largest tokens of 20 images would be ordinary ones for the most part and spoil the average.
        score_site: ``block_input`` (l_inf of the hidden state) or ``fc2_input`` (l_inf of the MLP output projection's
            input in that block).
        seed: for the sample of normal tokens.
        progress: show a progress bar.

    Returns:
        block -> `MinedTokens`. Protected tokens (CLS, trained registers, detection tokens) and padding never enter.

    Raises:
        ValueError: no images, or an unknown ``score_site``.
    """
    require(score_site in ("block_input", "fc2_input"), f"Unknown score_site {score_site!r}.")
    tower = find_tower(float_model)
    generator = torch.Generator().manual_seed(seed)
    recorder = TokenRecorder(tower, blocks, score_site == "fc2_input")
    padding = recorder.padding
    best: dict[int, MinedTokens] = {}
    seen = 0
    try:
        for batch in bar(batches, "mining tokens", shown=progress):
            padding.start(batch)
            run_tower(tower, batch)
            for block in blocks:
                state = recorder.inputs[block]
                valid = padding.valid(state.shape[0], state.shape[1], state.device)
                valid = valid & tower.patches_at(block).mask(state.shape[1], state.device)
                norms = state.abs().amax(-1).float() if score_site == "block_input" else recorder.fc2[block]
                found = _top_of_batch(recorder, block, norms.masked_fill(~valid, -1.0), top, seen, generator)
                best[block] = found if block not in best else _merge(best[block], found, top)
            images = next(iter(recorder.inputs.values())).shape[0]
            seen += images
            current().advance(images * len(tower.blocks))
    finally:
        recorder.remove()
    require(seen > 0, "No images to mine tokens from.")
    return {block: tokens.first(per_image * seen) for block, tokens in best.items()}


def _top_of_batch(
    recorder: TokenRecorder, block: int, scores: torch.Tensor, top: int, offset: int, generator: torch.Generator
) -> MinedTokens:
    tokens = scores.shape[1]
    flat = scores.flatten()
    order = torch.argsort(flat, descending=True, stable=True)[: min(top, int((flat >= 0).sum()))]
    image, position = order // tokens, order % tokens
    later = [b for b in sorted(recorder.keys) if b >= block]
    # a normal token: uniformly among those of at most median norm
    median = torch.where(scores >= 0, scores, torch.nan).nanmedian(1, keepdim=True).values
    chance = torch.rand(scores.shape, generator=generator).to(scores.device)
    normal = chance.masked_fill((scores < 0) | (scores > median), -1.0).argmax(1)
    rows = torch.arange(len(normal), device=normal.device)
    return MinedTokens(
        block=block,
        norms=flat[order].cpu(),
        image=(image + offset).cpu(),
        position=position.cpu(),
        states=recorder.inputs[block][image, position].float().cpu(),
        keys={b: recorder.keys[b][image, position].float().cpu() for b in later},
        values={b: recorder.values[b][image, position].float().cpu() for b in later},
        normal_states=recorder.inputs[block][rows, normal].float().cpu(),
    )


def _merge(a: MinedTokens, b: MinedTokens, top: int, max_normal: int = 512) -> MinedTokens:
    order = torch.argsort(torch.cat([a.norms, b.norms]), descending=True, stable=True)[:top]

    def pick(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y])[order]

    return MinedTokens(
        block=a.block,
        norms=pick(a.norms, b.norms),
        image=pick(a.image, b.image),
        position=pick(a.position, b.position),
        states=pick(a.states, b.states),
        keys={i: pick(a.keys[i], b.keys[i]) for i in a.keys},
        values={i: pick(a.values[i], b.values[i]) for i in a.values},
        normal_states=torch.cat([a.normal_states, b.normal_states])[:max_normal],
    )


@torch.inference_mode()
def isolated_cache(
    float_model: nn.Module, state: torch.Tensor, start_block: int, blocks: tuple[int, ...]
) -> RegisterCache:
    """K and V of ``state`` run alone through the blocks from ``start_block`` (docs/method.md 4).

    No CLS, no position embedding. tau identical copies attending only to each other give the same K and V as one, so one
    is run; each block normalises it before the projections.

    Args:
        float_model: unquantized, without registers.
        state: [D], hidden state at the input of ``start_block``.
        start_block: first block it runs through.
        blocks: blocks to keep.
    """
    tower = find_tower(float_model)
    recorder = TokenRecorder(tower, [start_block], False)
    try:
        hidden, arguments = lone_token(tower, state)
        for block in tower.blocks[start_block:]:
            output = block(hidden, **arguments)
            hidden = output[0] if isinstance(output, tuple) else output
    finally:
        recorder.remove()

    def row(store: dict[int, torch.Tensor], block: int) -> torch.Tensor:
        return store[block].flatten(0, -3)[0].float().cpu().unsqueeze(1)  # [H, 1, d]

    return RegisterCache(
        {b: row(recorder.keys, b) for b in blocks}, {b: row(recorder.values, b) for b in blocks}, len(tower.blocks)
    )
