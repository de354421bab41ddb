"""Export to ONNX: the encoder's own forward, traced with `QDQLinear` in place of the int8 kernels."""

from __future__ import annotations

import inspect
import logging as python_logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import logging

from optimum_regcache.encoders.compat import EXPORT_ATTENTION
from optimum_regcache.encoders.passes import unfused
from optimum_regcache.encoders.tower import Tower, find_tower, has_classifier
from optimum_regcache.export.layout import NETWORKS, need, require_float32, versions, write_info
from optimum_regcache.export.qdq import OPSET, QDQLinear
from optimum_regcache.kernels.cpu import needs_vnni
from optimum_regcache.layers.attention import attention_products
from optimum_regcache.layers.linear import quant_linears, running_as
from optimum_regcache.registers import prepare_tower

logger = logging.get_logger(__name__)

_NOISY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")


def export_onnx(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    processor: Any = None,
    image_size: int | tuple[int, int] | None = None,
    opset: int = OPSET,
    dynamic_batch: bool = True,
) -> Path:
    """Write ``model.onnx`` with config, processor and ``export.json`` beside it.

    Quantized layers become QuantizeLinear and DequantizeLinear with the model's own scales and int8 weights, registers
    become constants, token deletion TopK and gathering. A float model is written as it is.

    Args:
        model: the encoder, in float32; unchanged. Of a model with a text tower the image side is exported, of a classifier
            the logits too.
        output_dir: made if it does not exist.
        processor: saved beside the model; its image size is the default of ``image_size``.
        image_size: pixels, side or (height, width), that the graph accepts; default: the processor's, else the config's.
        opset: ONNX operator set, at least 21.
        dynamic_batch: accept batches of any size, otherwise of one image.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: a model that has no such form, with the reason.
        ImportError: onnx or onnxscript is missing.
    """
    tower, size = prepare_export(model, processor, image_size, opset)
    path = Path(output_dir)
    path.mkdir(parents=True, exist_ok=True)
    names, program = encoder_program(model, tower, size, opset, dynamic_batch)
    save_program(program, path / NETWORKS["onnx"])
    model.config.save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    info = {"format": "onnx", **describe(model, tower, size, opset), "outputs": names, "dynamic_batch": dynamic_batch}
    write_info(path, info)
    return path


def prepare_export(
    model: PreTrainedModel, processor: Any, image_size: int | tuple[int, int] | None, opset: int
) -> tuple[Tower, tuple[int, int]]:
    """The tower, and (height, width) of the pixels that the graph accepts; before anything is written.

    Raises:
        ValueError, ImportError: as `export_onnx`.
    """
    need("onnx")
    need("onnxscript")
    tower = find_tower(model)
    if opset < OPSET:
        raise ValueError(f"opset must be at least {OPSET}, got {opset}.")
    check_exportable(model, tower)
    return tower, pixel_size(tower, processor, image_size)


def encoder_program(
    model: PreTrainedModel,
    tower: Tower,
    size: tuple[int, int],
    opset: int,
    dynamic_batch: bool,
    outputs: tuple[str, ...] | None = None,
) -> tuple[list[str], Any]:
    """Names of the outputs and the ONNX program of the image side; ``outputs``: only these, in this order."""
    wrapper = EncoderOutputs(model, tower, size, outputs).eval()
    pixels = torch.zeros(2 if dynamic_batch else 1, 3, *size, device=model.device)
    with torch.no_grad():
        names = list(wrapper.named(pixels))
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}} if dynamic_batch else None
    with _export_attention(wrapper.tower), unfused(model), running_as(model, QDQLinear):
        return names, trace(wrapper, {"pixel_values": pixels}, names, opset, shapes)


def save_program(program: Any, path: Path) -> None:
    """Write ``path``, and ``path.data`` beside it for weights above 2 GB."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        program.save(Path(temporary) / path.name)
        for file in Path(temporary).iterdir():
            os.replace(file, path.parent / file.name)


def describe(model: PreTrainedModel, tower: Tower, size: tuple[int, int], opset: int) -> dict[str, Any]:
    """What ``export.json`` says about a model in ONNX, whatever the layout."""
    config = getattr(model.config, "quantization_config", None)
    return {
        "model_class": type(model).__name__,
        "image_size": list(size),
        "num_prefix_tokens": tower.num_prefix_tokens,
        "num_trailing_tokens": tower.num_trailing_tokens,
        "quantization": config.label if config else None,
        "quantized_layers": sum(1 for _ in quant_linears(model)),
        "needs_vnni": any(needs_vnni(2**m.activations.bits - 1, m.codes()) for _, m in quant_linears(model)),
        "opset": opset,
        "versions": versions("optimum-regcache", "torch", "transformers", "onnx", "onnxscript"),
    }


def check_exportable(model: PreTrainedModel, tower: Tower) -> None:
    """Refuse what has no integer form in an ONNX file.

    Raises:
        ValueError: with the reason and what to do.
    """
    name = type(model).__name__
    if tower.family.always_mask:
        raise ValueError(
            f"{name} ({tower.family.name}) takes patches of varying grids with a padding mask; the export has one fixed "
            "image size and no mask. Use a SigLIP encoder, or run the model in PyTorch."
        )
    if tower.num_queries:
        raise ValueError(
            f"{name} ({tower.family.name}) gives classes and masks of its queries, which the export does not write. Run the "
            "model in PyTorch."
        )
    if tower.is_backbone:
        raise ValueError(
            f"{name} returns feature maps of chosen stages, which the export does not write. Export the encoder class, for "
            "example Dinov2Model."
        )
    require_float32(model)
    if any(True for _ in attention_products(model)):
        raise ValueError(
            "Quantized attention products are simulated and have no form in the export. Quantize with "
            "attention.quantize=false (without --quantize-attention)."
        )
    for layer, module in quant_linears(model):
        reason = QDQLinear.unsupported_reason(module.state())
        if reason is not None:
            raise ValueError(
                f"Layer {layer} cannot be exported: {reason} Quantize with static uniform activations of at most 8 bits, "
                "for example the preset w8a8 without ptq4vit and mixed_precision."
            )
    runtime = prepare_tower(model)
    if runtime.deletion.active and runtime.deletion.rule == "threshold":
        raise ValueError(
            "deletion.rule='threshold' needs the median norm, which ONNX has no operator for. Quantize with "
            "deletion.rule='topk'."
        )


def pixel_size(tower: Tower, processor: Any, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the pixels that the graph accepts."""
    images = getattr(processor, "image_processor", processor)
    if image_size is None and images is not None:
        given = getattr(images, "crop_size", None) if getattr(images, "do_center_crop", False) else None
        given = given or getattr(images, "size", None)
        if given is not None and all(k in given for k in ("height", "width")):
            image_size = (int(given["height"]), int(given["width"]))
    size: Any = tower.config.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    rows, columns = tower.patch_size or (1, 1)
    if height < rows or width < columns:
        raise ValueError(f"image_size {height} x {width} is smaller than a patch of {rows} x {columns} pixels.")
    return height, width


