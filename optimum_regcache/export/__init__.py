"""Export of encoders to ONNX (QuantizeLinear and DequantizeLinear from our own scales) and OpenVINO, and a runner for both."""

from optimum_regcache.export.onnx import export_onnx
from optimum_regcache.export.openvino import export_openvino
from optimum_regcache.export.runner import ExportedEncoder, ExportedOutput

__all__ = ["ExportedEncoder", "ExportedOutput", "export_onnx", "export_openvino"]
