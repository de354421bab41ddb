"""What the embeddings and blocks of a tower do around their native forward: deletion, mask, fill."""

from __future__ import annotations

from typing import Any

import torch

from optimum_regcache.registers import deletion as D
from optimum_regcache.registers.cache import RegisterCache
from optimum_regcache.registers.swap import Swapped


class EmbeddingsMixin(Swapped):
    """Notes the patch grid at the start of each pass."""

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes = kwargs.get("spatial_shapes", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        if shapes is not None and (shapes.ndim != 2 or shapes.shape[-1] != 2 or shapes.is_floating_point()):
            shapes = None
        self.regcache.begin(pixel_values, shapes)
        return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]


class BlockMixin(Swapped):
    """Deletes (or replaces) tokens at the input of the delete block, or in its MLP, narrows the mask after it, fills after the
    last block.

    ``fused`` computes the block itself if it is there (`optimum_regcache.fusion`). ``takes_mask``: the native forward has an
    argument ``attention_mask``; where it has none, the attention function takes the mask from the pass under way.
    Buffer ``rotation`` [D, D] of the first and last block: orthogonal, the residual stream between them is ``x @ rotation``.
    """

    block_index: int
    takes_mask: bool
    rotation: torch.Tensor | None
    fused: Any = None

    @property
    def acts_inside(self) -> bool:
        """Whether the deletion works within this block, which then runs unfused."""
        deletion = self.regcache.deletion
        return deletion.inside_mlp and deletion.block == self.block_index

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        runtime, state = self.regcache, self.regcache.current
        if runtime.replay is not None and self.block_index <= runtime.replay.block:
            if self.block_index < runtime.replay.block:
                return hidden_states
            if state.replayed is not None:
                hidden_states = state.replayed.hidden
                state.selection, state.valid = state.replayed.selection, state.replayed.valid
        runtime.join(self.block_index)
        if self.block_index == 0:
            hidden_states = runtime.enter(hidden_states, self.rotation)
        attention_mask = runtime.mask_for_token(attention_mask)
        inside = self.acts_inside
        fused = (
            self.fused if self.fused is not None and not inside and self.fused.applies(self, hidden_states) else None
        )
        native = fused is not None and fused.settings.native
        if self.block_index == runtime.deletion.block and runtime.deletion.active:
            module: Any = self
            if module.training and getattr(self, "gradient_checkpointing", False):
                raise ValueError(
                    "Token deletion and gradient checkpointing do not go together: a block that is computed again would delete "
                    "again. Call model.gradient_checkpointing_disable(), or set_deletion(model, DeletionConfig())."
                )
            first: Any = runtime.first_block
            if inside:
                runtime.open_mlp(hidden_states, attention_mask)
            else:
                hidden_states = runtime.delete(hidden_states, attention_mask, first.rotation, native)
        if state.selection is not None:
            attention_mask = D.narrow_mask(attention_mask, state.selection, hidden_states.dtype)
            if "position_embeddings" in kwargs:
                kwargs["position_embeddings"] = D.narrow_positions(kwargs["position_embeddings"], state.selection)
        cache = take_cache(kwargs)
        before, state.cache = state.cache, state.cache if cache is None else runtime.accept(cache)
        try:
            if fused is not None:
                output = fused(self, hidden_states, attention_mask)
            elif self.takes_mask:
                output = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
            else:
                state.mask = attention_mask
                output = super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        finally:
            state.cache, state.mask = before, None
            if inside:
                runtime.close_mlp()
        if inside:
            output = runtime.drop_states(output)  # pyright: ignore[reportUnknownArgumentType]
        if self.block_index != runtime.num_blocks - 1:
            return output  # pyright: ignore[reportUnknownVariableType]
        return runtime.leave(runtime.finish(output, native), self.rotation)  # pyright: ignore[reportUnknownArgumentType]


CACHE_NAMES = ("past_key_values", "cache", "register_cache")


def take_cache(kwargs: dict[str, Any]) -> RegisterCache | None:
    """Remove the `RegisterCache` from the arguments of a forward and return it; transformers renamed the argument from
    ``past_key_values`` to ``cache``, and ``register_cache`` is a name of our own.

    Raises:
        ValueError: more than one.
    """
    found = [name for name in CACHE_NAMES if isinstance(kwargs.get(name), RegisterCache)]
    if len(found) > 1:
        raise ValueError(f"A register cache was passed as {' and as '.join(found)}; give one of them.")
    return kwargs.pop(found[0]) if found else None
