"""Registers as leaves of autograd."""

from __future__ import annotations

import math

import torch

from optimum_regcache.registers.cache import RegisterCache


class TrainedRows:
    """K, V and logit bias of a cache as float32 leaves of autograd.

    Args:
        cache: where they start; unchanged.
        device: of the leaves.
        dtype: float32, or float64 to compare gradients.
    """

    def __init__(self, cache: RegisterCache, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(device, dtype, copy=True).requires_grad_()

        self.blocks, self._depth = cache.blocks, len(cache.layers)
        self.keys = {b: leaf(cache.rows(b)[0]) for b in self.blocks}
        self.values = {b: leaf(cache.rows(b)[1]) for b in self.blocks}
        self.biases = {b: leaf(torch.tensor(math.log(cache.copies(b)))) for b in self.blocks}

    def leaves(self) -> list[torch.Tensor]:
        """Keys, values and biases, block after block each."""
        return [*self.keys.values(), *self.values.values(), *self.biases.values()]

    def finite(self) -> bool:
        """Whether all of them are numbers, and so is every tau."""
        copies = [self._copies(b) for b in self.blocks]
        return all(0 < c < math.inf for c in copies) and all(bool(t.isfinite().all()) for t in self.leaves())

    def live(self) -> RegisterCache:
        """The leaves themselves, for a pass that autograd records."""
        cache = RegisterCache(self.keys, self.values, self._depth, {b: self._copies(b) for b in self.blocks})
        for block, bias in self.biases.items():
            cache.layers[block].bias = bias
        return cache

    def frozen(self) -> RegisterCache:
        """A copy of what they are now."""
        keys, values = ({b: t.detach().clone() for b, t in rows.items()} for rows in (self.keys, self.values))
        return RegisterCache(keys, values, self._depth, {b: self._copies(b) for b in self.blocks})

    def _copies(self, block: int) -> float:
        bias = float(self.biases[block].detach())
        return math.exp(bias) if bias < 700 else math.inf
