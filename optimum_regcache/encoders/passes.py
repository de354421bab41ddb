"""Final features of an encoder: what quantization is meant to preserve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_regcache.encoders.tower import Tower, find_tower

if TYPE_CHECKING:
    pass

from abc import ABC, abstractmethod


class FeatureEncoder(ABC):
    """An encoder that is no torch module and takes batches on the CPU, such as an exported one."""

    @abstractmethod
    def image_features(self, batch: Batch) -> torch.Tensor:
        """Pooled features [B, D], float32."""


def move(batch: Batch, model: nn.Module | FeatureEncoder) -> Batch:
    """Batch on the model's device; floating tensors in the model's dtype."""
    if isinstance(model, FeatureEncoder):
        return batch
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {
        k: v.to(parameter.device, parameter.dtype) if v.is_floating_point() else v.to(parameter.device)
        for k, v in batch.items()
    }


def image_features(model: Any, batch: Batch) -> torch.Tensor:
    """Pooled features [B, D], float32.

    Projected image embeddings for CLIP- and SigLIP-like models; otherwise the tower's pooled output, the CLS token if it
    has none, and the mean token where there is no CLS either.
    """
    inputs = move(batch, model)
    if isinstance(model, FeatureEncoder):
        return model.image_features(inputs)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        output = model.get_image_features(**inputs)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()
    tower = find_tower(model)
    output = tower.module(**inputs)
    if getattr(output, "image_embeds", None) is not None:
        return output.image_embeds.float()
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.float()
    if getattr(output, "feature_maps", None) is not None:
        return output.feature_maps[-1].flatten(2).mean(-1).float()
    last = output.last_hidden_state
    return (last[:, 0] if tower.num_prefix_tokens else last.mean(1)).float()


@torch.inference_mode()
def encode(model: nn.Module | FeatureEncoder, batches: Iterable[Batch]) -> torch.Tensor:
    """Features of all batches, [n, D] float32 on the CPU."""
    return torch.cat([image_features(model, batch).cpu() for batch in batches])


def unfuse(model: nn.Module) -> None:
    """Undo `optimum_regcache.fuse`, in place."""
    for block in find_tower(model).blocks:
        block.fused = None  # type: ignore[assignment]


def is_fused(model: nn.Module) -> bool:
    """Whether any block of the encoder runs fused."""
    return any(getattr(block, "fused", None) is not None for block in find_tower(model).blocks)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
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
    """Hands the current batch's padding mask to hooks, which only see one module's input."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def start(self, batch: Batch) -> None:
        """Note the mask of the batch about to run."""
        mask = batch.get("pixel_attention_mask")
        self.mask = None if mask is None else mask.bool()

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


def leading_tokens(tower: Tower) -> int:
    """Tokens before the patches inside the blocks, a test-time register among them; works for unprepared towers too."""
    runtime = getattr(tower.blocks[0], "regcache", None)
    return tower.num_prefix_tokens if runtime is None else runtime.num_prefix_tokens


Visitor = Callable[[str, int, torch.Tensor, torch.Tensor], None]


@torch.inference_mode()
def visit_tokens(model: nn.Module, batches: Iterable[Batch], visit: Visitor) -> None:
    """Run ``batches`` through the vision tower, with whatever registers and deletion are installed.

    Args:
        model: model or tower.
        batches: images.
        visit: called with (site, block, states [B, N, D], valid bool [B, N], false at padding) for every block, site
            ``block`` being its input and ``fc2`` the input of its MLP output projection. CLS and registers come first.

    """
    tower, padding = find_tower(model), PaddingMask()

    def hook(site: str, block: int) -> Any:
        def seen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            visit(site, block, x, padding.valid(x.shape[0], x.shape[1], x.device).clone())

        return seen

    handles = []
    for index, block in enumerate(tower.blocks):
        handles.append(block.register_forward_pre_hook(hook("block", index)))
        handles.append(tower.mlp_out(index).register_forward_pre_hook(hook("fc2", index)))
    try:
        with unfused(tower.module):
            for batch in batches:
                padding.start(batch)
                tower.module(**move(batch, model))
    finally:
        for handle in handles:
            handle.remove()


Batch = dict[str, torch.Tensor]
