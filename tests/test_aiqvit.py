"""AIQViT on tiny models: searched ranks, easy images first, intervals of probabilities that learn."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import PACKED, TOWERS
from test_reconstruction import configured, reconstructed, unseen_cosine

from optimum_regcache.layers.attention import AttentionProducts, attention_products
from optimum_regcache.math.nonuniform import focus_ends, uniform_unit
from optimum_regcache.methods._reconstruction.train import BlockTraining, Reconstruction
from optimum_regcache.methods._search.gradients import Watched
from optimum_regcache.methods._search.product import search_interval
from optimum_regcache.methods.aiqvit import AIQViT

SHORT = {
    "name": "aiqvit", "ranks": [2, 8], "search_iterations": 4, "iterations": 25, "batch": 8, "learning_rate": 2e-3,
}  # fmt: skip
PRODUCTS = {"attention": {"quantize": True, "bits": 4}}


def with_form(methods: list[Any], form: str = "uniform") -> Any:
    return reconstructed(configured(methods, attention={**PRODUCTS["attention"], "probabilities": form}))


def test_every_block_learns_with_ranks_of_its_own_and_unseen_images_gain() -> None:
    result = reconstructed(configured([SHORT], **PRODUCTS))
    blocks = result.measured["aiqvit"]["blocks"]
    assert [record["block"] for record in blocks] == [0, 1, 2, 3]
    assert all(record["trained"] and record["end"] < 1 for record in blocks)
    ranks = [rank for record in blocks for rank in record["ranks"].values()]
    assert len(ranks) == 24
    assert set(ranks) == {2, 8}
    assert unseen_cosine(result) > unseen_cosine(with_form(["rtn"], "dfq"))


def test_it_follows_the_reparametrisation_of_repq_vit() -> None:
    result = reconstructed(configured(["repq_vit", SHORT], **PRODUCTS))
    assert result.config.attention.probabilities == "dfq"
    assert result.config.activations.symmetric is False
    assert unseen_cosine(result) > unseen_cosine(reconstructed(configured(["repq_vit"], **PRODUCTS)))


def test_intervals_learn_and_what_is_stored_is_plain(tmp_path: Path) -> None:
    start, end = (
        reconstructed(configured([SHORT | {"scale_learning_rate": rate}], **PRODUCTS)) for rate in (1e-9, 1e-2)
    )
    ends = [[float(p.probabilities.scale) for _, p in attention_products(r.model)] for r in (start, end)]
    assert all(any(abs(a / focus - 1) < 1e-4 for focus in focus_ends().tolist()) for a in ends[0])
    assert all(a != b for a, b in zip(*ends, strict=True))
    plain = with_form(["rtn"], "dfq").model.state_dict()
    assert {name: t.shape for name, t in end.model.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    tiny = TOWERS["clip"]
    end.model.save_pretrained(tmp_path)
    opened = type(end.model).from_pretrained(tmp_path)
    assert torch.equal(tiny.run(opened), tiny.run(end.model))


def test_the_interval_starts_where_the_weighted_error_of_the_product_is_least() -> None:
    config = configured([SHORT], **PRODUCTS).replace(attention={"probabilities": "dfq"}).attention
    products, generator = AttentionProducts(2, config), torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 17, 17, generator=generator) / 2
    logits[:, :, 4, 2] += 5.0
    a, v = logits.softmax(-1), torch.randn(3, 2, 17, 5, generator=generator) + 1.0
    importance = torch.zeros(3, 2, 17, 5)
    found = []
    for row in (4, 5):
        importance.zero_()[:, :, row] = 1.0
        watched = {"probabilities": Watched(a, a), "value": Watched(v, v), "output": Watched(v, importance)}
        search_interval(products, watched)
        errors = [float(((uniform_unit(a, end, 4) - a) @ v)[:, :, row].pow(2).sum()) for end in focus_ends()]
        found.append(float(products.probabilities.scale))
        assert found[-1] == float(focus_ends()[min(range(64), key=errors.__getitem__)])
    assert found[0] > found[1]
    watched["output"].importance.zero_()
    search_interval(products, watched)
    assert float(products.probabilities.scale) == found[1]  # nothing matters: it stays


def test_one_rank_is_not_searched() -> None:
    fixed = {k: v for k, v in SHORT.items() if k != "search_iterations"} | {"ranks": [4, 4]}
    blocks = reconstructed(configured([fixed])).measured["aiqvit"]["blocks"]
    assert {rank for record in blocks for rank in record["ranks"].values()} == {4}


def test_losses_of_images_are_in_the_order_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    search = AIQViT._search

    def look(self: AIQViT, training: BlockTraining) -> None:
        items = training.owner.images.training[0][:5]
        backward = training.image_losses(items[::-1])
        torch.testing.assert_close(training.image_losses(items), backward.flip(0))
        for item, loss in zip(items[::-1], backward.tolist(), strict=True):
            assert float(training.losses([item])[0]) == pytest.approx(loss, rel=1e-4)
        checked.append(training.ours.block)
        search(self, training)

    monkeypatch.setattr(AIQViT, "_search", look)
    reconstructed(configured([SHORT | {"seed": 5}]))
    assert checked == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["siglip2", "dinov2", "qwen2_5_vl"])
def test_padded_deleted_and_packed_tokens(name: str) -> None:
    packed = name in PACKED
    tiny = PACKED[name] if packed else TOWERS[name]
    config = configured([SHORT | {"iterations": 4}], registers=not packed, **PRODUCTS)
    result = reconstructed(config, tiny)
    assert all(record["end"] <= 1 for record in result.measured["aiqvit"]["blocks"])
    assert tiny.run(result.model).isfinite().all()


def test_it_continues_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = SHORT | {"iterations": 4}
    whole = reconstructed(configured([short]))
    search = AIQViT._search

    def stop(self: AIQViT, training: BlockTraining) -> None:
        if training.ours.block == 2:
            raise KeyboardInterrupt
        search(self, training)

    with monkeypatch.context() as patch:
        patch.setattr(AIQViT, "_search", stop)
        with pytest.raises(KeyboardInterrupt):
            reconstructed(configured([short]), work_dir=tmp_path)
    continued = reconstructed(configured([short]), work_dir=tmp_path)
    other = continued.model.state_dict()
    assert all(torch.equal(t, other[name]) for name, t in whole.model.state_dict().items())
    ranks = [[record["ranks"] for record in r.measured["aiqvit"]["blocks"]] for r in (whole, continued)]
    assert ranks[0] == ranks[1]


def test_the_loss_is_that_of_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = Reconstruction.__init__

    def init(self: Reconstruction, fit: Any, settings: Any, *args: Any) -> None:
        seen.append(settings)
        original(self, fit, settings, *args)

    monkeypatch.setattr(Reconstruction, "__init__", init)
    reconstructed(configured([SHORT | {"seed": 6, "iterations": 1}]))
    assert [(s.features, s.scales) for s in seen] == [(False, True)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": ()}, r"aiqvit.ranks must be 1 or more each, got \[\]"),
        ({"ranks": (0, 4)}, "aiqvit.ranks must be 1 or more each"),
        ({"search_iterations": 0}, "aiqvit.search_iterations must be at least 1, got 0"),
        ({"iterations": 0}, "aiqvit.iterations must be at least 1"),
        ({"batch": 0}, "aiqvit.batch must be at least 1"),
        ({"learning_rate": 0.0}, "aiqvit.learning_rate must be > 0 and finite"),
        ({"scale_learning_rate": float("inf")}, "aiqvit.scale_learning_rate must be > 0 and finite"),
        ({"drop_path": 1.0}, "aiqvit.drop_path must be at least 0 and below 1"),
        ({"first_fraction": 0.0}, "aiqvit.first_fraction must be above 0 and at most 1"),
    ],
)
def test_other_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AIQViT(**values)
