"""`RegisterCache`: constant K and V rows per block, in the shape of a transformers `Cache`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from optimum_regcache.config.copies import block_copies


class RegisterLayer(CacheLayerMixin):
    """Prefix rows of one block. ``update`` returns prefix + new rows and stores nothing: the cache never grows.

    ``copies`` is tau of the rows; ``bias``, a 0-dim tensor, takes the place of ln(tau) while it is being trained.
    """

    is_compileable = True

    def __init__(
        self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, copies: float = 1.0
    ) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.keys, self.values, self.copies = keys, values, copies
        self.bias: torch.Tensor | None = None
        self.is_initialized = keys is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to initialise: the rows are given."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, N, d] -> [B, H, n + N, d]; the prefix comes first."""
        if self.keys is None or self.values is None:
            return key_states, value_states
        batch = key_states.shape[0]
        prefix_k = self.keys.to(key_states).unsqueeze(0).expand(batch, -1, -1, -1)
        prefix_v = self.values.to(value_states).unsqueeze(0).expand(batch, -1, -1, -1)
        return torch.cat((prefix_k, key_states), 2), torch.cat((prefix_v, value_states), 2)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return self.get_seq_length()

    def get_max_cache_shape(self) -> int:  # what transformers before 5.13 calls it
        return self.get_seq_length()


class RegisterCache(Cache):
    """K and V of the universal outlier token for some blocks (RegCache, arXiv 2510.04547; docs/method.md 4).

    Args:
        keys, values: block index -> [H, n, d]; the same blocks in both. n is the number of distinct registers.
        num_blocks: blocks of the encoder; blocks without rows are left alone.
        num_copies: tau > 0; tau copies of each row are the row with logit bias ln(tau) (docs/method.md 5). One number for all
            blocks, block -> number, or one for each block in ascending order.

    Attributes:
        num_copies: the number as it was given, or one for each of ``blocks``; where all are equal, one number.

    Raises:
        ValueError: blocks or shapes that do not fit together, or a tau that is not > 0 and finite.

    Passing one as ``past_key_values`` to a RegCache model overrides the registers stored in it.
    """

    layers: list[RegisterLayer]  # type: ignore[assignment]

    def __init__(
        self,
        keys: Mapping[int, torch.Tensor],
        values: Mapping[int, torch.Tensor],
        num_blocks: int,
        num_copies: float | Mapping[int, float] | Sequence[float] = 1.0,
    ) -> None:
        if set(keys) != set(values):
            raise ValueError(f"keys are given for blocks {sorted(keys)}, values for blocks {sorted(values)}.")
        if keys and not 0 <= min(keys) <= max(keys) < num_blocks:
            raise ValueError(f"Register blocks {sorted(keys)} lie outside the {num_blocks} blocks of the encoder.")
        blocks = sorted(keys)
        copies = block_copies(num_copies, blocks, "num_copies")
        shapes = {tuple(t.shape) for t in (*keys.values(), *values.values())}
        if len(shapes) > 1 or any(len(s) != 3 for s in shapes):
            raise ValueError(
                f"All register rows must share one shape [heads, registers, head_dim], got {sorted(shapes)}."
            )
        each = dict(zip(blocks, copies, strict=True)) if isinstance(copies, tuple) else dict.fromkeys(blocks, copies)
        super().__init__(
            layers=[RegisterLayer(keys.get(i), values.get(i), each.get(i, 1.0)) for i in range(num_blocks)]
        )
        self.num_copies: float | tuple[float, ...] = copies

    @property
    def logit_bias(self) -> float | tuple[float, ...]:
        """ln(tau), added to the attention logits of every register row, in the form of ``num_copies``."""
        tau = self.num_copies
        return tuple(map(math.log, tau)) if isinstance(tau, tuple) else math.log(tau)

    def copies(self, block: int) -> float:
        """tau of a block that has rows.

        Raises:
            KeyError: it has none.
        """
        self.rows(block)
        return self.layers[block].copies

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that have rows, ascending."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.keys is not None)

    @property
    def num_registers(self) -> int:
        """Distinct rows per block, 0 when empty."""
        return max((layer.get_seq_length() for layer in self.layers), default=0)

    def rows(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of a block, each [H, n, d].

        Raises:
            KeyError: the block has none.
        """
        layer = self.layers[block]
        if layer.keys is None or layer.values is None:
            raise KeyError(f"Block {block} has no registers; blocks with registers: {list(self.blocks)}.")
        return layer.keys, layer.values

    def check(self, num_blocks: int, heads: int, head_dim: int) -> None:
        """Make sure that the rows fit an encoder.

        Raises:
            ValueError: a cache for another number of blocks, or rows of another shape.
        """
        if len(self.layers) != num_blocks:
            raise ValueError(f"The register cache is for {len(self.layers)} blocks, this encoder has {num_blocks}.")
        for index in self.blocks:
            shape = self.rows(index)[0].shape
            if (shape[0], shape[2]) != (heads, head_dim):
                raise ValueError(
                    f"Register rows of block {index} have shape {tuple(shape)}; this encoder needs [{heads}, registers, "
                    f"{head_dim}]."
                )

    def check_finite(self) -> None:
        """Make sure that the rows are numbers.

        Raises:
            ValueError: rows that are nan or infinite.
        """
        for index in self.blocks:
            if not all(bool(torch.isfinite(rows).all()) for rows in self.rows(index)):
                raise ValueError(f"Register rows of block {index} are not finite. Mine them again, or load them again.")

    def restricted(
        self, blocks: tuple[int, ...], num_copies: float | Mapping[int, float] | Sequence[float] | None = None
    ) -> RegisterCache:
        """The same rows in fewer blocks and with another tau; without one each block keeps its own."""
        keys, values = ({b: self.rows(b)[i] for b in blocks} for i in (0, 1))
        if num_copies is None:
            own = self.num_copies
            num_copies = {b: self.copies(b) for b in blocks} if isinstance(own, tuple) else own
        return RegisterCache(keys, values, len(self.layers), num_copies)
