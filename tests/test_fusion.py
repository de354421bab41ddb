"""`fuse`: the same results as the unfused int8 model up to rounding ties, and everything around it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from transformers import AutoModel

from optimum_regcache import RegCacheCLIPVisionModel, RegCacheConfig, fuse, unfuse
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.evaluation import measure_token_norms
from optimum_regcache.fusion import is_fused
from optimum_regcache.kernels import native
from optimum_regcache.kernels.onednn import machine_reason
from optimum_regcache.kernels.reference import ReferenceLinear
from optimum_regcache.layers.linear import quant_linears, set_backend
from optimum_regcache.quantizer import build_quantized

pytestmark = pytest.mark.skipif(machine_reason() is not None, reason=f"int8 kernel: {machine_reason()}")
NATIVE = native.unavailable_reason()
needs_native = pytest.mark.skipif(NATIVE is not None, reason=f"C++ operators: {NATIVE}")
MODES = [
    pytest.param({"native": False}, id="torch"),
    pytest.param({"attention": "float32"}, id="native", marks=needs_native),
    pytest.param({}, id="int8 attention", marks=needs_native),
]
CLIP = models.MODELS["clip"]
NOTHING: dict[str, Any] = {"registers": {"mode": "none", "blocks": ()}, "deletion": {"block": None, "count": 0}}


def close(found: torch.Tensor, expected: torch.Tensor, int8_attention: bool) -> None:
    """A code at a tie may differ by one; int8 attention differs by about 1 % of the attention output."""
    relative = float((found - expected).norm() / expected.norm())
    assert relative < (0.06 if int8_attention else 0.02), relative


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in models.MODELS if name != "dinov3"])
def test_fused_equals_unfused(name: str, mode: dict[str, Any]) -> None:
    tiny = models.MODELS[name]
    for parts in ({}, NOTHING):
        model = models.quantized(tiny, **parts)
        expected = tiny.run(model)
        report = fuse(model, **mode)
        assert report.fused == tuple(range(models.BLOCKS)), str(report)
        close(tiny.run(model), expected, not mode)
        unfuse(model)
        assert torch.equal(tiny.run(model), expected)


def test_rotary_positions_run_layer_by_layer() -> None:
    tiny = models.MODELS["dinov3"]
    model = models.quantized(tiny)
    expected = tiny.run(model)
    report = fuse(model)
    assert report.fused == ()
    assert "rotary positions and packed sequences have no fused attention" in str(report)
    assert torch.equal(tiny.run(model), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [6, 4])
def test_narrower_codes(bits: int, mode: dict[str, Any]) -> None:
    """Steps are so wide here that one flipped code shows: judged by the distance to the float model."""
    real = CLIP.run(CLIP.build())

    def fidelity(model: Any) -> float:
        return float(torch.cosine_similarity(CLIP.run(model).flatten(), real.flatten(), 0))

    for activations in ({}, {"symmetric": False}):
        model = models.quantized(CLIP, bits, activations={"bits": bits, **activations}, **NOTHING)
        expected = fidelity(model)
        fuse(model, **mode)
        assert fidelity(model) == pytest.approx(expected, abs=0.03 if bits == 4 else 0.005)


def test_activation_functions() -> None:
    """Every activation function with a fused form, against the unfused model."""
    from optimum_regcache.fusion.gemm import ACTIVATIONS

    tiny = models.MODELS["vit"]
    for activation in ACTIVATIONS:
        for bits in (8, 6):  # u8 straight from the epilogue, and float32 from it
            config = RegCacheConfig.from_preset(f"w{bits}a{bits}").replace(registers={"mode": "none"})
            model = build_quantized(tiny.build(hidden_act=activation), config, None, [tiny.inputs(seed=2)])
            expected = tiny.run(model)
            assert fuse(model, native=False).skipped == {}
            close(tiny.run(model), expected, bits != 8)


def test_an_activation_function_without_a_fused_form() -> None:
    tiny = models.MODELS["vit"]
    config = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    model = build_quantized(tiny.build(hidden_act="mish"), config, None, [tiny.inputs(seed=2)])
    expected = tiny.run(model)
    report = fuse(model)
    assert report.fused == ()
    assert set(report.skipped.values()) == {"the activation function 'mish' has no fused form."}
    assert torch.equal(tiny.run(model), expected)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"activations": {"mode": "dynamic", "granularity": "per_token"}}, "scales are computed from each input"),
        ({"activations": {"mode": "dynamic"}}, "scales are computed from each input"),
        ({"weights": {"symmetric": False}}, "weights have zero points"),
        ({"activations": {"mlp_out_hadamard": True}}, "the input is shifted or transformed before it is quantized"),
        ({"activations": {"post_activation": "twin"}}, "a twin quantizer has two steps"),
        ({"attention": {"quantize": True}}, r"the attention products are simulated \(attention.quantize\)"),
        ({"modules": {"ignore": ("*.fc2",)}}, "mlp.fc2 is not quantized"),
    ],
)
def test_blocks_that_cannot_be_fused_run_as_before(parts: dict[str, Any], reason: str) -> None:
    model = models.quantized(CLIP, **parts)
    expected = CLIP.run(model)
    report = fuse(model)
    assert report.fused == ()
    assert not is_fused(model)
    assert re.search(reason, str(report))
    assert torch.equal(CLIP.run(model), expected)


def test_some_blocks_fused_some_not() -> None:
    model = models.quantized(CLIP, modules={"ignore": ("encoder.layers.1.mlp.fc1",)})
    expected = CLIP.run(model)
    report = fuse(model, native=False)
    assert report.fused == (0, 2, 3)
    assert report.skipped == {1: "mlp.fc1 is not quantized."}
    assert "3 of 4 blocks fused, float32 attention" in str(report)
    assert "blocks [1] not fused: mlp.fc1 is not quantized." in str(report)
    close(CLIP.run(model), expected, False)


def test_projections_with_scales_of_their_own_are_not_merged() -> None:
    model = models.quantized(CLIP)
    tower = find_tower(model)
    for index, name in enumerate(("q_proj", "k_proj")):
        linear: Any = tower.attention(1).get_submodule(name)
        linear.set_input_qparams(linear.input_scale * (1.1 + 0.3 * index), linear.input_zero_point)
    expected = CLIP.run(model)
    assert len(fuse(model, native=False).fused) == 4
    close(CLIP.run(model), expected, False)
    separate, merged = (len(tower.blocks[i].fused._parts.qkv.gemms) for i in (1, 2))  # type: ignore[union-attr]
    assert separate > merged


@pytest.mark.skipif(native.blocks_reason() is not None, reason=f"whole blocks: {native.blocks_reason()}")
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_the_operator_of_a_whole_block_equals_its_parts(name: str) -> None:
    """Whatever the batch size and the number of threads; groups of images are then computed by different threads."""
    tiny = models.MODELS[name]
    model = models.quantized(tiny)
    fuse(model)
    parts = copy.deepcopy(model)
    tiny.run(parts)
    for block in find_tower(parts).blocks:
        assert block.fused._parts.whole is not None  # type: ignore[union-attr]
        block.fused._parts.whole = None  # type: ignore[union-attr]
    for batch in (1, 2, 3, 4, 10):
        inputs = tiny.inputs(batch=batch)
        expected = tiny.run(parts, inputs)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(tiny.run(model, inputs), expected)
            finally:
                torch.set_num_threads(1)


@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_are_those_of_the_unfused_model(mode: dict[str, Any]) -> None:
    """A residual addition that wrote into its operand would change collected states."""
    for name in ("clip", "dinov2"):
        tiny = models.MODELS[name]
        model = models.quantized(tiny, **NOTHING)
        expected = model(**tiny.inputs(), output_hidden_states=True).hidden_states
        fuse(model, **mode)
        found = model(**tiny.inputs(), output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == models.BLOCKS + 1
        for a, b in zip(found, expected, strict=True):
            close(a, b, not mode)
        assert torch.equal(found[0], expected[0])


def test_attention_weights_come_from_the_unfused_blocks() -> None:
    model = models.quantized(CLIP)
    model.set_attn_implementation("eager")
    expected = model(**CLIP.inputs(), output_attentions=True)
    fuse(model)
    found = model(**CLIP.inputs(), output_attentions=True)
    assert len(found.attentions) == models.BLOCKS
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_state_checkpoint_and_module_tree_stay_the_same(tmp_path: Any) -> None:
    model = models.quantized(CLIP)
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    expected = CLIP.run(model)
    fuse(model)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert not is_fused(again)
    assert torch.equal(CLIP.run(again), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_pickles_are_fused_too(duplicate: Callable[[Any], Any]) -> None:
    model = models.quantized(CLIP)
    fuse(model)
    expected = CLIP.run(model)
    twin = duplicate(model)
    assert is_fused(twin)
    assert torch.equal(CLIP.run(twin), expected)
    unfuse(twin)
    assert is_fused(model)
    assert torch.equal(CLIP.run(model), expected)


def test_a_pickle_without_the_operators_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.quantized(CLIP)
    fuse(model)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "none here.")
    close(CLIP.run(twin), CLIP.run(model), True)
    assert not twin.encoder.layers[0].fused.settings.native


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_simulated_attention_is_the_int8_attention(name: str) -> None:
    """Also with registers: beside the operator where there is one, else beside float32 attention."""
    tiny = models.TOWERS[name]
    model = models.quantized(tiny)
    assert fuse(model, attention="simulated").attention == "simulated int8"
    found = tiny.run(model)
    fuse(model, attention="float32")
    assert not torch.equal(found, tiny.run(model))
    close(found, tiny.run(model), True)
    if native.unavailable_reason() is None:
        fuse(model, attention="int8")
        close(found, tiny.run(model), True)


def test_changed_weights_and_scales_are_noticed() -> None:
    model = models.quantized(CLIP)
    fuse(model, native=False)
    before = CLIP.run(model)
    linear: Any = dict(quant_linears(model))["encoder.layers.3.mlp.fc2"]
    linear.set_input_qparams(linear.input_scale * 3, linear.input_zero_point)
    after = CLIP.run(model)
    assert not torch.equal(after, before)
    unfuse(model)
    close(after, CLIP.run(model), False)


def test_a_chosen_backend_is_respected() -> None:
    model = models.quantized(CLIP)
    fuse(model, native=False)
    fused = CLIP.run(model)
    set_backend(model, "reference")
    reference = CLIP.run(model)
    close(reference, fused, False)
    assert not torch.equal(reference, fused)
    assert all(isinstance(m.runtime(), ReferenceLinear) for _, m in quant_linears(model))
    report = fuse(model)
    assert set(report.skipped.values()) == {"the execution backend 'reference' was chosen."}
    set_backend(model, "auto")
    assert len(fuse(model).fused) == models.BLOCKS


def test_token_norms_of_a_fused_model_are_those_of_the_unfused_one() -> None:
    model = models.quantized(CLIP)
    batches = [CLIP.inputs()]
    expected = measure_token_norms(model, batches).to_dict()
    fuse(model)
    assert measure_token_norms(model, batches).to_dict() == expected
    assert is_fused(model)


def test_fused_layers_hold_no_packed_copy_of_their_own() -> None:
    model = models.quantized(CLIP)
    CLIP.run(model)
    fuse(model)
    assert all(m._runtime is None for _, m in quant_linears(model))


def test_registers_of_the_call_override_the_stored_ones() -> None:
    other = models.random_cache((1, 2), registers=2, num_copies=3.0, seed=5)
    mine = models.quantized(CLIP, cls=RegCacheCLIPVisionModel)
    stored = CLIP.run(mine)
    expected = CLIP.run(mine, past_key_values=other)
    report = mine.fuse(native=False)
    assert len(report.fused) == 4
    close(CLIP.run(mine, past_key_values=other), expected, False)
    close(CLIP.run(mine), stored, False)
    mine.unfuse()
    assert torch.equal(CLIP.run(mine, past_key_values=other), expected)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.train()], ids=["bfloat16", "train"])
def test_other_dtypes_and_training_run_unfused(change: Callable[[Any], Any]) -> None:
    model = change(models.quantized(CLIP))
    expected = CLIP.run(model)
    fuse(model)
    assert torch.equal(CLIP.run(model), expected)


def test_what_fuse_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"this model is float\. Quantize it with RegCacheQuantizer first"):
        fuse(CLIP.build())
    model = models.quantized(CLIP)
    with pytest.raises(ValueError, match="attention must be one of auto, int8, float32, simulated, got 'fast'"):
        fuse(model, attention="fast")
    with pytest.raises(ValueError, match=r"attention='int8' needs the C\+\+ operators: native=False"):
        fuse(model, attention="int8", native=False)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler.")
    with pytest.raises(ValueError, match=r"native=True: no compiler\."):
        fuse(model, native=True)
    assert fuse(model).native_reason == "no compiler."
    monkeypatch.setattr("optimum_regcache.fusion.kernel_reason", lambda: "the CPU is too old.")
    with pytest.raises(ValueError, match="cannot run int8 on this machine: the CPU is too old"):
        fuse(model)


@pytest.mark.parametrize(
    ("name", "fused"),
    [*((name, name != "dinov3") for name in models.TOWERS), ("clip", False), ("dinov2_swiglu", False)],
)
def test_int8_compiles_into_one_graph_for_all_batch_sizes(name: str, fused: bool) -> None:
    tiny = models.TOWERS[name]
    model = models.quantized(tiny)
    if fused:
        fuse(model)
    batches = [tiny.inputs(batch=n) for n in (2, 3, 5)]
    expected = [tiny.run(model, batch) for batch in batches]
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for batch, result in zip(batches, expected, strict=True):
        assert torch.equal(tiny.run(compiled, batch), result)
    # transformers interpolates SigLIP2's positions in a loop over the images: up to one graph for each batch size
    assert 1 <= len(graphs) <= (len(batches) if name == "siglip2" else 1)
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert any(t.startswith("regcache") for t in targets)  # int8, not a simulation of it


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_inductor(mode: dict[str, Any]) -> None:
    for name in models.TOWERS:
        tiny = models.TOWERS[name]
        model = models.quantized(tiny)
        fuse(model, **mode)
        batches = [tiny.inputs(batch=n) for n in (2, 3)]
        expected = [tiny.run(model, batch) for batch in batches]
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for batch, result in zip(batches, expected, strict=True):
            close(tiny.run(compiled, batch), result, False)


def test_compiling_before_the_weights_are_packed_says_what_to_do() -> None:
    model = models.quantized(CLIP)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"Run the model once before torch\.compile"):
        CLIP.run(torch.compile(model, fullgraph=True, backend="eager"))
