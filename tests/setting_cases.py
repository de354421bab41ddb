"""The cases of test_every_setting: contexts, every field of every config part, every parameter of every method."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

# Contexts: recipe fields besides the one that changes.
NONE = {"quantization.registers.mode": "none"}
FIXED = {"quantization.registers": {"mode": "fixed", "blocks": [1]}}
SEARCH = {
    "search.num_copies": [2],
    "search.max_delete": 1,
    "search.sensitive_block": 1,
    "search.always": True,
    "data.batch_size": 2,
}
BIG = {"search.num_copies": [2, 3], "search.max_delete": 4}
FOUR_BITS = {"quantization.weights.bits": 4, "quantization.activations.bits": 4}
SCAN = {**SEARCH, "search.sensitive_block": None, "search.sensitivity": "linear"}
DYNAMIC = {**NONE, "quantization.activations.mode": "dynamic"}
ATTENTION = {**NONE, "quantization.attention.quantize": True}
DELETION = {**NONE, "quantization.deletion": {"block": 1, "count": 3}}
THRESHOLD = {**NONE, "quantization.deletion": {"block": 1, "count": 6, "rule": "threshold", "kappa": 1.05}}


def with_(context: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """``context`` and settings such as ``activations__observer="mse"``."""
    return {**context, **{f"quantization.{k.replace('__', '.')}": v for k, v in settings.items()}}


@dataclass(frozen=True)
class Case:
    """One changed value: ``refused`` is the expected message, None where the result must change."""

    value: Any
    context: tuple[tuple[str, str], ...]
    refused: str | None = None
    model: str = "clip"


def changes(value: Any, context: dict[str, Any] = NONE, model: str = "clip") -> Case:
    return Case(value, tuple((k, json.dumps(v)) for k, v in context.items()), None, model)


def refused(value: Any, message: str, context: dict[str, Any] = NONE) -> Case:
    return Case(value, tuple((k, json.dumps(v)) for k, v in context.items()), message)


def unread(value: Any, context: dict[str, Any] = NONE) -> Case:
    return refused(value, "has no effect", context)


TABLE: dict[str, list[Case]] = {
    "weights.bits": [changes(4)],
    "weights.granularity": [changes("per_tensor")],
    "weights.observer": [changes("mse"), unread("mse", with_(NONE, methods=["rtn"]))],
    "weights.symmetric": [changes(False), unread(False, with_(NONE, methods=["ptq4vit"]))],
    "activations.bits": [changes(4)],
    "activations.mode": [changes("dynamic"), unread("dynamic", with_(NONE, methods=["rtn"]))],
    "activations.granularity": [
        changes("per_token", DYNAMIC),
        refused("per_token", "needs activations.mode='dynamic'"),
    ],
    "activations.symmetric": [changes(False), unread(False, with_(NONE, methods=["oracle"]))],
    "activations.observer": [
        changes("mse"),
        unread("mse", DYNAMIC),
        *(unread("moving_average", with_(NONE, methods=[m])) for m in ("rtn", "mse", "percentile", "repq_vit")),
    ],
    "activations.percentile": [
        changes(90.0, with_(NONE, activations__observer="percentile")),
        unread(90.0),
        unread(90.0, with_(NONE, methods=["percentile"])),
    ],
    "activations.momentum": [
        changes(0.1, with_({**NONE, "data.batch_size": 1}, activations__observer="moving_average")),
        unread(0.1),
    ],
    "activations.outlier_tokens": [changes("per_token"), unread("per_token", with_(NONE, methods=["gptq"]))],
    "activations.outlier_ratio": [changes(1.05, with_(NONE, activations__outlier_tokens="per_token")), unread(1.05)],
    "activations.post_activation": [changes("twin"), unread("twin", with_(NONE, methods=["gptq"]))],
    "activations.mlp_out_offset": [unread(True)],
    "activations.mlp_out_hadamard": [changes(True), unread(True, with_(NONE, methods=["gptq"]))],
    "attention.quantize": [changes(True)],
    "attention.bits": [changes(4, ATTENTION), unread(4)],
    "attention.symmetric": [changes(False, ATTENTION), unread(False)],
    "attention.granularity": [changes("per_head", ATTENTION), unread("per_head")],
    "attention.probabilities": [*(changes(form, ATTENTION) for form in ("log2", "dfq")), unread("log2")],
    "attention.observer": [changes("mse", ATTENTION), unread("mse")],
    "registers.mode": [changes("none", {})],
    "registers.blocks": [changes([0, 1], FIXED), refused([1], "contradicts registers.mode='none'")],
    "registers.num_registers": [
        refused(2, "Mining gives one register per block", FIXED),
        unread(2),
        unread(2, SEARCH),
    ],
    "registers.num_copies": [changes(3.0, FIXED), unread(3.0), unread(8.0, SEARCH)],
    "registers.kv_mode": [changes("isolated", FIXED), changes("isolated", SEARCH), unread("isolated")],
    "registers.refinement": [refused("tuned", "would mine others", FIXED), unread("tuned"), unread("tuned", SEARCH)],
    "deletion.block": [changes(0, DELETION), unread(1), unread(1, SEARCH)],
    "deletion.count": [changes(2, DELETION), refused(2, "found by the search", with_(SEARCH, deletion__block=1))],
    "deletion.score": [changes("l2", DELETION), unread("l2")],
    "deletion.rule": [changes("threshold", DELETION), unread("threshold")],
    "deletion.kappa": [changes(1.3, THRESHOLD), unread(1.3), unread(1.3, DELETION), unread(1.3, SEARCH)],
    "deletion.fill": [changes("none", DELETION), unread("none")],
    "deletion.action": [
        *(changes(action, DELETION) for action in ("replace", "late", "per_token")),
        *(changes(action, SEARCH) for action in ("replace", "late")),
        unread("late"),
        refused("per_token", "gives a few tokens a scale", with_(DELETION, activations__mode="dynamic")),
    ],
    "modules.patch_embedding": [changes(True)],
    "modules.head": [changes(True, NONE, "clip_dual"), unread(True)],
    "modules.ignore": [changes(["mlp.fc2"]), refused(["fc9"], "match no module")],
    "modules.mixed_precision": [changes(["mlp.fc2"]), refused(["fc9"], "match no module")],
    "rewrites.rotation": [unread(True)],
    "rewrites.register_neurons": [unread(["0:1"])],
    "search.strategy": [changes("single_token", SEARCH)],
    "search.objective": [
        *(changes(name, SEARCH, "vit_classifier") for name in ("accuracy", "knn", "logit_kl")),
        *(changes(name, SEARCH) for name in ("patch_cosine", "similarity_kl")),
        refused("patch_cosine", "compares all patch tokens", with_(SEARCH, deletion__fill="none")),
        refused("logit_kl", "needs a classifier", SEARCH),
    ],
    "search.algorithm": [changes(a, {**SEARCH, **BIG, **FOUR_BITS}) for a in ("exhaustive", "coordinate")],
    "search.always": [changes(False, {**SEARCH, "search.min_gain": 0.5})],
    "search.sensitivity": [
        changes("block", SCAN),
        changes("coarse", SCAN),
        unread("block", {"search.sensitive_block": 1}),
    ],
    "search.sensitivity_images": [changes(2, SCAN), unread(2, SEARCH)],
    "search.sensitive_block": [changes(0, SEARCH), refused(9, "encoder has blocks 0 to 1", SEARCH)],
    "search.score_site": [changes("fc2_input", SEARCH)],
    "search.blocks_before": [changes(0, SEARCH), unread(0, {**SEARCH, "search.strategy": "single_token"})],
    "search.scopes": [changes(["single"], SEARCH)],
    "search.num_copies": [changes([3], SEARCH)],
    "search.max_delete": [changes(2, SEARCH)],
    "search.top_tokens": [changes(2, SEARCH), unread(2, {**SEARCH, "search.strategy": "single_token"})],
    "search.num_candidates": [changes(2, {**SEARCH, "search.strategy": "single_token"}), unread(2, SEARCH)],
    "search.min_gain": [changes(7.0, SEARCH)],
    "search.noise_sigmas": [changes(99.0, SEARCH)],
    "search.retune": [changes(True, with_(SEARCH, methods=["mse"])), unread(True, SEARCH)],
    "search.refinements": [
        changes(["block_copies"], SEARCH),
        *(changes([name], SEARCH) for name in ("clusters", "replace", "late_deletion", "per_token", "threshold")),
        unread(["replace"], {**SEARCH, "search.max_delete": 0}),
        unread(["threshold"], with_(SEARCH, deletion__rule="threshold")),
        refused(["per_token"], "gives a few tokens a scale", with_(SEARCH, activations__mode="dynamic")),
        refused(["clusters"], "averages of tokens in context", with_(SEARCH, registers__kv_mode="isolated")),
        refused(["clusters"], "averages of tokens in context", {**SEARCH, "search.strategy": "single_token"}),
        refused(["tuned"], "would mine others", FIXED),
    ],
    "search.seed": [changes(1, SEARCH), changes(1), changes(1, FIXED)],
    "data.num_samples": [changes(6), changes(6, SEARCH)],
    "data.calibration_fraction": [changes(0.7), changes(0.7, SEARCH)],
    "data.confirm_fraction": [changes(0.7, SEARCH)],
    "data.batch_size": [changes(1, with_(NONE, activations__observer="moving_average"))],
    "data.skip_broken": [changes(True)],
    "data.streaming": [changes(True)],
    "data.memory_budget": [changes(0.0, SEARCH)],
    "data.workers": [changes(2, SEARCH)],
    "data.num_report": [changes(3, {"data.num_samples": 4, "data.num_report": 2})],
}
W4 = {**NONE, "quantization.weights.bits": 4, "quantization.activations.bits": 4}
TUNED = {**W4, "data.calibration_fraction": 0.7}
TUNED_FIXED = {**FIXED, **FOUR_BITS, "data.calibration_fraction": 0.7}
PARAMETERS: dict[str, dict[str, list[Case]]] = {
    "percentile": {"percentile": [changes(90.0)]},
    "output_mse": {"candidates": [changes(7, W4)], "max_tokens": [changes(8, W4)]},
    "oracle": {"outlier_ratio": [changes(1.05)]},
    "ptq4vit": {
        "candidates": [changes(7, W4)],
        "low": [changes(0.3, W4)],
        "high": [changes(0.9, W4)],
        "rounds": [changes(1, W4)],
        "twin": [changes(False, W4)],
        "weight_granularity": [changes("per_channel", W4)],
        "draws": [changes(2, W4)],
        "max_images": [changes(1, W4)],
        "max_tokens": [changes(8, W4)],
        "product_images": [changes(1, with_(W4, attention__quantize=True)), unread(1, W4)],
        "seed": [changes(1, W4)],
    },
    "repq_vit": {"max_tokens": [changes(8, W4)]},
    "noisyquant": {
        "shifts": [changes(3, W4)],
        "draws": [changes(9, {**W4, "parameters": {"skip_by_prediction": False}})],
        "ranges": [changes(3, W4)],
        "skip_by_prediction": [changes(False, W4)],
        "max_tokens": [changes(8, W4)],
        "seed": [changes(1, W4)],
    },
    "smoothquant": {
        "alphas": [changes([0.3], W4)],
        "values": [changes(False, W4)],
        "max_tokens": [changes(8, W4)],
    },
    "gptq": {
        "damping": [changes(1.0, W4)],
        "order_by_hessian": [changes(False, W4)],
        "token_weights": [changes("inverse_energy", W4)],
        "max_tokens": [changes(8, W4)],
        "row_scales": [changes("searched", W4)],
    },
    **{
        name: {
            "parametrisation": [changes("adaround", W4)],
            "rank": [
                changes(1, {**W4, "parameters": {"parametrisation": "low_rank"}}),
                unread(1, W4),
            ],
            "loss": [changes("block", W4)],
            "activation_scales": [changes(False, W4)],
            "iterations": [changes(3, W4)],
            "batch": [changes(1, {**W4, "data.calibration_fraction": 0.5})],
            "learning_rate": [changes(0.1, W4)],
            "scale_learning_rate": [changes(0.1, W4)],
            "seed": [changes(1, {**W4, "data.calibration_fraction": 0.5})],
        }
        for name in ("reconstruction", "light", "glf_q")
    },
    "aiqvit": {
        "ranks": [
            changes([2], {**W4, "parameters": {"search_iterations": 2000, "drop_path": 0.2, "learning_rate": 0.01}})
        ],
        "search_iterations": [changes(9, W4), unread(9, {**W4, "parameters": {"ranks": [4], "drop_path": 0.2}})],
        "drop_path": [changes(0.9, W4), unread(0.9, {**W4, "parameters": {"ranks": [4], "search_iterations": 2000}})],
        "first_fraction": [changes(1.0, {**W4, "data.calibration_fraction": 0.75})],
        "iterations": [changes(3, W4)],
        "batch": [changes(1, {**W4, "data.calibration_fraction": 0.75})],
        "learning_rate": [changes(0.1, W4)],
        "scale_learning_rate": [changes(0.1, W4), unread(0.1, with_(W4, activations__mode="dynamic"))],
        "seed": [changes(1, W4)],
    },
    "rotation": {
        "residual": [changes(False)],
        "heads": [changes(False)],
        "mlp": [changes(False)],
        "seed": [changes(1)],
    },
    "bias_correction": {"max_tokens": [changes(8, W4)]},
    "norm_tuning": {
        "iterations": [changes(2, TUNED)],
        "batch": [changes(3, TUNED)],
        "learning_rate": [changes(0.005, {**TUNED, "parameters": {"iterations": 30}})],
        "norms": [changes(False, TUNED_FIXED)],
        "layer_scale": [refused(False, "CLIP has no LayerScale", TUNED), changes(False, TUNED, "dinov2")],
        "registers": [changes(False, TUNED_FIXED), unread(False, TUNED)],
        "holdout": [changes(0.5, TUNED)],
        "patience": [changes(1, {**TUNED, "parameters": {"iterations": 20, "learning_rate": 10.0}})],
        "seed": [changes(1, TUNED)],
    },
    "test_time_registers": {"variant": [changes("token", NONE, "planted")], "top_k": [changes(1, NONE, "planted")]},
    "mixed_precision": {"layers": [changes(1)]},
}
QUICK: dict[str, dict[str, Any]] = {
    "ptq4vit": {"candidates": 20, "rounds": 2, "draws": 1, "max_images": 4, "max_tokens": 40},
    "output_mse": {"candidates": 20, "max_tokens": 40},
    "noisyquant": {"shifts": 8, "draws": 2, "ranges": 4, "max_tokens": 40},
    "smoothquant": {"alphas": [0.5, 0.8], "max_tokens": 40},
    "test_time_registers": {"top_k": 2},
    **{name: {"iterations": 2, "batch": 2, "learning_rate": 0.01} for name in ("reconstruction", "light", "glf_q")},
    "norm_tuning": {"iterations": 3, "batch": 1, "learning_rate": 0.02},
    "aiqvit": {"ranks": [2, 8], "search_iterations": 2, "iterations": 4, "batch": 2, "learning_rate": 0.003},
}


def rows() -> list[Any]:
    found = [(name, None, case) for name, cases in TABLE.items() for case in cases]
    for method, parameters in PARAMETERS.items():
        found += [(f"{method}.{name}", method, case) for name, cases in parameters.items() for case in cases]
    return [pytest.param(*row, id=f"{row[0]}={row[2].value}-{i}") for i, row in enumerate(found)]
