"""Class swap: modules of a tower become instances of subclasses of their own class."""

from __future__ import annotations

from typing import Any

from torch import nn

from optimum_regcache.registers.state import TowerRuntime


class _Swapped:
    """Base of the mixins below; makes the dynamic classes copyable and picklable."""

    _native: type
    regcache: TowerRuntime

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = type(self).__mro__[1]
        return _rebuild, (mixin, self._native), self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(mixin: type, native: type) -> Any:
    cls: Any = _swapped_class(mixin, native)
    return cls.__new__(cls)


_SWAPPED: dict[tuple[type, type], type] = {}


def _swapped_class(mixin: type, native: type) -> type:
    key = (mixin, native)
    if key not in _SWAPPED:
        # the native name is kept: repr, no-split rules and output recorders go by it
        _SWAPPED[key] = type(native.__name__, (mixin, native), {"_native": native, "__module__": native.__module__})
    return _SWAPPED[key]


def _swap(module: nn.Module, mixin: type, runtime: TowerRuntime) -> Any:
    if not isinstance(module, mixin):
        module.__class__ = _swapped_class(mixin, type(module))
    target: Any = module
    target.regcache = runtime
    return target
