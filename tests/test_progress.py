"""Progress of a whole fit, what an interrupted search keeps, and mined tokens beside the journal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOWERS

from optimum_regcache import RegCacheConfig
from optimum_regcache.commands.failures import INTERRUPTED, Unfinished, explain
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.search import fit as fitting
from optimum_regcache.search import progress as watch
from optimum_regcache.search.estimate import expected_work
from optimum_regcache.search.fit import FitResult, fit_registers
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages
from optimum_regcache.search.search import so_far
from optimum_regcache.search.setups import Setup, Trial
from optimum_regcache.search.trials import TrialRunner

SEARCH = SearchConfig(always=True, num_copies=(1, 4), max_delete=2, blocks_before=1)


def fit(work: Path | None = None, *, keep_best: bool = False, progress: bool = False) -> FitResult:
    tower = TOWERS["clip"]
    images = [{"pixel_values": tower.inputs(seed=s)["pixel_values"][0]} for s in range(24)]
    plan = QuantizationPlan.of(Recipe(RegCacheConfig.from_preset("w6a6"), SEARCH, DataConfig(24, batch_size=4)))
    return fit_registers(
        tower.build(), ReferenceImages(images), plan, work_dir=work, keep_best=keep_best, progress=progress
    )


def test_a_fit_without_a_terminal_writes_a_line_a_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "QUIET", 0.0)
    fit(progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fit: ")]
    assert any(re.match(r"fit: about \d+ (s|min) at most", line) for line in lines)
    ends = [re.match(r"fit: (\w+) done in \d+ (?:s|min)", line) for line in lines]
    assert [m[1] for m in ends if m] == ["features", "naive", "sensitivity", "mining", "search"]
    shares = [int(m[1]) for line in lines if (m := re.search(r"; (\d+) %, about \d+ (?:s|min) left", line))]
    assert shares == sorted(shares)
    assert any(re.search(r"best so far: .*: 0\.\d+ on \d+ images", line) for line in lines)
    assert any(re.match(r"fit: \w+ \.\.\.", line) for line in lines)  # a sign of life within a stage


def test_silence_where_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    fit(progress=False)
    assert capsys.readouterr().err == ""


def test_the_estimate_is_of_the_size_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}

    def kept(*args: Any) -> dict[str, float]:
        seen.update(expected_work(*args))
        return seen

    monkeypatch.setattr(fitting, "expected_work", kept)
    with watch.watching("job", False) as job:
        fit()
    assert job.done > 0
    assert sum(seen.values()) / 3 < job.done < sum(seen.values()) * 2
    assert abs(job.total - job.done) < 1e-6  # what stages took has replaced what they were to take


def test_what_is_left_follows_from_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    progress = watch.Progress("job", False)
    assert progress.left() is None
    progress.expect(one=10, two=30)
    with progress.stage("one"):
        now[0] += 5
        progress.advance(10)
    assert progress.left() == pytest.approx(15)
    with progress.stage("two"):
        progress.advance(60)  # more than expected
    assert progress.left() == 0
    assert [watch.duration(s) for s in (12.4, 89, 91, 4800)] == ["12 s", "89 s", "2 min", "1 h 20 min"]


@pytest.mark.parametrize("after", [2, 5, 8])
def test_an_interrupted_search_keeps_the_best_so_far(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit()
    calls = 0
    score = TrialRunner.score

    def interrupted(self: TrialRunner, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return score(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrialRunner, "score", interrupted)
        if after == 2:  # only "nothing": there is nothing to choose from
            with pytest.raises(KeyboardInterrupt):
                fit(tmp_path, keep_best=True)
        else:
            part = fit(tmp_path, keep_best=True)
            assert part.search.unfinished
            assert part.search.to_dict()["unfinished"] is True
            assert re.match(r"unfinished, interrupted after \d+ trials; ", part.search.reason)
            assert len(part.search.trials) < len(whole.search.trials) + 30
    resumed = fit(tmp_path)
    assert not resumed.search.unfinished
    assert resumed.search.to_dict() == whole.search.to_dict()


def test_python_gets_the_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = TrialRunner.score, list[int]()

    def interrupted(self: TrialRunner, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(self, *args)

    monkeypatch.setattr(TrialRunner, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit()


def test_the_best_so_far_is_compared_on_equal_images() -> None:
    def trial(count: int, images: int) -> Trial:
        return Trial(Setup(count=count), torch.ones(images))

    few, many = [trial(0, 4), trial(1, 4), trial(2, 4)], [trial(1, 8)]
    assert so_far({4: few, 8: many}) == few  # on eight images nobody knows what nothing scores
    both = [trial(1, 8), trial(0, 8)]
    assert [t.setup.count for t in so_far({4: few, 8: both})] == [0, 1]
    assert so_far({4: [trial(0, 4)]}) == []


def test_an_unfinished_result_has_the_exit_code_of_an_interruption() -> None:
    assert explain(Unfinished("the best so far is saved.")) == (INTERRUPTED, "interrupted: the best so far is saved.")


def test_mined_tokens_are_kept_beside_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(tmp_path)
    (path,) = tmp_path.glob("*.mining.safetensors")
    before = {b: t.states.clone() for b, t in first.mined.items()}
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "mine_tokens", lambda *a, **k: pytest.fail("mined again"))
        again = fit(tmp_path)
    assert again.to_dict() | {"seconds": 0} == first.to_dict() | {"seconds": 0}
    assert all(torch.equal(again.mined[b].states, rows) for b, rows in before.items())
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mining\.safetensors is not what this fit wrote\. Delete it and"):
            fit(tmp_path)
        path.unlink(missing_ok=True)


def test_packed_tokens_come_back_as_they_were() -> None:
    tower = TOWERS["dinov2"]
    mined = mine_tokens(tower.build(), [tower.inputs(seed=1)], [1, 2], top=3, progress=False)
    back = MinedTokens.unpack(MinedTokens.pack(mined))
    assert list(back) == [1, 2]
    for block, tokens in mined.items():
        other = back[block]
        assert list(other.keys) == list(tokens.keys)
        for name in ("norms", "image", "position", "states", "normal_states"):
            assert torch.equal(getattr(other, name), getattr(tokens, name))
        assert all(torch.equal(other.keys[b], tokens.keys[b]) for b in tokens.keys)
        assert all(torch.equal(other.values[b], tokens.values[b]) for b in tokens.values)


def test_a_journal_in_memory_keeps_no_tensors() -> None:
    journal = Journal(None, "")
    made = [journal.kept("mining", "mining", lambda n=n: {"a": torch.full((1,), n)}) for n in (1.0, 2.0)]
    assert [float(tensors["a"]) for tensors in made] == [1.0, 2.0]
    assert len(journal) == 0
