"""Every objective against a computation of its own, and what all of them promise to the search."""
# pyright: reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import COMPOSITES, DINOV2_BACKBONE, PACKED, TOWERS, TinyModel, random_cache
from optimum.commands.register.register_regcache import QuantizeCommand
from test_hidden_states import llava
from transformers.modeling_outputs import BaseModelOutputWithPooling

from optimum_regcache import RegCacheConfig, RegCacheQuantizer, SearchConfig
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import OBJECTIVES as NAMES
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.passes import FeatureEncoder, ImageRange, patch_tokens
from optimum_regcache.evaluation import OBJECTIVES, AccuracyObjective, Bank, NeighbourObjective, make_objective
from optimum_regcache.evaluation.registry import bank_for
from optimum_regcache.registers import prepare_tower, set_deletion, set_registers
from optimum_regcache.search import TrialRunner

NONE = RegCacheConfig(registers={"mode": "none"})
DELETION = DeletionConfig(block=2, count=3)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def perturbed(tiny: TinyModel) -> Any:
    """The tiny model with other weights in one layer, so that every feature differs a little."""
    model = tiny.build()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fc1.weight" in name and ".1." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batches_of(tiny: TinyModel) -> tuple[list[Any], list[Any]]:
    """(calibration, scored); the last scored batch is a smaller one."""
    images = {"pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes"}
    parts = [{k: v for k, v in tiny.inputs(seed=seed).items() if k in images} for seed in (1, 2, 3, 4)]
    return parts[:2], [parts[2], *ImageRange([parts[3]], 1)]


def objective_of(kind: str, model: Any, calibration: list[Any], scored: list[Any]) -> Any:
    labels = torch.arange(10) % 2  # six calibration and four scored images
    bank = bank_for(kind, model, calibration, scored, labels)
    return make_objective(kind, model, scored, labels[6:], None, bank)


def test_one_list_of_names_everywhere() -> None:
    parser = argparse.ArgumentParser()
    QuantizeCommand.parse_args(parser)
    options = next(a.choices for a in parser._actions if a.dest == "objective")
    assert tuple(OBJECTIVES) == NAMES == options
    assert all(SearchConfig(objective=name).objective == name for name in OBJECTIVES)
    with pytest.raises(
        ValueError, match=r"Unknown objective 'loss'; expected one of cosine, patch_cosine, similarity_kl"
    ):
        make_objective("loss", TOWERS["clip"].build(), [])


# --- what the search relies on

CASES = [
    *((kind, "vit_classifier") for kind in NAMES),
    *((kind, name) for kind in ("patch_cosine", "similarity_kl", "knn") for name in ("siglip2", "dinov3", "clip_dual")),
    ("patch_cosine", "backbone"),
    ("patch_cosine", "llava"),
]


