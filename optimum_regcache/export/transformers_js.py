"""Export in the layout that transformers.js reads: ``config.json``, processor and tokenizer files, networks below ``onnx/``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from optimum_regcache.config.files import write_json, write_text
from optimum_regcache.data.labels import imagenet_classes
from optimum_regcache.export.layout import float_config, need, write_info
from optimum_regcache.export.onnx import describe, encoder_program, prepare_export, save_program, trace
from optimum_regcache.export.qdq import OPSET
from optimum_regcache.registers import get_register_cache, prepare_tower

LAYOUT = "transformers.js"
TEXT_COSINE = 0.999  # an int8 text tower below it is not written
# their texts need no mask: what follows the end of a text changes nothing (CLIP), or is read (SigLIP)
_DUAL = ("clip", "metaclip_2", "siglip")
_LARGEST = 2**31  # bytes of a file that holds its own weights
_TEXTS = 64


class _TextOutputs(nn.Module):
    """Token ids int64 [B, L] -> ``text_embeds`` [B, D] of a model that projects, else the two outputs of its text tower."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        projects = hasattr(model, "text_projection")
        self.names = ["text_embeds"] if projects else ["last_hidden_state", "pooler_output"]

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model: Any = self.model
        output = model.get_text_features(input_ids=input_ids)
        return tuple(output.pooler_output if name == "text_embeds" else getattr(output, name) for name in self.names)


def export_transformers_js(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    processor: Any = None,
    image_size: int | tuple[int, int] | None = None,
    opset: int = OPSET,
) -> Path:
    """Write the folder that transformers.js opens; names end in ``_quantized`` (dtype ``q8``) if the model is quantized.

    Of a model with a text tower: ``onnx/vision_model``, ``onnx/text_model`` and both as ``onnx/model``. The text tower is float
    in the model; its ``_quantized`` file has int8 weights where that keeps a cosine of 0.999, else float ones (``README.md``
    there says which), and ``onnx/text_model.onnx`` is float. Of any other encoder: ``onnx/model``.

    Args:
        model, output_dir, image_size, opset: as for `export_onnx`.
        processor: saved beside the networks; needed, with a fast tokenizer if there is a text tower.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: a model that has no such form, or a processor that transformers.js cannot read.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    tower, size = prepare_export(model, processor, image_size, opset)
    dual = hasattr(model, "get_text_features")
    _check(model, processor, dual)
    path = Path(output_dir)
    (path / "onnx").mkdir(parents=True, exist_ok=True)
    _write_processor(processor, path, dual)
    suffix = "_quantized" if getattr(model.config, "quantization_config", None) else ""
    projects = hasattr(model, "visual_projection")
    outputs = (("image_embeds",) if projects else ("last_hidden_state", "pooler_output")) if dual else None
    names, program = encoder_program(model, tower, size, opset, True, outputs)
    network = f"onnx/{'vision_model' if dual else 'model'}{suffix}.onnx"
    save_program(program, path / network)
    info = {"format": "onnx", "layout": LAYOUT, "network": network, **describe(model, tower, size, opset)}
    info |= {"outputs": names, "dynamic_batch": True}
    if dual:
        info["text"] = _write_text_tower(model, processor, path / "onnx", suffix, opset)
        _join(model, path / network, path / f"onnx/text_model{suffix}.onnx", path / f"onnx/model{suffix}.onnx")
    config = float_config(model.config).to_dict()
    config["transformers.js_config"] = {"dtype": "q8" if suffix else "fp32"}
    write_json(path / "config.json", config)
    write_text(path / "README.md", _readme(model, path, info))
    write_info(path, info)
    return path


def _check(model: PreTrainedModel, processor: Any, dual: bool) -> None:
    """Refuse what transformers.js could not use, before anything is written."""
    name, kind = type(model).__name__, model.config.model_type
    if dual and kind not in _DUAL:
        raise ValueError(
            f"The layout {LAYOUT} knows text towers of the types {', '.join(_DUAL)}, {name} is of {kind}. Export its image "
            "side with the layout flat."
        )
    if processor is None:
        raise ValueError(f"The layout {LAYOUT} needs the model's processor; none is saved beside the model.")
    if dual and not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
        raise ValueError(f"The layout {LAYOUT} needs a tokenizer with a tokenizer.json; {name} came without one.")
    text = sum(4 * p.numel() for n, p in model.named_parameters() if dual and n.startswith("text_"))
    if text + sum(p.numel() * p.element_size() for p in model.state_dict().values()) >= _LARGEST:
        raise ValueError(
            f"{name} is too large for one file of 2 GB, which the layout {LAYOUT} writes. Export its image side with the "
            "layout flat."
        )


def _write_processor(processor: Any, path: Path, dual: bool) -> None:
    """``preprocessor_config.json``, which alone transformers.js reads, and the tokenizer's files."""
    images = getattr(processor, "image_processor", processor)
    images.save_pretrained(path)
    if dual:
        processor.tokenizer.save_pretrained(path)
    for name in ("preprocessor_config.json", *(("tokenizer.json",) if dual else ())):
        if not (path / name).is_file():
            raise ValueError(f"The processor of the model gives no {name}, which the layout {LAYOUT} needs.")


