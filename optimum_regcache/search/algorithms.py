"""How a search walks through its space: one class for each value of ``search.algorithm``.

An algorithm asks for configurations one after the other, on all selection images or on a share of them, and says what it
learned: the trials on all images. It decides nothing; whether anything is installed is decided on other images
(`optimum_regcache.search.search`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Protocol

from optimum_regcache.config.recipe import SearchConfig
from optimum_regcache.search.setups import Setup, Space, Trial, best, mean_and_error


class Evaluate(Protocol):
    """Scores a configuration on the first ``images`` selection images, on all of them by default, with scales from the same
    share of the calibration images; several at once where one does not depend on another, for processes to share."""

    def __call__(self, setup: Setup, images: int | None = None) -> Trial: ...

    def many(self, setups: list[Setup], images: int | None = None) -> list[Trial]:
        """The trials of ``setups``, in their order."""
        ...


class Algorithm(ABC):
    """One way through a space.

    Args:
        space: what may be installed.
        config: search settings.
        images: number of selection images.
        best_score: of an image, if there is one that none can exceed.
    """

    def __init__(self, space: Space, config: SearchConfig, images: int, best_score: float | None = None) -> None:
        self.space, self.config, self.images, self.best_score = space, config, images, best_score

    @abstractmethod
    def work(self) -> float:
        """Expected work, in trials on all images; for the progress bar."""

    @abstractmethod
    def run(self, evaluate: Evaluate) -> list[Trial]:
        """Trials on all images; the first is that of ``Setup()``, nothing installed."""


class Exhaustive(Algorithm):
    """Every start, tau and k~ with every other."""

    def _all(self) -> list[Setup]:
        alone = [Setup(), *self.space.prefixes()]
        return [*alone, *(replace(setup, count=k) for setup in alone for k in self.space.counts)]

    def work(self) -> float:
        return len(self._all())

    def run(self, evaluate: Evaluate) -> list[Trial]:
        return evaluate.many(self._all())


class Coordinate(Algorithm):
    """Start and tau, then k~ for the best tau of every start, then tau again for the best pair.

    The paper picks the best prefix first and k~ for it alone. Where the sinks of the image hide what a prefix does until they
    are deleted, all prefixes score alike and that choice is noise; so every start keeps its best prefix.
    """

    def work(self) -> float:
        counts, starts = len(self.space.counts), len(self.space.starts)
        again = len(self.space.copies) - 1 if counts and starts else 0
        return 1 + starts * len(self.space.copies) + (1 + len({s[::2] for s in self.space.starts})) * counts + again

    def run(self, evaluate: Evaluate) -> list[Trial]:
        base = evaluate(Setup())
        alone = evaluate.many(self.space.prefixes())
        delete = evaluate.many([Setup(count=k) for k in self.space.counts])
        starts = sorted({(s.start_block, s.scope) for s in self.space.prefixes()})
        groups = [[a for a in alone if (a.setup.start_block, a.setup.scope) == s] for s in starts]
        leaders = [t for group in groups if (t := best(group)) is not None]
        both = evaluate.many([replace(t.setup, count=k) for t in leaders for k in self.space.counts])
        if (pair := best(both)) is not None:
            others = [c for c in self.space.copies if c != pair.setup.num_copies]
            both += evaluate.many([replace(pair.setup, num_copies=c) for c in others])
        return [base, *alone, *delete, *both]


class Halving(Algorithm):
    """Successive halving: a third of all configurations on a few images, the better ones on more, the best on all, then its
    neighbours.

    Scores are paired, image by image. A configuration stays while it is within ``search.noise_sigmas`` standard errors of the
    leader, at least an eighth and at most a third of a round; the best of each kind stays in any case. It ends where the lead
    over "nothing installed" cannot reach ``search.min_gain`` any more (by three standard errors, on all images by
    ``search.noise_sigmas``), or where nobody can lead the leader by that. tau is a
    logit bias, ln(tau), so around the winner it is no longer bound to the grid; a neighbour that is clearly behind on the
    images of the round before is not tried on all.
    """

    FIRST, FACTOR = 8, 4  # images of the first round, and how their number grows
    STEPS = 8  # neighbours of the winner, most of them on the images of the round before only

    def _rounds(self) -> list[int]:
        found = [self.images]
        while found[0] // self.FACTOR >= self.FIRST:
            found.insert(0, found[0] // self.FACTOR)
        return found

    def _first(self) -> list[Setup]:
        alone = [Setup(), *self.space.prefixes(self.space.few_copies)]
        return [*alone, *(replace(setup, count=k) for setup in alone for k in self.space.few_counts)]

    def work(self) -> float:
        setups, total = len(self._first()), self.STEPS / 2
        for images in self._rounds():
            total += setups * images / self.images
            setups = max(4, math.ceil(setups / 5))
        return total

    def run(self, evaluate: Evaluate) -> list[Trial]:
        setups, trials = self._first(), []
        for images in self._rounds():
            whole = None if images == self.images else images
            trials = evaluate.many(setups, whole)
            if whole is None and self._settled(trials, self.config.noise_sigmas):
                return trials
            if whole is None:
                break
            if self._settled(trials):
                return evaluate.many(self._leaders(trials))
            if self._lossless(trials) and self._lossless(leaders := evaluate.many(self._leaders(trials))):
                return self._fewer(leaders, evaluate)
            setups = self._kept(trials)
        return self._fewer(self._neighbours(trials, evaluate), evaluate)

    def _settled(self, trials: list[Trial], sigmas: float = 3.0) -> bool:
        """Whether nothing can win any more: ``sigmas`` standard errors would lift nobody to the gain that is asked for."""
        leads = [t.lead(trials[0]) for t in trials[1:] if not math.isnan(t.mean)]
        return all(gain + sigmas * error < self.config.min_gain for gain, error in leads)

    def _lossless(self, trials: list[Trial]) -> bool:
        """Whether the leader loses less than a gain must be, even if it was lucky by three standard errors. A few images may
        all lack what is rare, so this has to hold on all of them."""
        leader = best(trials)
        if leader is None or self.best_score is None:
            return False
        loss, error = mean_and_error(self.best_score - leader.scores)
        return loss + 3 * error < self.config.min_gain

    def _fewer(self, trials: list[Trial], evaluate: Evaluate) -> list[Trial]:
        """``trials``, and the leader with the smallest ``k~`` by which it loses less than a gain must be, found by bisection on
        the images of the round before the last."""
        leader, rounds = best(trials), self._rounds()
        if leader is None or leader.setup.count < 2:
            return trials
        images = rounds[-2] if len(rounds) > 1 else None
        most, low, high = evaluate(leader.setup, images), 0, leader.setup.count
        while high - low > 1:
            middle = (low + high) // 2
            fewer = evaluate(replace(leader.setup, count=middle), images)
            low, high = (low, middle) if most.mean - fewer.mean < self.config.min_gain else (middle, high)
        found = replace(leader.setup, count=high)
        return trials if found in {t.setup for t in trials} else [*trials, evaluate(found)]

    def _leaders(self, trials: list[Trial]) -> list[Setup]:
        """Nothing, and the best of each kind."""
        leaders = (best(trials, kind) for kind in ("prefix", "delete", "both"))
        return [Setup(), *(t.setup for t in leaders if t is not None)]

    def _kept(self, trials: list[Trial]) -> list[Setup]:
        """Who enters the next round, in the order of this one."""
        ranked = sorted((t for t in trials if not math.isnan(t.mean)), key=lambda t: -t.mean)
        if not ranked:
            return [Setup()]
        least, most = math.ceil(len(trials) / 8), math.ceil(len(trials) / 3)
        close = []
        for trial in ranked[:most]:
            behind, error = ranked[0].lead(trial)
            if len(close) < least or behind <= self.config.noise_sigmas * error:
                close.append(trial.setup)
        kept = {*close, *self._leaders(trials)}
        return [t.setup for t in trials if t.setup in kept]

    def _neighbours(self, trials: list[Trial], evaluate: Evaluate) -> list[Trial]:
        """``trials`` and those on the way uphill from the best of them: k~ by one, tau by its double, then by its root."""
        leader = best(trials)
        if leader is None or leader.setup == Setup():
            return trials
        tried, widths = {t.setup for t in trials}, [math.log(2), math.log(2) / 2]
        for _ in range(self.STEPS):
            near = [n for width in widths for n in self._near(leader.setup, width)]
            fresh = next((n for n in near if n not in tried), None)
            if fresh is None:
                break
            tried.add(fresh)
            if self._clearly_behind(fresh, leader.setup, evaluate):
                continue
            trials = [*trials, evaluate(fresh)]
            leader = best([leader, trials[-1]]) or leader
        return trials

    def _near(self, setup: Setup, width: float) -> list[Setup]:
        """Those one step of k~, or ``width`` of ln(tau), away."""
        counts = (setup.count - 1, setup.count + 1)
        found = [replace(setup, count=k) for k in counts if 0 <= k <= self.space.max_count]
        if setup.start_block is not None:
            found += [replace(setup, num_copies=setup.num_copies * math.exp(d)) for d in (width, -width)]
        return [n for n in found if n.kind != "nothing"]

    def _clearly_behind(self, setup: Setup, leader: Setup, evaluate: Evaluate) -> bool:
        """By the images of the round before the last, if there was one."""
        if len(rounds := self._rounds()) == 1:
            return False
        ahead, trial = evaluate.many([leader, setup], rounds[-2])
        behind, error = ahead.lead(trial)
        return not behind <= self.config.noise_sigmas * error  # nan is behind


ALGORITHMS: dict[str, type[Algorithm]] = {"halving": Halving, "coordinate": Coordinate, "exhaustive": Exhaustive}
