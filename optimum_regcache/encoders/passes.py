"""Running an encoder: batches and final features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from optimum_regcache.config.validation import require
from optimum_regcache.encoders.store import LazySequence
from optimum_regcache.encoders.tower import PatchSpan, Tower, find_tower, reads_patches, takes_mask
from optimum_regcache.math.linear import fast_linears

Batch = dict[str, torch.Tensor]


class FeatureEncoder(ABC):
    """An encoder that is no torch module and takes batches on the CPU, such as an exported one."""

    patches: PatchSpan = PatchSpan(0)  # of `last_hidden_state`
    patch_size: tuple[int, int] | None = None  # pixels (h, w), None if nobody knows
    gives_tokens: bool = False  # whether there is a `last_hidden_state`

    @abstractmethod
    def run(self, batch: Batch) -> Any:
        """Its output, whose ``last_hidden_state`` [B, N, D] is None where it gives no tokens."""

    @abstractmethod
    def features_of(self, output: Any) -> torch.Tensor:
        """Pooled features [B, D], float32, of what :meth:`run` gave."""

    def image_features(self, batch: Batch) -> torch.Tensor:
        """Pooled features [B, D], float32."""
        return self.features_of(self.run(batch))


def move(batch: Batch, model: nn.Module | FeatureEncoder) -> Batch:
    """Batch on the model's device; floating tensors in the model's dtype. Copies from pinned memory wait for nothing."""
    if isinstance(model, FeatureEncoder):
        return batch
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    there = {k: v.to(parameter.device, non_blocking=v.is_pinned()) for k, v in batch.items()}
    return {k: v.to(parameter.dtype) if v.is_floating_point() else v for k, v in there.items()}


def num_images(batch: Batch) -> int:
    """Images in a batch; where their patches are packed into one sequence, ``image_grid_thw`` has a row for each."""
    return len(batch["image_grid_thw"] if "image_grid_thw" in batch else batch["pixel_values"])


def count_images(batches: Sequence[Batch]) -> int:
    """Images in all batches; stored ones are not opened for it."""
    return sum(batch_sizes(batches))


def batch_sizes(batches: Sequence[Batch]) -> list[int]:
    """Images of each batch."""
    known: list[int] | None = getattr(batches, "sizes", None)
    return [num_images(batch) for batch in batches] if known is None else known


class ImageRange(LazySequence[Batch]):
    """Images ``first`` to ``end`` of ``batches``, in the same batches; those at the ends are cut.

    Attributes:
        sizes: images of each batch.
    """

    def __init__(self, batches: Sequence[Batch], end: int | None = None, first: int = 0) -> None:
        self.batches = batches
        self.sizes: list[int] = []
        self._parts: list[tuple[int, int, int]] = []  # position, first image, end
        begin = 0
        for position, size in enumerate(batch_sizes(batches)):
            low, high = max(first - begin, 0), size if end is None else min(end - begin, size)
            if low < high:
                self.sizes.append(high - low)
                self._parts.append((position, low, high))
            begin += size

    def __len__(self) -> int:
        return len(self.sizes)

    def item(self, position: int) -> Batch:
        index, first, end = self._parts[position]
        batch = self.batches[index]
        return batch if end - first == num_images(batch) else _cut(batch, end, first)


class JoinedBatches(LazySequence[Batch]):
    """The batches of several sequences, one sequence after the other.

    Attributes:
        sizes: images of each batch.
    """

    def __init__(self, *parts: Sequence[Batch]) -> None:
        self.sizes = [size for part in parts for size in batch_sizes(part)]
        self._places = [(part, position) for part in parts for position in range(len(part))]

    def __len__(self) -> int:
        return len(self.sizes)

    def item(self, position: int) -> Batch:
        part, index = self._places[position]
        return part[index]


def _cut(batch: Batch, end: int, first: int = 0) -> Batch:
    if "image_grid_thw" not in batch:
        return {name: rows[first:end] for name, rows in batch.items()}
    grids = batch["image_grid_thw"]
    begin, stop = (int(grids[:n].prod(1).sum()) for n in (first, end))
    return {"pixel_values": batch["pixel_values"][begin:stop], "image_grid_thw": grids[first:end]}


def _integers(numbers: torch.Tensor) -> list[int]:
    return cast("Any", numbers).tolist()


@fast_linears()
def run_tower(tower: Tower, batch: Batch, **options: Any) -> Any:
    """The tower's output for a batch, which is moved to its device and dtype first."""
    inputs = move(batch, tower.module)
    if tower.family.packed:
        return tower.module(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], **options)
    if "pixel_attention_mask" in inputs:
        inputs[tower.family.padding_mask] = inputs.pop("pixel_attention_mask")
    return tower.module(**inputs, **options)


