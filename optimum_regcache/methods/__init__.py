"""Published quantization methods, one file each; `registry` lists them, `pipeline` holds their order and the fit."""

from optimum_regcache.methods.base import Group, Method, PipelineState
from optimum_regcache.methods.pipeline import STAGES, Quantized, configured, quantize_with
from optimum_regcache.methods.registry import METHODS, build_methods

__all__ = [
    "METHODS",
    "STAGES",
    "Group",
    "Method",
    "PipelineState",
    "Quantized",
    "build_methods",
    "configured",
    "quantize_with",
]
