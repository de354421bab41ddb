"""Class swap: modules of a tower become instances of subclasses of their own class."""

from __future__ import annotations

from typing import Any

from torch import nn

from optimum_regcache.registers.state import TowerRuntime


class Swapped:
    """Base of the mixins; makes the dynamic classes copyable and picklable."""

    _native: type
    regcache: TowerRuntime

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = type(self).__mro__[1]
        return _rebuild, (mixin, self._native), self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(mixin: type, native: type) -> Any:
    cls: Any = _class_of(mixin, native)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type, type], type] = {}


def _class_of(mixin: type, native: type) -> type:
    key = (mixin, native)
    if key not in _CLASSES:
        # the native name is kept: repr, no-split rules and output recorders go by it
        _CLASSES[key] = type(native.__name__, (mixin, native), {"_native": native, "__module__": native.__module__})
    return _CLASSES[key]


def swap(module: nn.Module, mixin: type, runtime: TowerRuntime) -> Any:
    if not isinstance(module, mixin):
        module.__class__ = _class_of(mixin, type(module))
    target: Any = module
    target.regcache = runtime
    return target
