"""The most sensitive MLP output projections get 16-bit inputs, the simplest competitor of registers (docs/method.md 11.11)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from optimum_regcache.calibration.calibrate import calibrate
from optimum_regcache.calibration.quantized_inputs import quantized_inputs
from optimum_regcache.config import ModulesConfig, RegCacheConfig
from optimum_regcache.config.validation import require
from optimum_regcache.evaluation.objective import CosineObjective
from optimum_regcache.layers.install import config_sites
from optimum_regcache.methods.base import Method, PipelineState


@dataclass(frozen=True)
class MixedPrecision(Method):
    """Inputs of the ``layers`` most sensitive MLP output projections at 16 bits; the weights keep the nominal bits.

    Sensitivity: drop of the feature cosine on the calibration images when the input of that layer alone is quantized.

    Attributes:
        layers: how many.
    """

    layers: int = 2
    name: ClassVar[str] = "mixed_precision"
    paper: ClassVar[str] = "mixed precision by sensitivity"
    finds: ClassVar[tuple[tuple[str, str], ...]] = (("modules", "mixed_precision"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers >= 1, f"mixed_precision.layers must be at least 1, got {self.layers}.")

    def select(self, fit: PipelineState) -> None:
        names = {site.name: site.path for site in config_sites(fit.model, fit.config) if site.role == "activation"}
        require(bool(names), "mixed_precision needs quantized MLP output projections; modules.ignore leaves none.")
        plain = RegCacheConfig(
            weights=fit.config.weights,
            activations=replace(fit.config.activations, mlp_out_offset=False, mlp_out_hadamard=False),
            modules=ModulesConfig(ignore=fit.config.modules.ignore),
        )
        qparams = calibrate(fit.model, plain, fit.batches)
        objective = CosineObjective(fit.model, list(fit.batches))
        drops = {}
        for name in names:
            with quantized_inputs(fit.model, [name], qparams, plain):
                drops[name] = 1 - float(objective.scores(fit.model).mean())
        worst = sorted(sorted(drops), key=lambda name: -drops[name])[: self.layers]
        fit.config = fit.config.replace(modules={"mixed_precision": tuple(sorted(names[name] for name in worst))})
        fit.measured[self.name] = {"layers": worst, "drops": drops}
