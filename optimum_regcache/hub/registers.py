"""Registers and deletion of an opened model: read them, change them, and keep the config that is saved with it right."""

from __future__ import annotations

from typing import Any

from torch import nn

from optimum_regcache import registers as runtime
from optimum_regcache.config import DeletionConfig, RegCacheConfig, RegistersConfig
from optimum_regcache.hub.hf_quantizer import attach_quantizer
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.registers import RegisterCache


def get_registers(model: nn.Module) -> RegisterCache | None:
    """The registers that a model attends to.

    Args:
        model: a supported encoder or a model that contains one, float or quantized.

    Returns:
        Keys and values per block, each [heads, registers, head_dim], with tau; None if there are none. The rows are the
        model's own tensors, not copies.

    Raises:
        ValueError: ``model`` holds no supported encoder.
    """
    return runtime.get_register_cache(model)


def set_registers(model: nn.Module, cache: RegisterCache | None) -> None:
    """Give a model other registers, or take them away, in place.

    A quantized model is saved with them. Its activation scales stay those that were calibrated with the old registers: to
    calibrate again, quantize the float model. After `rotation`, keys and values are rotated; rows of another model do not fit.

    Args:
        model: as for :func:`get_registers`; of a quantized model the one that was opened, not its vision tower.
        cache: for as many blocks as the encoder has; None removes the registers.

    Raises:
        ValueError: the cache belongs to an encoder of another shape or is not finite, or ``model`` is a part of a quantized
            model.
    """
    config = _stored_config(model)
    if cache is not None:
        cache.check_finite()
    runtime.set_registers(model, cache)
    if config is None:
        return
    registers = RegistersConfig(mode="none")
    if cache is not None:
        registers = RegistersConfig(
            "fixed", cache.blocks, cache.num_registers, cache.num_copies, config.registers.kv_mode
        )
    attach_quantizer(model, config.replace(registers=registers))  # type: ignore[arg-type]


def set_deletion(model: nn.Module, deletion: DeletionConfig) -> None:
    """Choose which tokens a model deletes, in place; ``DeletionConfig()`` deletes none. A quantized model is saved with it.

    Args:
        model: as for :func:`set_registers`.
        deletion: block, count, rule, fill and action.

    Raises:
        ValueError: the block does not exist, the encoder cannot work with ``fill="none"``, the activations cannot be combined
            with ``action="per_token"``, or ``model`` is a part of a quantized model.
    """
    config = _stored_config(model)
    config = config and config.replace(deletion=deletion)
    runtime.set_deletion(model, deletion)
    if config is not None:
        attach_quantizer(model, config)  # type: ignore[arg-type]


def _stored_config(model: Any) -> RegCacheConfig | None:
    """The config that is saved with a quantized model; None of a float model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, RegCacheConfig):
        return config
    if any(True for _ in quant_linears(model)):
        raise ValueError(
            f"This {type(model).__name__} is a part of a quantized model and does not hold its config. Pass the model that "
            "was opened or quantized."
        )
    return None
