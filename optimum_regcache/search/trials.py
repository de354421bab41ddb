"""A float model and its quantized twin, so that one configuration after another can be calibrated and scored."""

from __future__ import annotations

import torch
from torch import nn

from optimum_regcache.calibration.calibrate import calibrate
from optimum_regcache.config import DeletionConfig, RegCacheConfig
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.sharing import shared_copy
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.layers.install import assign_input_qparams, quantize_modules
from optimum_regcache.registers import RegisterCache, prepare_tower, set_deletion, set_registers


class TrialRunner:
    """Calibrates and scores configurations that share their weights.

    Weights are quantized once; activation scales are found anew for every configuration (docs/method.md 8).

    Args:
        model: the float model; not changed. Its tensors are shared, not copied.
        config: weights, activations and modules.
        calibration: batches for the activation scales.

    Attributes:
        float_model: float copy, wired for registers.
        quantized: quantized copy, wired the same way.
    """

    def __init__(self, model: nn.Module, config: RegCacheConfig, calibration: list[Batch]) -> None:
        self.config, self.calibration = config, calibration
        self.float_model = shared_copy(model).eval()
        prepare_tower(self.float_model)
        self.quantized = shared_copy(self.float_model)
        quantize_modules(self.quantized, config)

    def install(self, cache: RegisterCache | None, deletion: DeletionConfig) -> None:
        """Put registers and deletion into both models and recalibrate the quantized one."""
        for model in (self.float_model, self.quantized):
            set_registers(model, cache)
            set_deletion(model, deletion)
        assign_input_qparams(self.quantized, calibrate(self.float_model, self.config, self.calibration))

    def reset(self) -> None:
        """Remove registers and deletion from the float model."""
        set_registers(self.float_model, None)
        set_deletion(self.float_model, DeletionConfig())

    def score(self, cache: RegisterCache | None, deletion: DeletionConfig, objective: Objective) -> torch.Tensor:
        """Install, recalibrate and score; float32 [n]."""
        self.install(cache, deletion)
        scores = objective.scores(self.quantized)
        self.reset()
        return scores
