"""Contenders of the CPU benchmark by name: PyTorch, this package, torchao; other runtimes are in `cpu_peers`.

To add one, write a builder (`Job` -> `Runner`) and a row in `CONTENDERS`. A builder that cannot work here raises `Skipped`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import cpu_peers as peers
from cpu_job import Job, Runner, Skipped, TorchRunner
from optimum_regcache import set_backend
from optimum_regcache.layers.linear import quant_linears

FLOAT, LAYERS, FUSED = "float32 (sdpa)", "int8 per layer", "int8 fused"


@dataclass(frozen=True)
class Contender:
    """A row of the registry.

    Attributes:
        build: makes the runner.
        packages: what must be importable beyond the package's own requirements.
        option: runs only with this command line option ("" = always).
        max_batch: largest batch size that is timed without ``--all``.
        ours: a PyTorch model of this package, which the profile script can take apart.
    """

    build: Callable[[Job], Runner]
    packages: tuple[str, ...] = ()
    option: str = ""
    max_batch: int | None = None
    ours: bool = False


def float32(job: Job) -> Runner:
    """PyTorch eager with sdpa attention: what the ratios refer to."""
    return TorchRunner(job.model)


def float32_compiled(job: Job) -> Runner:
    """The same through torch.compile."""
    return compiled(job.model)


def compiled(model: nn.Module) -> Runner:
    """Through torch.compile with inductor."""
    torch._dynamo.reset()  # graphs of an earlier model would count as recompilations
    return TorchRunner(model, torch.compile(model, dynamic=False), "inductor")


def simulated(job: Job) -> Runner:
    """Fake-quant in float32, as research code runs it."""
    model = job.copy(job.plain)
    set_backend(model, "simulated")
    return ours(model)


def per_layer(job: Job) -> Runner:
    """Each linear layer alone in int8."""
    return ours(job.copy(job.plain))


def per_layer_regcache(job: Job) -> Runner:
    """Each linear layer alone in int8, with registers and deletion."""
    return ours(job.copy(job.prefixed))


def fused(job: Job) -> Runner:
    """Whole blocks in int8."""
    return fuse(lambda: job.plain, job)


def fused_torch(job: Job) -> Runner:
    """Whole blocks in int8 without compiled code of our own."""
    return fuse(lambda: job.plain, job, native=False)


def fused_regcache(job: Job) -> Runner:
    """Whole blocks in int8, with registers and deletion."""
    return fuse(lambda: job.prefixed, job)


def fuse(source: Callable[[], Any], job: Job, **options: Any) -> Runner:
    """A fused copy of a quantized model.

    Raises:
        Skipped: this version of the package has no fused execution.
    """
    import optimum_regcache

    if not hasattr(optimum_regcache, "fuse"):
        raise Skipped("optimum_regcache.fuse is not available")
    model = job.copy(source())
    report = optimum_regcache.fuse(model, **options)
    runner = TorchRunner(model, variant=str(report))
    runner.details["fuse"] = str(report)
    return runner


def ours(model: nn.Module) -> Runner:
    """One of our models; the variant names the backend of its linear layers."""
    names = sorted({type(module.runtime()).__name__ for _, module in quant_linears(model)})
    return TorchRunner(model, variant=", ".join(names))


def torchao_dynamic(job: Job) -> Runner:
    """torchao: a scale per token, computed for each input."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # pyright: ignore[reportMissingImports]

    model = job.copy(job.model)
    # set_inductor_config would change torch's float32 matmul precision for every contender
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return TorchRunner(model, variant="torch")


def torchao_dynamic_compiled(job: Job) -> Runner:
    """torchao through torch.compile, as its documentation advises."""
    return compiled(torchao_dynamic(job).module)  # type: ignore[arg-type]


def torchao_static(job: Job) -> Runner:
    """torchao: one stored scale per layer, from the largest input in calibration."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8StaticActivationInt8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    model = job.copy(job.model)
    largest: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def observe(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                value = inputs[0].abs().max()
                largest[name] = torch.maximum(largest.get(name, value), value)

            hooks.append(module.register_forward_pre_hook(observe))
    with torch.inference_mode():
        for batch in job.calibration:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for target, value in largest.items():
        scale = (value.clone() / 127).reshape(1, 1, 1)
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale, granularity=[PerTensor(), PerRow()], set_inductor_config=False
        )
        quantize_(model, config, filter_fn=lambda _, name, target=target: name == target)
    return TorchRunner(model, variant="torch")


def quanto_static(job: Job) -> Runner:
    """optimum-quanto: int8 weights, int8 activations with one stored scale each, from its own calibration."""
    from optimum.quanto import Calibration, freeze, qint8, quantize  # pyright: ignore[reportMissingImports]

    model = job.copy(job.model)
    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        for batch in job.calibration:
            model(**batch)
    freeze(model)
    return TorchRunner(model, variant="torch")


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OPENVINO = ("onnx", "onnxscript", "openvino")

CONTENDERS: dict[str, Contender] = {
    FLOAT: Contender(float32),
    "float32 compiled": Contender(float32_compiled, option="compiled"),
    "simulated": Contender(simulated, option="all", ours=True),
    LAYERS: Contender(per_layer, ours=True),
    f"{LAYERS} + registers + deletion": Contender(per_layer_regcache, option="all", ours=True),
    FUSED: Contender(fused, ours=True),
    f"{FUSED}, torch only": Contender(fused_torch, ours=True),
    f"{FUSED} + registers + deletion": Contender(fused_regcache, ours=True),
    "onnxruntime float32": Contender(peers.ort_float32, _ONNX),
    "onnxruntime dynamic int8": Contender(peers.ort_dynamic, _ONNX),
    "onnxruntime, our QDQ": Contender(peers.ort_ours, _ONNX),
    "onnxruntime, our QDQ, exact kernels": Contender(peers.ort_ours_exact, _ONNX),
    "openvino float32": Contender(peers.openvino_float32, _OPENVINO),
    "openvino default precision": Contender(peers.openvino_default, _OPENVINO),
    "openvino int8 (NNCF)": Contender(peers.openvino_nncf, (*_OPENVINO, "nncf")),
    "openvino, our QDQ": Contender(peers.openvino_ours, _OPENVINO),
    "torchao int8 dynamic": Contender(torchao_dynamic, ("torchao",), max_batch=8),
    "torchao int8 static": Contender(torchao_static, ("torchao",), max_batch=8),
    "torchao int8 dynamic, compiled": Contender(torchao_dynamic_compiled, ("torchao",), option="compiled"),
}


def choose(only: list[str] | None, options: set[str]) -> list[str]:
    """Names of the contenders of this run, in the order of the table; float32 is always among them.

    Raises:
        ValueError: a name that is not in the registry.
    """
    unknown = sorted(set(only or ()) - set(CONTENDERS))
    if unknown:
        raise ValueError(f"Unknown contender {', '.join(unknown)}; expected some of: {'; '.join(CONTENDERS)}.")
    if only:
        return [name for name in CONTENDERS if name == FLOAT or name in only]
    return [name for name, c in CONTENDERS.items() if not c.option or c.option in options]


def build(name: str, job: Job) -> Runner:
    """The runner called ``name``.

    Raises:
        Skipped: a package is missing, or the builder's reason.
    """
    entry = CONTENDERS[name]
    missing = [package for package in entry.packages if find_spec(package) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")
    return entry.build(job)
