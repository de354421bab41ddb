"""The search over start block (or token), tau, scope and k~ (docs/method.md 8), resumable and never obliged to install."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.files import write_text
from optimum_regcache.config.recipe import SearchConfig
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.mining import MinedTokens, isolated_cache
from optimum_regcache.search.trials import TrialRunner


@dataclass(frozen=True)
class Setup:
    """One configuration of the search.

    Attributes:
        start_block: l_p; None for no prefix.
        scope: ``onwards`` or ``single``.
        candidate: number of the mined token (strategy ``single_token``); None for the average.
        num_copies: tau.
        count: k~.
    """

    start_block: int | None = None
    scope: str = "onwards"
    candidate: int | None = None
    num_copies: float = 1.0
    count: int = 0

    @property
    def key(self) -> str:
        """Stable identity in the record."""
        return json.dumps(asdict(self), sort_keys=True)

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that get the prefix."""
        if self.start_block is None:
            return ()
        return (self.start_block,) if self.scope == "single" else tuple(range(self.start_block, num_blocks))

    def describe(self) -> str:
        """Short text for tables."""
        parts = []
        if self.start_block is not None:
            token = "" if self.candidate is None else f" token {self.candidate}"
            only = " only" if self.scope == "single" else ""
            parts.append(f"prefix from block {self.start_block}{only}{token}, tau {self.num_copies:g}")
        if self.count:
            parts.append(f"delete {self.count}")
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True)
class Trial:
    """A configuration and its score on each selection image."""

    setup: Setup
    scores: torch.Tensor

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(self.scores.mean())


@dataclass(frozen=True)
class SearchResult:
    """Outcome.

    Attributes:
        chosen: what is to be installed; ``Setup()`` means nothing.
        best_prefix, best_delete, best_both: best of each kind on the selection images, None if never tried.
        baseline: mean selection score with nothing installed.
        gain, noise: paired gain of the chosen setup (of the best candidate if nothing was chosen) on the confirmation
            images, and its standard error.
        reason: why ``chosen`` was chosen, in words.
        trials: every configuration tried.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible: every configuration with its score."""
        kinds = {"prefix": self.best_prefix, "delete": self.best_delete, "both": self.best_both}
        return {
            "chosen": {**asdict(self.chosen), "text": self.chosen.describe()},
            "reason": self.reason,
            "baseline": self.baseline,
            "confirmation": {"gain": self.gain, "standard_error": self.noise},
            "best": {k: {**asdict(t.setup), "score": t.mean} for k, t in kinds.items() if t is not None},
            "trials": [{**asdict(t.setup), "score": t.mean} for t in self.trials],
        }


FinalScorer = Callable[[Setup, RegisterCache | None, DeletionConfig, Objective], torch.Tensor]


