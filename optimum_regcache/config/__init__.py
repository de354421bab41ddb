"""What a quantized model is made of, and how it is found: plain data without tensors."""

from optimum_regcache.config.model import FORMAT_VERSION, PRESETS, QUANT_METHOD, RegCacheConfig
from optimum_regcache.config.parts import (
    ActivationsConfig,
    AttentionConfig,
    DeletionConfig,
    ModulesConfig,
    RegistersConfig,
    RewritesConfig,
    WeightsConfig,
)
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig

__all__ = [
    "FORMAT_VERSION",
    "PRESETS",
    "QUANT_METHOD",
    "ActivationsConfig",
    "AttentionConfig",
    "DataConfig",
    "DeletionConfig",
    "ModulesConfig",
    "Recipe",
    "RegCacheConfig",
    "RegistersConfig",
    "RewritesConfig",
    "SearchConfig",
    "WeightsConfig",
]
