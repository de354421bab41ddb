"""Wiring of registers and deletion into a vision tower, by class swap of its blocks, attention modules and embeddings.

The transformers forward functions stay as they are. Every swapped class is a subclass of the native one (hooks,
``isinstance`` checks and state-dict names keep working); with nothing installed it calls the native code, so outputs are
bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_regcache.architectures import find_tower
from optimum_regcache.config import DeletionConfig
from optimum_regcache.hf_private import attention_interface
from optimum_regcache.registers import deletion as D
from optimum_regcache.registers.cache import RegisterCache, RegisterLayer
from optimum_regcache.registers.state import TowerRuntime


class _Swapped:
    """Base of the mixins below; makes the dynamic classes copyable and picklable."""

    _native: type
    regcache: TowerRuntime

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = type(self).__mro__[1]
        return _rebuild, (mixin, self._native), self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(mixin: type, native: type) -> Any:
    cls: Any = _swapped_class(mixin, native)
    return cls.__new__(cls)


_SWAPPED: dict[tuple[type, type], type] = {}


def _swapped_class(mixin: type, native: type) -> type:
    key = (mixin, native)
    if key not in _SWAPPED:
        # the native name is kept: repr, no-split rules and output recorders go by it
        _SWAPPED[key] = type(native.__name__, (mixin, native), {"_native": native, "__module__": native.__module__})
    return _SWAPPED[key]


class EmbeddingsMixin(_Swapped):
    """Notes the patch grid at the start of each pass."""

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes = kwargs.get("spatial_shapes", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        if shapes is not None and (shapes.ndim != 2 or shapes.shape[-1] != 2 or shapes.is_floating_point()):
            shapes = None
        self.regcache.begin(pixel_values, shapes)
        return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]


class BlockMixin(_Swapped):
    """Deletes tokens at the input of the delete block, narrows the mask after it, fills after the last block.

    ``fused`` computes the block itself if it is there (`optimum_regcache.fusion`).
    Buffer ``rotation`` [D, D] of the first and last block: orthogonal, the residual stream between them is ``x @ rotation``.
    """

    block_index: int
    rotation: torch.Tensor | None
    fused: Any = None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        runtime = self.regcache
        if runtime.replay is not None and self.block_index <= runtime.replay.block:
            if self.block_index < runtime.replay.block:
                return hidden_states
            state = runtime.current
            if state.replayed is not None:
                hidden_states = state.replayed.hidden
                state.selection, state.valid = state.replayed.selection, state.replayed.valid
        if self.block_index == 0:
            hidden_states = runtime.enter(hidden_states, self.rotation)
        attention_mask = runtime.mask_for_token(attention_mask)
        fused = self.fused if self.fused is not None and self.fused.applies(self, hidden_states) else None
        native = fused is not None and fused.settings.native
        if self.block_index == runtime.deletion.block and runtime.deletion.active:
            first: Any = runtime.first_block
            hidden_states = runtime.delete(hidden_states, attention_mask, first.rotation, native)
        selection = runtime.current.selection
        if selection is not None:
            attention_mask = D.narrow_mask(attention_mask, selection, hidden_states.dtype)
        if fused is not None:
            output = fused(self, hidden_states, attention_mask, kwargs.get("past_key_values"))
        else:
            output = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        if self.block_index != runtime.num_blocks - 1:
            return output
        return runtime.leave(runtime.finish(output, native), self.rotation)


class AttentionMixin(_Swapped):
    """Self-attention whose keys and values start with register rows (RegCache A.7).

    Buffers ``register_key`` and ``register_value`` [H, n, d] hold the stored registers; None where the block has none.
    A `RegisterCache` passed as ``past_key_values`` takes their place. ``products`` computes the attention if it is there
    (`optimum_regcache.products`: quantized operands).
    """

    block_index: int
    products: nn.Module | None
    tower_names: tuple[str, str, str, str, str, str]
    register_key: torch.Tensor | None
    register_value: torch.Tensor | None

    def registers(self, past_key_values: RegisterCache | None) -> tuple[RegisterLayer, float] | None:
        """The rows for this call and tau, or None."""
        if past_key_values is not None:
            layer = past_key_values.layers[self.block_index]
            return (layer, past_key_values.num_copies) if layer.get_seq_length() else None
        if self.register_key is None:
            return None
        return RegisterLayer(self.register_key, self.register_value), self.regcache.num_copies

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RegisterCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        registers = self.registers(past_key_values)
        if registers is None and self.products is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        layer, copies = registers or (RegisterLayer(), 1.0)
        module: Any = self
        query, key, value, out, scaling, dropout = self.tower_names
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q, k, v = (getattr(module, name)(hidden_states).view(shape).transpose(1, 2) for name in (query, key, value))
        mask, factor = widen_mask(attention_mask, layer.get_seq_length(), copies, q), getattr(module, scaling)
        if self.products is not None:
            rows = None if layer.keys is None else (layer.keys, layer.values)
            output, weights = self.products(q, k, v, rows, mask, factor)
        else:
            k, v = layer.update(k, v)
            attention = attention_interface(module, self._native)
            rate = getattr(module, dropout) if module.training else 0.0
            output, weights = attention(module, q, k, v, mask, scaling=factor, dropout=rate, **kwargs)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return getattr(module, out)(output), weights


def widen_mask(
    attention_mask: torch.Tensor | None, rows: int, num_copies: float, query: torch.Tensor
) -> torch.Tensor | None:
    """Add ``rows`` leading columns with logit bias ln(num_copies) to the mask of queries [B, H, N, d].

    Returns:
        None if no mask is needed, else additive float [B or 1, 1, N, rows + N].
    """
    bias = math.log(num_copies)
    tokens = query.shape[2]
    if attention_mask is None:
        if bias == 0.0:
            return None
        attention_mask = query.new_zeros(1, 1, 1, tokens)
    elif not attention_mask.dtype.is_floating_point:
        attention_mask = query.new_zeros(attention_mask.shape).masked_fill(
            ~attention_mask.bool(), torch.finfo(query.dtype).min
        )
    attention_mask = attention_mask.to(query.dtype)
    column = attention_mask.new_full((*attention_mask.shape[:-1], rows), bias)
    return torch.cat((column, attention_mask), -1).expand(-1, -1, tokens, -1)


def _swap(module: nn.Module, mixin: type, runtime: TowerRuntime) -> Any:
    if not isinstance(module, mixin):
        module.__class__ = _swapped_class(mixin, type(module))
    target: Any = module
    target.regcache = runtime
    return target


def prepare_tower(model: nn.Module) -> TowerRuntime:
    """Make the vision tower of ``model`` ready for registers and deletion, in place. Repeated calls change nothing.

    Raises:
        ValueError: ``model`` holds no supported encoder.
    """
    tower = find_tower(model)
    embeddings = tower.module.get_submodule(tower.family.embeddings)
    if isinstance(embeddings, EmbeddingsMixin):
        return embeddings.regcache
    runtime = TowerRuntime(tower)
    runtime.first_block = tower.blocks[0]
    _swap(embeddings, EmbeddingsMixin, runtime)
    family = tower.family
    for index, block in enumerate(tower.blocks):
        _swap(block, BlockMixin, runtime).block_index = index
        block.register_buffer("rotation", None)
        attention = _swap(tower.attention(index), AttentionMixin, runtime)
        attention.block_index = index
        attention.tower_names = (family.query, family.key, family.value, family.out, family.scaling, family.dropout)
        attention.register_buffer("register_key", None)
        attention.register_buffer("register_value", None)
        attention.register_module("products", None)
    return runtime


def set_registers(model: nn.Module, cache: RegisterCache | None) -> None:
    """Store ``cache`` in the tower as ordinary buffers (None removes the registers), in the tower's dtype and device.

    Raises:
        ValueError: the cache belongs to an encoder of another shape.
    """
    runtime, tower = prepare_tower(model), find_tower(model)
    if cache is not None and len(cache.layers) != len(tower.blocks):
        raise ValueError(
            f"The register cache is for {len(cache.layers)} blocks, {type(tower.module).__name__} has {len(tower.blocks)}."
        )
    heads = tower.config.num_attention_heads
    for index in cache.blocks if cache is not None else ():
        keys, width = cache.rows(index)[0], tower.attention(index).head_dim  # type: ignore[union-attr]
        if keys.shape[0] != heads or keys.shape[2] != width:
            raise ValueError(
                f"Register rows of block {index} have shape {tuple(keys.shape)}; this encoder needs "
                f"[{heads}, registers, {width}]."
            )
    for index, block in enumerate(tower.blocks):
        attention: Any = tower.attention(index)
        if cache is None or index not in cache.blocks:
            attention.register_key = attention.register_value = None
            continue
        like = block.get_parameter(_norm_name(block))
        attention.register_key, attention.register_value = (
            rows.detach().to(like, copy=True).contiguous() for rows in cache.rows(index)
        )
    runtime.num_copies = 1.0 if cache is None else cache.num_copies


def _norm_name(block: nn.Module) -> str:
    """Name of a parameter that is never quantized: the first norm weight of the block."""
    for name, module in block.named_modules():
        if isinstance(module, nn.LayerNorm):
            return f"{name}.weight"
    raise ValueError(f"{type(block).__name__} has no LayerNorm.")


def get_register_cache(model: nn.Module) -> RegisterCache | None:
    """The registers stored in the tower, None if there are none."""
    runtime, tower = prepare_tower(model), find_tower(model)
    keys: dict[int, torch.Tensor] = {}
    values: dict[int, torch.Tensor] = {}
    for index in range(len(tower.blocks)):
        attention: Any = tower.attention(index)
        if attention.register_key is not None:
            keys[index], values[index] = attention.register_key, attention.register_value
    return RegisterCache(keys, values, len(tower.blocks), runtime.num_copies) if keys else None


def set_deletion(model: nn.Module, config: DeletionConfig) -> None:
    """Choose which tokens the tower deletes.

    Raises:
        ValueError: the block does not exist, or the encoder cannot work with ``fill="none"``.
    """
    runtime, tower = prepare_tower(model), find_tower(model)
    if config.block is not None and config.block >= len(tower.blocks):
        raise ValueError(f"deletion.block={config.block}, but the encoder has blocks 0 to {len(tower.blocks) - 1}.")
    needs_grid = tower.family.always_mask or tower.is_backbone or type(model).__name__.endswith("MaskedImageModeling")
    if config.active and config.fill == "none" and needs_grid:
        raise ValueError(
            f"{type(tower.module).__name__} needs the whole patch grid after the last block; use "
            "deletion.fill='neighbour_mean'."
        )
    runtime.deletion = config


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
