"""The registry of methods: one line each."""

from __future__ import annotations

from typing import Any

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.validation import build_part, require
from optimum_regcache.methods.aiqvit import AIQViT
from optimum_regcache.methods.base import Method
from optimum_regcache.methods.bias_correction import BiasCorrection
from optimum_regcache.methods.dynamic import Dynamic
from optimum_regcache.methods.gptq import GPTQ
from optimum_regcache.methods.mixed_precision import MixedPrecision
from optimum_regcache.methods.mse import MSE
from optimum_regcache.methods.noisyquant import NoisyQuant
from optimum_regcache.methods.norm_tuning import NormTuning
from optimum_regcache.methods.oracle import Oracle
from optimum_regcache.methods.output_mse import OutputMSE
from optimum_regcache.methods.percentile import Percentile
from optimum_regcache.methods.ptq4vit import PTQ4ViT
from optimum_regcache.methods.reconstruction import GLFQ, Light, Reconstruction
from optimum_regcache.methods.repq_vit import RepQViT
from optimum_regcache.methods.rotation import Rotation
from optimum_regcache.methods.rtn import RTN
from optimum_regcache.methods.smoothquant import SmoothQuant
from optimum_regcache.methods.test_time_registers import TestTimeRegisters

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        RTN,
        Percentile,
        MSE,
        OutputMSE,
        Dynamic,
        Oracle,
        PTQ4ViT,
        RepQViT,
        NoisyQuant,
        SmoothQuant,
        GPTQ,
        Reconstruction,
        Light,
        GLFQ,
        AIQViT,
        Rotation,
        BiasCorrection,
        NormTuning,
        TestTimeRegisters,
        MixedPrecision,
    )
}


def build_methods(config: RegCacheConfig) -> list[Method]:
    """The methods of ``config.methods`` with their parameters, in the order of the registry.

    Raises:
        ValueError: an unknown method or parameter, with those that exist.
        TypeError: a parameter of another type.
    """
    found: list[Method] = []
    for entry in config.methods:
        values: dict[str, Any] = dict(entry)
        name = values.pop("name")
        require(name in METHODS, f"Unknown method {name!r}; expected one of {', '.join(METHODS)}.")
        found.append(build_part(METHODS[name], values, f"method {name}"))
    order = list(METHODS)
    return sorted(found, key=lambda method: order.index(method.name))
