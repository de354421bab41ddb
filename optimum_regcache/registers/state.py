"""What the swapped modules of one tower share: the settings, and the state of the forward pass under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.compat import collected_outputs
from optimum_regcache.encoders.tower import PatchSpan, Tower
from optimum_regcache.registers import deletion as D
from optimum_regcache.registers.cache import RegisterCache


@dataclass(frozen=True)
class BlockInput:
    """What arrives at a block for one batch: states [B, N, D], what was deleted before, and padding."""

    hidden: torch.Tensor
    selection: D.Selection | None = None
    valid: torch.Tensor | None = None


class _Pass:
    """State of one forward pass, written by the first swapped module it meets and read by the later ones."""

    def __init__(self) -> None:  # all of them on the instance: a compiled graph is guarded by what is there
        self.grid: D.Grid = None
        self.selection: D.Selection | None = None
        self.valid: torch.Tensor | None = None
        self.replayed: BlockInput | None = None
        self.cache: RegisterCache | None = None  # takes the place of the stored registers
        self.mask: torch.Tensor | None = None  # of a block whose native forward takes none
        self.states_wanted = False  # somebody looks at the states between the blocks
        self.chosen: torch.Tensor | None = None  # bool [B, N], the outlier tokens of the pass, for reports
        self.inside = False  # the block computes in whose MLP tokens are taken
        self.content: torch.Tensor | None = None  # its tokens that are not padding


class _ThreadPass(_Pass, threading.local):
    """One `_Pass` per thread: a served model may run in several threads at once."""


_ARGUMENTS = ("output_hidden_states", "output_attentions")
_PER_BLOCK = frozenset(("hidden_states", "attentions"))  # what transformers collects for them


class Replay:
    """Known inputs of one block, batch after batch: earlier blocks are skipped and the recorded states take over.

    Args:
        block: the block that gets the states.
        states: one for each forward pass to come, in order.
    """

    def __init__(self, block: int, states: Sequence[BlockInput]) -> None:
        self.block, self._states = block, iter(states)

    def take(self) -> BlockInput:
        """The state of the pass that begins."""
        return next(self._states)


class TowerRuntime:
    """Shared by all swapped modules of one tower.

    Attributes:
        deletion: what to delete.
        hooks: handles on the MLP output projection of the block of the deletion (`optimum_regcache.registers.mlp_output`).
        num_copies: block -> tau of the stored registers.
        extra_token: a token that starts at zero runs along after the leading tokens (test-time register).
        keep_positions: delete by masking instead of gathering, so that every hidden state keeps N tokens. A call that asks for
            hidden states or attention weights is served in this way too, unless ``deletion.fill`` is ``none``.
        patch_size: pixels (h, w) of a patch, None if the input is already patchified.
        num_blocks: blocks of the tower.
        joining: the block at which queries join before all other tokens, and their number.
        first_block: holds the rotation of the residual stream, if there is one.
        replay: recorded block inputs, while a search measures later blocks only.
    """

    def __init__(self, tower: Tower) -> None:
        self.deletion = DeletionConfig()
        self.hooks: list[RemovableHandle] = []
        self.num_copies: dict[int, float] = {}
        self.extra_token = False
        spans = [tower.patches_at(b) for b in range(len(tower.blocks))]
        self._spans = spans, [replace(s, lead=s.lead + 1) for s in spans]  # without and with a test-time register
        self.joining = tower.first_with_queries, tower.num_queries
        self.keep_positions = tower.keeps_places
        self.num_blocks = len(tower.blocks)
        self._rows_of = (self.num_blocks, tower.num_heads, tower.head_dim)
        self._accepted: RegisterCache | None = None
        self.patch_size = tower.patch_size
        self.replay: Replay | None = None
        self.first_block: Any = None
        self._eager = _ThreadPass()
        self._traced = _Pass()  # torch.compile and torch.export see a plain object; it is empty between passes

    @property
    def current(self) -> _Pass:
        """The pass under way in this thread."""
        return self._traced if torch.compiler.is_compiling() else self._eager

    def patches_at(self, block: int) -> PatchSpan:
        """Which tokens are patches in a block; the others are never deleted."""
        return self._spans[int(self.extra_token)][block]

    @property
    def _leading(self) -> int:
        return self._spans[0][0].lead

    @property
    def _deleted_from(self) -> PatchSpan:
        """The patches at the block of the deletion."""
        return self.patches_at(0 if self.deletion.block is None else self.deletion.block)

    def join(self, block: int) -> None:
        """Before ``block``: what was deleted moves on by the queries that join here."""
        first, count = self.joining
        state = self.current
        if block != first or not count or state.selection is None:
            return
        state.selection = D.moved_on(state.selection, count, self.patches_at(block))
        if state.valid is not None:
            state.valid = torch.nn.functional.pad(state.valid, (count, 0), value=True)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_eager", "_traced", "_accepted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _eager=_ThreadPass(), _traced=_Pass(), _accepted=None)

    def accept(self, cache: RegisterCache) -> RegisterCache:
        """A cache that was passed to a call, checked once.

        Raises:
            ValueError: it does not fit this encoder, or holds rows that are not finite.
        """
        if cache is not self._accepted:
            cache.check(*self._rows_of)
            if not torch.compiler.is_compiling():
                cache.check_finite()
                self._accepted = cache
        return cache

    def note_outputs(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the tower: whether this call gives the states between its blocks to the caller."""
        asked = (kwargs.get(name, getattr(module.config, name, None)) for name in _ARGUMENTS)
        self.current.states_wanted = any(value is not None and value is not False for value in asked)

    def begin(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None) -> None:
        """Start a forward pass: remember the patch grid."""
        state = self.current
        state.selection = state.valid = state.chosen = None
        state.replayed = None if self.replay is None else self.replay.take()
        state.grid = spatial_shapes
        if spatial_shapes is None and self.patch_size is not None and pixel_values.ndim == 4:
            state.grid = (
                pixel_values.shape[-2] // self.patch_size[0],
                pixel_values.shape[-1] // self.patch_size[1],
            )

    def delete(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotation: torch.Tensor | None = None,
        native: bool = False,
    ) -> torch.Tensor:
        """Rank and remove tokens of ``hidden`` [B, N, D]; returns [B, N - count, D] ([B, N, D] when masking or replacing).

        In a rotated residual stream (``rotation`` [D, D]) tokens are ranked in the original basis, where outliers stand out.
        ``native``: by the C++ operator where it applies.
        """
        batch, tokens, _ = hidden.shape
        config, span, state = self.deletion, self._deleted_from, self.current
        masked = self._masked()
        simple = not masked and attention_mask is None and config.score == "linf" and rotation is None
        if native and simple and config.action == "delete" and not span.trail:
            self._check_size(tokens)
            hidden, kept, dropped = torch.ops.regcache.delete_tokens(hidden, span.lead, config.count)
            state.selection = D.Selection(dropped, kept, config.count, state.grid, span)
            state.valid = None
            self._note(dropped)
            return hidden
        valid = D.valid_tokens(attention_mask, batch, tokens, hidden.device)
        states = hidden if rotation is None or config.score == "l2" else hidden @ rotation.T.to(hidden)
        selection = self._select(states, valid, masked or config.action == "replace")
        if config.action == "replace":
            return D.fill_deleted(hidden, selection, valid)
        state.selection, state.valid = selection, None if attention_mask is None else valid
        return D.remove_tokens(hidden, selection, state.valid)

    def _masked(self) -> bool:
        """Whether tokens that are deleted keep their place in this pass."""
        config, state = self.deletion, self.current
        wanted = state.states_wanted or bool(_PER_BLOCK.intersection(collected_outputs()))
        return self.keep_positions or config.rule == "threshold" or (wanted and config.fill != "none")

    def _check_size(self, tokens: int) -> None:
        """Raise ``ValueError`` where ``tokens`` are too few for the deletion."""
        count, patches = self.deletion.count, self._deleted_from.count(tokens)
        if patches < 2 * count:
            raise ValueError(
                f"deletion.count={count} would remove more than half of the {patches} patch tokens of this input. Use larger "
                "images or a smaller count."
            )

    def _select(self, states: torch.Tensor, valid: torch.Tensor, stay: bool) -> D.Selection:
        """The outlier tokens by ``states`` [B, N, D]; ``stay``: they keep their place."""
        config, span, tokens = self.deletion, self._deleted_from, states.shape[1]
        self._check_size(tokens)
        patch = span.mask(tokens, states.device)
        dropped = D.choose_dropped(D.outlier_scores(states, valid & patch, config.score), valid | ~patch, config)
        if config.action in ("replace", "per_token"):
            dropped = dropped & valid  # padding need not make up the number
        self._note(dropped)
        kept = None if stay else D.kept_positions(dropped, config.count)
        return D.Selection(dropped, kept, config.count, self.current.grid, span)

    def _note(self, chosen: torch.Tensor) -> None:
        if not torch.compiler.is_compiling():  # nothing of a pass outlives it in a graph
            self.current.chosen = chosen

    def open_mlp(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Before the block in whose MLP tokens of ``hidden`` [B, N, D] are to be taken."""
        state = self.current
        state.inside = True
        if attention_mask is not None:
            state.content = D.valid_tokens(attention_mask, hidden.shape[0], hidden.shape[1], hidden.device)

    def close_mlp(self) -> None:
        """After it, whatever happened there."""
        self.current.inside, self.current.content = False, None

    def mlp_outliers(self, x: torch.Tensor) -> torch.Tensor | None:
        """bool [B, N]: the outlier tokens by the input ``x`` [B, N, M] of the MLP output projection; None outside of the pass
        of the block of the deletion."""
        return self._select(x, self._content(x), True).dropped if self.current.inside and x.ndim == 3 else None

    def drop_mlp_rows(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Forward pre-hook of the MLP output projection: rank by its input [B, N, M], and go on without the outlier tokens."""
        del module
        x, state = args[0], self.current
        if not state.inside or x.ndim != 3:
            return None
        state.selection, state.valid = self._select(x, self._content(x), self._masked()), state.content
        return (D.remove_tokens(x, state.selection, state.valid), *args[1:])

    def spread_mlp_rows(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Forward hook of the same: [B, N, D] again, for the residual addition; :meth:`drop_states` follows it."""
        del module, args
        state = self.current
        return D.spread_tokens(output, state.selection) if state.inside and state.selection is not None else None

    def drop_states(self, hidden: torch.Tensor) -> torch.Tensor:
        """After a block in whose MLP tokens were deleted: its output [B, N, D] without them."""
        state = self.current
        return hidden if state.selection is None else D.remove_tokens(hidden, state.selection, state.valid)

    def _content(self, x: torch.Tensor) -> torch.Tensor:
        content = self.current.content
        return D.valid_tokens(None, x.shape[0], x.shape[1], x.device) if content is None else content

    def enter(self, hidden: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """Before the first block: rotate the residual stream, and add the test-time register.

        An image [N, D] with a value that is not finite becomes nan as a whole, as attention in float makes it: integer codes
        cannot say nan, so the class token would look like that of a good image.
        """
        if hidden.ndim == 3:
            hidden = hidden + (hidden - hidden).sum((1, 2), keepdim=True)  # 0, or nan
        if rotation is not None:
            hidden = hidden @ rotation.to(hidden)
        if not self.extra_token:
            return hidden
        token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])
        return torch.cat((hidden[:, : self._leading], token, hidden[:, self._leading :]), 1)

    def leave(self, hidden: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """After the last block: undo :meth:`enter`."""
        if self.extra_token:
            hidden = torch.cat((hidden[:, : self._leading], hidden[:, self._leading + 1 :]), 1)
        return hidden if rotation is None else hidden @ rotation.T.to(hidden)

    def mask_for_token(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The encoder's mask [B or 1, 1, N or 1, N] with a row and a column for the test-time register."""
        if attention_mask is None or not self.extra_token:
            return attention_mask
        order = list(range(attention_mask.shape[-1]))
        order.insert(self._leading, 0)  # the register sees, and is seen by, what the first token does
        index = torch.tensor(order, device=attention_mask.device)
        attention_mask = attention_mask.index_select(-1, index)
        return attention_mask if attention_mask.shape[-2] == 1 else attention_mask.index_select(-2, index)

    def finish(self, hidden: torch.Tensor, native: bool = False) -> torch.Tensor:
        """After the last block: restore the grid if the config asks for it (``native``: by the C++ operator where it
        applies), and forget the pass."""
        state = self.current
        selection, valid = state.selection, state.valid
        state.selection = state.valid = None
        if selection is None or self.deletion.fill == "none":
            return hidden
        span = selection.patches
        if native and selection.kept is not None and valid is None and not span.trail:
            size = D.patch_grid(selection.grid, span.count(selection.dropped.shape[1]))
            if size is not None:
                return torch.ops.regcache.restore_tokens(hidden, selection.kept, selection.dropped, span.lead, *size)
        return D.fill_deleted(D.spread_tokens(hidden, selection), selection, valid)
