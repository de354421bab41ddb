"""Opens this model with ``trust_remote_code=True``: imports optimum-regcache, as one would by hand, and does nothing else."""

from typing import Any

import transformers

try:
    import optimum_regcache  # noqa: F401  # pyright: ignore[reportUnusedImport] (registers the quantization method)
except ModuleNotFoundError as error:
    if error.name != "optimum_regcache":
        raise
    raise ImportError(
        "This model is quantized with RegCache and needs the package: pip install optimum-regcache"
    ) from None


def __getattr__(name: str) -> Any:
    """The model class ``name`` of transformers, as a subclass that belongs to this file: saving it copies the file."""
    native: Any = getattr(transformers, name, None)
    if not (isinstance(native, type) and issubclass(native, transformers.PreTrainedModel)):
        raise AttributeError(name)
    inherited: dict[str, Any] = {"__module__": __name__}
    inherited["is_custom_code"] = staticmethod(lambda: False)  # the names of its tensors are the native ones
    return globals().setdefault(name, type(name, (native,), inherited))