def build(name: str) -> tuple[Any, list[Any], list[Any]]:
    """(model, calibration, scored)."""
    if name == "llava":
        return llava(vision_feature_layer=[-2, 1]), *batches_of(TOWERS["clip"])
    tiny = DINOV2_BACKBONE if name == "backbone" else {**TOWERS, **COMPOSITES}[name]
    return tiny.build(), *batches_of(tiny)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_scores_with_and_without_the_record_are_the_same_bits(kind: str, name: str) -> None:
    model, calibration, scored = build(name)
    runners = [TrialRunner(model, NONE, calibration, reuse=reuse) for reuse in (False, True)]
    objectives = [objective_of(kind, r.float_model, calibration, scored) for r in runners]
    few = ImageRange(calibration, 4)
    for registers, deletion in (
        (None, DeletionConfig()),
        (random_cache((2, 3)), DeletionConfig()),
        (None, DELETION if name != "siglip2" else replace(DELETION, count=1)),
        (random_cache((1, 2, 3)), DeletionConfig(block=3, count=1)),
    ):
        plain, reused = (r.score(registers, deletion, o) for r, o in zip(runners, objectives, strict=True))
        assert torch.equal(plain, reused)
        assert plain.dtype == torch.float32
        assert plain.shape == (4,)
        assert plain.isfinite().all()
        plain, reused = (
            r.score(registers, deletion, o.first(2), few) for r, o in zip(runners, objectives, strict=True)
        )
        assert torch.equal(plain, reused)
        assert plain.shape == (2,)
    assert runners[1].block_forwards < runners[0].block_forwards


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_first_images_score_as_among_all(kind: str, name: str) -> None:
    model, calibration, scored = build(name)
    objective = objective_of(kind, model, calibration, scored)
    prepare_tower(model)
    set_registers(model, random_cache((1, 2, 3)))
    whole = objective.scores(model)
    for images in (1, 2, 3, 4):
        part = objective.first(images)
        torch.testing.assert_close(part.scores(model), whole[:images], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(objective.scores(model), whole)  # the whole one is as before
    assert objective.first(3).first(2).scores(model).shape == (2,)


@pytest.mark.parametrize("kind", [name for name, cls in OBJECTIVES.items() if cls.labels_read == "none"])
def test_the_float_model_scores_best_and_nan_stays_nan(kind: str) -> None:
    tiny = COMPOSITES["vit_classifier"]
    objective = objective_of(kind, tiny.build(), *batches_of(tiny))
    best, other = objective.scores(tiny.build()), objective.scores(perturbed(tiny))
    torch.testing.assert_close(best, torch.full((4,), 1.0 if "cosine" in kind else 0.0), atol=1e-6, rtol=0)
    assert (other < best - 1e-5).all()
    broken = tiny.build()
    broken.vit.layernorm.bias.data[0] = float("nan")
    assert objective.scores(broken).isnan().all()


def test_a_model_that_gives_no_numbers_is_never_right() -> None:
    tiny = COMPOSITES["vit_classifier"]
    _, scored = batches_of(tiny)
    broken = tiny.build()
    broken.vit.layernorm.bias.data[0] = float("nan")
    assert AccuracyObjective(scored, torch.zeros(4, dtype=torch.int64)).scores(broken).tolist() == [0.0] * 4
    bank = Bank.of(tiny.build(), scored, labels=torch.zeros(4, dtype=torch.int64), own=0)
    assert NeighbourObjective(scored, torch.zeros(4, dtype=torch.int64), bank).scores(broken).tolist() == [0.0] * 4


# --- patch tokens


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2_registers", "dinov3", "deit"])
def test_patch_cosine_is_the_mean_over_positions(name: str) -> None:
    tiny = TOWERS[name]
    _, scored = batches_of(tiny)
    other = perturbed(tiny)
    found = make_objective("patch_cosine", tiny.build(), scored).scores(other)
    expected = []
    for batch in scored:
        a, b = (unit(tiny.run(model, batch).numpy().astype(np.float64)) for model in (tiny.build(), other))
        expected += [
            np.mean([x @ y for x, y in zip(p, q, strict=True)][tiny.lead :]) for p, q in zip(a, b, strict=True)
        ]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_padding_takes_no_part() -> None:
    tiny = TOWERS["siglip2"]
    batch = tiny.inputs(seed=3)
    other = perturbed(tiny)
    found = make_objective("patch_cosine", tiny.build(), [batch]).scores(other)
    a, b = (unit(tiny.run(model, batch).numpy().astype(np.float64)) for model in (tiny.build(), other))
    lengths = batch["spatial_shapes"].prod(1).tolist()
    assert lengths == [16, 12, 6]
    expected = [np.mean([a[i, j] @ b[i, j] for j in range(n)]) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "dinov2_registers", "siglip"])
def test_a_deleted_token_scores_what_the_fill_gives_at_its_place(name: str) -> None:
    tiny = TOWERS[name]
    batch = tiny.inputs(seed=3)
    model = tiny.build()
    objective = make_objective("patch_cosine", tiny.build(), [batch])
    prepare_tower(model)
    set_deletion(model, DELETION)
    found = objective.scores(model)
    a = unit(tiny.run(tiny.build(), batch).numpy().astype(np.float64))[:, tiny.lead :]
    masked = model(**batch, output_hidden_states=True).last_hidden_state.detach()  # tokens stay in place here
    b = unit(masked.numpy().astype(np.float64))[:, tiny.lead :]
    np.testing.assert_allclose(found.numpy(), (a * b).sum(-1).mean(-1), atol=1e-5)
    # which positions are gone, found from outside: kept tokens in their order, the deleted ones left out
    set_deletion(model, replace(DELETION, fill="none"))
    fewer = unit(tiny.run(model, batch).numpy().astype(np.float64))[:, tiny.lead :]
    for image in range(len(a)):
        kept = [int(np.argmax(b[image] @ token)) for token in fewer[image]]
        assert kept == sorted(kept)
        gone = sorted(set(range(16)) - set(kept))
        assert len(gone) == DELETION.count
        total = sum(a[image, j] @ b[image, j] for j in kept) + sum(a[image, j] @ b[image, j] for j in gone)
        assert found[image].item() == pytest.approx(total / 16, abs=1e-5)
        assert np.mean([a[image, j] @ b[image, j] for j in gone]) < found[image].item()  # deletion has its price
    with pytest.raises(
        ValueError, match=r"gives 13 patch tokens for an image of which the float model gives 16: which po"
    ):
        objective.scores(model)