def states_read(model: nn.Module, tower: Tower) -> tuple[int, ...]:
    """Which states between the blocks ``model`` reads, 0 being the input of block 0: the ``vision_feature_layer`` of LLaVA and
    its relatives, the stages of a backbone; the last state alone otherwise."""
    depth = len(tower.blocks)
    layers: Any = getattr(getattr(model, "config", None), "vision_feature_layer", None) if tower.name else None
    if layers is None and tower.is_backbone:
        layers = list(cast("Any", tower.module).out_indices)
    if layers is None:
        return (depth,)
    found = cast("list[int]", layers if isinstance(layers, (list, tuple)) else [layers])
    return tuple(i if i >= 0 else depth + 1 + i for i in found)


def patch_features(model: nn.Module, tower: Tower, batch: Batch) -> torch.Tensor:
    """The patch tokens that a model around the tower reads, each of length 1, as one row per image [B, M], float32: the cosine
    of two such rows is the mean cosine of their tokens."""
    strategy = getattr(cast("Any", model).config, "vision_feature_select_strategy", "default")
    span = tower.patches if strategy == "default" else PatchSpan(0)
    states = _read_states(model, tower, batch, span)
    tokens = [nn.functional.normalize(s.float(), dim=-1) for s in states]
    return torch.cat([t.flatten(1) for t in tokens], 1) / sum(t.shape[1] for t in tokens) ** 0.5


def _read_states(
    model: nn.Module, tower: Tower, batch: Batch, span: PatchSpan, output: Any = None
) -> list[torch.Tensor]:
    """The states that a model around the tower reads, the tokens of ``span`` alone, each [B, N, D]; of a backbone, the feature
    maps. ``output`` is that of the tower, if it has run."""
    options = call_options(model, tower)
    output = run_tower(tower, batch, **options) if output is None else output
    if tower.is_backbone:
        return _map_tokens(tower, output)
    if not options:
        return [output.last_hidden_state[:, span.positions]]
    return [output.hidden_states[i][:, span.positions] for i in states_read(model, tower)]


def call_options(model: nn.Module, tower: Tower) -> dict[str, Any]:
    """How the model around the tower calls it: those with a ``vision_feature_layer`` ask for the states between the blocks,
    where deleted tokens are masked and still computed."""
    config: Any = getattr(model, "config", None) if tower.name and not tower.is_backbone else None
    return {} if getattr(config, "vision_feature_layer", None) is None else {"output_hidden_states": True}


def _map_tokens(tower: Tower, output: Any) -> list[torch.Tensor]:
    """Patch tokens [B, N, D] of each feature map of a backbone, which are grids, or sequences that begin with CLS
    (``reshape_hidden_states=False``, as for DPT)."""
    places = tower.patches.positions
    return [m.flatten(2).transpose(1, 2) if m.ndim == 4 else m[:, places] for m in output.feature_maps]


