"""Whether a quantized model fits some images: against plain computations, on planted ground truth, by the command."""
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import PACKED, TOWERS, TinyModel, quantized

from optimum_regcache import DeletionConfig, RegCacheConfig, RegCacheQuantizer, get_registers, registers, set_deletion
from optimum_regcache.config.recipe import DataConfig, SearchConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.hub.dequantize import dequantize_modules
from optimum_regcache.layers.float_activations import float_activations
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.registers import prepare_tower
from optimum_regcache.search import FitCheck, check_fit
from optimum_regcache.search import check as module
from optimum_regcache.search.check import FITS, PARTLY, UNFIT
from optimum_regcache.search.clipping import measure_clipping

BLOCK = planted.PLANTED_BLOCK
NO_REGISTERS = {"mode": "none", "blocks": (), "num_copies": 1.0}


@pytest.fixture(scope="module")
def fitted() -> Any:
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    quantizer.fit(
        planted.load_dataset("search", 32),
        RegCacheConfig.from_preset("w8a8"),
        SearchConfig(num_copies=(15,), max_delete=4, sensitive_block=BLOCK, blocks_before=0),
        DataConfig(num_samples=32, batch_size=16),
        progress=False,
    )
    return quantizer.quantize(progress=False)


@pytest.fixture
def model(fitted: Any) -> Any:
    return copy.deepcopy(fitted)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return list(ImageInputs(planted.load_dataset("report", 24), planted.build_processor()).batches(10))


def random_rows(model: Any) -> None:
    """Registers of the same size, drawn at random."""
    cache = get_registers(model)
    assert cache is not None
    generator = torch.Generator().manual_seed(0)
    for block in cache.blocks:
        for rows in cache.rows(block):
            rows.copy_(torch.randn(rows.shape, generator=generator) * rows.std())


def test_images_like_those_of_the_fit_fit(model: Any, batches: Any) -> None:
    before = copy.deepcopy(model)
    found = check_fit(model, batches)
    assert found.parts() == dict.fromkeys(("registers", "deletion", "outliers left", "activation scales"), FITS)
    assert (found.verdict, found.images, found.block, found.float_model) == (FITS, 24, BLOCK, False)
    assert found.notes == []
    assert found.advice == "Nothing to do."
    assert found.rows is not None
    assert found.nothing is not None
    assert found.installed is not None
    assert found.rows.share > 0.9
    assert found.rows.normal < found.rows.cosine - 0.2
    assert found.nothing.largest > 5 * found.installed.largest
    assert found.nothing.images == 1.0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, before(**batches[0]).logits)


def test_other_register_rows_do_not_fit(model: Any, batches: Any) -> None:
    random_rows(model)
    found = check_fit(model, batches)
    assert found.rows is not None
    assert found.rows.share < 0.3
    assert found.parts()["registers"] == UNFIT
    assert found.verdict == UNFIT
    assert found.advice is not None
    assert "optimum-cli regcache quantize" in found.advice


def planted_states(model: Any, batches: Any) -> dict[str, np.ndarray]:
    """Block inputs and outputs, keys and values of the planted model, patches only, whatever is installed."""
    tower, seen = find_tower(model), {"in": [], "out": [], **{f"{x}{b}": [] for x in "kv" for b in range(6)}}
    block = tower.blocks[BLOCK]
    handles = [
        block.register_forward_pre_hook(lambda m, args: seen["in"].append(args[0])),
        block.register_forward_hook(lambda m, args, out: seen["out"].append(out)),
    ]
    for index in range(6):
        for letter, layer in zip("kv", tower.projections(index)[1:], strict=True):
            handles.append(layer.register_forward_hook(lambda m, a, out, n=f"{letter}{index}": seen[n].append(out)))
    with torch.no_grad():
        for batch in batches:
            tower.module(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows)[:, 1:].numpy() for name, rows in seen.items()}


