"""What the embeddings and blocks of a tower do around their native forward: deletion, mask, fill."""

from __future__ import annotations

from typing import Any

import torch

from optimum_regcache.registers import deletion as D
from optimum_regcache.registers.swap import _Swapped


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
