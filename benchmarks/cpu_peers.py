"""ONNX Runtime and OpenVINO for the CPU benchmark, from one float ONNX file or from our own QDQ file.

Both get their best allowed settings: static shapes for OpenVINO, and for batches of eight and more whatever is fastest of
the whole batch or parts of it, one after another or on parallel streams. All use as many threads as PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpu_job import Job, Runner, Skipped, pooled
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.kernels.cpu import sums_saturate

INPUT, OUTPUTS = "pixel_values", ("last_hidden_state", "pooler_output")
SPLIT_FROM = 8  # batches of this size and more may be split


class _Exported(nn.Module):
    """pixel_values -> (last_hidden_state, pooled output)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values=pixel_values)
        return output.last_hidden_state, pooled(output)


def float_onnx(job: Job) -> Path:
    """The float model as ONNX with a free batch size, written once."""
    images = job.pixels()

    def write(path: Path) -> None:
        with quiet():
            torch.onnx.export(
                _Exported(job.model), (torch.cat(images[:2]) if len(images) > 1 else images[0].repeat(2, 1, 1, 1),),
                path, dynamo=True, dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1, max=4096)}},
                input_names=[INPUT], output_names=list(OUTPUTS), external_data=False, verbose=False,
            )  # fmt: skip

    return job.file("float.onnx", write)


def our_onnx(job: Job) -> Path:
    """Our int8 model as QDQ ONNX, written once.

    Raises:
        Skipped: this version of the package has no export.
    """
    try:
        from optimum_regcache.export import export_onnx
    except ImportError as error:
        raise Skipped("optimum_regcache.export.export_onnx is not available") from error
    size = job.pixels()[0].shape[-2:]
    folder = job.workdir / "our-qdq"
    if not (folder / "model.onnx").exists():
        with quiet():
            export_onnx(job.copy(job.plain), folder, image_size=(size[0], size[1]))
    return folder / "model.onnx"


@contextlib.contextmanager
def quiet() -> Any:
    """Without the messages and warnings of exporters and quantizers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ONNX Runtime


class OrtRunner(Runner):
    """An ONNX file in ONNX Runtime's CPU provider."""

    def __init__(self, path: Path, threads: int, exact: bool = False) -> None:
        import onnx
        import onnxruntime as ort

        super().__init__()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        operators = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        self.details["operators"] = {k: operators[k] for k in sorted(operators) if "MatMul" in k or k == "Gemm"}
        self.variant = "whole batch"

    def __call__(self, batch: Batch) -> torch.Tensor:
        return torch.from_numpy(self.session.run([OUTPUTS[1]], {INPUT: batch[INPUT].numpy()})[0])

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        states, features = self.session.run(list(OUTPUTS), {INPUT: batch[INPUT].numpy()})
        return torch.from_numpy(states), torch.from_numpy(features)


def ort_float32(job: Job) -> Runner:
    """The float model."""
    return OrtRunner(float_onnx(job), job.settings.threads)


def ort_ours(job: Job) -> Runner:
    """Our QDQ model."""
    return OrtRunner(our_onnx(job), job.settings.threads)


def ort_ours_exact(job: Job) -> Runner:
    """Our QDQ model by the kernels that do not saturate on CPUs without VNNI, as `ExportedEncoder` runs it there."""
    if not sums_saturate():
        raise Skipped("the int8 kernels of this CPU do not saturate")
    return OrtRunner(our_onnx(job), job.settings.threads, exact=True)