def test_patch_tokens_of_backbones_larger_models_and_packed_towers() -> None:
    backbone, batch = DINOV2_BACKBONE.build(), DINOV2_BACKBONE.inputs()
    with torch.no_grad():
        maps = backbone(**batch).feature_maps
        tokens, lengths = patch_tokens(backbone, batch)
    assert lengths == [32] * 3
    torch.testing.assert_close(tokens[32 + 16 + 5], maps[1][1, :, 1, 1])
    model = llava(vision_feature_layer=[-2, 1], vision_feature_select_strategy="full")
    with torch.no_grad():
        states = model.get_submodule("model.vision_tower")(**batch, output_hidden_states=True).hidden_states
        tokens, lengths = patch_tokens(model, batch)
    assert lengths == [32] * 3
    torch.testing.assert_close(tokens[32 + 16 + 5], states[1][1, 1 + 5])  # the class token is none
    packed = PACKED["qwen2_5_vl"]
    batch = packed.inputs()
    with torch.no_grad():
        tokens, lengths = patch_tokens(packed.build(), batch)
    assert lengths == [4, 6, 2]
    torch.testing.assert_close(tokens, packed.run(packed.build(), batch))
    other = packed.build(seed=1)
    found = make_objective("patch_cosine", packed.build(), [batch]).scores(other)
    a, b = (unit(packed.run(m, batch).numpy().astype(np.float64)) for m in (packed.build(), other))
    cosines = (a * b).sum(-1)
    np.testing.assert_allclose(
        found.numpy(), [cosines[:4].mean(), cosines[4:10].mean(), cosines[10:].mean()], atol=1e-6
    )


def test_encoders_without_hidden_states_have_no_patch_tokens() -> None:
    class Exported(FeatureEncoder):
        def run(self, batch: Any) -> Any:
            return BaseModelOutputWithPooling(pooler_output=torch.ones(len(batch["pixel_values"]), 4))

        def features_of(self, output: Any) -> torch.Tensor:
            return output.pooler_output

    with pytest.raises(ValueError, match="The encoder gives pooled features and no patch tokens"):
        patch_tokens(Exported(), TOWERS["clip"].inputs())


def test_places_that_are_left_out_cannot_be_compared() -> None:
    quantizer = RegCacheQuantizer(TOWERS["clip"].build())
    items = [{"pixel_values": row} for row in TOWERS["clip"].inputs(batch=8)["pixel_values"]]
    config, search = RegCacheConfig(deletion={"fill": "none"}), SearchConfig(objective="patch_cosine")
    with pytest.raises(
        ValueError, match=r"search\.objective='patch_cosine' compares all patch tokens, and deletion\.fill"
    ):
        quantizer.fit(items, config, search, DataConfig(num_samples=8), progress=False)


# --- neighbours and distributions


def features_of(tiny: TinyModel, model: Any, batches: list[Any]) -> np.ndarray:
    """Normalised float64 features, computed from the model's own output."""
    with torch.no_grad():
        if tiny.name == "clip_dual":
            rows = [model.visual_projection(model.vision_model(b["pixel_values"]).pooler_output) for b in batches]
        else:
            rows = [model(**b).pooler_output for b in batches]
    return unit(torch.cat(rows).numpy().astype(np.float64))


