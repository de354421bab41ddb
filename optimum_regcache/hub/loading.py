"""Open a float or quantized encoder with its processor, by directory, Hub id or reference name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from optimum_regcache.data import reference
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.files import check_files

logger = logging.get_logger(__name__)


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where files are and whose code may run, the same for model, config and
    processor."""
    places = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
    names = (*places, "trust_remote_code", "code_revision")
    return {name: kwargs[name] for name in names if name in kwargs}


def load_model(name: str | Path, *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """Load with the class that the checkpoint was saved from, in evaluation mode.

    Args:
        name: directory, Hub id, or a name in `reference.names()`.
        dtype: of the float tensors; float32 by default, because CPUs compute float16 slowly and calibration wants range.
        kwargs: for `from_pretrained`; those that say where files are and whose code may run (``trust_remote_code``,
            ``code_revision``) hold for the config too.

    Raises:
        ValueError: the model holds no supported encoder, or a file of its directory is not what it should be.
        FileNotFoundError: a directory without a model.
    """
    if str(name) in reference.names():
        return reference.load(str(name), dtype=dtype).model
    if Path(name).is_dir():
        check_files(Path(name, kwargs.get("subfolder") or ""))
    config = cast("Any", AutoConfig).from_pretrained(name, **_where(kwargs))
    names = cast("list[str]", getattr(config, "architectures", None) or [])
    classes: list[Any] = [getattr(transformers, a, None) for a in names]
    models = (c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel))
    found = next(models, None)
    if found is not None:  # its code is that of transformers, which takes no revision
        kwargs.pop("code_revision", None)
    loader = cast("Any", AutoModel if found is None else found)
    model = loader.from_pretrained(name, dtype=dtype, **kwargs).eval()
    find_tower(model)
    return model


def load_processor(name: str | Path, **kwargs: Any) -> Any:
    """The full processor (with tokenizer) if there is one, else the image processor, else None.

    Args:
        name: directory, Hub id, or a name in `reference.names()`.
        kwargs: as for `load_model`; only those that say where files are and whose code may run are used.
    """
    if str(name) in reference.names():
        return reference.load(str(name)).processor
    for auto in (AutoProcessor, AutoImageProcessor):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                processor = cast("Any", auto).from_pretrained(name, **_where(kwargs))
        except (OSError, ValueError, KeyError):
            continue
        except ImportError as error:  # a tokenizer library; the image processor does not need it
            logger.warning(f"{auto.__name__} of {name} could not be opened: {error}")
            continue
        if hasattr(processor, "image_processor") or hasattr(processor, "image_mean"):
            return processor
    logger.warning(f"No image processor found in {name}; data sets of images cannot be used, ready pixel_values can.")
    return None
