"""Calibration: forward passes of the float model that feed the observers of the static activations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from optimum_regcache.calibration.observers import FocusObserver, ProbabilityObserver, make_observer
from optimum_regcache.config import ActivationsConfig, AttentionConfig, RegCacheConfig
from optimum_regcache.encoders.outputs import class_logits
from optimum_regcache.encoders.passes import Batch, PaddingMask, image_features
from optimum_regcache.encoders.tower import PatchSpan, find_tower, has_classifier
from optimum_regcache.encoders.visiting import patch_span
from optimum_regcache.layers.attention import AttentionProducts, attention_products, install_products
from optimum_regcache.layers.install import config_sites, site_activations
from optimum_regcache.math.hadamard import block_hadamard, block_order
from optimum_regcache.registers.mlp_output import own_scale_tokens
from optimum_regcache.registers.replay import Recorded, replaying


class _Tap:
    """Feeds the observer of one linear layer from a forward pre-hook."""

    def __init__(self, activations: ActivationsConfig, padding: PaddingMask) -> None:
        self.config, self.padding = activations, padding
        self.observer = make_observer(activations)

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, a = args[0], self.config
        own = own_scale_tokens(module, x)
        if own is not None:
            x = x[self.padding.valid(x.shape[0], x.shape[1], x.device) & ~own]
        elif a.outlier_tokens == "per_token" and x.ndim == 3:
            x = _normal_tokens(x, a.outlier_ratio, self.padding.valid(x.shape[0], x.shape[1], x.device))
        else:
            x = self.padding.content(x)
        if a.mlp_out_hadamard:
            x = block_hadamard(x, block_order(x.shape[-1]))
        self.observer.update(x.clamp(min=0) if a.post_activation == "twin" else x)

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.observer.qparams()


class _OperandTap:
    """The same for an operand [B, H, N, *] of an attention product, with an observer for all heads or one for each."""

    def __init__(self, role: str, config: AttentionConfig, heads: int, padding: PaddingMask) -> None:
        self.padding, self.per_head = padding, config.granularity == "per_head" and role != "probabilities"
        if role == "probabilities":
            self.observers: list[Any] = [ProbabilityObserver(config)]
        else:
            observer = ActivationsConfig(bits=config.bits, symmetric=config.symmetric, observer=config.observer)
            self.observers = [make_observer(observer) for _ in range(heads if self.per_head else 1)]

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = self.padding.content(args[0].transpose(1, 2))  # tokens first, then heads
        if not self.per_head:
            return self.observers[0].update(x)
        for head, observer in enumerate(self.observers):
            observer.update(x.select(-2, head))
        return None

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = [observer.qparams() for observer in self.observers]
        if not self.per_head:
            return found[0]
        return torch.stack([scale for scale, _ in found]), torch.stack([zero for _, zero in found])


class _FocusTap:
    """The same for probabilities of the form ``dfq``, which are judged together with the values they meet."""

    def __init__(
        self, products: AttentionProducts, config: AttentionConfig, patches: PatchSpan, padding: PaddingMask
    ) -> None:
        self.padding, self.observer = padding, FocusObserver(config, patches)
        self.values: torch.Tensor | None = None
        products.value.register_forward_pre_hook(self._keep)  # goes with the products

    def _keep(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.values = args[0]

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, values, self.values = args[0], self.values, None
        if values is not None:
            self.observer.update(x, values, self.padding.valid(x.shape[0], x.shape[2], x.device))

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.observer.qparams()


def _normal_tokens(x: torch.Tensor, ratio: float, valid: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` [B, N, D] where ``valid`` [B, N] whose l_inf norm is at most ``ratio`` times the median of the valid
    tokens of their image, [rows, D]."""
    norms = x.abs().amax(-1).float().masked_fill(~valid, torch.nan)
    return x[norms <= ratio * norms.nanmedian(1, keepdim=True).values]


QParams = dict[str, tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def calibrate(
    float_model: nn.Module, config: RegCacheConfig, batches: Iterable[Batch], known: Recorded | None = None
) -> QParams:
    """Static scales of every module, and of every attention operand, that ``config`` quantizes.

    The float model runs with whatever registers and deletion are installed in it: prefix rows never pass through a linear
    layer, so they cannot enter the statistics (docs/method.md 4); padding rows are left out.

    Args:
        float_model: unquantized model with its `prepare_tower` wiring.
        config: activations, attention and modules.
        batches: calibration images.
        known: inputs of a block for these batches. Earlier blocks are skipped then and have no scales in the result.

    Returns:
        module name -> (scale, zero_point); 0-dim, or [H] for operands with a scale per head. Empty if everything is dynamic.

    Raises:
        ValueError: no batch was given.
    """
    taps: dict[str, _Tap | _OperandTap | _FocusTap] = {}
    padding, handles = PaddingMask(), []

    def watch(name: str, tap: _Tap | _OperandTap | _FocusTap) -> None:
        taps[name] = tap
        handles.append(float_model.get_submodule(name).register_forward_pre_hook(tap))

    first = 0 if known is None else known.block
    for site in config_sites(float_model, config):
        activations = site_activations(config, site)
        if activations.mode == "static" and (site.block is None or site.block >= first):
            watch(site.name, _Tap(activations, padding))
    if config.attention.quantize:
        install_products(float_model, config.attention, bypass=True)
        tower = find_tower(float_model)
        spans = {tower.attention(b).products: patch_span(tower, b) for b in range(first, len(tower.blocks))}
        for name, products in attention_products(float_model):
            for role, _ in products.operands() if products in spans else ():
                focused = role == "probabilities" and config.attention.probabilities == "dfq"
                tap = _FocusTap(products, config.attention, spans[products], padding) if focused else None
                watch(f"{name}.{role}", tap or _OperandTap(role, config.attention, tower.num_heads, padding))
    try:
        if taps:
            with nullcontext() if known is None else replaying(float_model, known.block, known.states):
                for batch in batches:
                    padding.start(batch)
                    run_heads(float_model, batch)
    finally:
        for handle in handles:
            handle.remove()
        if config.attention.quantize:
            install_products(float_model, AttentionConfig())
    return {name: tap.qparams() for name, tap in taps.items()}  # type: ignore[misc]


def run_heads(model: Any, batch: Batch) -> None:
    """Run everything that may be quantized: the classifier if there is one, else the features."""
    if has_classifier(model):
        class_logits(model, batch)
    else:
        image_features(model, batch)
