"""The shipped encoders have the disease they are shipped for (docs/method.md 1), on scenes that training never saw; the control
has not. Figures are those of docs/results/reference-encoders.md, with room for other machines."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch

from optimum_regcache import DeletionConfig, RegCacheConfig, RegisterCache
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs, class_names, object_boxes
from optimum_regcache.encoders.passes import Batch
from optimum_regcache.evaluation import AccuracyObjective, CosineObjective, OutlierReport, measure_outliers
from optimum_regcache.evaluation.objective import zero_shot_features
from optimum_regcache.search import TrialRunner, mine_tokens, scan_sensitivity

INDUCED = ("clip-scenes-induced", "siglip-scenes-induced")
SENSITIVE = 3
CALIBRATION, REPORT = 64, 512
NONE = DeletionConfig()
DELETE = DeletionConfig(block=SENSITIVE, count=4)


class Lab:
    """One encoder with its images; whatever two tests ask for is computed once."""

    def __init__(self, name: str) -> None:
        self.ref = reference.load(name)
        searched = ImageInputs(self.ref.dataset("search", CALIBRATION, 0), self.ref.processor)
        images = self.ref.dataset("report", REPORT, 0)
        report = ImageInputs(images, self.ref.processor)
        self.calibration: list[Batch] = list(searched.batches(64))
        self.report: list[Batch] = list(report.batches(64))
        self.boxes = object_boxes(images)
        text = zero_shot_features(self.ref.model, self.ref.processor, class_names(images) or [], self.ref.template)
        labels = report.labels()
        assert labels is not None
        self.accuracy = AccuracyObjective(self.report, labels, text)
        self.benches: dict[str, TrialRunner] = {}
        self.tops: dict[tuple[str, bool, DeletionConfig], float] = {}
        self.reports: dict[bool, OutlierReport] = {}

    def bench(self, preset: str) -> TrialRunner:
        if preset not in self.benches:
            self.benches[preset] = TrialRunner(self.ref.model, RegCacheConfig.from_preset(preset), self.calibration)
        return self.benches[preset]

    @cached_property
    def register(self) -> RegisterCache:
        tokens = mine_tokens(self.bench("w8a8").float_model, self.calibration, [SENSITIVE], progress=False)[SENSITIVE]
        return tokens.average(tuple(range(SENSITIVE, 6)), 6).restricted(tuple(range(SENSITIVE, 6)), 8.0)

    def top1(self, preset: str, *, prefix: bool = False, deletion: DeletionConfig = NONE) -> float:
        key = (preset, prefix, deletion)
        if key not in self.tops:
            cache = self.register if prefix else None
            self.tops[key] = float(self.bench(preset).score(cache, deletion, self.accuracy).mean())
        return self.tops[key]

    @cached_property
    def float_top1(self) -> float:
        return float(self.accuracy.scores(self.ref.model).mean())

    def outliers(self, *, prefix: bool = False) -> OutlierReport:
        if prefix not in self.reports:
            cache = self.register if prefix else None
            bench = self.bench("w8a8")
            bench.install(cache, NONE)
            self.reports[prefix] = measure_outliers(bench.float_model, self.report, self.boxes)
            bench.reset()
        return self.reports[prefix]


@lru_cache
def lab(name: str) -> Lab:
    return Lab(name)


@pytest.mark.parametrize("name", INDUCED)
def test_1_a_few_background_tokens_are_far_above_the_median_from_a_middle_block_on(name: str) -> None:
    report = lab(name).outliers()
    assert report.first_block in (SENSITIVE, SENSITIVE + 1)
    late = report.ratio[SENSITIVE + 1 :]
    assert bool((late >= 20).all())
    assert float(report.ratio[:SENSITIVE].max()) < 5
    assert 1 <= float(report.per_image[SENSITIVE + 1]) <= 10
    assert report.on_background is not None
    assert report.background is not None
    assert report.on_background > 0.95 > report.background


@pytest.mark.parametrize("name", INDUCED)
def test_2_they_are_nearly_the_same_vector_in_all_images(name: str) -> None:
    report = lab(name).outliers()
    assert report.cosine is not None
    assert report.normal_cosine is not None
    assert report.cosine > 0.95
    assert report.normal_cosine < 0.75


@pytest.mark.parametrize("name", INDUCED)
def test_3_the_scan_names_the_fc2_whose_input_they_dominate(name: str) -> None:
    encoder = lab(name)
    report = encoder.outliers()
    assert int(report.fc2_ratio.argmax()) == SENSITIVE
    assert float(report.fc2_ratio[SENSITIVE]) > 20
    bench = encoder.bench("w8a8")
    objective = CosineObjective(bench.float_model, encoder.calibration)
    scan = scan_sensitivity(bench.float_model, bench.config, encoder.calibration, objective, progress=False)
    (first, most), (_, second) = scan.top(2)
    assert first == f"vision_model.encoder.layers.{SENSITIVE}.mlp.fc2"
    assert most > 20 * second


@pytest.mark.parametrize("name", INDUCED)
def test_4_static_w8a8_collapses_because_of_tokens(name: str) -> None:
    encoder = lab(name)
    assert encoder.float_top1 >= 0.85
    assert encoder.float_top1 - encoder.top1("w8a8") >= 0.095  # 10 points where they were trained
    assert encoder.float_top1 - encoder.top1("w8a8-dynamic") < 0.01


@pytest.mark.parametrize("name", INDUCED)
def test_5_a_prefixed_sink_shrinks_them_and_only_both_halves_repair(name: str) -> None:
    encoder = lab(name)
    before, prefixed = encoder.outliers(), encoder.outliers(prefix=True)
    assert float(prefixed.fc2_ratio[SENSITIVE]) < 0.9 * float(before.fc2_ratio[SENSITIVE])
    assert float(prefixed.ratio[SENSITIVE + 1]) < 0.95 * float(before.ratio[SENSITIVE + 1])
    naive, both = encoder.top1("w8a8"), encoder.top1("w8a8", prefix=True, deletion=DELETE)
    prefix, delete = encoder.top1("w8a8", prefix=True), encoder.top1("w8a8", deletion=DELETE)
    assert both > max(prefix, delete)
    assert both - naive >= 0.8 * (encoder.float_top1 - naive)
    assert both >= 0.975 * encoder.float_top1


def test_the_control_has_none_and_loses_nothing() -> None:
    encoder = lab("clip-scenes")
    report = encoder.outliers()
    assert report.first_block is None
    assert float(report.ratio.max()) < 3
    assert encoder.float_top1 - encoder.top1("w8a8") < 0.01


@pytest.mark.parametrize("name", [*INDUCED, "clip-scenes"])
def test_every_encoder_says_what_it_is(name: str) -> None:
    ref: Any = reference.load(name, dtype=torch.float16)
    assert ref.model.dtype == torch.float16
    assert ("INDUCED" in ref.note) == name.endswith("-induced")
    card = (reference.directory(name) / "README.md").read_text(encoding="utf-8")
    assert f"python scripts/train_reference.py {name}" in card
    assert ("outlier tokens were **induced**" in card) == name.endswith("-induced")
