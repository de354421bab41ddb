"""How much an output of a layer matters: squared gradients of the final features (PTQ4ViT's metric: docs/method.md 11.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.encoders.passes import Batch, image_features, move
from optimum_regcache.encoders.tower import find_tower, has_classifier
from optimum_regcache.registers.mlp_output import own_scale_tokens
from optimum_regcache.registers.replay import TokenSample

MICRO_BATCH = 4


@dataclass(frozen=True)
class Watched:
    """Input and importance of one module over the calibration images.

    Attributes:
        x: float32 [tokens, in] of a linear layer; [images, ...] where ``whole`` was asked for.
        importance: float32 of the shape of the output: mean of the squared gradients over the draws.
    """

    x: torch.Tensor
    importance: torch.Tensor


def squared_gradients(
    model: Any,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    draws: int = 4,
    limit: int | None = None,
    whole: bool = False,
    seed: int = 0,
) -> dict[str, Watched]:
    """Watch the inputs of modules, and the squared gradient of the loss with respect to their outputs.

    The official code takes the KL divergence between a prediction and itself, whose gradient is rounding noise. Used here:
    for a model with classes, cross-entropy against labels drawn from its own prediction (empirical Fisher without labels);
    for an encoder, ``<f(x), e>`` with ``e ~ N(0, I)`` on the normalised features: squared and averaged over draws this is the
    Gauss-Newton diagonal of the feature error (docs/method.md 11.4).

    Args:
        model: float model; parameters need no gradients.
        names: modules to watch.
        batches: calibration images.
        draws: random labels or probes per image.
        limit: largest number of tokens of linear layers (`TokenSample`).
        whole: keep whole tensors instead of tokens.
        seed: of the draws.
    """
    found: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in names}
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    left_out: dict[str, torch.Tensor | None] = {}
    micro = [part for batch in batches for part in _micro_batches(batch)]
    tower, generator = find_tower(model), torch.Generator().manual_seed(seed)
    samples = {name: TokenSample(model, micro, limit, tower.block_of(name)) for name in names}

    def hook(name: str) -> Any:
        def watch(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output
            left_out[name] = own_scale_tokens(module, inputs[name])

        return watch

    # before the hook of a late deletion, which spreads the rows of the output again
    handles = [model.get_submodule(name).register_forward_hook(hook(name), prepend=True) for name in names]
    first = 0
    try:
        for batch in micro:
            for sample in samples.values():
                sample.start(batch, first)
            first += len(batch["pixel_values"])
            inputs.clear()
            outputs.clear()
            with torch.enable_grad():
                moved = move(batch, model)
                moved["pixel_values"] = moved["pixel_values"].detach().clone().requires_grad_(True)
                losses = _losses(model, moved, draws, generator)
                squares = {name: torch.zeros_like(output, dtype=torch.float32) for name, output in outputs.items()}
                for loss in losses:
                    grads = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True, allow_unused=True)
                    for name, grad in zip(outputs, grads, strict=True):
                        if grad is not None:
                            squares[name] += grad.float().pow(2) / draws
            for name in outputs:
                for kept, x in zip(found[name], (inputs[name], squares[name]), strict=True):
                    kept.append((x if whole else samples[name].rows(x, left_out[name])).float())
    finally:
        for handle in handles:
            handle.remove()
    return {name: Watched(torch.cat(x), torch.cat(g)) for name, (x, g) in found.items()}


def _micro_batches(batch: Batch) -> Iterator[Batch]:
    for start in range(0, len(batch["pixel_values"]), MICRO_BATCH):
        yield {key: value[start : start + MICRO_BATCH] for key, value in batch.items()}


def _losses(model: Any, batch: Batch, draws: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Scalar losses, summed over the images of the batch."""
    if has_classifier(model):
        logits = model(**batch).logits.float()
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), draws, replacement=True, generator=generator)
        return [F.cross_entropy(logits, labels[:, d].to(logits.device), reduction="sum") for d in range(draws)]
    features = F.normalize(image_features(model, batch), dim=-1)
    probes = torch.randn(draws, *features.shape, generator=generator).to(features)
    return [(features * probe).sum() for probe in probes]
