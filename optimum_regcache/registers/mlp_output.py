"""What a deletion inside the MLP needs at the MLP output projection (fc2) of its block: a hook on either side for ``late``, a
choice of tokens for ``per_token``."""

from __future__ import annotations

from typing import Any

import torch

from optimum_regcache.encoders.tower import Tower
from optimum_regcache.registers.state import TowerRuntime


def wire_mlp_output(runtime: TowerRuntime, tower: Tower) -> None:
    """Put on fc2 of each block what ``runtime.deletion`` needs there, and take off what an earlier deletion needed."""
    deletion = runtime.deletion
    for handle in runtime.hooks:
        handle.remove()
    runtime.hooks = []
    for index in range(len(tower.blocks)):
        linear: Any = tower.mlp_out(index)
        here = deletion.inside_mlp and index == deletion.block
        if here and deletion.action == "late":  # before all other hooks, so that these see what is left
            before = linear.register_forward_pre_hook(runtime.drop_mlp_rows, prepend=True)
            runtime.hooks += [before, linear.register_forward_hook(runtime.spread_mlp_rows)]
        choose = runtime.mlp_outliers if here and deletion.action == "per_token" else None
        if getattr(linear, "own_scales", None) != choose:
            linear.own_scales = choose


def own_scale_tokens(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """bool [B, N]: the tokens of the input ``x`` [B, N, in] of a linear layer, float or quantized, that get a scale of their
    own, so that no static scale is fitted to them; None where there are none.

    To be called while the layer's block runs, in a hook.
    """
    choose = getattr(module, "own_scales", None)
    return None if choose is None else choose(x)


def rewire(tower: Tower) -> None:
    """`wire_mlp_output` again, after modules were replaced; nothing for an encoder that was never prepared."""
    runtime = getattr(tower.blocks[0], "regcache", None)
    if runtime is not None:
        wire_mlp_output(runtime, tower)
