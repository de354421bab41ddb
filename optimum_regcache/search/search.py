"""The search over start block (or token), tau, scope and k~ (docs/method.md 8), resumable and never obliged to install."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import torch

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.recipe import DELETION_REFINEMENTS, SearchConfig
from optimum_regcache.encoders.passes import count_images
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.algorithms import ALGORITHMS
from optimum_regcache.search.mining import MinedTokens, isolated_cache
from optimum_regcache.search.processes import spread, world_size
from optimum_regcache.search.progress import current
from optimum_regcache.search.refine import (
    MAKERS,
    RefinedRegisters,
    RefinementTrial,
    Start,
    deletions,
    judge_refinements,
)
from optimum_regcache.search.scores import TrialScores
from optimum_regcache.search.setups import Setup, Space, Trial, best, mean_and_error, sparing


@dataclass(frozen=True)
class SearchResult:
    """Outcome.

    Attributes:
        chosen: what is to be installed; ``Setup()`` means nothing.
        best_prefix, best_delete, best_both: best of each kind on the selection images, with the smallest k~ that loses less
            than ``search.min_gain`` by it; None if never tried.
        baseline: mean selection score with nothing installed.
        gain, noise: paired gain of the chosen setup (of the best candidate if nothing was chosen) on the confirmation
            images, and its standard error.
        reason: why ``chosen`` was chosen, in words.
        trials: every configuration tried on all selection images.
        block_forwards: images times blocks that the search computed.
        unfinished: whether it was interrupted, and what was best until then was taken.
        refinements: how each of ``search.refinements`` did, best selection score first.
    """

    chosen: Setup
    best_prefix: Trial | None
    best_delete: Trial | None
    best_both: Trial | None
    baseline: float
    gain: float
    noise: float
    reason: str
    trials: list[Trial]
    block_forwards: int = field(default=0, compare=False)
    unfinished: bool = False
    refinements: list[RefinementTrial] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible: every configuration with its score."""
        kinds = {"prefix": self.best_prefix, "delete": self.best_delete, "both": self.best_both}
        return {
            "chosen": {**asdict(self.chosen), "text": self.chosen.describe()},
            "reason": self.reason,
            "unfinished": self.unfinished,
            "baseline": self.baseline,
            "confirmation": {"gain": self.gain, "standard_error": self.noise},
            "best": {k: {**asdict(t.setup), "score": t.mean} for k, t in kinds.items() if t is not None},
            "refinements": [r.to_dict() for r in self.refinements],
            "trials": [{**asdict(t.setup), "score": t.mean} for t in self.trials],
        }


FinalScorer = Callable[[Setup, RegisterCache | None, DeletionConfig, Objective], torch.Tensor]


@dataclass(frozen=True)
class Candidates:
    """What may be installed.

    Attributes:
        mined: start block -> mined tokens.
        delete_block: l_del, the sensitive block.
        max_delete: largest k~.
        num_blocks: blocks of the encoder.
    """

    mined: dict[int, MinedTokens]
    delete_block: int
    max_delete: int
    num_blocks: int


@dataclass(frozen=True)
class Judges:
    """Who decides.

    Attributes:
        selection, confirmation: objectives on disjoint images: configurations are ranked on the first; the best must beat
            "install nothing" on the second.
        ceiling: mean selection score of the float model.
        final: scores (setup, registers, deletion, objective) with the final quantizer; configurations are then ranked with
            round to nearest, but confirmed, and tuned again if ``search.retune``, with it.
    """

    selection: Objective
    confirmation: Objective
    ceiling: float = 1.0
    final: FinalScorer | None = None


