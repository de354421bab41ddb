"""Published quantization methods, one file each; `registry` lists them, `resolution` makes a config ready
for them, `pipeline` holds their order and the fit."""

from optimum_regcache.methods.base import Group, Method, PipelineState
from optimum_regcache.methods.pipeline import STAGES, Quantized, quantize_with
from optimum_regcache.methods.registry import METHODS, build_methods
from optimum_regcache.methods.resolution import ResolvedConfig, resolve, without_methods

__all__ = [
    "METHODS",
    "STAGES",
    "Group",
    "Method",
    "PipelineState",
    "Quantized",
    "ResolvedConfig",
    "build_methods",
    "quantize_with",
    "resolve",
    "without_methods",
]
