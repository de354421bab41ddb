"""Export to OpenVINO's own format, through the ONNX file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_regcache.export.layout import NETWORKS, copy_beside, need, read_info, versions, write_info
from optimum_regcache.export.onnx import export_onnx


def export_openvino(model_or_onnx: PreTrainedModel | str | Path, output_dir: str | Path, **kwargs: Any) -> Path:
    """Write ``openvino_model.xml`` and ``.bin`` with config, processor and ``export.json`` beside them.

    Args:
        model_or_onnx: the encoder, or a directory that `export_onnx` wrote.
        output_dir: made if it does not exist.
        kwargs: of `export_onnx`, if a model is given.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: a model that cannot be exported, a directory that holds no exported ONNX encoder, or options beside a
            directory.
        ImportError: openvino, onnx or onnxscript is missing.
    """
    openvino = need("openvino")
    if isinstance(model_or_onnx, PreTrainedModel):
        with tempfile.TemporaryDirectory() as temporary:
            return export_openvino(export_onnx(model_or_onnx, temporary, **kwargs), output_dir)
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)} belong to the ONNX export; {model_or_onnx} is exported already.")
    source, path = Path(model_or_onnx), Path(output_dir)
    info = read_info(source)
    if info["format"] != "onnx" or "layout" in info:
        kind = info.get("layout", info["format"])
        raise ValueError(f"{source} holds the format {kind}; a directory of export_onnx is needed.")
    path.mkdir(parents=True, exist_ok=True)
    network = openvino.convert_model(source / NETWORKS["onnx"])
    openvino.save_model(network, path / NETWORKS["openvino"], compress_to_fp16=False)
    copy_beside(source, path)
    info["versions"] |= versions("openvino")
    write_info(path, {**info, "format": "openvino"})
    return path
