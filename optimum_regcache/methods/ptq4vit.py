"""PTQ4ViT (arXiv 2111.12293): scales by gradient-weighted output error, twin quantizers after GELU and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import AttentionConfig, RegCacheConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.layers.attention import attention_products, install_products
from optimum_regcache.methods._search.gradients import squared_gradients
from optimum_regcache.methods._search.product import search_products
from optimum_regcache.methods._search.scale import SearchSpace, search_group
from optimum_regcache.methods.base import Method, PipelineState, linear_groups


@dataclass(frozen=True)
class PTQ4ViT(Method):
    """Scale search with the Hessian-guided metric, twin uniform quantizers in their disjoint form (docs/method.md 11.4).

    Every layer is searched with the float inputs of all others, as in the official code. Query, key and value share one
    input scale and have a weight scale each.

    Attributes:
        candidates, low, high, rounds: `SearchSpace`.
        twin: use the twin quantizer after GELU (and after softmax where attention products are quantized).
        weight_granularity: ``per_tensor`` as in the paper, or ``per_channel``.
        draws: random probes per image for the gradients.
        max_images: calibration images used.
        max_tokens: tokens of these used for a linear layer.
        product_images: images used for the attention products.
        seed: of the probes.
    """

    candidates: int = 100
    low: float = 0.01
    high: float = 1.2
    rounds: int = 3
    twin: bool = True
    weight_granularity: str = "per_tensor"
    draws: int = 4
    max_images: int = 32
    max_tokens: int = 512
    product_images: int = 8
    seed: int = 0
    name: ClassVar[str] = "ptq4vit"
    paper: ClassVar[str] = "PTQ4ViT (arXiv 2111.12293)"
    provides: ClassVar[str] = "input scales"
    needs_static: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "mixed_precision": "the twin quantizer takes care of the MLP output projections.",
    }

    def configure(self, config: RegCacheConfig) -> RegCacheConfig:
        form = "twin" if self.twin else "uniform"
        return config.replace(
            weights={"granularity": self.weight_granularity, "observer": "minmax", "symmetric": True},
            activations={"symmetric": True, "observer": "minmax", "post_activation": form},
            attention={"symmetric": True, "observer": "minmax", "granularity": "per_head", "probabilities": form},
        )

    def unread(self, config: RegCacheConfig) -> dict[str, str]:
        return {} if config.attention.quantize else {"product_images": "the attention products stay float"}

    def scales(self, fit: PipelineState) -> None:
        groups = linear_groups(fit.model, fit.config)
        batches = first_images(fit.batches, self.max_images)
        names = [name for group in groups for name in group.names]
        draws, seed = self.draws, self.seed
        watched = squared_gradients(fit.model, names, batches, limit=self.max_tokens, draws=draws, seed=seed)
        space = SearchSpace(self.low, self.high, self.candidates, self.rounds)
        for group in bar(groups, "PTQ4ViT scales", shown=fit.progress):
            importance = [watched[name].importance for name in group.names]
            search_group(fit, group, watched[group.names[0]].x, space, importance)
        if fit.config.attention.quantize:
            self._search_products(fit, first_images(batches, self.product_images), space)

    def _search_products(self, fit: PipelineState, batches: Sequence[Batch], space: SearchSpace) -> None:
        install_products(fit.model, fit.config.attention, bypass=True)
        try:
            found = list(attention_products(fit.result))
            for name, products in bar(found, "PTQ4ViT products", shown=fit.progress):
                parts = ("query", "key", "probabilities", "value", "logits", "output")
                names = [f"{name}.{part}" for part in parts]
                watched = squared_gradients(fit.model, names, batches, whole=True, draws=self.draws, seed=self.seed)
                search_products(products, {part: watched[f"{name}.{part}"] for part in parts}, space)
        finally:
            install_products(fit.model, AttentionConfig())
        fit.measured[self.name] = {"product_images": sum(len(b["pixel_values"]) for b in batches)}


def first_images(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first ``count`` images of ``batches``."""
    found: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        found.append({key: value[:count] for key, value in batch.items()})
        count -= len(batch["pixel_values"])
    return found