def ort_dynamic(job: Job) -> Runner:
    """ONNX Runtime's own quantization: int8 weights per channel, activation scales computed for each input."""
    source = prepared_onnx(job)

    def write(path: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with quiet():
            quantize_dynamic(str(source), str(path), per_channel=True, weight_type=QuantType.QInt8)

    return OrtRunner(job.file("ort-dynamic.onnx", write), job.settings.threads)


def prepared_onnx(job: Job) -> Path:
    """The float ONNX with shapes inferred, as ONNX Runtime's quantizers want it, written once."""
    source = float_onnx(job)

    def write(path: Path) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with quiet():
            quant_pre_process(str(source), str(path))

    return job.file("prepared.onnx", write)


class _Images:
    """Calibration images, one after the other; what ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self, images: list[torch.Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {INPUT: image.numpy()}


def ort_static(job: Job, operators: tuple[str, ...] | None = None) -> Runner:
    """ONNX Runtime's own quantization: QDQ, ranges from minimum and maximum, int8 weights per channel; ``operators`` restricts
    it to some."""
    source, images = prepared_onnx(job), job.pixels()

    def write(path: Path) -> None:
        from onnxruntime.quantization import quantize_static

        with quiet():
            reader: Any = _Images(images)
            quantize_static(str(source), str(path), reader, op_types_to_quantize=operators, per_channel=True)

    name = "-".join(("ort-static", *(operators or ())))
    return OrtRunner(job.file(f"{name}.onnx", write), job.settings.threads, exact=sums_saturate())


# OpenVINO


def import_openvino() -> Any:
    """OpenVINO without its usage reports: a benchmark sends nothing to anyone."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # OpenVINO and NNCF use their stubs
    import openvino

    return openvino


@dataclass(frozen=True)
class Plan:
    """How OpenVINO runs a batch.

    Attributes:
        streams: 0 = parts one after another under the hint LATENCY; else parallel requests under THROUGHPUT.
        part: images per request.
        precision: ``f32``, or None for OpenVINO's default (bf16 where the CPU has it).
    """

    streams: int
    part: int
    precision: str | None

    def config(self, threads: int) -> dict[str, Any]:
        """Properties for `Core.compile_model`."""
        hint = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": self.streams} if self.streams else {}
        found = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **hint}
        return found if self.precision is None else {**found, "INFERENCE_PRECISION_HINT": self.precision}