class EncoderOutputs(nn.Module):
    """Pixels [B, 3, H, W] -> the tensors that the exported graph returns.

    ``last_hidden_state`` and ``pooler_output`` of the tower, ``image_embeds`` where the model projects them, ``logits`` of a
    classifier; with ``outputs`` only these, in this order.
    """

    def __init__(
        self, model: PreTrainedModel, tower: Tower, size: tuple[int, int], outputs: tuple[str, ...] | None = None
    ) -> None:
        super().__init__()
        self.model, self.tower, self._outputs = model, tower.module, outputs
        trained = tower.config.image_size
        trained = (trained, trained) if isinstance(trained, int) else tuple(trained)
        parameters = inspect.signature(type(tower.module).__mro__[0].forward).parameters
        resize = size != trained and "interpolate_pos_encoding" in parameters
        self._options: dict[str, Any] = {"interpolate_pos_encoding": True} if resize else {}

    def named(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs by name; those that the model does not have are left out."""
        model: Any = self.model
        found: dict[str, Any] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            found["last_hidden_state"] = output.last_hidden_state
            found["pooler_output"] = getattr(output, "pooler_output", None)

        handle = self.tower.register_forward_hook(note)
        try:
            if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
                features = model.get_image_features(pixel_values=pixel_values, **self._options).pooler_output
                found["image_embeds"] = None if features is found["pooler_output"] else features
            elif has_classifier(model):
                found["logits"] = model(pixel_values=pixel_values, **self._options).logits
            elif type(model).__name__.endswith("WithProjection"):
                found["image_embeds"] = model(pixel_values=pixel_values, **self._options).image_embeds
            else:
                self.tower(pixel_values=pixel_values, **self._options)
        finally:
            handle.remove()
        return {name: found[name] for name in self._outputs or found if found.get(name) is not None}

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(pixel_values).values())


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention of [B, H, N, d]: the nodes that both runtimes fuse."""
    del module, dropout, kwargs
    logits = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    return (logits.softmax(-1) @ value).transpose(1, 2), None


def _no_mask(**kwargs: Any) -> None:
    """There is no padding; while tracing, transformers would write out a mask of ones."""
    del kwargs


@contextmanager
def _export_attention(tower: Any) -> Iterator[None]:
    """The tower computes its attention by `_attention`, without masks."""
    AttentionInterface.register(EXPORT_ATTENTION, _attention)
    AttentionMaskInterface.register(EXPORT_ATTENTION, _no_mask)
    before = tower.config._attn_implementation
    tower.set_attn_implementation(EXPORT_ATTENTION)
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks of the exporter's own libraries about themselves."""
    levels = {name: python_logging.getLogger(name).level for name in _NOISY_LOGGERS}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        for name in _NOISY_LOGGERS:
            python_logging.getLogger(name).setLevel(python_logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                python_logging.getLogger(name).setLevel(level)


def _stable_sort() -> Any:
    """ONNX's TopK breaks ties by the lower index, as a stable sort does; the exporter has no translation of its own."""
    op: Any = need("onnxscript").opset21

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        return op.TopK(self, op.Shape(self, start=dim, end=dim + 1), axis=dim, largest=int(descending), sorted=1)

    return stable_sort


def trace(wrapper: nn.Module, inputs: dict[str, torch.Tensor], names: list[str], opset: int, shapes: Any) -> Any:
    """The ONNX program of ``wrapper`` with inputs and outputs of these names."""
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            wrapper,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=names,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            verbose=False,
        )
    _own_zero_points(program.model.graph)
    return program


def _own_zero_points(graph: Any) -> None:
    """Give every weight a zero point of its own. Where integer kernels saturate, ONNX Runtime moves s8 weights to u8 and with
    them each zero point: it stops at one that several weights share, and guesses the shape of one that is left out."""
    ir: Any = need("onnx_ir")
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0].name not in graph.initializers:
            continue
        _, scale, *zero = node.inputs
        if zero and len(zero[0].uses()) == 1:
            continue
        value = zero[0].const_value.numpy() if zero else np.zeros(tuple(scale.shape), np.int8)
        name = f"{node.outputs[0].name}_zero_point"
        own = ir.Value(name=name, const_value=ir.tensor(value, name=name))
        graph.register_initializer(own)
        node.resize_inputs(3)
        node.replace_input_with(2, own)
