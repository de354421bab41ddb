"""The only file that touches names of transformers that are not public, and the only one that knows how they differ between
releases (5.4 to 5.24). What can be probed is probed; version numbers are not asked."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging, output_capturing
from transformers.utils.hub import PushToHubMixin

from optimum_regcache.encoders.versions import TESTED_TRANSFORMERS, requirement

logger = logging.get_logger(__name__)

SUPPORTED_ATTENTION = ("eager", "sdpa")
EXPORT_ATTENTION = "regcache_export"  # registered by export/onnx.py, in use while a model is traced


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Let attention modules find ``function`` under ``name``."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)  # pyright: ignore[reportUnknownMemberType]


def base_attention(config: Any, module_class: type[Any]) -> Callable[..., Any]:
    """The attention function that ``config`` names, for a module of ``module_class``.

    Raises:
        ValueError: an implementation without additive masks, which a logit bias needs.
    """
    name = config._attn_implementation
    if name not in (*SUPPORTED_ATTENTION, EXPORT_ATTENTION):
        raise ValueError(
            f"Register injection supports attn_implementation {' and '.join(SUPPORTED_ATTENTION)}, got {name!r}. "
            "Call model.set_attn_implementation('sdpa')."
        )
    eager = sys.modules[module_class.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def attention_caller(attention: nn.Module) -> nn.Module:
    """The module that calls the attention interface and reads its name from ``config``: ``attention``, or its inner part."""
    for module in attention.modules():
        if hasattr(module, "config"):
            return module
    raise ValueError(f"{type(attention).__name__} has no config that names its attention function.")


def share_checkpoint_conversion(new_class: str, native_class: type[PreTrainedModel]) -> None:
    """Give the class named ``new_class`` the checkpoint key renames of ``native_class`` (custom classes get none), which are
    kept under its name or under its model type."""
    config: Any = native_class.config_class
    conversions = cast("Any", conversion_mapping)
    for name in (native_class.__name__, config.model_type):
        mapping = conversions.get_checkpoint_conversion_mapping(name)
        if mapping is not None:
            if conversions.get_checkpoint_conversion_mapping(new_class) is None:
                conversions.register_checkpoint_conversion_mapping(new_class, mapping)
            return


def accept_bare_names(model: PreTrainedModel, tower: str) -> None:
    """Let ``model``, which is no more than its vision tower, load checkpoints whose names leave that part out.

    Args:
        model: about to be loaded.
        tower: the tower's name in it, "" since transformers 5.6; before, files name it and those of later releases need not.
    """
    if tower and [name for name, _ in model.named_children()] == [tower]:
        model.base_model_prefix = tower  # transformers adds it to names that are unknown without it


def loaded_names(model: PreTrainedModel, names: list[str]) -> dict[str, list[str]]:
    """For each of the checkpoint tensors called ``names``: the names in ``model`` under which `from_pretrained` would load it.

    Raises:
        ValueError: this release of transformers renames in a way that is not known here.
    """
    try:
        return _loaded_names(model, names)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            "The checkpoint cannot be checked for missing tensors: this release of transformers renames tensors in a way "
            f'that is not known here ({error}). Install a tested one: pip install "{requirement("transformers")}" (tested: '
            f"{' to '.join(TESTED_TRANSFORMERS)})."
        ) from error


def _loaded_names(model: PreTrainedModel, names: list[str]) -> dict[str, list[str]]:
    target: Any = model
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    found: dict[str, list[str]] = {}
    rename = cast("Any", core_model_loading).rename_source_key  # by position: the name of the prefix argument differs
    for name in names:
        renamed, pattern = rename(name, renamings, converters, target.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename(name, [], [], target.base_model_prefix, state)
        targets = ("",) if pattern is None else by_pattern[pattern].target_patterns  # one tensor may become several
        found[name] = [renamed] if pattern is None else [renamed.replace(targets[0], t) for t in targets]
    return found


def divides_tensors(model: PreTrainedModel) -> bool:
    """Whether a stored tensor of this model's type may become several as it is opened."""
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    return any(len(getattr(transform, "target_patterns", ())) > 1 for transform in transforms)


def stored_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of ``model`` under the names, and in the form, in which `save_pretrained` writes them."""
    return cast("Any", core_model_loading).revert_weight_conversion(model, model.state_dict())


def tied_names(model: PreTrainedModel) -> set[str]:
    """Tensors that share their values with others and are not stored."""
    return set(cast("Any", getattr(model, "all_tied_weights_keys", None)) or {})


def never_loaded(model: PreTrainedModel) -> set[str]:
    """Tensors of ``model`` that `from_pretrained` found nowhere; the names of releases that do not tell are left out."""
    state = model.state_dict(keep_vars=True)
    marks = {name: bool(getattr(tensor, "_is_hf_initialized", False)) for name, tensor in state.items()}
    return {name for name, loaded in marks.items() if not loaded} if any(marks.values()) else set()


def leave_uninitialized(module: nn.Module) -> None:
    """Keep `from_pretrained` from drawing tensors of ``module`` that it finds nowhere: it fails at integers."""
    for target in cast("list[Any]", list(module.modules())):
        target._is_hf_initialized = True


def leave_out(model: PreTrainedModel, names: list[str]) -> None:
    """Tell `from_pretrained` that the checkpoint tensors called ``names`` belong to a part that ``model`` does not have."""
    target: Any = model
    known: Any = target._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), *(f"^{re.escape(name)}$" for name in names)]
    target._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(known, set) else patterns


def mark_quantized(model: PreTrainedModel, hf_quantizer: Any) -> None:
    """Set what `from_pretrained` sets on a quantized model, so that `save_pretrained` and friends treat it as one."""
    target: Any = model
    target.hf_quantizer = hf_quantizer
    model.add_model_tags(["optimum", "regcache"])  # in the card that `push_to_hub` of transformers writes
    target.is_quantized = True
    target.quantization_method = hf_quantizer.quantization_config.quant_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def being_pushed() -> bool:
    """Whether `save_pretrained` of transformers, which is under way, was called by its `push_to_hub`: nothing else tells."""
    frame: Any = sys._getframe()  # pyright: ignore[reportPrivateUsage]
    pushes = inspect.unwrap(cast("Any", PushToHubMixin).push_to_hub).__code__
    while frame is not None and frame.f_code is not pushes:
        frame = frame.f_back
    return frame is not None


def attention_weights_wanted() -> bool:
    """Whether the model call under way collects attention weights (``output_attentions=True``); yes where it cannot be told,
    which costs speed (fused blocks step aside) and never a result."""
    if getattr(output_capturing, "_active_collector", None) is None:
        logger.warning_once("This release of transformers does not tell whether attention weights are wanted: unfused.")
        return True
    return "attentions" in collected_outputs()


def collected_outputs() -> Collection[str]:
    """What the model call under way collects from its blocks, such as ``hidden_states``; nothing where it cannot be told."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None:
        return ()
    if torch.compiler.is_compiling() and not collector.compiling:  # a context variable cannot be traced
        return ()
    return collector.get() or ()
