"""Ways through the space of configurations, on landscapes that are known."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import pytest
import torch

from optimum_regcache.config.recipe import SearchConfig
from optimum_regcache.search.algorithms import ALGORITHMS, Halving
from optimum_regcache.search.setups import Setup, Space, Trial, best, sparing

STARTS = tuple((block, None, "onwards") for block in (3, 4, 5, 6))
PAPER = Space(STARTS, tuple(float(tau) for tau in range(1, 16)), 10)
COARSE = Space(STARTS, (1.0, 2.0, 4.0, 8.0, 15.0), 10)
IMAGES = 128


class Landscape:
    """Scores with one summit, images of different difficulty and noise; counts what is asked for.

    Alone, prefixes look alike: what they do shows when tokens are deleted, as in real encoders.
    """

    def __init__(self, summit: Setup, height: float = 0.3, noise: float = 0.02) -> None:
        self.summit, self.height, self.noise = summit, height, noise
        self.asked: list[tuple[Setup, int]] = []
        self.difficulty = torch.rand(IMAGES, generator=torch.Generator().manual_seed(0)) / 10

    def quality(self, setup: Setup) -> float:
        """Mean score above "nothing"."""
        s = self.summit
        deleting = math.exp(-(((setup.count - s.count) / 3) ** 2)) if setup.count else 0.0
        if setup.start_block is None:
            return self.height * 0.4 * deleting
        near = math.exp(-abs(setup.start_block - (s.start_block or 0)))
        near *= math.exp(-(math.log(setup.num_copies / s.num_copies) ** 2))
        return self.height * (0.05 + deleting * (0.35 + 0.6 * near))

    def __call__(self, setup: Setup, images: int | None = None) -> Trial:
        count = images or IMAGES
        self.asked.append((setup, count))
        generator = torch.Generator().manual_seed(zlib.crc32(setup.key.encode()))
        noise = self.noise * torch.randn(IMAGES, generator=generator)
        return Trial(setup, (0.5 - self.difficulty + self.quality(setup) + noise)[:count])

    def many(self, setups: list[Setup], images: int | None = None) -> list[Trial]:
        return [self(setup, images) for setup in setups]

    @property
    def work(self) -> float:
        """In trials on all images."""
        return sum(count for _, count in self.asked) / IMAGES


@pytest.mark.parametrize("summit", [Setup(5, num_copies=4.0, count=4), Setup(3, num_copies=11.0, count=7)])
def test_halving_finds_what_the_paper_s_grid_finds_with_a_fraction_of_the_work(summit: Setup) -> None:
    everything, few = Landscape(summit), Landscape(summit)
    config = SearchConfig()
    top = best(ALGORITHMS["exhaustive"](PAPER, config, IMAGES).run(everything))
    found = best(Halving(COARSE, config, IMAGES).run(few))
    assert top is not None
    assert found is not None
    assert few.quality(found.setup) > everything.quality(top.setup) - 0.02
    assert everything.work / few.work > 20


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_first_trial_is_nothing_and_all_are_of_all_images(name: str) -> None:
    landscape = Landscape(Setup(5, num_copies=4.0, count=4))
    algorithm = ALGORITHMS[name](COARSE, SearchConfig(), IMAGES)
    trials = algorithm.run(landscape)
    assert trials[0].setup == Setup()
    assert {len(t.scores) for t in trials} == {IMAGES}
    assert {t.setup.kind for t in trials} == {"nothing", "prefix", "delete", "both"}
    assert len({t.setup for t in trials}) == len(trials)
    assert algorithm.work() == pytest.approx(landscape.work, rel=0.5)
    again = ALGORITHMS[name](COARSE, SearchConfig(), IMAGES).run(Landscape(Setup(5, num_copies=4.0, count=4)))
    assert [t.setup for t in again] == [t.setup for t in trials]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("space", [Space((), (1.0,), 3), Space(STARTS, (1.0, 4.0), 0), Space((), (), 0)])
def test_spaces_without_prefixes_or_without_deletion(name: str, space: Space) -> None:
    trials = ALGORITHMS[name](space, SearchConfig(), 12).run(Landscape(Setup(5, num_copies=4.0, count=4)))
    assert trials[0].setup == Setup()
    kinds = {t.setup.kind for t in trials}
    assert ("prefix" in kinds) == bool(space.starts)
    assert ("delete" in kinds) == bool(space.max_count)


def test_tau_leaves_the_grid_around_the_winner() -> None:
    landscape = Landscape(Setup(5, num_copies=5.66, count=4), noise=0.0)
    found = best(Halving(COARSE, SearchConfig(), IMAGES).run(landscape))
    assert found is not None
    assert found.setup.start_block == 5
    assert found.setup.num_copies == pytest.approx(5.66, rel=0.01)  # 4 times the square root of 2


def test_it_ends_after_a_few_images_where_nothing_can_win() -> None:
    flat = Landscape(Setup(5, num_copies=4.0, count=4), height=0.0, noise=0.0)
    trials = Halving(COARSE, SearchConfig(), IMAGES).run(flat)
    assert max(t.mean for t in trials) == trials[0].mean
    assert [t.setup.kind for t in trials] == ["nothing", "prefix", "delete", "both"]  # for the report
    assert flat.work < len(Halving(COARSE, SearchConfig(), IMAGES)._first()) * 8 / IMAGES + 5


@pytest.mark.parametrize(("sigmas", "ends"), [(1.5, True), (2.5, False)])
def test_no_neighbours_are_tried_where_all_images_say_that_nothing_wins(sigmas: float, ends: bool) -> None:
    """The lead of one standard error is too small to be installed, and too uncertain to give up on a few images."""
    landscape = Landscape(Setup(5, num_copies=4.0, count=4), height=0.0, noise=0.0)
    signs = torch.ones(IMAGES).index_fill(0, torch.arange(0, IMAGES, 2), -1)

    class Barely(Landscape):
        def __call__(self, setup: Setup, images: int | None = None) -> Trial:
            trial = super().__call__(setup, images)
            paired = 0.1 + 1.0 * signs if setup != Setup() else torch.zeros(IMAGES)  # 0.1 +- 0.089
            return Trial(setup, trial.scores + paired[: len(trial.scores)])

    barely = Barely(landscape.summit, height=0.0, noise=0.0)
    config = SearchConfig(min_gain=0.3, noise_sigmas=sigmas)
    trials = Halving(COARSE, config, IMAGES).run(barely)
    on_all = [setup for setup, count in barely.asked if count == IMAGES]
    assert {t.setup for t in trials} == set(on_all)
    rounds = {count for _, count in barely.asked}
    assert rounds == {8, 32, IMAGES}
    neighbours = [s for s in on_all if s.num_copies not in COARSE.copies or s.count not in (0, 1, 2, 4, 8, 10)]
    assert bool(neighbours) is not ends


def test_it_ends_after_a_few_images_where_nobody_can_be_better_than_the_leader() -> None:
    landscape = Landscape(Setup(5, num_copies=4.0, count=4), noise=1e-5)
    landscape.difficulty.zero_()
    top = landscape.quality(Setup(5, num_copies=4.0, count=4)) + 0.5
    trials = Halving(COARSE, SearchConfig(), IMAGES, best_score=top + 5e-4).run(landscape)
    assert len(trials) == 4  # nothing, and the best of each kind
    assert landscape.work < 20
    flat = Landscape(Setup(5, num_copies=4.0, count=4), noise=1e-5)
    flat.quality = lambda s: 0.5 if s.kind == "both" and s.count >= 3 else 0.0  # type: ignore[method-assign]
    flat.difficulty.zero_()
    trials = Halving(COARSE, SearchConfig(), IMAGES, best_score=1.0).run(flat)
    found = sparing(trials, "both", 1e-3)
    assert found is not None
    assert found.setup.count == 3  # any number from 3 on is as good
    assert sparing(trials, "both", 0.0) == best(trials, "both")
    assert sparing([], "both", 1e-3) is None
    whole = Landscape(Setup(5, num_copies=4.0, count=4), noise=1e-5)
    assert len(Halving(COARSE, SearchConfig(), IMAGES, best_score=top + 0.1).run(whole)) > 4
    assert whole.work > landscape.work


def test_what_is_lossless_on_a_few_images_only_does_not_end_it() -> None:
    class Rare(Landscape):
        """Images from the 65th on need more deleted tokens."""

        def __call__(self, setup: Setup, images: int | None = None) -> Trial:
            trial = super().__call__(setup, images)
            scores = torch.full_like(trial.scores, 0.5 if setup.kind == "both" and setup.count >= 2 else 0.0)
            scores[64:] = 0.5 if setup.kind == "both" and setup.count >= 7 else 0.0
            return replace(trial, scores=scores + 1e-6 * torch.rand(len(scores)))

    landscape = Rare(Setup(5, num_copies=4.0, count=4))
    trials = Halving(COARSE, SearchConfig(), IMAGES, best_score=0.5).run(landscape)
    found = sparing(trials, "both", 1e-3)
    assert found is not None
    assert found.mean == pytest.approx(0.5, abs=1e-3)


def test_no_number_never_wins_a_round() -> None:
    class Broken(Landscape):
        def __call__(self, setup: Setup, images: int | None = None) -> Trial:
            trial = super().__call__(setup, images)
            return replace(trial, scores=trial.scores * math.nan) if setup.start_block == 5 else trial

    landscape = Broken(Setup(5, num_copies=4.0, count=4), noise=0.0)
    found = best(Halving(COARSE, SearchConfig(), IMAGES).run(landscape))
    assert found is not None
    assert found.setup.start_block in (4, 6)


def test_few_counts_grow() -> None:
    assert Space((), (), 10).few_counts == (1, 2, 4, 8, 10)
    assert Space((), (), 1).few_counts == (1,)
    assert Space((), (), 0).few_counts == ()