@pytest.mark.parametrize(("name", "temperature"), [("clip", 0.07), ("clip_dual", math.exp(-1.0))])
@pytest.mark.parametrize("inside", [True, False])
def test_similarity_kl(name: str, temperature: float, inside: bool) -> None:
    tiny = {**TOWERS, **COMPOSITES}[name]
    calibration, scored = batches_of(tiny)
    model, other = tiny.build(), perturbed(tiny)
    bank = bank_for("similarity_kl", model, calibration, scored)
    assert bank is not None
    bank = bank if inside else replace(bank, own=None)
    found = make_objective("similarity_kl", model, scored, bank=bank).scores(other)
    rows, f, q = (features_of(tiny, m, b) for m, b in ((model, calibration + scored), (model, scored), (other, scored)))
    expected = []
    for i in range(4):
        others = [j for j in range(10) if not (inside and j == 6 + i)]
        p, r = (np.exp([x[i] @ rows[j] / temperature for j in others]) for x in (f, q))
        p, r = p / p.sum(), r / r.sum()
        expected.append(-np.sum(p * np.log(p / r)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)
    assert max(expected) < -1e-4


def test_logit_kl_is_that_of_the_class_probabilities() -> None:
    tiny = COMPOSITES["dinov2_classifier"]
    _, scored = batches_of(tiny)
    other = perturbed(tiny)
    found = make_objective("logit_kl", tiny.build(), scored).scores(other)
    p, q = (torch.cat([tiny.run(m, b) for b in scored]).double().softmax(-1).numpy() for m in (tiny.build(), other))
    np.testing.assert_allclose(found.numpy(), -(p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"objective='logit_kl' needs a classifier; CLIPVisionModel has none"):
        make_objective("logit_kl", TOWERS["clip"].build(), scored)


@pytest.mark.parametrize("inside", [True, False])
def test_knn_is_a_weighted_vote_of_the_nearest(inside: bool) -> None:
    tiny = TOWERS["dinov2"]
    calibration = [tiny.inputs(seed=seed, batch=8) for seed in (1, 2, 5)]
    _, scored = batches_of(tiny)
    labels = torch.randint(0, 3, (28,), generator=torch.Generator().manual_seed(4)) * 700_000_000 + 5
    model, other = tiny.build(), perturbed(tiny)
    bank = bank_for("knn", model, calibration, scored, labels)
    assert bank is not None
    bank = bank if inside else replace(bank, own=None)
    objective = NeighbourObjective(scored, labels[24:], bank)
    rows, q = features_of(tiny, model, calibration + scored), features_of(tiny, other, scored)
    expected = []
    for i in range(4):
        others = [j for j in range(28) if not (inside and j == 24 + i)]
        nearest = sorted(others, key=lambda j: -(q[i] @ rows[j]))[:10]
        votes: dict[int, float] = {}
        for j in nearest:
            votes[int(labels[j])] = votes.get(int(labels[j]), 0.0) + math.exp(q[i] @ rows[j] / 0.07)
        expected.append(max(votes, key=lambda label: votes[label]))
    assert objective.predictions(other).tolist() == expected
    assert objective.scores(other).tolist() == [
        float(e == t) for e, t in zip(expected, labels[24:].tolist(), strict=True)
    ]
    assert bank.others(4).all() != inside


def test_an_image_is_not_its_own_neighbour() -> None:
    """Two classes of one image each but for a third: who looks at itself would be right."""
    tiny = TOWERS["clip"]
    _, scored = batches_of(tiny)
    labels = torch.tensor([0, 1, 1, 1])
    bank = Bank.of(tiny.build(), scored, labels=labels, own=0)
    assert NeighbourObjective(scored, labels, bank).scores(tiny.build()).tolist() == [0.0, 1.0, 1.0, 1.0]
    assert not bank.others(4).diagonal().any()
    assert bank.others(4).sum() == 12


def test_what_is_missing_is_said() -> None:
    tiny = TOWERS["clip"]
    model, (_, scored) = tiny.build(), batches_of(tiny)
    labels = torch.tensor([0, 0, 1, 1])
    bank = Bank.of(model, scored, labels=labels, own=0)
    for kind, given, message in (
        ("knn", (None, None, bank), r"objective='knn' needs labels\. Use objective='similarity_kl'"),
        ("knn", (labels, None, None), r"objective='knn' compares with a bank of reference images: pass bank="),
        ("knn", (labels, None, replace(bank, labels=None)), r"objective='knn' needs labels of the bank's images"),
        ("knn", (labels[:3], None, bank), r"3 labels for 4 images"),
        (
            "knn",
            (torch.tensor([5, 6, 7, 0]), None, bank),
            r"several images of a class: for 3 of 4 there is no other one",
        ),
        ("similarity_kl", (None, None, None), r"objective='similarity_kl' compares with a bank"),
        ("accuracy", (None, None, None), r"objective='accuracy' needs labels that the model can predict"),
        ("accuracy", (labels, None, None), r"objective='accuracy' needs a classifier or a text tower"),
    ):
        with pytest.raises(ValueError, match=message):
            make_objective(kind, model, scored, *given)
    lone = Bank(bank.features[:2], labels[:2], own=0)
    with pytest.raises(
        ValueError, match=r"objective='similarity_kl' needs at least two other images to compare with, got 1"
    ):
        make_objective("similarity_kl", model, ImageRange(scored, 2), bank=lone)
    with pytest.raises(ValueError, match="Not a label for each of 4 images of the bank"):
        Bank.of(model, scored, labels=labels[:3])


# --- the whole fit

SEARCH = SearchConfig(num_copies=(15,), max_delete=4, sensitive_block=3, blocks_before=0, always=True)


@pytest.mark.parametrize("kind", NAMES)
def test_every_objective_repairs_the_planted_encoder(kind: str) -> None:
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    fit = quantizer.fit(
        planted.load_dataset("search", 48),
        RegCacheConfig.from_preset("w8a8"),
        replace(SEARCH, objective=kind),
        DataConfig(num_samples=48, batch_size=12),
        progress=False,
    )
    assert fit.search.chosen.kind != "nothing", fit.search.reason
    assert fit.search.gain > 0
