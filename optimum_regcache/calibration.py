"""Calibration: forward passes of the float model that feed the observers of the static activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from optimum_regcache.config import RegCacheConfig
from optimum_regcache.data import Batch
from optimum_regcache.evaluation.features import image_features, move
from optimum_regcache.evaluation.norms import PaddingMask
from optimum_regcache.evaluation.objective import has_classifier
from optimum_regcache.observers import Observer, make_observer
from optimum_regcache.surgery import config_sites


@torch.inference_mode()
def calibrate(
    float_model: nn.Module, config: RegCacheConfig, batches: Iterable[Batch]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Static activation scales of every module that ``config`` quantizes.

    The float model runs with whatever registers and deletion are installed in it: prefix rows never pass through a linear
    layer, so they cannot enter the statistics (A.13-3); padding rows are left out.

    Args:
        float_model: unquantized model with its `prepare_tower` wiring.
        config: activations and modules.
        batches: calibration images.

    Returns:
        module name -> (scale [], zero_point []); empty if activations are dynamic.

    Raises:
        ValueError: no batch was given.
    """
    if config.activations.mode == "dynamic":
        return {}
    observers: dict[str, Observer] = {}
    padding = PaddingMask()

    def hook(observer: Observer) -> Any:
        return lambda module, args: observer.update(padding.content(args[0]))

    handles = []
    for site in config_sites(float_model, config):
        observers[site.name] = make_observer(config.activations)
        handles.append(float_model.get_submodule(site.name).register_forward_pre_hook(hook(observers[site.name])))
    try:
        for batch in batches:
            padding.start(batch)
            run_heads(float_model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: observer.qparams() for name, observer in observers.items()}


def run_heads(model: Any, batch: Batch) -> None:
    """Run everything that may be quantized: the classifier if there is one, else the features."""
    if has_classifier(model):
        model(**move(batch, model))
    else:
        image_features(model, batch)