def outliers(states: np.ndarray) -> np.ndarray:
    norms = np.abs(states).max(-1)
    return norms > 5 * np.sort(norms, 1)[:, (norms.shape[1] - 1) // 2][:, None]  # torch's median is the lower one


@pytest.mark.parametrize("count", [1, 2, 4])
def test_deletion_and_rows_agree_with_plain_numpy(model: Any, batches: Any, count: int) -> None:
    set_deletion(model, DeletionConfig(block=BLOCK, count=count))
    cache, original = get_registers(model), planted.build_planted_model()
    assert cache is not None
    found = check_fit(model, batches, original)
    assert found.float_model
    bare = planted_states(original, batches)
    registers.set_registers(original, cache)
    states = planted_states(original, batches)
    many = outliers(states["out"])
    order = np.argsort(-np.abs(states["in"]).max(-1), 1, kind="stable")[:, :count]
    taken = sum(int(many[image, place]) for image, row in enumerate(order) for place in row)
    assert found.deletion is not None
    assert found.deletion.recall is not None
    assert found.deletion.outliers == many.sum() > 24
    assert found.deletion.recall == pytest.approx(taken / many.sum())
    assert found.deletion.images_over == pytest.approx((many.sum(1) > count).mean())
    assert (found.deletion.recall < module.RECALL[0]) == (count < 4)
    assert found.registers is not None
    assert found.registers.per_image == pytest.approx(many.sum(1).mean())
    assert found.registers.largest == pytest.approx(np.abs(states["out"]).max(), rel=1e-5)
    top, cosines, tokens = np.abs(bare["in"]).max(-1).argmax(1), [], []
    images = np.arange(24)
    for letter, place in (("k", 0), ("v", 1)):
        for block in cache.blocks:
            rows = bare[f"{letter}{block}"][images, top].reshape(24, 4, 16)
            stored = cache.rows(block)[place][:, 0].numpy()
            for head in range(4):
                a, b = rows[:, head], stored[head]
                cosines.append(a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b))
                for image in images:
                    mean = np.delete(a, image, 0).mean(0)
                    tokens.append(a[image] @ mean / np.linalg.norm(a[image]) / np.linalg.norm(mean))
    assert outliers(bare["out"]).any(1).all()
    assert found.rows is not None
    assert found.rows.cosine == pytest.approx(np.mean(cosines), abs=1e-4)
    assert found.rows.attainable == pytest.approx(np.mean(tokens), abs=1e-4)
    kept = get_registers(original)
    assert kept is not None
    assert kept.blocks == cache.blocks  # what the test installed is still there


def test_a_deletion_that_is_too_small_does_not_fit(model: Any, batches: Any) -> None:
    set_deletion(model, DeletionConfig(block=BLOCK, count=1))
    found = check_fit(model, batches)
    assert found.parts()["deletion"] == UNFIT
    assert found.parts()["outliers left"] == UNFIT
    assert found.parts()["registers"] == FITS
    assert found.verdict == UNFIT


@pytest.mark.parametrize("symmetric", [True, False])
def test_scaled_pixels_are_clipped(symmetric: bool) -> None:
    tiny = TOWERS["clip"]
    model = quantized(
        tiny, modules={"patch_embedding": True}, activations={"symmetric": symmetric}, registers=NO_REGISTERS,
        deletion={"block": None, "count": 0},
    )  # fmt: skip
    same, scaled = tiny.inputs(seed=2), {"pixel_values": tiny.inputs(seed=2)["pixel_values"] * 4}
    assert check_fit(model, [same]).verdict == FITS
    found = check_fit(model, [scaled])
    assert found.notes == ["this model has no registers and deletes nothing: only its activation scales are judged"]
    assert list(found.parts()) == ["activation scales"]
    assert found.verdict == UNFIT
    assert found.clipping is not None
    assert found.clipping.worst.endswith("patch_embedding.linear")
    layer = dict(quant_linears(model))[found.clipping.worst]
    assert layer.input_scale is not None
    assert layer.input_zero_point is not None
    pixels, step = scaled["pixel_values"].numpy().astype(np.float64), float(layer.input_scale)
    codes, zero = np.round(pixels / step), int(layer.input_zero_point)
    low, high = (-128, 127) if symmetric else (-zero, 255 - zero)
    share = np.mean((codes < low) | (codes > high))
    assert share > 0.5
    assert found.clipping.shares[found.clipping.worst] == pytest.approx(share, abs=1e-3)
    assert found.clipping.reach[found.clipping.worst] == pytest.approx(4, rel=0.05)
    assert 0 < found.clipping.mean < found.clipping.shares[found.clipping.worst]


