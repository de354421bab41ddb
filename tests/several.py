"""What a process of a torchrun run does in tests/test_processes.py: ``python several.py WHAT FOLDER``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.data.reference import planted
from optimum_regcache.search import processes
from optimum_regcache.search.trials import TrialRunner

SEARCH = SearchConfig(
    num_copies=(1, 4, 15),
    max_delete=2,
    blocks_before=1,
    sensitivity="coarse",
    retune=True,
    always=True,
    algorithm="exhaustive",
)
RECIPE = Recipe(
    RegCacheConfig.from_preset("w8a8").replace(methods=("bias_correction",)),
    SEARCH,
    DataConfig(num_samples=24, batch_size=12),
)


def search(folder: Path) -> None:
    """A fit with a journal and a saved model."""
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    images, r = planted.load_dataset("search", 24, 0), RECIPE
    fit = quantizer.fit(images, r.quantization, r.search, r.data, work_dir=folder / "work", progress=False)
    model = quantizer.quantize(folder / "model", calibration_dataset=images, progress=False)
    found: dict[str, Any] = {**fit.to_dict(), "config": fit.config.to_dict()}
    del found["seconds"]
    (folder / f"fit-{processes.rank()}.json").write_text(json.dumps(found, sort_keys=True))
    torch.save(model.state_dict(), folder / f"state-{processes.rank()}.pt")


def cut(folder: Path) -> None:
    """A fit in which the last process cannot compute its third configuration."""
    original, calls = TrialRunner.score, {"count": 0}

    def score(self: TrialRunner, *args: Any) -> torch.Tensor:
        calls["count"] += 1
        if processes.rank() == processes.world_size() - 1 and calls["count"] == 3:
            raise ValueError("the third configuration of the last process")
        return original(self, *args)

    TrialRunner.score = score  # type: ignore[method-assign]
    try:
        search(folder)
    except ValueError as error:
        (folder / f"error-{processes.rank()}.txt").write_text(str(error))
        raise


class UnsendableError(Exception):
    """Pickled, it cannot be made again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def _failing(error: Exception, last: int) -> Callable[[int], int]:
    def compute(item: int) -> int:
        if item == last:
            raise error
        return item

    return compute


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def exchange(folder: Path) -> None:
    """Every way to exchange something."""
    own = processes.rank()
    with processes.alone():
        alone = [processes.world_size(), *processes.spread([5, 6], lambda item: own)]
    found: dict[str, Any] = {
        "size": processes.world_size(),
        "shares": processes.spread(["a", "b", "c", "d", "e"], lambda item: f"{item}{own}"),
        "none": processes.spread([], str),
        "together": processes.together(lambda: own),
        "on_main": processes.on_main(lambda: "done"),
        "from_main": processes.from_main(f"of {own}"),
        "gathered": processes.gathered(own),
        "alone": alone,
        "last": _message(lambda: processes.spread([0, 1, 2], _failing(ValueError("no good"), 1))),
        "main": _message(lambda: processes.on_main(lambda: _failing(OSError(28, "full", "disk"), 0)(0))),
        "unsendable": _message(lambda: processes.spread([0, 1], _failing(UnsendableError("this", "that"), 1))),
        "steps": _message(lambda: processes.spread([0] if own else [0, 1], str)),
        "after": processes.gathered(own),
    }
    (folder / f"found-{own}.json").write_text(json.dumps(found))


def images(folder: Path) -> None:
    """Processes that read other images."""
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    dataset = planted.load_dataset("search", 24, processes.rank())
    call = partial(quantizer.fit, dataset, RECIPE.quantization, RECIPE.search, RECIPE.data, progress=False)
    (folder / f"error-{processes.rank()}.txt").write_text(_message(call))


if __name__ == "__main__":
    warnings.simplefilter("error")
    {"search": search, "cut": cut, "exchange": exchange, "images": images}[sys.argv[1]](Path(sys.argv[2]))
    processes.end()
