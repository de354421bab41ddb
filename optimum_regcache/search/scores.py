"""The scores of configurations, each computed once and kept in the journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from optimum_regcache.config import DeletionConfig
from optimum_regcache.encoders.passes import Batch, ImageRange, count_images
from optimum_regcache.evaluation.objective import Objective
from optimum_regcache.registers import RegisterCache
from optimum_regcache.search.journal import Journal
from optimum_regcache.search.processes import spread, world_size
from optimum_regcache.search.setups import Setup, Trial
from optimum_regcache.search.trials import TrialRunner

Configuration = tuple[Setup, Callable[[], RegisterCache | None], DeletionConfig]


class TrialScores:
    """Scores of configurations with round to nearest, each computed once, on all selection images or on the first of them.

    Args:
        runner: models and calibration data.
        selection: objective on the selection images.
        journal: finished steps.
    """

    def __init__(self, runner: TrialRunner, selection: Objective, journal: Journal) -> None:
        self.runner, self.selection, self.journal = runner, selection, journal
        self._parts: dict[int, tuple[Objective, Sequence[Batch]]] = {}

    def __call__(
        self,
        setup: Setup,
        cache: Callable[[], RegisterCache | None],
        deletion: DeletionConfig,
        images: int | None = None,
    ) -> Trial:
        """The trial of a configuration; ``cache`` makes its registers if they are needed."""
        return self.many([(setup, cache, deletion)], images)[0]

    def many(
        self,
        configurations: Sequence[Configuration],
        images: int | None = None,
        finished: Callable[[Trial], object] = lambda trial: None,
    ) -> list[Trial]:
        """The trials of several configurations, in their order, shared by the processes of the run.

        Args:
            configurations: setups, each with what makes its registers, and its deletion.
            images: selection images to score on, the first ones; all by default.
            finished: called with every trial, in their order.
        """
        names = [setup.key if images is None else f"{setup.key} on {images} images" for setup, _, _ in configurations]
        missing = {n: c for n, c in zip(names, configurations, strict=True) if self.journal.get(n) is None}

        def score(name: str) -> list[float]:
            _, cache, deletion = missing[name]
            objective, calibration = self._part(images)
            return self.runner.score(cache(), deletion, objective, calibration).tolist()

        trials, waiting = [], list(missing)
        for name, (setup, _, _) in zip(names, configurations, strict=True):
            if self.journal.get(name) is None:  # one trial for each process, so that a kill loses no more than these
                wave, waiting = waiting[: world_size()], waiting[world_size() :]
                for step, values in zip(wave, spread(wave, score), strict=True):
                    self.journal.put(step, values)
            trials.append(Trial(setup, torch.tensor(self.journal.get(name), dtype=torch.float32)))
            finished(trials[-1])
        return trials

    def _part(self, images: int | None) -> tuple[Objective, Sequence[Batch]]:
        """The objective on the first images, and the same share of the calibration images."""
        if images is None:
            return self.selection, self.runner.calibration
        if images not in self._parts:
            everything = count_images(self.selection.batches)
            calibration = count_images(self.runner.calibration)
            few = max(4, math.ceil(calibration * images / everything))
            self._parts[images] = self.selection.first(images), ImageRange(self.runner.calibration, few)
        return self._parts[images]