def test_clipping_of_attention_operands_is_counted_per_head() -> None:
    tiny = TOWERS["dinov2"]
    model = quantized(tiny, attention={"quantize": True, "granularity": "per_head"})
    found = measure_clipping(model, [tiny.inputs(seed=2)])
    assert found is not None
    assert max(found.shares.values()) < 0.01
    assert sum(name.endswith(".products.key") for name in found.shares) == 4
    products: Any = next(m for n, m in model.named_modules() if n.endswith("2.attention.products"))
    with torch.no_grad():
        products.key.scale[1] /= 100  # nearly all of one head of four
    damaged = measure_clipping(model, [tiny.inputs(seed=2)])
    assert damaged is not None
    assert damaged.worst.endswith("2.attention.products.key")
    assert 0.2 < damaged.shares[damaged.worst] < 0.25


@pytest.mark.parametrize("tiny", [*TOWERS.values(), *PACKED.values()], ids=lambda tiny: tiny.name)
def test_every_family_is_measured_and_left_as_it_was(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_regcache.search.traces.OUTLIER_RATIO", 1.1)  # random tokens are no outliers
    parts = {"deletion": {"block": None, "count": 0}} if tiny.name in PACKED else {}
    model, inputs = quantized(tiny, **parts), tiny.inputs(batch=4)
    before = tiny.run(model, inputs)
    found = check_fit(model, [inputs, tiny.inputs(seed=3, batch=6)])
    assert torch.equal(tiny.run(model, inputs), before)
    assert found.images == 10
    assert found.rows is not None
    assert found.rows.images >= 8
    assert abs(found.rows.cosine) < 0.5  # the rows are random
    assert found.parts()["registers"] == UNFIT
    assert (found.deletion is None) == (tiny.name in PACKED)
    if found.deletion is not None:
        assert found.deletion.count == 2
        assert found.deletion.recall is not None
        assert found.block == 2
    assert json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["clip", "dinov2_swiglu", "dinov3"])
def test_float_activations_are_those_of_the_dequantized_model(name: str) -> None:
    tiny = TOWERS[name]
    model = quantized(tiny, bits=4, attention={"quantize": True})
    rounded, cache, deletion = tiny.run(model), get_registers(model), model.config.quantization_config.deletion
    with float_activations(model):
        ours = tiny.run(model)
    assert torch.equal(tiny.run(model), rounded)
    plain = copy.deepcopy(model)
    dequantize_modules(plain, model.config.quantization_config, torch.float32)
    plain.config.quantization_config = None
    registers.set_registers(plain, cache)
    registers.set_deletion(plain, deletion)
    torch.testing.assert_close(ours, tiny.run(plain), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, rounded, atol=1e-2)


def test_dynamic_scales_have_no_clipping(batches: Any) -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny, activations={"mode": "dynamic", "granularity": "per_token"})
    found = check_fit(model, [tiny.inputs()])
    assert found.clipping is None
    assert found.rows is None  # random tokens are no outliers
    assert "0 images have an outlier token" in found.notes[0]
    assert "no activation scale is stored" in found.notes[1]
    assert found.parts() == {"outliers left": FITS}
    plain = quantized(
        tiny, activations={"mode": "dynamic", "granularity": "per_token"}, registers=NO_REGISTERS,
        deletion={"block": None, "count": 0},
    )  # fmt: skip
    nothing = check_fit(plain, [tiny.inputs()])
    assert (nothing.verdict, nothing.advice, nothing.block, nothing.parts()) == (None, None, None, {})


def test_scales_that_clip_on_purpose_have_wider_limits() -> None:
    tiny = TOWERS["clip"]
    model = quantized(tiny, activations={"observer": "percentile", "percentile": 99.0})
    found = check_fit(model, [tiny.inputs(seed=2)])
    assert found.clipping is not None
    assert 0.001 < found.clipping.mean < 0.02
    assert found.parts()["activation scales"] == FITS
    assert found.to_dict()["limits"]["clipped"] == module.CLIPPED_ON_PURPOSE


def test_verdict_is_that_of_the_worst_part_and_limits_belong_to_the_better_side() -> None:
    def left(share: float) -> FitCheck:
        return FitCheck(8, 0, False, installed=module.TokenState(1.0, 1.0, 0.0, share))

    low, high = module.IMAGES_LEFT
    assert [left(x).verdict for x in (0.0, low, low + 1e-6, high, high + 1e-6)] == [FITS, FITS, PARTLY, PARTLY, UNFIT]
    few = module.DeletionCheck(2, module.MIN_OUTLIERS - 1, 0.0, 1.0)
    assert FitCheck(8, 0, False, deletion=few).parts() == {}
    many = module.DeletionCheck(2, module.MIN_OUTLIERS, module.RECALL[1], 1.0)
    assert FitCheck(8, 0, False, deletion=many).verdict == PARTLY


