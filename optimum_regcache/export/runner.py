"""`ExportedEncoder`: an exported directory, called like the model that it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from optimum_regcache.encoders.passes import Batch, FeatureEncoder, trailing_features
from optimum_regcache.encoders.tower import PatchSpan
from optimum_regcache.export.layout import NETWORKS, need, read_info
from optimum_regcache.hub.loading import load_processor
from optimum_regcache.kernels.cpu import sums_saturate

logger = logging.get_logger(__name__)

Network = Callable[[np.ndarray], list[np.ndarray]]


@dataclass
class ExportedOutput(BaseModelOutputWithPooling):
    """What the graph returns; the fields that the model does not have are None.

    Attributes:
        image_embeds: float [B, D], projected features of a model with a text tower.
        logits: float [B, classes] of a classifier.
    """

    image_embeds: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class ExportedEncoder(FeatureEncoder):
    """Runs an exported encoder on the CPU, computing the same function on every CPU.

    Without VNNI the integer kernels of x86 CPUs saturate (`optimum_regcache.kernels.cpu`). There ONNX Runtime is told to use
    its slower exact ones, and OpenVINO, which has none, to compute in float32 from the int8 weights.

    Attributes:
        config: the transformers config.
        processor: the processor saved beside the network, None if there is none.
        info: ``export.json``.
        format: ``onnx`` or ``openvino``.

    Example:
        >>> encoder = ExportedEncoder.from_pretrained("clip-w8a8-onnx")  # doctest: +SKIP
        >>> features = encoder(pixel_values=pixels).pooler_output  # doctest: +SKIP
    """

    def __init__(self, directory: Path, info: dict[str, Any], config: Any, processor: Any, network: Network) -> None:
        self.directory, self.info, self.config, self.processor = directory, info, config, processor
        self.format: str = info["format"]
        self.patches = PatchSpan(info["num_prefix_tokens"], info.get("num_trailing_tokens", 0))
        self.gives_tokens = "last_hidden_state" in info["outputs"]
        patch: Any = getattr(getattr(config, "vision_config", config), "patch_size", None)
        self.patch_size = (patch, patch) if isinstance(patch, int) else patch and (int(patch[0]), int(patch[1]))
        self._network = network

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, num_threads: int | None = None) -> ExportedEncoder:
        """Open what `export_onnx` or `export_openvino` wrote.

        Args:
            directory: of the export.
            num_threads: of the runtime; its own choice if None.

        Raises:
            ValueError: not an exported directory, or its network is missing.
            ImportError: onnxruntime or openvino is missing.
        """
        path = Path(directory)
        info = read_info(path)
        if info["format"] not in NETWORKS:
            raise ValueError(
                f"{directory} holds the format {info['format']}; open it with from_pretrained of transformers."
            )
        file = path / info.get("network", NETWORKS[info["format"]])
        if not file.is_file():
            raise ValueError(f"{directory} is incomplete: {file.name} is missing. Export the model again.")
        saturates = info.get("needs_vnni", info.get("quantization") is not None) and sums_saturate()
        network = {"onnx": _onnx_network, "openvino": _openvino_network}[info["format"]](file, num_threads, saturates)
        return cls(path, info, AutoConfig.from_pretrained(path), load_processor(path), network)

    @property
    def classifies(self) -> bool:
        """Whether it predicts classes, those of ``config.id2label``."""
        return "logits" in self.info["outputs"]

    def __call__(
        self, pixel_values: torch.Tensor | np.ndarray, return_dict: bool = True
    ) -> ExportedOutput | tuple[torch.Tensor, ...]:
        """Encode images.

        Args:
            pixel_values: float [B, 3, H, W]; H and W are those of the export.
            return_dict: a tuple if false.

        Raises:
            ValueError: pixels of another shape.
        """
        pixels = np.ascontiguousarray(torch.as_tensor(pixel_values).detach().cpu().float().numpy())
        height, width = self.info["image_size"]
        fixed = not self.info["dynamic_batch"]
        if pixels.ndim != 4 or pixels.shape[1:] != (3, height, width) or (fixed and len(pixels) != 1):
            batch = "1" if fixed else "batch"
            raise ValueError(
                f"This export takes pixel_values [{batch}, 3, {height}, {width}], got {list(pixels.shape)}. Use its "
                "processor, or export with another image_size."
            )
        values = [torch.from_numpy(np.array(v)) for v in self._network(pixels)]
        output = ExportedOutput(**dict(zip(self.info["outputs"], values, strict=True)))  # type: ignore[arg-type]
        return output if return_dict else output.to_tuple()

    def run(self, batch: Batch) -> Any:
        """The output for the pixels of ``batch``."""
        return self(batch["pixel_values"])

    def features_of(self, output: Any) -> torch.Tensor:
        """Pooled features [B, D], the same that `evaluation.image_features` takes of the model itself."""
        last = output.last_hidden_state
        if self.patches.trail:
            return trailing_features(last, self.patches)
        for features in (output.image_embeds, output.pooler_output):
            if features is not None:
                return features
        return last[:, 0] if self.patches.lead else last.mean(1)


def _onnx_network(file: Path, num_threads: int | None, saturates: bool) -> Network:
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    if saturates:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})


def _openvino_network(file: Path, num_threads: int | None, saturates: bool) -> Network:
    core = need("openvino").Core()
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if num_threads is not None:
        options["INFERENCE_NUM_THREADS"] = num_threads
    if saturates:
        options |= {"LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        logger.warning(
            "This CPU has no VNNI, and OpenVINO's int8 kernels would saturate: it computes in float32, not faster than a "
            "float model. Use ONNX Runtime or PyTorch here, or quantize with --set quantization.weights.bits=7, which "
            "cannot saturate."
        )
    compiled = core.compile_model(core.read_model(file), "CPU", options)

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        request = compiled.create_infer_request()  # one for each call: several threads may run
        results = request.infer([pixels])
        return [results[output] for output in compiled.outputs]

    return run
