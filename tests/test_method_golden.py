"""The methods' searches against stored values: the package's own, from a state that agreed with the authors' code
(docs/results/method-agreement.md). A deliberate change of a method rewrites them with

    python tests/test_method_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from method_problems import GELU_MINIMUM, correlated, heavy_tailed, products_problem, rand, randn
from torch.nn import functional as F

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.config.files import write_text
from optimum_regcache.math.nonuniform import log_quantize
from optimum_regcache.math.uniform import percentile_mse_range
from optimum_regcache.methods._search.product import search_products
from optimum_regcache.methods._search.scale import FoundScales, LayerGroup, SearchSpace, search_scales
from optimum_regcache.methods.gptq import Curvature, WeightGrid, gptq_codes
from optimum_regcache.methods.noisyquant import expected_error, predicted_gain
from optimum_regcache.methods.repq_vit import reparametrise

GOLDEN = Path(__file__).parent / "golden" / "method_agreement.json"


def digits(value: Any) -> Any:
    """Floats of a tensor or nested lists, to seven digits."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double().tolist()
    if isinstance(value, (list, tuple)):
        return [digits(v) for v in value]
    return float(f"{value:.7g}")


def of_scales(found: FoundScales) -> dict[str, Any]:
    weights = [] if found.weight_scales is None else found.weight_scales
    return {
        "input_scale": digits(found.input_scale),
        "input_zero_point": int(found.input_zero_point),
        "weight_scales": digits([s.tolist() for s in weights]),
        "error": digits(found.error),
    }


def scale_search_values() -> dict[str, Any]:
    x, gelu = heavy_tailed(0, 48, 12), F.gelu(2 * heavy_tailed(1, 48, 12))
    weights = [randn(2, 5, 12), 2 * randn(3, 7, 12)]
    importance = [randn(4, 48, 5) ** 2, randn(5, 48, 7) ** 2]
    found = {}
    for bits in (4, 8):
        for granularity in ("per_tensor", "per_channel"):
            w = WeightsConfig(bits=bits, granularity=granularity)
            for form in ("uniform", "twin"):
                twin = form == "twin"
                a = ActivationsConfig(bits=bits, post_activation=form)
                negative = torch.tensor(GELU_MINIMUM / 2 ** (bits - 1)) if twin else None
                group = LayerGroup(gelu if twin else x, weights, importance)
                result = search_scales(group, w, a, SearchSpace(), negative_scale=negative)
                found[f"{form} {granularity} {bits}"] = of_scales(result)
        a = ActivationsConfig(bits=bits, symmetric=False)
        space = SearchSpace(0.01, 1.01, 100, rounds=1, weights=False)
        result = search_scales(LayerGroup(gelu, weights), WeightsConfig(bits=bits), a, space, quantized_weights=weights)
        found[f"asymmetric input only {bits}"] = of_scales(result)
    return found


def product_search_values() -> dict[str, Any]:
    found = {}
    for bits in (4, 8):
        products, watched = products_problem(bits, 20)
        search_products(products, watched, SearchSpace())
        found[str(bits)] = {role: digits(operand.scale) for role, operand in products.operands()}
    return found


def reparametrisation_values() -> dict[str, Any]:
    x = randn(30, 600, 8) * torch.exp(randn(31, 8)) + randn(32, 8)
    found = {}
    for bits in (4, 8):
        for integer in (True, False):
            r = reparametrise(x, bits, integer)
            found[f"{bits} {'integer' if integer else 'free'}"] = {
                "factor": digits(r.factor),
                "shift": digits(r.shift),
                "scale": digits(r.scale),
                "zero_point": digits(r.zero_point),
            }
    return found


def quantizer_values() -> dict[str, Any]:
    x = torch.exp2(-14 * rand(40, 40))
    logarithms = {
        f"{form} {bits}": digits(log_quantize(x, torch.tensor(0.9), bits, half_steps=form == "log_sqrt2"))
        for form in ("log2", "log_sqrt2")
        for bits in (3, 4, 8)
    }
    rows = heavy_tailed(41, 6, 3000) + 0.5
    ranges = {}
    for bits in (4, 8):
        for symmetric, widen in ((True, True), (False, True), (False, False)):
            ends = percentile_mse_range(rows, bits, symmetric, widen)
            ranges[f"{bits} symmetric={symmetric} widen={widen}"] = digits(torch.stack(ends))
    return {"log_quantize": logarithms, "percentile_mse_range": ranges}


def gptq_values() -> dict[str, Any]:
    x, weight = correlated(50, 60, 12).double(), randn(52, 4, 12)
    found = {}
    for bits in (3, 4, 8):
        step = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
        for by_hessian in (True, False):
            codes = gptq_codes(
                weight, Curvature.of(x.T @ x, 0.01, by_hessian), WeightGrid(step, torch.zeros(4), bits), block=5
            )[0]
            found[f"{bits} {'by diagonal' if by_hessian else 'in order'}"] = [
                [int(c) for c in r] for r in codes.tolist()
            ]
    return found


def noise_values() -> dict[str, Any]:
    distance = torch.linspace(0.2, 0.5, 7)
    x = 0.3 * randn(60, 500)
    return {
        "expected_error": {str(n): digits(expected_error(distance, 0.5, n)) for n in (0.3, 0.5, 0.7)},
        "predicted_gain": {str(s): digits(predicted_gain(x, torch.tensor(s))) for s in (0.1, 0.5, 0.8, 2.0)},
    }


def own_values() -> dict[str, Any]:
    return {
        "search_scales": scale_search_values(),
        "search_products": product_search_values(),
        "reparametrise": reparametrisation_values(),
        **quantizer_values(),
        "gptq_codes": gptq_values(),
        **noise_values(),
    }


def assert_same(got: Any, stored: Any, place: str) -> None:
    """Whole numbers exactly; other numbers within 1e-5, relative, of the largest in their list."""
    if isinstance(stored, dict):
        assert got.keys() == stored.keys(), place
        for key in stored:
            assert_same(got[key], stored[key], f"{place} / {key}")
    elif isinstance(stored, list) and stored and isinstance(stored[0], list):
        assert len(got) == len(stored), place
        for number, (one, other) in enumerate(zip(got, stored, strict=True)):
            assert_same(one, other, f"{place} / {number}")
    else:
        one, other = np.atleast_1d(got), np.atleast_1d(stored)
        exact = other.dtype.kind == "i"
        tolerance = 0.0 if exact or not other.size else 1e-5 * float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=place)


def test_values_are_the_stored_ones() -> None:
    assert_same(own_values(), json.loads(GOLDEN.read_text(encoding="utf-8")), "golden")


def write_golden() -> None:
    """Rewrite the stored values, atomically."""
    GOLDEN.parent.mkdir(exist_ok=True)
    write_text(GOLDEN, json.dumps(own_values(), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_golden()