class SearchRecord:
    """Scores of finished configurations on disk; every write is atomic, so an interrupted search loses one trial at most.

    Args:
        path: JSON file; None keeps everything in memory.
        fingerprint: identity of model, data and settings; a record with another one is refused.

    Raises:
        ValueError: the file belongs to another search, or is damaged.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.scores: dict[str, list[float]] = {}
        if path is None or not path.exists():
            return
        try:
            data = json.loads(path.read_text())
            stored, scores = data["fingerprint"], data["scores"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable search record ({error}). Delete it to start again.") from None
        if stored != fingerprint:
            raise ValueError(
                f"{path} records a search with another model, data set or settings. Use another work directory, or delete "
                "the file to start again."
            )
        self.scores = scores

    def get(self, key: str) -> torch.Tensor | None:
        """Scores of a finished configuration."""
        return torch.tensor(self.scores[key], dtype=torch.float32) if key in self.scores else None

    def put(self, key: str, scores: torch.Tensor) -> None:
        """Add a configuration and write the file."""
        self.scores[key] = scores.tolist()
        if self.path is not None:
            write_text(self.path, json.dumps({"fingerprint": self.fingerprint, "scores": self.scores}))


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
        runner: models and calibration data.
        config: search settings.
        candidates: what may be installed.
        judges: who decides.
        record: finished trials.
        progress: show a progress bar.
    """

    def __init__(
        self,
        runner: TrialRunner,
        config: SearchConfig,
        candidates: Candidates,
        judges: Judges,
        record: SearchRecord,
        *,
        progress: bool = True,
    ) -> None:
        self.runner, self.config, self.record, self.progress = runner, config, record, progress
        self.mined, self.delete_block = candidates.mined, candidates.delete_block
        self.max_delete, self.num_blocks = candidates.max_delete, candidates.num_blocks
        self.selection, self.confirmation = judges.selection, judges.confirmation
        self.ceiling, self.final = judges.ceiling, judges.final
        self.trials: dict[str, Trial] = {}
        self._isolated: dict[tuple[int, int | None], RegisterCache] = {}

    def cache(self, setup: Setup) -> RegisterCache | None:
        """The registers of a configuration."""
        if setup.start_block is None:
            return None
        tokens, blocks = self.mined[setup.start_block], setup.blocks(self.num_blocks)
        if self.runner.config.registers.kv_mode == "isolated":
            key = (setup.start_block, setup.candidate)
            if key not in self._isolated:
                state = tokens.states.mean(0) if setup.candidate is None else tokens.states[setup.candidate]
                every = tuple(range(setup.start_block, self.num_blocks))
                self._isolated[key] = isolated_cache(self.runner.float_model, state, setup.start_block, every)
            return self._isolated[key].restricted(blocks, setup.num_copies)
        if setup.candidate is None:
            cache = tokens.average(blocks, self.num_blocks)
        else:
            cache = tokens.single(setup.candidate, blocks, self.num_blocks)
        return cache.restricted(blocks, setup.num_copies)

    def deletion(self, setup: Setup) -> DeletionConfig:
        """The deletion of a configuration, with rule and fill of the trial runner's config."""
        if not setup.count:
            return DeletionConfig()
        return replace(self.runner.config.deletion, block=self.delete_block, count=setup.count)

    def _prefix_setups(self) -> list[Setup]:
        c = self.config
        if c.strategy == "single_token":
            block = self.delete_block
            numbers: list[int | None] = list(range(min(c.num_candidates, len(self.mined[block].norms))))
            starts = [(block, n) for n in numbers]
        else:
            starts = [(block, None) for block in sorted(self.mined)]
        return [
            Setup(block, scope, number, copies)
            for block, number in starts
            for scope in c.scopes
            for copies in c.num_copies
        ]

    def _evaluate(self, setup: Setup, bar: Any) -> Trial:
        scores = self.record.get(setup.key)
        if scores is None:
            scores = self.runner.score(self.cache(setup), self.deletion(setup), self.selection)
            self.record.put(setup.key, scores)
        trial = self.trials[setup.key] = Trial(setup, scores)
        bar.set_postfix_str(f"{setup.describe()}: {trial.mean:.4f}", refresh=False)
        bar.update()
        return trial

    def run(self) -> SearchResult:
        """Evaluate everything and decide. Interrupt and call again with the same record: the result is the same.

        The paper picks the best prefix first and k~ for it alone. Where the sinks of the image hide what a prefix does until
        they are deleted, all prefixes score alike and that choice is noise. So k~ is searched for the best prefix of every
        start block, and tau again for the winner.
        """
        prefixes = self._prefix_setups()
        counts = range(1, self.max_delete + 1)
        starts = {(s.start_block, s.scope) for s in prefixes}
        again = len(self.config.num_copies) - 1 if counts else 0
        total = 1 + len(prefixes) + (1 + len(starts)) * len(counts) + again
        with tqdm(total=total, desc="search", disable=not self.progress) as bar:
            base = self._evaluate(Setup(), bar)
            alone = [self._evaluate(s, bar) for s in prefixes]
            best_delete = _best([self._evaluate(Setup(count=k), bar) for k in counts])
            leaders = [t for s in sorted(starts) if (t := _best([a for a in alone if _start(a) == s])) is not None]
            both = [self._evaluate(replace(t.setup, count=k), bar) for t in leaders for k in counts]
            if (best := _best(both)) is not None:
                copies = [c for c in self.config.num_copies if c != best.setup.num_copies]
                both += [self._evaluate(replace(best.setup, num_copies=c), bar) for c in copies]
        return self._decide(base, _best(alone), best_delete, _best(both))

    def _decide(self, base: Trial, prefix: Trial | None, delete: Trial | None, both: Trial | None) -> SearchResult:
        """Install the best setup only if it beats "nothing" on images that did not choose it (docs/method.md 9)."""
        c = self.config
        ranked = sorted((t for t in (prefix, delete, both) if t is not None), key=lambda t: -t.mean)
        # a simpler setup of equal score comes first: prefix, delete, both is the order of the tuple above
        if self.final is not None and c.retune:
            ranked = [self._retuned(t) for t in ranked]
            ranked = sorted((t for t in ranked if t.setup != Setup()), key=lambda t: -t.mean)
        nothing = self._confirm(Setup())
        loss = self.ceiling - base.mean
        chosen, gain, noise = Setup(), 0.0, 0.0
        reason = "nothing to install: no configuration was tried"
        for trial in ranked:
            difference = self._confirm(trial.setup) - nothing
            mean = float(difference.mean())
            error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else math.inf
            needed = max(c.min_gain, c.noise_sigmas * error)
            measured = f"gain {mean:+.4f} +- {error:.4f} on held-out search images, needed {needed:.4f}"
            if mean >= needed:
                chosen, gain, noise, reason = trial.setup, mean, error, measured
                break
            if trial is ranked[0]:
                gain, noise = mean, error
                why = f"nothing to repair (naive loses {loss:.4f})" if loss < c.min_gain else "nothing helped enough"
                reason = f"{why}; best candidate: {measured}"
        return SearchResult(chosen, prefix, delete, both, base.mean, gain, noise, reason, list(self.trials.values()))

    def _confirm(self, setup: Setup) -> torch.Tensor:
        return self._final_scores("confirm", setup, self.confirmation)

    def _final_scores(self, purpose: str, setup: Setup, objective: Objective) -> torch.Tensor:
        """Scores with the final quantizer, or with round to nearest if there is no other."""
        key = f"{purpose} {setup.key}"
        scores = self.record.get(key)
        if scores is None:
            cache, deletion = self.cache(setup), self.deletion(setup)
            if self.final is None:
                scores = self.runner.score(cache, deletion, objective)
            else:
                scores = self.final(setup, cache, deletion, objective)
            self.record.put(key, scores)
        return scores

    def _retuned(self, trial: Trial) -> Trial:
        """The neighbour of a setup in k~, then in tau, that scores best on the selection images with the final quantizer: a
        better quantizer than round to nearest needs less deletion (docs/method.md 9)."""
        best = Trial(trial.setup, self._final_scores("final", trial.setup, self.selection))
        count, copies = trial.setup.count, trial.setup.num_copies
        counts = sorted({k for k in (0, count // 2, count - 1, count + 1) if 0 <= k <= self.max_delete} - {count})
        neighbours = [replace(trial.setup, count=k) for k in counts]
        for setup in tqdm(neighbours, desc="retune k", disable=not self.progress):
            best = _best([best, Trial(setup, self._final_scores("final", setup, self.selection))]) or best
        if best.setup.start_block is not None:
            for factor in (0.25, 0.5, 2.0, 4.0):
                setup = replace(best.setup, num_copies=copies * factor)
                best = _best([best, Trial(setup, self._final_scores("final", setup, self.selection))]) or best
        return best


def _start(trial: Trial) -> tuple[int | None, str]:
    return trial.setup.start_block, trial.setup.scope


def _best(trials: list[Trial]) -> Trial | None:
    """Largest mean; the earliest of equals. A score that is not a number never wins."""
    return max((t for t in trials if not math.isnan(t.mean)), key=lambda t: t.mean, default=None)
