"""The order in which methods work together (docs/method.md 10), and the fit itself.

| stage | what happens | who takes part |
|---|---|---|
| configure | structure of the checkpoint, before any data is seen | all |
| search | sensitive block, registers, tau, k~, with round to nearest (`optimum_regcache.search.fit`) | |
| install | registers and deletion into a float copy | |
| select | layers or units are chosen | mixed_precision, test_time_registers |
| rewrite | rotations, neurons silenced; function preserved, registers transformed along | rotation, test_time_registers |
| smooth | norms and values rescaled to the statistics with registers active | smoothquant, repq_vit |
| build | modules replaced, weights rounded to nearest, static scales calibrated | observers (rtn, percentile, mse, ...) |
| scales | scales searched | output_mse, ptq4vit, noisyquant, aiqvit |
| round | weight codes chosen, with activations quantized | gptq, reconstruction and its presets |
| noise | offsets before rounding | noisyquant |
| correct | biases | bias_correction |
| tune | norms, LayerScale and registers trained through the quantized model | norm_tuning |
| retune | k~ and tau again, with all of the above (`search.retune`, `optimum_regcache.search.fit`) | |

Search comes before smoothing and rounding: outlier tokens are a property of the float network, and what is fitted without
the registers wastes capacity on tokens that will be gone. Scales come before weight codes: the
codes are to absorb the error of the activation quantizers, so these have to be final. What is trained comes last: it makes up
for what all others left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_regcache.calibration.calibrate import calibrate
from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.encoders.sharing import own_tensors, shared_copy
from optimum_regcache.encoders.sites import quantization_sites
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.hf_quantizer import attach_quantizer
from optimum_regcache.hub.structure import validate_positions
from optimum_regcache.layers.install import assign_input_qparams, config_sites, quantize_modules
from optimum_regcache.methods.base import PipelineState
from optimum_regcache.methods.resolution import ResolvedConfig
from optimum_regcache.registers import RegisterCache, prepare_tower, set_deletion, set_registers

STAGES = ("select", "rewrite", "smooth", "build", "scales", "round", "noise", "correct", "tune")


@dataclass(frozen=True)
class Quantized:
    """Result of a fit.

    Attributes:
        model: the quantized model, ready for `save_pretrained`.
        config: its config.
        float_model: the float model after all rewrites, registers and deletion installed, nothing trained. It uses the tensors
            of the caller's model wherever no method changed them: read it, do not write into it.
        measured: method name -> what it found.
        seconds: stage -> duration.
    """

    model: PreTrainedModel
    config: RegCacheConfig
    float_model: PreTrainedModel
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def quantize_with(
    model: PreTrainedModel,
    resolved: ResolvedConfig,
    cache: RegisterCache | None,
    batches: Sequence[Batch],
    progress: bool = True,
    work_dir: Path | None = None,
    training: Sequence[Batch] = (),
) -> Quantized:
    """Fit the stages from "install" to "tune" of the table above on a copy of ``model``.

    Float weights are not copied: the copy uses those of ``model`` until a method changes them. In the result the encoder has
    tensors of its own; what lies outside of it and is not quantized (a text tower) is shared with ``model``, see
    `optimum_regcache.encoders.sharing`.

    Args:
        model: float model, unchanged.
        resolved: of a config whose registers are ``fixed`` or ``none``, see `optimum_regcache.methods.resolution`.
        cache: the registers for ``fixed``.
        batches: calibration images; may be empty if nothing needs any.
        progress: show progress bars.
        work_dir: directory for finished blocks of a reconstruction; call again with the same one to resume.
        training: what methods that train learn from; the calibration images if empty.

    Raises:
        ValueError: a method that cannot work on this model, or config and cache that disagree, with the reason.
    """
    methods, config = resolved.methods, resolved.config
    validate_positions(model, config)
    check_cache(config, cache)
    _check_head(model, config)
    if config.deletion.active and config.deletion.action == "per_token":
        require_quantized_fc2(model, config, config.deletion.block)
    require(bool(batches) or not resolved.needs_images, f"{resolved.image_users} need calibration images.")
    twin = shared_copy(model).eval()
    prepare_tower(twin)
    set_registers(twin, cache)
    set_deletion(twin, config.deletion)
    fit = PipelineState(
        config, methods, model, twin, list(batches), progress=progress, work_dir=work_dir, training=training
    )
    seconds: dict[str, float] = {}
    for stage in STAGES:
        begun = time.perf_counter()
        if stage == "build":
            _build(fit)
        else:
            for method in methods:
                getattr(method, stage)(fit)
        seconds[stage] = time.perf_counter() - begun
    attach_quantizer(fit.result, fit.config)
    return Quantized(fit.result, fit.config, fit.model, fit.measured, seconds)


def check_cache(config: RegCacheConfig, cache: RegisterCache | None) -> None:
    """Make sure that ``cache`` is the one ``config.registers`` describes.

    Raises:
        ValueError: they disagree.
    """
    r = config.registers
    agree = cache is None if r.mode == "none" else cache is not None
    if agree and cache is not None:
        agree = (r.blocks, r.num_registers, r.num_copies) == (cache.blocks, cache.num_registers, cache.num_copies)
    require(agree, f"registers.mode={r.mode!r} and the register cache disagree (blocks, num_registers or num_copies).")


def _check_head(model: PreTrainedModel, config: RegCacheConfig) -> None:
    """Make sure that ``modules.head`` finds something.

    Raises:
        ValueError: the model has no layer outside the blocks that it could mean.
    """
    if config.modules.head and all(site.block is not None for site in quantization_sites(model, head=True)):
        raise ValueError(
            f"modules.head=True has no effect: {type(model).__name__} has no projection, classifier or pooling linear. Leave "
            "it out."
        )


def require_quantized_fc2(model: nn.Module, config: RegCacheConfig, block: int | None) -> None:
    """Make sure that a scale for each token has something to quantize.

    Raises:
        ValueError: the MLP output projection of ``block`` stays float.
    """
    require(
        any(site.block == block and site.role == "activation" for site in config_sites(model, config)),
        f"deletion.action='per_token' has no effect: the MLP output projection (fc2) of block {block} stays float. Shorten "
        "modules.ignore, or use another action.",
    )


def _build(fit: PipelineState) -> None:
    """Replace the modules of a copy, weights rounded to nearest, and calibrate the static scales."""
    qparams = calibrate(fit.model, fit.config, fit.batches) | fit.input_qparams
    fit.quantized = shared_copy(fit.model)
    quantize_modules(fit.quantized, fit.config)
    own_tensors(find_tower(fit.quantized).module, fit.model)  # norms, embeddings: the little that stayed float
    assign_input_qparams(fit.quantized, qparams)
