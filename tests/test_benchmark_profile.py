"""The profile of one model: which operator belongs to which line of the table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cpu_contenders
import profile_cpu_int8
from cpu_job import Job
from cpu_shapes import make_inputs, make_model
from optimum_regcache.data.images import collate


def test_products_are_grouped_by_role(tmp_path: Path):
    job = Job(make_model("clip-tiny"), [collate(make_inputs("clip-tiny", None, 2, 64))], tmp_path)
    found = profile_cpu_int8.take_apart(
        cpu_contenders.build("int8 per layer", job).module, collate(make_inputs("clip-tiny", None, 2, 64)), repeats=1
    )
    products = {f"product: {role}" for role in profile_cpu_int8.ROLES.values()}
    assert products <= set(found)
    assert {"attention", "LayerNorm", "quantize", "patch convolution"} <= set(found)
    assert all(value >= 0 for value in found.values())


@pytest.mark.parametrize(
    ("name", "shapes", "group"),
    [
        ("onednn::qlinear_pointwise", [[2, 65, 8], [], [], [24], [24]], "product: query, key, value"),
        ("onednn::qlinear_pointwise", [[130, 8], [], [], [8], [8]], "product: attention out"),
        ("onednn::qlinear_pointwise", [[130, 8], [], [], [32], [32]], "product: MLP in (fc1)"),
        ("onednn::qlinear_pointwise", [[130, 32], [], [], [8]], "product: MLP out (fc2)"),
        ("onednn::qlinear_pointwise", [[130, 5], [], [], [7]], "product: 5 x 7"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], "attention"),
        ("aten::native_layer_norm", [], "LayerNorm"),
        ("aten::mkldnn_convolution", [], "patch convolution"),
        ("aten::quantize_per_tensor", [], "quantize"),
        ("regcache::attention", [], "attention"),
        ("regcache::embed", [], "regcache::embed"),
        ("aten::add_", [], "rest"),
    ],
)
def test_operators_outside_layers_are_grouped_by_name_and_shape(name: str, shapes: Any, group: str):
    event = SimpleNamespace(name=name, cpu_parent=None, input_shapes=shapes)
    assert profile_cpu_int8.group_of(event, 8, 32) == group


def test_operators_inside_a_layer_belong_to_its_role():
    layer = SimpleNamespace(name="role: MLP in (fc1)", cpu_parent=None, input_shapes=[])
    event = SimpleNamespace(name="onednn::qlinear_pointwise", cpu_parent=layer, input_shapes=[[1, 8], [], [], [8]])
    assert profile_cpu_int8.group_of(event, 8, 32) == "product: MLP in (fc1)"
    event.name = "aten::mul"
    assert profile_cpu_int8.group_of(event, 8, 32) == "quantize"
