"""Refinements of the deletion: tried at neighbouring k~ of the best setups, chosen only if they win, resumed bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_refine import PREFIX, SCORES, engine
from transformers import AutoModelForImageClassification

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DELETION_REFINEMENTS, DataConfig, SearchConfig
from optimum_regcache.data.reference import planted
from optimum_regcache.registers import prepare_tower
from optimum_regcache.search import Setup
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.refine import KAPPAS, deletions

NAMES = tuple(DELETION_REFINEMENTS)
FIT = SearchConfig(num_copies=(15,), max_delete=4, blocks_before=0, sensitive_block=3, refinements=NAMES)
DATA = DataConfig(num_samples=24, batch_size=6)
WORDS = {
    "replace": "replace 1",
    "late_deletion": "delete 1 late",
    "per_token": "1 per token at fc2",
    "threshold": "delete up to 1 beyond 2 x median",
}


def test_what_is_tried() -> None:
    both = Setup(2, "onwards", None, 4.0, 3)
    for name in ("replace", "late_deletion", "per_token"):
        tried = deletions(name, both, 5)
        assert tried == [replace(both, count=k, refinement=name) for k in (2, 3, 4)]
        assert [s.count for s in deletions(name, both, 8)] == [2, 3, 4, 6]
        assert [s.count for s in deletions(name, PREFIX, 8)] == [1, 2]  # of a prefix that deletes nothing
        assert deletions(name, both, 0) == []  # an encoder without deletion
    tried = deletions("threshold", both, 8)
    assert [(s.count, s.kappa) for s in tried] == [(k, kappa) for k in (3, 6) for kappa in KAPPAS]
    assert len({s.key for s in tried}) == len(tried)
    assert "kappa" not in both.key


def with_deletion(search: Any, name: str, start: Setup, selecting: float, confirming: float) -> Any:
    """Give ``search`` the scores of every variant of ``start``: the first of them the best."""
    search.config = replace(search.config, refinements=(name,))
    for number, setup in enumerate(deletions(name, start, 1)):
        search.journal.put(setup.key, [selecting - 0.01 * number] * 4)
        search.journal.put(f"confirm {setup.key}", [confirming] * 4)
    return search


@pytest.mark.parametrize("name", NAMES)
def test_each_is_chosen_if_it_wins_and_not_if_it_does_not(name: str) -> None:
    won = with_deletion(engine({}), name, PREFIX, 0.8, 0.8).run()
    first = deletions(name, PREFIX, 1)[0]
    assert won.chosen == first
    assert won.chosen.describe() == f"prefix from block 1, tau 1; {WORDS[name]}"
    (record,) = won.refinements  # one for each name, whatever the number of its variants
    assert (record.setup, record.rival, record.gain) == (first, PREFIX, pytest.approx(0.1))
    for confirming in (0.705, 0.6, float("nan")):
        search = with_deletion(engine({}), name, PREFIX, 0.8, confirming)
        assert search.run().chosen == PREFIX
    search = with_deletion(engine({}), name, PREFIX, 0.8, 0.8)
    changed = replace(DeletionConfig(block=1, count=1), **DELETION_REFINEMENTS[name])
    kappa = 5.0 if first.kappa is None else first.kappa
    assert search.deletion(first) == replace(changed, kappa=kappa)
    mined, again = search.cache(PREFIX), search.cache(first)
    assert all(torch.equal(a, b) for a, b in zip(mined.rows(1), again.rows(1), strict=True))


def test_the_best_deletion_alone_is_a_start_where_it_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for delete in (0.9, 0.4):
        monkeypatch.setitem(SCORES, "delete", [delete] * 4)
        search = with_deletion(engine({}, SCORES), "replace", PREFIX, 0.8, 0.8)
        alone = Setup(count=1, refinement="replace")
        search.journal.put(alone.key, [0.95] * 4)
        search.journal.put(f"confirm {alone.key}", [0.95] * 4)
        result = search.run()
        if delete > 0.5:
            assert result.chosen == alone
            assert result.refinements[0].rival == Setup(count=1)
            assert (result.chosen.kind, result.chosen.describe()) == ("delete", "replace 1")
            assert search.cache(alone) is None
        else:
            assert result.chosen.start_block == 1


def quantizer() -> RegCacheQuantizer:
    return RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())


def fit(folder: Path, **changes: Any) -> Any:
    data = planted.load_dataset("search", 24)
    return quantizer().fit(data, RegCacheConfig(), replace(FIT, **changes), DATA, work_dir=folder, progress=False)


def test_a_killed_fit_ends_in_the_same_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(tmp_path / "whole")
    assert [r.setup.refinement for r in whole.search.refinements] != []
    tried = [r.setup.key for r in whole.search.refinements]
    put, waiting = Journal.put, [tried[0], f"confirm {tried[-1]}"]

    def killed(self: Journal, name: str, values: list[float]) -> None:
        if name in waiting:
            waiting.remove(name)
            raise KeyboardInterrupt
        put(self, name, values)

    monkeypatch.setattr(Journal, "put", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "cut")
    resumed = fit(tmp_path / "cut")
    assert not waiting
    assert resumed.search.to_dict() == whole.search.to_dict()
    assert resumed.config == whole.config
    (first,), (second,) = ([p.read_text() for p in (tmp_path / n).glob("*.jsonl")] for n in ("whole", "cut"))
    assert first == second


def test_the_result_is_saved_with_its_action_and_its_recipe_needs_no_search(tmp_path: Path) -> None:
    """The late deletion wins against a deletion alone, which wakes the other sinks."""
    one = quantizer()
    recipe = Recipe(
        RegCacheConfig(), replace(FIT, num_copies=(1,), algorithm="coordinate", refinements=("late_deletion",)), DATA
    )
    data = planted.load_dataset("search", 24)
    model = one.quantize(tmp_path / "a", calibration_dataset=data, recipe=recipe, progress=False)
    chosen = one.fit_result.search.chosen  # type: ignore[union-attr]
    assert chosen.refinement == "late_deletion"
    opened: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    assert prepare_tower(opened).deletion == DeletionConfig(block=3, count=chosen.count, action="late")
    images = planted.build_processor()([planted.render("report", i)[0] for i in range(4)], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(opened(**images).logits, model(**images).logits)
    saved = Recipe.load(tmp_path / "a" / "recipe.yaml")
    assert saved.search.refinements == ()
    assert saved.quantization.deletion.action == "late"
    assert saved.quantization.registers.mode != "search"
