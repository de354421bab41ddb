"""RegCache for Hugging Face: post-training quantization of vision encoders with prefixed registers (arXiv 2510.04547).

Importing this package registers the quantization method ``regcache`` with transformers, so that
``AutoModel.from_pretrained`` opens RegCache checkpoints.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from optimum_regcache.encoders.versions import check_transformers

check_transformers()  # before anything that an old release lacks is imported

from optimum_regcache.config import (  # noqa: E402
    ActivationsConfig,
    DeletionConfig,
    ModulesConfig,
    RegCacheConfig,
    RegistersConfig,
    WeightsConfig,
)
from optimum_regcache.hub.hf_quantizer import register  # noqa: E402
from optimum_regcache.registers import RegisterCache  # noqa: E402

if TYPE_CHECKING:
    from optimum_regcache.config.recipe import Recipe, SearchConfig
    from optimum_regcache.fusion import fuse, unfuse
    from optimum_regcache.hub.checks import accept_edits
    from optimum_regcache.hub.registers import get_registers, set_deletion, set_registers
    from optimum_regcache.kernels.report import backend_report
    from optimum_regcache.layers.linear import set_backend
    from optimum_regcache.models import (
        RegCacheCLIPVisionModel,
        RegCacheDeiTModel,
        RegCacheDinov2Model,
        RegCacheDinov2WithRegistersModel,
        RegCacheDINOv3ViTModel,
        RegCacheSiglip2VisionModel,
        RegCacheSiglipVisionModel,
        RegCacheViTModel,
    )
    from optimum_regcache.quantizer import RegCacheQuantizer

__version__ = "0.1.0"

_LAZY = {
    "RegCacheCLIPVisionModel": "models",
    "RegCacheDINOv3ViTModel": "models",
    "RegCacheDeiTModel": "models",
    "RegCacheDinov2Model": "models",
    "RegCacheDinov2WithRegistersModel": "models",
    "RegCacheSiglip2VisionModel": "models",
    "RegCacheSiglipVisionModel": "models",
    "RegCacheViTModel": "models",
    "RegCacheQuantizer": "quantizer",
    "Recipe": "config",
    "SearchConfig": "config",
    "accept_edits": "hub.checks",
    "backend_report": "kernels.report",
    "fuse": "fusion",
    "get_registers": "hub.registers",
    "set_backend": "layers.linear",
    "set_deletion": "hub.registers",
    "set_registers": "hub.registers",
    "unfuse": "fusion",
}

__all__ = [
    "ActivationsConfig",
    "DeletionConfig",
    "ModulesConfig",
    "Recipe",
    "RegCacheCLIPVisionModel",
    "RegCacheConfig",
    "RegCacheDINOv3ViTModel",
    "RegCacheDeiTModel",
    "RegCacheDinov2Model",
    "RegCacheDinov2WithRegistersModel",
    "RegCacheQuantizer",
    "RegCacheSiglip2VisionModel",
    "RegCacheSiglipVisionModel",
    "RegCacheViTModel",
    "RegisterCache",
    "RegistersConfig",
    "SearchConfig",
    "WeightsConfig",
    "accept_edits",
    "backend_report",
    "fuse",
    "get_registers",
    "set_backend",
    "set_deletion",
    "set_registers",
    "unfuse",
]

register()


class _Moved(ModuleType):
    """A module under the name that it had in 0.1.0; loads the one it is now when something is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module(_MOVED[self.__name__]), name)


_MOVED = {"optimum_regcache.sources": "optimum_regcache.commands.sources"}
for _name in _MOVED:
    sys.modules.setdefault(_name, _Moved(_name))


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'optimum_regcache' has no attribute {name!r}")
    return getattr(import_module(f"optimum_regcache.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