def patch_tokens(model: nn.Module | FeatureEncoder, batch: Batch, output: Any = None) -> tuple[torch.Tensor, list[int]]:
    """The patch tokens that a model gives for dense use, without CLS, trained registers, detection tokens and padding.

    ``last_hidden_state`` of the tower, whose deleted positions hold the fill (docs/method.md 7); the feature maps of a
    backbone, all of them; the states that a larger model around the tower reads; merged tokens where patches are packed.

    Args:
        model: torch module, or an exported encoder.
        batch: the images.
        output: of the tower, or of the exported encoder, for ``batch``; it runs if None.

    Returns:
        (tokens [rows, D], float32, image after image; rows of each image).

    Raises:
        ValueError: an encoder that gives pooled features only.
    """
    if isinstance(model, FeatureEncoder):
        last = (model.run(batch) if output is None else output).last_hidden_state
        if last is None:
            raise ValueError("The encoder gives pooled features and no patch tokens. Compare its features.")
        last = last[:, model.patches.positions].float()
        return last.flatten(0, 1), [last.shape[1]] * len(last)
    inputs, tower = move(batch, model), find_tower(model)
    if tower.family.packed:
        output = run_tower(tower, inputs) if output is None else output
        merged = output if isinstance(output, torch.Tensor) else output.pooler_output
        return merged.float(), _merged_lengths(tower, inputs)
    span = tower.patches
    if tower.is_backbone or reads_patches(model, tower):
        states = _read_states(model, tower, inputs, span, output)
    else:
        states = [(run_tower(tower, inputs) if output is None else output).last_hidden_state[:, span.positions]]
    tokens, mask = torch.cat(states, 1).float(), inputs.get("pixel_attention_mask")
    if mask is None or mask.shape != states[0].shape[:2]:
        return tokens.flatten(0, 1), [tokens.shape[1]] * len(tokens)
    valid = mask.bool().repeat(1, len(states))
    return tokens[valid], _integers(valid.sum(1))