class RegisterSearch:
    """Searches with the quantizer of the trial runner.

    Args:
        scores: of configurations on the selection images.
        config: search settings.
        candidates: what may be installed.
        judges: who decides.
    """

    def __init__(
        self,
        scores: TrialScores,
        config: SearchConfig,
        candidates: Candidates,
        judges: Judges,
    ) -> None:
        self.scores, self.runner, self.journal = scores, scores.runner, scores.journal
        self.config = config
        self.mined, self.delete_block = candidates.mined, candidates.delete_block
        self.max_delete, self.num_blocks = candidates.max_delete, candidates.num_blocks
        self.judges = judges
        self.trials: dict[str, Trial] = {}
        self._isolated: dict[tuple[int, int | None], RegisterCache] = {}
        self._refined = RefinedRegisters(self.journal)

    def cache(self, setup: Setup) -> RegisterCache | None:
        """The registers of a configuration."""
        if setup.start_block is None:
            return None
        if setup.refinement in MAKERS:
            name = str(setup.refinement)
            return self._refined(setup, lambda: MAKERS[name](self._start(setup, int(setup.start_block or 0))))
        return self._mined(setup, setup.start_block)

    def _mined(self, setup: Setup, start: int) -> RegisterCache:
        """The registers of a setup without its refinement, from the tokens mined at block ``start``."""
        tokens, blocks = self.mined[start], setup.blocks(self.num_blocks)
        if self.runner.config.registers.kv_mode == "isolated":
            key = (start, setup.candidate)
            if key not in self._isolated:
                state = tokens.states.mean(0) if setup.candidate is None else tokens.states[setup.candidate]
                every = tuple(range(start, self.num_blocks))
                self._isolated[key] = isolated_cache(self.runner.float_model, state, start, every)
            return self._isolated[key].restricted(blocks, setup.num_copies)
        if setup.candidate is None:
            cache = tokens.average(blocks, self.num_blocks)
        else:
            cache = tokens.single(setup.candidate, blocks, self.num_blocks)
        return cache.restricted(blocks, setup.num_copies)

    def deletion(self, setup: Setup) -> DeletionConfig:
        """The deletion of a configuration, with what it does not set from the trial runner's config."""
        if not setup.count:
            return DeletionConfig()
        found = replace(self.runner.config.deletion, block=self.delete_block, count=setup.count)
        kappa = found.kappa if setup.kappa is None else setup.kappa
        return replace(found, kappa=kappa, **DELETION_REFINEMENTS.get(setup.refinement or "", {}))

    def _start(self, setup: Setup, start: int) -> Start:
        """What the refinement of a setup with a prefix from block ``start`` begins with."""
        return Start(
            self.runner, self.judges.selection, self._mined(setup, start), setup.num_copies, self.deletion(setup),
            self.mined[start], self.config.seed,
        )  # fmt: skip

    def _refine(self, ranked: Sequence[Trial]) -> list[tuple[Trial, Setup]]:
        """The refinements of the best setup that has a prefix, and of the best of all, best first on the selection images: one
        trial for each name, with what it started from."""
        prefix = [t.setup for t in ranked if t.setup.start_block is not None][:1]
        alone = [t.setup for t in ranked[:1] if t.setup.kind == "delete"]
        found: list[tuple[Trial, Setup]] = []
        for name in self.config.refinements:
            if name in MAKERS:
                starts = {replace(start, refinement=name): start for start in prefix}
            else:
                starts = {s: start for start in prefix + alone for s in deletions(name, start, self.max_delete)}
            asked = [(setup, partial(self.cache, setup), self.deletion(setup)) for setup in starts]
            leader = best(self.scores.many(asked))
            if leader is not None:
                found.append((leader, starts[leader.setup]))
        return sorted(found, key=lambda pair: -pair[0].mean)

    def space(self) -> Space:
        """Everything that may be installed."""
        c, starts = self.config, [(block, None) for block in sorted(self.mined)]
        if c.strategy == "single_token":
            block = self.delete_block
            starts = [(block, n) for n in range(min(c.num_candidates, len(self.mined[block].norms)))]
        scoped = tuple((block, number, scope) for block, number in starts for scope in c.scopes)
        return Space(scoped, c.num_copies, self.max_delete)

    def run(self, keep_best: bool = False) -> SearchResult:
        """Try configurations as ``search.algorithm`` says, and decide. Interrupt and call again with the same journal: the
        result is the same.

        Args:
            keep_best: an interruption (Ctrl-C) ends the search with the best so far instead of raising KeyboardInterrupt.
        """
        before = self.runner.block_forwards
        available = count_images(self.judges.selection.batches)
        limit = self.judges.selection.best_score
        algorithm = ALGORITHMS[self.config.algorithm](self.space(), self.config, available, limit)
        evaluate, unfinished = _Evaluate(self, available), False
        try:
            trials = algorithm.run(evaluate)
        except KeyboardInterrupt:
            trials = so_far(evaluate.seen)
            if not (keep_best and trials) or world_size() > 1:
                raise
            unfinished = True
            self.config = replace(self.config, refinements=())  # they take minutes
            current().say("interrupted: the best so far is confirmed and kept; interrupt again to drop it")
        self.trials = {t.setup.key: t for t in trials}
        leaders = (sparing(trials, kind, self.config.min_gain) for kind in ("prefix", "delete", "both"))
        result = self._decide(trials[0], *leaders)
        if unfinished:
            count = sum(map(len, evaluate.seen.values()))
            reason = f"unfinished, interrupted after {count} trials; {result.reason}"
            result = replace(result, unfinished=True, reason=reason)
        return replace(result, block_forwards=self.runner.block_forwards - before)

    def _decide(self, base: Trial, prefix: Trial | None, delete: Trial | None, both: Trial | None) -> SearchResult:
        """Install the best setup only if it beats "nothing" on images that did not choose it (docs/method.md 9).

        Up to three setups and the refinements are tested there, so the number of standard errors is that of one test at the
        level divided by their number (Bonferroni).
        """
        c = self.config
        ranked = sorted((t for t in (prefix, delete, both) if t is not None), key=lambda t: -t.mean)
        # a simpler setup of equal score comes first: prefix, delete, both is the order of the tuple above
        if self.judges.final is not None and c.retune:
            ranked = [self._retuned(t) for t in ranked]
            ranked = sorted((t for t in ranked if t.setup != Setup()), key=lambda t: -t.mean)
        refined = self._refine(ranked)
        self._ahead("confirm", [Setup(), *(t.setup for t in ranked)] if ranked else [], self.judges.confirmation)
        nothing = self._confirm(Setup()) if ranked else torch.zeros(0)
        loss = self.judges.ceiling - base.mean
        chosen, gain, noise = Setup(), 0.0, 0.0
        reason = "nothing to install: no configuration was tried"
        sigmas = corrected_sigmas(c.noise_sigmas, len(ranked) + len(refined))
        for trial in ranked:
            mean, error = mean_and_error(self._confirm(trial.setup) - nothing)
            needed = max(c.min_gain, sigmas * error)
            measured = f"gain {mean:+.4f} +- {error:.4f} on held-out search images, needed {needed:.4f}"
            if mean >= needed:
                chosen, gain, noise, reason = trial.setup, mean, error, measured
                break
            if trial is ranked[0]:
                gain, noise = mean, error
                why = f"nothing to repair (naive loses {loss:.4f})" if loss < c.min_gain else "nothing helped enough"
                reason = f"{why}; best candidate: {measured}"
        result = SearchResult(chosen, prefix, delete, both, base.mean, gain, noise, reason, list(self.trials.values()))
        if not refined:
            return result
        rival = chosen if chosen != Setup() else refined[0][1]
        records = judge_refinements([trial for trial, _ in refined], rival, self._confirm, c.min_gain, sigmas)
        won = next((r for r in records if r.chosen), None)
        if won is not None:
            chosen, gain, noise = won.setup, won.over_nothing, won.over_nothing_error
            reason = f"gain {gain:+.4f} +- {noise:.4f} on held-out search images, needed {won.over_nothing_needed:.4f}"
        reason = f"{reason}; over {rival.describe()!r}: {', '.join(r.describe() for r in records)}"
        return replace(result, chosen=chosen, gain=gain, noise=noise, reason=reason, refinements=records)

    def _confirm(self, setup: Setup) -> torch.Tensor:
        return self._final_scores("confirm", setup, self.judges.confirmation)

    def _final_scores(self, purpose: str, setup: Setup, objective: Objective) -> torch.Tensor:
        """Scores with the final quantizer, or with round to nearest if there is no other."""
        name = f"{purpose} {setup.key}"
        if self.journal.get(name) is None:
            self._score([setup], purpose, objective)
        return torch.tensor(self.journal.get(name), dtype=torch.float32)

    def _ahead(self, purpose: str, setups: Sequence[Setup], objective: Objective) -> None:
        """Let several processes share what one process would ask for one after the other."""
        if world_size() > 1:
            missing = [s for s in dict.fromkeys(setups) if self.journal.get(f"{purpose} {s.key}") is None]
            self._score(missing, purpose, objective)

    def _score(self, setups: Sequence[Setup], purpose: str, objective: Objective) -> None:
        def score(setup: Setup) -> list[float]:
            cache, deletion = self.cache(setup), self.deletion(setup)
            if self.judges.final is None:
                return self.runner.score(cache, deletion, objective).tolist()
            return self.judges.final(setup, cache, deletion, objective).tolist()

        for setup, values in zip(setups, spread(setups, score), strict=True):
            self.journal.put(f"{purpose} {setup.key}", values)

    def _retuned(self, trial: Trial) -> Trial:
        """The neighbour of a setup in k~, then in tau, that scores best on the selection images with the final quantizer: a
        better quantizer than round to nearest needs less deletion (docs/method.md 9)."""
        selection = self.judges.selection
        count, copies = trial.setup.count, trial.setup.num_copies
        counts = sorted({k for k in (0, count // 2, count - 1, count + 1) if 0 <= k <= self.max_delete} - {count})
        neighbours = [replace(trial.setup, count=k) for k in counts]
        self._ahead("final", [trial.setup, *neighbours], selection)
        leader = Trial(trial.setup, self._final_scores("final", trial.setup, selection))
        for setup in neighbours:
            leader = best([leader, Trial(setup, self._final_scores("final", setup, selection))]) or leader
        if leader.setup.start_block is not None:
            factors = (0.25, 0.5, 2.0, 4.0)
            self._ahead("final", [replace(leader.setup, num_copies=copies * f) for f in factors], selection)
            for factor in factors:
                setup = replace(leader.setup, num_copies=copies * factor)
                leader = best([leader, Trial(setup, self._final_scores("final", setup, selection))]) or leader
        return leader


class _Evaluate:
    """How an algorithm of one search asks for trials.

    Attributes:
        seen: number of images -> the trials on them.
    """

    def __init__(self, search: RegisterSearch, available: int) -> None:
        self.search, self.available = search, available
        self.seen: dict[int, list[Trial]] = {}

    def __call__(self, setup: Setup, images: int | None = None) -> Trial:
        return self.many([setup], images)[0]

    def many(self, setups: list[Setup], images: int | None = None) -> list[Trial]:
        count = images or self.available

        def note(trial: Trial) -> None:
            tried = self.seen.setdefault(count, [])
            tried.append(trial)
            leader = best(tried) or trial
            current().best(f"{leader.setup.describe()}: {leader.mean:.4f} on {count} images")

        search = self.search
        asked = [(setup, partial(search.cache, setup), search.deletion(setup)) for setup in setups]
        return search.scores.many(asked, images, note)


def so_far(seen: dict[int, list[Trial]]) -> list[Trial]:
    """The trials on the most images among which is "nothing installed", that one first; none if there is nothing to choose."""
    for _, trials in sorted(seen.items(), reverse=True):
        nothing = [t for t in trials if t.setup == Setup()]
        if nothing and len(trials) > 1:
            return [nothing[0], *(t for t in trials if t.setup != Setup())]
    return []


def corrected_sigmas(sigmas: float, tests: int) -> float:
    """Standard errors that one of ``tests`` must reach so that all together are as likely to err as a single one at
    ``sigmas`` (Bonferroni, one-sided)."""
    if tests < 2 or not 0 < sigmas < 6:
        return sigmas
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-sigmas) / tests)
