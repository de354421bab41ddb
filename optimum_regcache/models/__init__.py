"""Vision encoders with register injection: thin subclasses of the transformers models.

They behave like their parents until registers or a deletion are installed (bit-identical outputs). ``forward`` takes the
parent's arguments and ``past_key_values``, a `RegisterCache` that overrides the stored registers for that call.
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
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTModel,
)

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.compat import share_checkpoint_conversion
from optimum_regcache.fusion import FusionReport, fuse, unfuse
from optimum_regcache.registers import RegisterCache, get_register_cache, prepare_tower, set_deletion, set_registers


class RegCacheMixin:
    """Registers and deletion on a transformers vision model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        prepare_tower(self._module)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        native = next(c for c in cls.__mro__ if c.__module__.startswith("transformers."))
        share_checkpoint_conversion(cls.__name__, native.__name__)

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

    def forward(self, *args: Any, past_key_values: RegisterCache | None = None, **kwargs: Any) -> Any:
        """The parent's forward; ``past_key_values`` overrides the stored registers.

        Raises:
            TypeError: ``past_key_values`` is not a `RegisterCache`.
            ValueError: it was made for another number of blocks.
        """
        if past_key_values is not None:
            if not isinstance(past_key_values, RegisterCache):
                raise TypeError(
                    f"past_key_values must be a RegisterCache, got {type(past_key_values).__name__}. Build one with "
                    "RegisterCache(keys, values, num_blocks)."
                )
            blocks = prepare_tower(self._module).num_blocks
            if len(past_key_values.layers) != blocks:
                raise ValueError(
                    f"past_key_values is a cache for {len(past_key_values.layers)} blocks; this model has {blocks}."
                )
            kwargs["past_key_values"] = past_key_values
        return super().forward(*args, **kwargs)  # type: ignore[misc]


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


class RegCacheViTModel(RegCacheMixin, ViTModel):
    """`ViTModel` with registers."""


class RegCacheDeiTModel(RegCacheMixin, DeiTModel):
    """`DeiTModel` with registers."""
