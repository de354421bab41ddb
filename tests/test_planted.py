"""The algorithm on ground truth: a SYNTHETIC encoder whose outlier mechanism is planted in a known block."""

from __future__ import annotations

import pytest
import torch

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DataConfig, SearchConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.evaluation import AccuracyObjective, CosineObjective, encode, measure_token_norms
from optimum_regcache.search import TrialRunner, mine_tokens, scan_sensitivity

BLOCK = planted.PLANTED_BLOCK


def inputs(split: str, count: int) -> ImageInputs:
    return ImageInputs(planted.load_dataset(split, count), planted.build_processor())


@pytest.fixture(scope="module")
def report():
    images = inputs("report", 96)
    return list(images.batches(48)), images.labels()


@pytest.fixture(scope="module")
def fitted():
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    fit = quantizer.fit(
        planted.load_dataset("search", 64),
        RegCacheConfig.from_preset("w8a8"),
        SearchConfig(num_copies=(1, 4, 15), max_delete=5),
        DataConfig(num_samples=64, batch_size=32),
        progress=False,
    )
    return quantizer, fit


@pytest.fixture(scope="module")
def bench():
    calibration = list(inputs("calibration", 16).batches(16))
    return TrialRunner(planted.build_planted_model(), RegCacheConfig.from_preset("w8a8"), calibration)


def accuracy(model, report) -> float:
    batches, labels = report
    return float(AccuracyObjective(batches, labels).scores(model).mean())


def test_splits_share_no_image():
    first = {planted.render("search", i)[0].tobytes() for i in range(20)}
    assert not first & {planted.render("report", i)[0].tobytes() for i in range(20)}
    with pytest.raises(ValueError, match="Unknown split 'validation'; expected one of train, search"):
        planted.render("validation", 0)


def test_sensitivity_scan_names_the_planted_layer(bench):
    batches = list(inputs("search", 32).batches(32))
    objective = CosineObjective(bench.float_model, batches)
    scan = scan_sensitivity(bench.float_model, bench.config, bench.calibration, objective, progress=False)
    assert scan.sensitive_block == BLOCK
    (name, drop), (_, second) = scan.top(2)
    assert name == f"vit.layers.{BLOCK}.mlp.fc2"
    assert drop > 0.5
    assert second < 0.01
    assert len(scan.drops) == 6 * 6
    by_block = scan_sensitivity(
        bench.float_model, bench.config, bench.calibration, objective, granularity="block", progress=False
    )
    assert by_block.sensitive_block == BLOCK
    assert set(by_block.drops) == {f"block {i}" for i in range(6)}


@pytest.mark.parametrize("site", ["block_input", "fc2_input"])
def test_mining_finds_the_planted_tokens(bench, site):
    images = inputs("search", 24)
    mined = mine_tokens(bench.float_model, images.batches(5), [BLOCK], top=24, score_site=site, progress=False)[BLOCK]
    truth = {i: planted.black_patches("search", i) for i in range(24)}
    hits = [int(p) - 1 in truth[int(i)] for i, p in zip(mined.image, mined.position, strict=True)]
    assert all(hits)
    assert torch.equal(mined.norms, mined.norms.sort(descending=True).values)
    assert (mined.position > 0).all()  # CLS never enters


def test_outlier_tokens_are_universal_after_the_planted_block(bench):
    mined = mine_tokens(bench.float_model, inputs("search", 24).batches(8), [BLOCK + 1], top=30, progress=False)
    outlier, normal = mined[BLOCK + 1].outlier_cosine(), mined[BLOCK + 1].normal_cosine()
    assert outlier is not None
    assert normal is not None
    assert outlier[0] > 0.98
    assert normal[0] < 0.6


def test_search_alone_repairs_the_collapse(fitted, bench, report):
    quantizer, fit = fitted
    float_accuracy = accuracy(bench.float_model, report)
    bench.install(None, DeletionConfig())
    naive = accuracy(bench.quantized, report)
    bench.reset()
    model = quantizer.quantize()
    repaired = accuracy(model, report)
    assert float_accuracy > 0.99
    assert naive < float_accuracy / 2  # naive loses at least half of the metric
    assert (repaired - naive) >= 0.95 * (float_accuracy - naive)  # RegCache recovers 95 % of what was lost
    assert fit.sensitive_block == BLOCK
    assert fit.search.chosen.start_block is not None
    assert fit.search.chosen.count >= 2
    assert fit.config.registers.mode == "fixed"
    assert fit.config.registers.blocks[-1] == 5
    assert fit.config.deletion.block == BLOCK
    assert fit.to_dict()["search"]["chosen"]["num_copies"] == fit.config.registers.num_copies


def test_each_half_alone_is_worse_than_both(fitted, bench, report):
    """The sign pattern of the paper's SigLIP rows: prefix helps in part, deletion alone does not, both restore."""
    _, fit = fitted
    batches, _ = report
    cosine = CosineObjective(bench.float_model, batches)
    naive = float(bench.score(None, DeletionConfig(), cosine).mean())
    prefix = float(bench.score(*fit.variants["prefix only"], cosine).mean())
    delete = float(bench.score(*fit.variants["delete only"], cosine).mean())
    both = float(bench.score(fit.cache, fit.config.deletion, cosine).mean())
    assert prefix > naive + 0.1
    assert abs(delete - naive) < 0.05
    assert both > 0.99
    assert both > prefix + 0.2


def test_norms_before_and_after(fitted, bench, report):
    _, fit = fitted
    batches, _ = report
    before = measure_token_norms(bench.float_model, batches)
    bench.install(fit.cache, fit.config.deletion)
    after = measure_token_norms(bench.float_model, batches)
    bench.reset()
    assert before.max_fc2_input[BLOCK] > 50 * after.max_fc2_input[BLOCK]
    assert before.max_block_input[BLOCK + 1] > 5 * after.max_block_input[BLOCK + 1]


def test_float_output_is_kept_with_the_prefix(fitted, bench, report):
    """docs/method.md 4: with the correct cache the cosine of the float model to itself stays above 0.9."""
    _, fit = fitted
    batches, _ = report
    reference = encode(bench.float_model, batches)
    bench.install(fit.cache, fit.config.deletion)
    changed = encode(bench.float_model, batches)
    bench.reset()
    assert float(torch.nn.functional.cosine_similarity(reference, changed).mean()) > 0.99


def test_isolated_registers_of_single_tokens_work_too(report):
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    fit = quantizer.fit(
        planted.load_dataset("search", 48),
        RegCacheConfig.from_preset("w8a8").replace(registers={"kv_mode": "isolated"}),
        SearchConfig(strategy="single_token", num_candidates=2, num_copies=(15,), max_delete=4, sensitive_block=3),
        DataConfig(num_samples=48, batch_size=24),
        progress=False,
    )
    assert fit.sensitivity is None
    assert fit.search.chosen.candidate in (0, 1)
    assert fit.config.registers.kv_mode == "isolated"
    assert fit.config.registers.blocks == (3, 4, 5)
    assert accuracy(quantizer.quantize(), report) > 0.95


def test_threshold_rule_repairs_and_spares_clean_tokens(fitted, report):
    _, fit = fitted
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    config = fit.config.replace(deletion={"rule": "threshold", "kappa": 1.6, "count": 6})
    model = quantizer.quantize(
        quantization_config=config, calibration_dataset=planted.load_dataset("calibration", 24), batch_size=24
    )
    assert accuracy(model, report) > 0.95