def plans(batch_size: int, threads: int, precisions: tuple[str | None, ...]) -> list[Plan]:
    """All plans to try; the first is the whole batch at once."""
    found = [Plan(0, batch_size, p) for p in precisions]
    if batch_size >= SPLIT_FROM:
        streams = min(threads, batch_size)
        parts = {1, batch_size // streams} if batch_size % streams == 0 else {1}
        for precision in precisions:
            found.append(Plan(0, 1, precision))
            found += [Plan(streams, part, precision) for part in sorted(parts) if part < batch_size]
    return found


class CompiledPlan:
    """A model compiled for one plan and batch size."""

    def __init__(self, core: Any, model: Any, plan: Plan, threads: int, shape: tuple[int, ...]) -> None:
        ov = import_openvino()
        self.plan, self.size = plan, shape[0]
        fixed = model.clone()
        fixed.reshape({INPUT: [plan.part, *shape[1:]]})
        self.compiled = core.compile_model(fixed, "CPU", plan.config(threads))
        self.output = self.compiled.output(OUTPUTS[1])
        self.results: list[Any] = [None] * (self.size // plan.part)
        if plan.streams:
            self.queue = ov.AsyncInferQueue(self.compiled, plan.streams)
            self.queue.set_callback(self._store)
        else:
            self.request = self.compiled.create_infer_request()
        used = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        how = f"throughput, streams: {plan.streams}" if plan.streams else "latency"
        part = "whole batch" if plan.part == self.size else f"{plan.part} at a time"
        self.variant = f"{how}, {part}, {used}"

    def _store(self, request: Any, index: int) -> None:
        self.results[index] = request.get_tensor(self.output).data.copy()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for index, part in enumerate(pixels.split(self.plan.part)):
            if self.plan.streams:
                self.queue.start_async({INPUT: part.numpy()}, userdata=index, share_inputs=True)
            else:
                self.request.infer({INPUT: part.numpy()}, share_inputs=True, share_outputs=True)
                self._store(self.request, index)
        if self.plan.streams:
            self.queue.wait_all()
        return torch.cat([torch.from_numpy(r) for r in self.results])

    def int8_layers(self) -> str:
        """Matrix products that run in int8, of all."""
        products = ("FullyConnected", "MatMul", "Convolution")
        kinds = [n.get_rt_info() for n in self.compiled.get_runtime_model().get_ops()]
        found = [str(k["runtimePrecision"].astype(str)) for k in kinds if str(k["layerType"].astype(str)) in products]
        return f"{sum(p in ('i8', 'u8') for p in found)} of {len(found)}"


class OpenVinoRunner(Runner):
    """An OpenVINO model that runs each batch size by the fastest of several plans."""

    def __init__(self, model: Any, job: Job, precisions: tuple[str | None, ...]) -> None:
        super().__init__()
        self.core, self.model, self.precisions = import_openvino().Core(), model, precisions
        self.threads, self.trials = job.settings.threads, job.settings.trials
        self.chosen: CompiledPlan | None = None
        self.whole: Any = None  # both outputs, any batch size

    def prepare(self, batch: Batch) -> None:
        pixels = batch[INPUT]
        self.chosen = None
        candidates = plans(len(pixels), self.threads, self.precisions)
        if not self.trials:
            candidates = candidates[:1]
        ready = [CompiledPlan(self.core, self.model, p, self.threads, tuple(pixels.shape)) for p in candidates]
        times: dict[str, list[float]] = {c.variant: [] for c in ready}
        for _ in range(self.trials if len(ready) > 1 else 0):
            for candidate in ready:
                begun = time.perf_counter()
                candidate(pixels)
                times[candidate.variant].append(1000 * (time.perf_counter() - begun))
        fastest = {variant: min(values) for variant, values in times.items() if values}
        self.chosen = min(ready, key=lambda c: fastest.get(c.variant, 0.0))
        self.variant = self.chosen.variant
        self.details = {"trials_ms": fastest, "int8_layers": self.chosen.int8_layers()}

    def settle(self) -> None:
        self.model = None  # its weights are beside the compiled ones

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.whole is None:
            self.whole = self.core.compile_model(self.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = self.whole({INPUT: batch[INPUT].numpy()})
        states, features = (torch.from_numpy(found[i].copy()) for i in range(len(OUTPUTS)))
        return states, features

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self.chosen is None:
            self.prepare(batch)
        return self.chosen(batch[INPUT])  # type: ignore[misc]


def default_precision() -> str:
    """What OpenVINO computes in where nothing else is asked for."""
    return import_openvino().Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()


def read(path: Path) -> Any:
    """An ONNX or OpenVINO file as an OpenVINO model."""
    return import_openvino().Core().read_model(str(path))


def openvino_float32(job: Job) -> Runner:
    """The float model, all of it in float32."""
    return OpenVinoRunner(read(float_onnx(job)), job, ("f32",))


def openvino_default(job: Job) -> Runner:
    """The float model as OpenVINO runs it by itself; the variant names the precision."""
    if default_precision() == "f32":
        raise Skipped("OpenVINO's default precision is f32 on this CPU: see openvino float32")
    return OpenVinoRunner(read(float_onnx(job)), job, (None,))


def both_precisions() -> tuple[str | None, ...]:
    """Default first, and f32 where that differs: what an int8 model does between its int8 layers."""
    return (None,) if default_precision() == "f32" else (None, "f32")


def openvino_nncf(
    job: Job, name: str = "nncf", transformer: bool = True, smooth: bool = True, ignored: tuple[str, ...] = ()
) -> Runner:
    """NNCF's post-training quantization of the float ONNX on the same calibration images.

    Args:
        job: of the model.
        name: of the files.
        transformer: NNCF is told that it is one; else its defaults.
        smooth: with SmoothQuant, which NNCF applies to transformers only.
        ignored: kinds of operations that stay float.
    """
    source, images = float_onnx(job), [image.numpy() for image in job.pixels()]

    def write(path: Path) -> None:
        ov = import_openvino()
        with quiet():
            import nncf  # pyright: ignore[reportMissingImports]

            more: dict[str, Any] = {}
            if transformer:
                more = {"model_type": nncf.ModelType.TRANSFORMER, "preset": nncf.QuantizationPreset.MIXED}
            if not smooth:
                off = nncf.AdvancedSmoothQuantParameters(matmul=-1)
                more["advanced_parameters"] = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=off)
            if ignored:
                more["ignored_scope"] = nncf.IgnoredScope(types=list(ignored))
            model = nncf.quantize(read(source), nncf.Dataset(images), subset_size=len(images), **more)
        ov.save_model(model, str(path.with_name(f"{name}.xml")), compress_to_fp16=False)
        path.touch()

    job.file(f"{name}.done", write)
    return OpenVinoRunner(read(job.workdir / f"{name}.xml"), job, both_precisions())


def openvino_ours(job: Job) -> Runner:
    """Our QDQ model."""
    return OpenVinoRunner(read(our_onnx(job)), job, both_precisions())
