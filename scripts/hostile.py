"""Recipes that nobody should write, and processes that are killed: the rest of the campaign (`campaign.py`). Seeded, but for
the moment at which a kill arrives.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.data.reference import planted
from optimum_regcache.search.plan import QuantizationPlan

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3.5, 10**30, float("nan"), float("inf"), "", "x", "../..", "\x00", [], [[]], [None], {}, {"a": 1},
    {"name": 3}, ["gptq", "gptq"], "!!python/object:os.system", "*a", "a" * 100_000,
)  # fmt: skip


def mutate_recipe(text: str, rng: random.Random) -> tuple[str, str]:
    """(mutant of a recipe, what was done)."""
    kind = rng.choice(("value", "value", "value", "key", "cut", "character", "nest", "double"))
    if kind == "cut":
        place = rng.randrange(len(text))
        return text[:place], f"cut at {place}"
    if kind == "character":
        place, new = rng.randrange(len(text)), chr(rng.choice((0, 9, 34, 38, 42, 58, 91, 123, 0xFEFF, 0x1F600)))
        return text[:place] + new + text[place + 1 :], f"character {place} = {new!r}"
    if kind == "double":
        line = rng.choice([line for line in text.splitlines() if line and not line.startswith((" ", "#", "-"))])
        return f"{text}\n{line}\n", f"{line!r} twice"
    data = yaml.safe_load(text)
    if kind == "nest":
        depth = rng.choice((10, 200, 20_000))
        return f"model: {'[' * depth}{']' * depth}\n", f"{depth} brackets"
    node, path = data, []
    while True:
        key = rng.choice(sorted(map(str, node)))
        path.append(key)
        if isinstance(node.get(key), dict) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        break
    if kind == "key":
        node[rng.choice(("", "bits", "model", "__class__", "a.b"))] = rng.choice(VALUES)
        return yaml.safe_dump(data), f"another key beside {'.'.join(path)}"
    node[key] = rng.choice(VALUES)
    return yaml.safe_dump(data), f"{'.'.join(path)} = {str(node[key])[:40]!r}"


def recipes(mutants: int, work: Path) -> tuple[Counter[str], list[str]]:
    """Read mutants of a complete recipe; outcomes are ``accepted``, ``named error`` and ``unhelpful error``."""
    text = yaml.safe_dump(Recipe().to_dict())
    path, counts, bad = work / "recipe.yaml", Counter[str](), []
    for number in range(mutants):
        mutant, done = mutate_recipe(text, random.Random(number))
        path.write_text(mutant, encoding="utf-8", errors="surrogatepass")
        try:
            recipe = Recipe.load(path)
            QuantizationPlan.of(recipe)
            if Recipe.from_dict(recipe.to_dict()).to_dict() != recipe.to_dict():
                raise RuntimeError("the recipe reads as another one when it is written")
        except (ValueError, TypeError, FileNotFoundError) as error:
            message = str(error)
            good = 10 < len(message) < 1000
            counts["named error" if good else "unhelpful error"] += 1
            if not good:
                bad.append(f"recipe {number}: {done}: {message[:200]!r}")
        except Exception as error:
            counts["unhelpful error"] += 1
            bad.append(f"recipe {number}: {done}: {type(error).__name__}: {str(error)[:200]}")
        else:
            counts["accepted"] += 1
    return counts, bad


def killed(task: Callable[[], object], delay: float) -> bool:
    """Run ``task`` in a process of its own and kill it after ``delay`` seconds; whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        try:
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the task failed by itself")
    return os.WIFSIGNALED(status)


def killed_saves(kills: int, work: Path) -> Counter[str]:
    """Save one model over another and be killed: afterwards the folder opens as one of the two or, in the moment of the swap,
    not at all until the next save."""
    rng, model = random.Random(0), planted.build_planted_model()
    quantizer = RegCacheQuantizer(model)
    size: Any = model.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    models = []
    for bits in (8, 4):
        config = RegCacheConfig.from_preset("w8a8-dynamic").replace(weights={"bits": bits}, registers={"mode": "none"})
        models.append(quantizer.quantize(quantization_config=config, progress=False))
    folder, counts = work / "saves", Counter[str]()

    def output(found: Any) -> torch.Tensor:
        with torch.no_grad():
            return found(pixel_values=pixels).logits

    expected = [output(m) for m in models]
    quantizer.save(models[0], folder)
    begun = time.monotonic()
    quantizer.save(models[0], folder, overwrite=True)  # the first one imported this and that
    seconds = time.monotonic() - begun
    for number in range(kills):
        new = models[1 - number % 2]
        stopped = killed(lambda: quantizer.save(new, folder, overwrite=True), rng.uniform(0, 1.3 * seconds))  # noqa: B023
        kind: Any = type(model)
        counts["killed"] += stopped
        try:
            found = output(kind.from_pretrained(folder).eval())
        except (OSError, RuntimeError):  # between the two: config.json leaves first and comes last
            counts["refused until the next save"] += 1
        else:
            which = [i for i, e in enumerate(expected) if torch.equal(found, e)]
            counts["neither" if not which else "old" if which[0] == number % 2 else "new"] += 1
        quantizer.save(new, folder, overwrite=True)  # whatever is left over, the next save works
        if not torch.equal(output(kind.from_pretrained(folder).eval()), expected[1 - number % 2]):
            counts["neither"] += 1
    return counts


def killed_fits(kills: int, work: Path) -> Counter[str]:
    """Fit, be killed, and go on, until ``kills`` processes were killed: every fit ends in the result of an undisturbed one."""
    rng, counts = random.Random(1), Counter[str]()
    dataset = planted.load_dataset("search", 24, 0)
    search = SearchConfig(num_copies=(1, 4, 15), max_delete=3, blocks_before=1)

    def fit(folder: Path | None) -> dict[str, Any]:
        quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
        data = DataConfig(num_samples=24, batch_size=12)
        found = quantizer.fit(dataset, RegCacheConfig(), search, data, work_dir=folder, progress=False)
        return {**found.to_dict(), "seconds": None}

    begun = time.monotonic()
    whole = fit(None)
    seconds = time.monotonic() - begun
    for number in range(kills):
        folder = work / f"fit{number}"
        for _ in range(3):
            if not killed(lambda: bool(fit(folder)), rng.uniform(0.1, 0.9) * seconds):  # noqa: B023
                break
            counts["killed"] += 1
        counts["identical" if fit(folder) == whole else "other"] += 1
    return counts
