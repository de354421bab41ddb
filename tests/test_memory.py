"""Bounds on resident memory, measured in fresh processes on a random model of 170 MB; and what the bounds rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.layers.linear import QuantLinear
from optimum_regcache.math import uniform

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "bench_memory.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def measured(step: str, folder: Path, preset: str) -> dict[str, Any]:
    """What one step reports; bytes above the memory after the imports."""
    command = [sys.executable, str(SCRIPT), "--step", step, "--shape", "clip-medium", "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--preset", preset], capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


@linux
@pytest.mark.parametrize("preset", ["w8a8", pytest.param("w8a8-dynamic", marks=pytest.mark.slow)])
def test_bounds_of_conversion_and_loading(preset: str, tmp_path: Path) -> None:
    found = measured("convert", tmp_path, preset)
    size, small = found["float_bytes"], found["int8_bytes"]
    assert size > 150e6
    assert small < 0.27 * size
    assert found["float_resident"] > 0.95 * size  # the measurement sees the float model
    assert found["quantize_peak"] < 1.3 * size
    assert found["save_peak"] < 1.32 * size  # saving copies nothing
    opened = measured("int8", tmp_path, preset)
    # the file is mapped and read where it is used; float weights would show
    assert opened["load_peak"] < small + 0.1 * size
    assert opened["run_resident"] > 0.9 * small  # the pass did use all weights
    assert opened["run_peak"] < 0.9 * size


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile_mse"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_rounding_in_parts_changes_nothing(
    bits: int, observer: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(37, 29)
    config = WeightsConfig(bits=bits, observer=observer, granularity=granularity, symmetric=False)
    activations = ActivationsConfig(mode="dynamic")
    whole = QuantLinear.from_float(linear, config, activations).state_dict()
    for values in (1, 100, 37 * 7):  # one row at a time; two; seven
        monkeypatch.setattr(uniform, "PART_VALUES", values)
        parts = QuantLinear.from_float(linear, config, activations).state_dict()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_eight_bit_codes_are_the_stored_words() -> None:
    layer = QuantLinear.from_float(nn.Linear(8, 4), WeightsConfig(), ActivationsConfig(mode="dynamic"))
    assert layer.codes().data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("columns", [1, 3, 4, 9])
def test_words_do_not_depend_on_the_byte_order(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-128, 128, (5, columns), generator=torch.Generator().manual_seed(0))
    fast = uniform.pack_codes(codes, 8)
    monkeypatch.setattr(uniform, "_BYTES_ARE_CODES", False)
    assert torch.equal(uniform.pack_codes(codes, 8), fast)
    assert torch.equal(uniform.unpack_codes(fast, 8, columns), codes.to(torch.int8))
    monkeypatch.undo()
    assert torch.equal(uniform.unpack_codes(fast, 8, columns), codes.to(torch.int8))


def test_packing_never_returns_the_memory_of_its_input() -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    words = uniform.pack_codes(codes, 8)
    codes.fill_(1)
    assert not words.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[2, 1] = value
    with pytest.raises(ValueError, match="The float weight to quantize is not finite"):
        QuantLinear.from_float(linear, WeightsConfig(), ActivationsConfig(mode="dynamic"))
