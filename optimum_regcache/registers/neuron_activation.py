"""The activation function of an MLP with register neurons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from optimum_regcache.encoders.tower import PatchSpan


class RegisterNeuronActivation(nn.Module):
    """The MLP's activation function, after which the register token takes over a few hidden units (docs/method.md 11.12).

    For each unit j: with m the value of largest magnitude over all tokens, sign kept, Z[register, j] = m and Z[n, j] = 0 for
    the patches n. Other tokens (CLS, trained registers, detection tokens) keep theirs. It has neither parameters nor buffers,
    so the names in the state dict do not change.

    Args:
        inner: the activation function.
        neurons: hidden units, distinct.
        patches: of the encoder; the register token stands right before them.
    """

    def __init__(self, inner: nn.Module, neurons: Sequence[int], patches: PatchSpan) -> None:
        super().__init__()
        self.inner, self.neurons, self.patches = inner, tuple(neurons), patches

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, M] -> [B, N, M]."""
        z = self.inner(hidden_states)
        index = torch.tensor(self.neurons, device=z.device)
        units = z.index_select(-1, index)  # [B, N, k]
        peak = units.gather(1, units.abs().argmax(1, keepdim=True))
        lead, end = self.patches.lead, units.shape[1] - self.patches.trail
        clean = torch.zeros_like(units[:, lead + 1 : end])
        return z.index_copy(-1, index, torch.cat((units[:, :lead], peak, clean, units[:, end:]), 1))

    def extra_repr(self) -> str:
        return f"neurons={list(self.neurons)}, register={self.patches.lead}"
