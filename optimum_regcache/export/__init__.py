"""Export of encoders to ONNX (QuantizeLinear and DequantizeLinear from our own scales), also in the layout of transformers.js,
to OpenVINO and to compressed-tensors, and a runner for the first three."""

from optimum_regcache.export.compressed import export_compressed_tensors
from optimum_regcache.export.onnx import export_onnx
from optimum_regcache.export.openvino import export_openvino
from optimum_regcache.export.runner import ExportedEncoder, ExportedOutput
from optimum_regcache.export.transformers_js import export_transformers_js

__all__ = [
    "ExportedEncoder",
    "ExportedOutput",
    "export_compressed_tensors",
    "export_onnx",
    "export_openvino",
    "export_transformers_js",
]