def _merged_lengths(tower: Tower, inputs: Batch) -> list[int]:
    """Merged tokens of each image, where patches are packed."""
    return _integers(inputs["image_grid_thw"].prod(1) // tower.config.spatial_merge_size**2)


def lone_token(tower: Tower, state: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """``state`` [D] as the only token of a sequence that a block can be called with: no CLS, no position.

    Returns:
        (states [1, 1, D], or [1, D] where sequences are packed; keyword arguments of the blocks).
    """
    state = state.to(next(p for p in tower.module.parameters() if p.is_floating_point()))
    width = tower.head_dim
    if tower.family.packed:
        angles = (state.new_ones(1, width), state.new_zeros(1, width))
        lengths = torch.tensor([0, 1], dtype=torch.int32, device=state.device)
        return state.reshape(1, -1), {"cu_seqlens": lengths, "position_embeddings": angles}
    hidden = state.reshape(1, 1, -1)
    given: dict[str, Any] = {"attention_mask": None} if takes_mask(tower.blocks[0]) else {}
    if tower.family.rotary:  # no patches: the token is a leading one, which is not rotated
        given["position_embeddings"] = (state.new_empty(0, width),) * 2
    return hidden, given


@fast_linears()
def image_features(model: Any, batch: Batch) -> torch.Tensor:
    """Features that ``model`` is used for, [B, D], float32.

    Projected image embeddings for CLIP- and SigLIP-like models; the patch tokens that a larger model reads (`patch_features`);
    the detection tokens that a detector reads (`trailing_features`); queries and patches of a segmenter; otherwise the tower's
    pooled output, the CLS token if it has none, and the mean token where there is no CLS either.
    """
    inputs = move(batch, model)
    if isinstance(model, FeatureEncoder):
        return model.image_features(inputs)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        output = model.get_image_features(**inputs)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()
    tower = find_tower(model)
    if reads_patches(model, tower) and not tower.family.packed:
        return patch_features(model, tower, inputs)
    output = run_tower(tower, inputs)
    if tower.family.packed:  # the tokens that the language model reads, averaged over each image
        merged = output if isinstance(output, torch.Tensor) else output.pooler_output
        lengths = _merged_lengths(tower, inputs)
        return torch.stack([part.mean(0) for part in torch.split(merged, lengths)]).float()
    return pooled_features(tower, output)


def pooled_features(tower: Tower, output: Any) -> torch.Tensor:
    """Pooled features [B, D], float32, of the output of a tower whose images are not packed."""
    if tower.num_trailing_tokens:
        return trailing_features(output.last_hidden_state, tower.patches)
    if tower.num_queries:
        return _query_features(output.last_hidden_state, tower)
    if getattr(output, "image_embeds", None) is not None:
        return output.image_embeds.float()
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.float()
    if getattr(output, "feature_maps", None) is not None:
        return _map_tokens(tower, output)[-1].mean(1).float()
    last = output.last_hidden_state
    return (last[:, 0] if tower.num_prefix_tokens else last.mean(1)).float()


def trailing_features(last: torch.Tensor, span: PatchSpan) -> torch.Tensor:
    """The tokens of ``last`` [B, N, D] behind the patches, which the heads of a detector read, each of length 1, as one row per
    image [B, M], float32: the cosine of two such rows is the mean cosine of their tokens."""
    return nn.functional.normalize(last[:, -span.trail :].float(), dim=-1).flatten(1) / span.trail**0.5


def _query_features(last: torch.Tensor, tower: Tower) -> torch.Tensor:
    """The queries and the patches of ``last`` [B, N, D], whose products are masks, as one row per image as for
    `trailing_features`; the queries count as much as the patches."""
    parts = (last[:, : tower.num_queries], last[:, tower.patches.positions])
    rows = [nn.functional.normalize(p.float(), dim=-1).flatten(1) / (2 * p.shape[1]) ** 0.5 for p in parts]
    return torch.cat(rows, 1)


@torch.inference_mode()
def encode(model: nn.Module | FeatureEncoder, batches: Iterable[Batch]) -> torch.Tensor:
    """Features of all batches, [n, D] float32 on the CPU. Nothing else of a batch is kept: features may be views of all tokens,
    and many small tensors between large ones would hold on to the memory of these."""
    if not isinstance(batches, Sequence):
        return torch.cat([image_features(model, batch).cpu().clone() for batch in batches])
    found, first = torch.empty(0), 0
    for batch in batches:
        features = image_features(model, batch)
        if first == 0:
            found = torch.empty(count_images(batches), *features.shape[1:], dtype=features.dtype)
        found[first : first + len(features)] = features
        first += len(features)
    require(first > 0, "The data set is empty.")
    return found


def unfuse(model: nn.Module) -> None:
    """Undo `optimum_regcache.fuse`, in place."""
    for block in find_tower(model).blocks:
        block.fused = None  # type: ignore[assignment]


def is_fused(model: nn.Module) -> bool:
    """Whether any block of the encoder runs fused."""
    return any(getattr(block, "fused", None) is not None for block in find_tower(model).blocks)


@contextmanager
def unfused(model: nn.Module) -> Generator[None, None, None]:
    """Inside the ``with`` block the model runs unfused, for example to be traced or watched by hooks."""
    blocks: list[Any] = [block for block in find_tower(model).blocks if getattr(block, "fused", None) is not None]
    before = [block.fused for block in blocks]
    for block in blocks:
        block.fused = None
    try:
        yield
    finally:
        for block, runner in zip(blocks, before, strict=True):
            block.fused = runner


class PaddingMask:
    """Hands the current batch's padding mask to hooks, which only see one module's input.

    Where images are packed into one sequence, :meth:`unpack` makes rows of equal length of it, and the mask is that of
    these rows.
    """

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.lengths: list[int] | None = None

    def start(self, batch: Batch) -> None:
        """Note the mask of the batch about to run."""
        mask, grids = batch.get("pixel_attention_mask"), batch.get("image_grid_thw")
        self.mask = None if mask is None else mask.bool()
        self.lengths = None
        if grids is not None:
            lengths = grids.prod(1)
            self.lengths = _integers(lengths)
            self.mask = torch.arange(int(lengths.max()), device=grids.device)[None] < lengths[:, None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Packed tokens [sum of N, ...] as [B, largest N, ...], zero at padding; other tensors as they are."""
        if self.lengths is None or x.shape[0] != sum(self.lengths):
            return x
        return nn.utils.rnn.pad_sequence(list(torch.split(x, self.lengths)), batch_first=True)

    def valid(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """bool [B, N]; all true where no mask of this length is known."""
        if self.mask is not None and self.mask.shape == (batch, tokens):
            return self.mask.to(device)
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)

    def content(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``x`` [B, N, ...] that are not padding, [rows, ...]; other shapes pass unchanged."""
        if self.mask is None or x.ndim < 3 or self.mask.shape != x.shape[:2]:
            return x
        return x[self.mask.to(x.device)]
