"""Vision encoders with register injection: thin subclasses of the transformers models.

They behave like their parents until registers or a deletion are installed (bit-identical outputs). ``forward`` takes the
parent's arguments and ``register_cache`` (or ``past_key_values``, ``cache``), a `RegisterCache` that overrides the stored
registers for that call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    CLIPVisionModel,
    DeiTModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTModel,
)

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.compat import share_checkpoint_conversion
from optimum_regcache.fusion import FusionReport, fuse, unfuse
from optimum_regcache.registers import RegisterCache, get_register_cache, prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.block import CACHE_NAMES, take_cache


class RegCacheMixin:
    """Registers and deletion on a transformers vision model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        prepare_tower(self._module)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        native = next(c for c in cls.__mro__ if c.__module__.startswith("transformers."))
        share_checkpoint_conversion(cls.__name__, native)  # type: ignore[arg-type]

    @property
    def _module(self) -> nn.Module:
        return self  # type: ignore[return-value]

    @property
    def register_cache(self) -> RegisterCache | None:
        """The stored registers; assign a `RegisterCache` or None."""
        return get_register_cache(self._module)

    @register_cache.setter
    def register_cache(self, cache: RegisterCache | None) -> None:
        set_registers(self._module, cache)

    @property
    def token_deletion(self) -> DeletionConfig:
        """What is deleted; assign a `DeletionConfig`."""
        return prepare_tower(self._module).deletion

    @token_deletion.setter
    def token_deletion(self, config: DeletionConfig) -> None:
        set_deletion(self._module, config)

    def fuse(self, *, attention: str = "auto", native: bool | None = None) -> FusionReport:
        """Make the blocks run as fused int8 operations, in place; see `optimum_regcache.fuse`."""
        return fuse(self._module, attention=attention, native=native)

    def unfuse(self) -> None:
        """Undo `fuse`."""
        unfuse(self._module)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The parent's; registers and deletion travel with quantized checkpoints only.

        Raises:
            ValueError: a float model with registers or a deletion, which its checkpoint could not describe.
        """
        if not getattr(self, "is_quantized", False) and (self.register_cache is not None or self.token_deletion.active):
            raise ValueError(
                "A float checkpoint cannot describe registers or a deletion; they would be lost. Remove them "
                "(model.register_cache = None, model.token_deletion = DeletionConfig()), or quantize the model with "
                "RegCacheQuantizer and save the result."
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward. A `RegisterCache` passed as ``past_key_values``, ``cache`` or ``register_cache`` overrides the
        stored registers for this call.

        Raises:
            TypeError: one of these is not a `RegisterCache`.
            ValueError: it does not fit the encoder or is not finite, or several were passed.
        """
        for name in CACHE_NAMES:
            if not isinstance(kwargs.get(name), RegisterCache | None):
                raise TypeError(
                    f"{name} must be a RegisterCache, got {type(kwargs[name]).__name__}. Build one with "
                    "RegisterCache(keys, values, num_blocks)."
                )
        cache = take_cache(kwargs)
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        if cache is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        runtime = prepare_tower(self._module)
        state = runtime.current
        state.cache = runtime.accept(cache)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            state.cache = None


class RegCacheCLIPVisionModel(RegCacheMixin, CLIPVisionModel):
    """`CLIPVisionModel` with registers (CLIP and OpenCLIP checkpoints in Hugging Face format)."""


class RegCacheSiglipVisionModel(RegCacheMixin, SiglipVisionModel):
    """`SiglipVisionModel` with registers."""


class RegCacheSiglip2VisionModel(RegCacheMixin, Siglip2VisionModel):
    """`Siglip2VisionModel` with registers; padding is never ranked, deleted or attended to."""


class RegCacheDinov2Model(RegCacheMixin, Dinov2Model):
    """`Dinov2Model` with registers."""


class RegCacheDinov2WithRegistersModel(RegCacheMixin, Dinov2WithRegistersModel):
    """`Dinov2WithRegistersModel` with a register cache beside its trained registers."""


class RegCacheDINOv3ViTModel(RegCacheMixin, DINOv3ViTModel):
    """`DINOv3ViTModel` with a register cache beside its trained registers; its rows carry no rotary position, like CLS."""


class RegCacheViTModel(RegCacheMixin, ViTModel):
    """`ViTModel` with registers."""


class RegCacheDeiTModel(RegCacheMixin, DeiTModel):
    """`DeiTModel` with registers."""