@contextmanager
def _eager_text(model: PreTrainedModel) -> Iterator[None]:
    """The text tower computes its attention with plain operators and an additive mask."""
    text: Any = model.config.text_config
    before = text._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def _write_text_tower(model: PreTrainedModel, processor: Any, folder: Path, suffix: str, opset: int) -> dict[str, Any]:
    """``text_model.onnx``, and with a suffix the same with int8 weights; returns what is in the second.

    ``weights``: ``int8`` (also of the embeddings, or ``int8, float embeddings``) or ``float``; ``cosine``: smallest over the
    embeddings of 64 texts, against PyTorch.
    """
    wrapper = _TextOutputs(model).eval()
    kind: Any = model.config
    padding = "max_length" if kind.model_type == "siglip" else True  # SigLIP was trained so
    words = list(imagenet_classes().values())[:: 1000 // _TEXTS][:_TEXTS]
    texts = [f"a photo of a {word.split(',')[0]}." for word in words]
    ids = processor.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    with torch.no_grad():
        expected = wrapper(ids)[-1]
    shapes = {"input_ids": {0: torch.export.Dim("text_batch"), 1: torch.export.Dim.DYNAMIC}}
    with _eager_text(model):
        program = trace(wrapper, {"input_ids": ids[:2]}, wrapper.names, opset, shapes)
    plain = folder / "text_model.onnx"
    save_program(program, plain)
    if not suffix:
        return {"weights": "float", "cosine": _text_cosine(plain, ids, expected)}
    target = folder / f"text_model{suffix}.onnx"
    for weights, operators in (("int8", ["MatMul", "Gather"]), ("int8, float embeddings", ["MatMul"])):
        _quantize_weights(plain, target, operators)
        cosine = _text_cosine(target, ids, expected)
        if cosine >= TEXT_COSINE:
            return {"weights": weights, "cosine": cosine}
    target.write_bytes(plain.read_bytes())
    return {"weights": "float", "cosine": _text_cosine(target, ids, expected)}


def _quantize_weights(source: Path, target: Path, operators: list[str]) -> None:
    """ONNX Runtime's dynamic quantization. Unsigned weights: u8 by u8 saturates on no CPU."""
    onnx, quantization = need("onnx"), need("onnxruntime.quantization")
    network = onnx.load(source)
    network.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # the shapes are known already
    quantization.quantize_dynamic(
        network, target, op_types_to_quantize=operators, weight_type=quantization.QuantType.QUInt8, per_channel=True
    )


def _text_cosine(file: Path, ids: torch.Tensor, expected: torch.Tensor) -> float:
    session = need("onnxruntime").InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input_ids": ids.cpu().numpy()})[-1])
    return float(F.cosine_similarity(found.double(), expected.cpu().double(), dim=-1).min())


def _join(model: PreTrainedModel, image_file: Path, text_file: Path, target: Path) -> None:
    """Both towers in one network with the logits of the model."""
    onnx, compose = need("onnx"), need("onnx.compose")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    sides = {}
    for prefix, file in (("vision_", image_file), ("text_", text_file)):
        network = onnx.load(file)
        network = compose.add_prefix(network, prefix, rename_inputs=False)
        sides[prefix] = network, network.graph.output[-1].name
    networks = [network for network, _ in sides.values()]
    versions = {(entry.domain, entry.version) for network in networks for entry in network.opset_import}
    for network in networks:
        network.ir_version = max(n.ir_version for n in networks)
        known = {entry.domain for entry in network.opset_import}
        network.opset_import.extend(helper.make_opsetid(d, v) for d, v in sorted(versions) if d not in known)
    joined = compose.merge_models(*networks, io_map=[])
    graph, ours = joined.graph, model.config
    constants = {"logit_axes": torch.tensor([-1]), "logit_factor": _parameter(model, "logit_scale").exp()}
    if hasattr(model, "logit_bias"):
        constants["logit_shift"] = _parameter(model, "logit_bias")
    graph.initializer.extend(numpy_helper.from_array(value.numpy(), name) for name, value in constants.items())
    for side, (prefix, (_, name)) in zip(("image", "text"), sides.items(), strict=True):
        graph.node.append(helper.make_node("ReduceL2", [name, "logit_axes"], [f"{prefix}norm"], keepdims=1))
        graph.node.append(helper.make_node("Div", [name, f"{prefix}norm"], [f"{side}_embeds"]))
    graph.node.append(helper.make_node("Transpose", ["image_embeds"], ["image_columns"], perm=[1, 0]))
    graph.node.append(helper.make_node("MatMul", ["text_embeds", "image_columns"], ["cosines"]))
    scaled = "scaled_cosines" if "logit_shift" in constants else "logits_per_text"
    graph.node.append(helper.make_node("Mul", ["cosines", "logit_factor"], [scaled]))
    if scaled != "logits_per_text":
        graph.node.append(helper.make_node("Add", [scaled, "logit_shift"], ["logits_per_text"]))
    graph.node.append(helper.make_node("Transpose", ["logits_per_text"], ["logits_per_image"], perm=[1, 0]))
    width = getattr(ours, "projection_dim", None) or ours.text_config.hidden_size
    shapes = {
        "logits_per_image": ["batch", "text_batch"],
        "logits_per_text": ["text_batch", "batch"],
        "text_embeds": ["text_batch", width],
        "image_embeds": ["batch", width],
    }
    del graph.output[:]
    for name, shape in shapes.items():
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(joined)
    onnx.save(joined, target)


def _parameter(model: Any, name: str) -> torch.Tensor:
    return getattr(model, name).detach().cpu().float()


def _readme(model: PreTrainedModel, path: Path, info: dict[str, Any]) -> str:
    """What each network is, for who finds the folder."""
    label = info["quantization"]
    inside = ["registers"] if get_register_cache(model) is not None else []
    inside += ["token deletion"] if prepare_tower(model).deletion.active else []
    tower = ", with ".join([label or "float", *([" and ".join(inside)] if inside else [])])
    rows = {Path(info["network"]).stem: f"image encoder, {tower}: {', '.join(info['outputs'])}"}
    if "text" in info:
        text = f"weights {info['text']['weights']}, smallest cosine {info['text']['cosine']:.5f} of {_TEXTS} texts"
        suffix = "_quantized" if label else ""
        rows |= {"text_model": "text encoder, float", f"text_model{suffix}": f"text encoder, {text}"}
        rows[f"model{suffix}"] = "both with their logits, for zero-shot classification"
    sizes = {name: (path / "onnx" / f"{name}.onnx").stat().st_size / 1e6 for name in rows}
    table = "\n".join(f"| `onnx/{name}.onnx` | {what} | {sizes[name]:.1f} |" for name, what in rows.items())
    return (
        f"# {info['model_class']} for transformers.js and ONNX Runtime\n\n"
        f"Written by optimum-regcache. Images of {info['image_size'][0]} x {info['image_size'][1]} pixels.\n\n"
        f"| file | what | MB |\n|---|---|---|\n{table}\n"
    )