def test_what_cannot_be_checked_is_said(model: Any, batches: Any) -> None:
    original = planted.build_planted_model()
    with pytest.raises(ValueError, match="is a float model: nothing is stored in it"):
        check_fit(original, batches)
    with pytest.raises(TypeError, match=r"A model is needed, got str\. Pass the quantized model"):
        check_fit("out", batches)
    with pytest.raises(ValueError, match="No images to check the model with"):
        check_fit(model, [])
    with pytest.raises(ValueError, match="Unknown score_site 'input'"):
        check_fit(model, batches, score_site="input")
    with pytest.raises(ValueError, match="is already quantized; start from the float model"):
        check_fit(model, batches, copy.deepcopy(model))
    broken = [{"pixel_values": batches[0]["pixel_values"].clone()}]
    broken[0]["pixel_values"][1, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="On these images block 0 computes values that are no numbers"):
        check_fit(model, broken)
    assert get_registers(model) is not None  # put back after the error
    assert model.config.quantization_config.deletion == prepare_tower(model).deletion
    config = model.config.quantization_config
    model.config.quantization_config = config.replace(methods=({"name": "rotation"},))
    with pytest.raises(ValueError, match=r"The registers of this model were rewritten \(rotation\)"):
        check_fit(model, batches, original)


@pytest.fixture(scope="module")
def saved(fitted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "planted"
    fitted.save_pretrained(folder)
    planted.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(30):
        planted.render("report", index)[0].save(folder / f"{index}.png")
    return folder


def test_the_command_writes_a_table_and_json(saved: Path, pictures: Path, tmp_path: Path, run: Any) -> None:
    code, out, _ = run("analyze", "--check", saved, "--dataset", pictures, "--output", tmp_path / "out")
    assert code == 0
    assert "planted (w8a8) on 10 images of" in out
    assert "verdict: fits\nNothing to do.\n" in out
    assert "clipped values, mean of 36 scales" in out
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (found["verdict"], found["images"], found["quantization"]) == ("fits", 10, "w8a8")
    assert found["limits"]["outlier_ratio"] == 5
    assert len(found["clipping"]["shares"]) == 36
    assert str(tmp_path) not in json.dumps(found)
    again = ("analyze", "--check", saved, "--dataset", pictures, "--output", tmp_path / "out")
    code, out, _ = run(*again, "--float-model", "planted-outlier", "--overwrite")
    assert code == 0
    assert "measured in the float original" in out
    code, _, line = run(*again)
    assert code == 2
    assert "holds the result of another job" in line


def test_a_model_that_does_not_fit_has_an_exit_code_of_its_own(
    fitted: Any, pictures: Path, tmp_path: Path, run: Any
) -> None:
    model = copy.deepcopy(fitted)
    random_rows(model)
    model.save_pretrained(tmp_path / "model")
    planted.build_processor().save_pretrained(tmp_path / "model")
    code, out, _ = run("analyze", "--check", tmp_path / "model", "--dataset", pictures, "--output", tmp_path / "out")
    assert code == 5
    assert "verdict: does not fit\nFit again on images of this kind" in out
    assert json.loads((tmp_path / "out" / "check.json").read_text())["verdict"] == "does not fit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--check", "planted-outlier"), "is a float model: nothing is stored in it"),
        (("--check", "nowhere/at/all"), "--check: there is no directory nowhere/at/all"),
        (("--check", "x", "--model", "y", "--preset", "w8a8"), "--model, --preset has no effect: --check opens"),
        (("--check", "x", "--show-photos"), "--show-photos has no effect: --check opens a finished model"),
        (("--float-model", "x"), "--float-model has no effect without --check"),
        (("--check", "x", "--float-model", "x"), "--float-model x is the model itself"),
    ],
)
def test_errors_of_the_command(options: tuple[str, ...], message: str, tmp_path: Path, run: Any) -> None:
    code, _, line = run("analyze", *options, "--output", tmp_path / "out")
    assert code == 2
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_exported_model_is_refused(saved: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "export.json").write_text("{}")
    code, _, line = run("analyze", "--check", tmp_path / "exported", "--output", tmp_path / "out")
    assert code == 2
    assert "is exported: its activations cannot be read" in line
    code, _, line = run("analyze", "--check", saved, "--output", tmp_path / "out")
    assert code == 2
    assert "--dataset is needed for" in line
