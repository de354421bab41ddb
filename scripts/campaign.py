"""Mutate checkpoints in thousands of ways, feed recipes that nobody should write, kill savers and fits, and count what comes
out. Nothing may be wrong in silence.

    python scripts/campaign.py                       # 2,520 checkpoints, some minutes on two cores
    python scripts/campaign.py --mutants 200         # of each checkpoint
    python scripts/campaign.py --only clip/w4a4 --number 17    # one mutant again, with its traceback

Every checkpoint is a tiny model of one family in one form; mutant N of it is the same in every run. The counts, and every
mutant that is not as it should be, go to docs/results/campaign.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

import hostile
import mutations

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from models import MODELS, fit  # noqa: E402

from optimum_regcache import RegCacheConfig  # noqa: E402

FORMS: dict[str, dict[str, Any]] = {
    "w8a8 registers": {},
    "w4a4": {"weights": {"bits": 4, "symmetric": False}, "activations": {"bits": 4, "symmetric": False}},
    "w6a6 dynamic": {"weights": {"bits": 6}, "activations": {"bits": 6, "mode": "dynamic", "granularity": "per_token"}},
    "attention, patch embedding, head": {
        "attention": {"quantize": True},
        "modules": {"patch_embedding": True, "head": True},
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "rotation": {"methods": ["rotation"]},
    "noisyquant": {"methods": ["noisyquant"]},
    "ptq4vit": {"methods": ["ptq4vit"]},
}
FAMILIES = ("clip", "clip_dual", "siglip_dual", "dinov2", "vit_classifier")


@dataclass(frozen=True)
class Subject:
    """An intact checkpoint and one to mix it up with.

    Attributes:
        name: family/form.
        family: key of the tests' models.
        intact, stranger: folders.
        output: of the intact one.
    """

    name: str
    family: str
    intact: Path
    stranger: Path
    output: torch.Tensor

    def open(self, folder: Path) -> Any:
        """With the class that saved it."""
        return MODELS[self.family].model_class.from_pretrained(folder).eval()

    def run(self, model: Any) -> torch.Tensor:
        """Output on fixed inputs."""
        return MODELS[self.family].run(model)


def subjects(work: Path, families: tuple[str, ...] = FAMILIES) -> list[Subject]:
    """All checkpoints; every family in every form that it has."""
    found = []
    for family in families:
        for form, parts in {**FORMS, **METHODS}.items():
            head = parts.get("modules", {}).get("head", False)
            if head and family in ("clip", "dinov2"):  # nothing to quantize there
                parts = {**parts, "modules": {"patch_embedding": True}}
            folder = work / f"{family}-{form}".replace(" ", "-").replace(",", "")
            for seed, name in enumerate(("intact", "stranger")):
                save(family, parts, seed, folder / name)
            subject = Subject(f"{family}/{form}", family, folder / "intact", folder / "stranger", torch.empty(0))
            output = subject.run(subject.open(subject.intact))
            found.append(Subject(subject.name, family, subject.intact, subject.stranger, output))
    return found


def save(family: str, parts: dict[str, Any], seed: int, folder: Path) -> None:
    """A tiny quantized model with weights of ``seed``."""
    tiny = MODELS[family]
    given = {"registers": {"mode": "fixed", "blocks": (2, 3), "num_copies": 2.0}, "deletion": {"block": 2, "count": 2}}
    fit(tiny.build(seed=seed), RegCacheConfig().replace(**given, **parts), [tiny.inputs(seed=2)]).save_pretrained(
        folder
    )


def campaign(
    found: list[Subject], mutants: int, work: Path, progress: bool = True
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by (mutation, outcome), and what should not be."""
    counts: Counter[tuple[str, str]] = Counter()
    bad = []
    for subject in tqdm(found, desc="checkpoints", disable=not progress):
        for number in range(mutants):
            with tempfile.TemporaryDirectory(dir=work) as folder:
                text = mutations.mutate(subject.intact, subject.stranger, Path(folder), number)
                outcome, details = mutations.judge(subject.open, subject.run, Path(folder), text, subject.output)
            counts[mutations.MUTATIONS[number % len(mutations.MUTATIONS)].__name__, outcome] += 1
            if outcome in ("silent wrong", "unhelpful error"):
                bad.append(f"{outcome}: {subject.name} {number}: {details}")
    return counts, bad


def report(counts: Counter[tuple[str, str]], rest: dict[str, Counter[str]], bad: list[str], seconds: float) -> str:
    """docs/results/campaign.md."""
    names = [m.__name__ for m in mutations.MUTATIONS]
    total = Counter({o: sum(counts[n, o] for n in names) for o in mutations.OUTCOMES})
    lines = [
        "# Campaign",
        "",
        f"Written by `python scripts/campaign.py` (`make campaign`) in {seconds:.0f} s.",
        "",
        "## Mutated checkpoints",
        "",
        f"{sum(counts.values())} mutants of tiny checkpoints of {len(FAMILIES)} families in {len(FORMS) + len(METHODS)} forms. "
        "*Identical*: opens with the same output bits. *Named error*: refused with a message that says what is wrong and what "
        "to do. *Legitimate*: another model in good order (weights and fingerprint of another checkpoint of the same config). "
        "*Silent wrong*: opens with other outputs.",
        "",
        "| mutation | " + " | ".join(mutations.OUTCOMES) + " |",
        "|---|" + "---|" * len(mutations.OUTCOMES),
        *(f"| {n} | " + " | ".join(str(counts[n, o]) for o in mutations.OUTCOMES) + " |" for n in names),
        "| **all** | " + " | ".join(f"**{total[o]}**" for o in mutations.OUTCOMES) + " |",
        "",
        "## Recipes and kills",
        "",
        "Recipes: a complete one with a value, key, character or line changed, cut off, or nested. Savers: a model is saved "
        "over another one and the process is killed at any moment; the folder opens as the old or as the new model or, in "
        "the moment of the swap, not at all until the next save. Fits: "
        "killed and continued, they end in the result of an undisturbed one.",
        "",
        "| what | outcomes |",
        "|---|---|",
        *(
            f"| {what} | {', '.join(f'{n} {outcome}' for outcome, n in sorted(c.items()))} |"
            for what, c in rest.items()
        ),
    ]
    if bad:
        lines += ["", "## Not as they should be", "", *(f"- {line}" for line in bad)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=72, help="of each checkpoint (default 72)")
    parser.add_argument("--only", help="family/form")
    parser.add_argument("--number", type=int, help="one mutant, with its traceback")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "campaign.md")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        families = (arguments.only.split("/")[0],) if arguments.only else FAMILIES
        found = [s for s in subjects(work / "made", families) if arguments.only in (None, s.name)]
        if arguments.number is not None:
            print(mutations.mutate(found[0].intact, found[0].stranger, work / "mutant", arguments.number))
            print(json.dumps(str(found[0].run(found[0].open(work / "mutant")).shape)))
            return
        counts, bad = campaign(found, arguments.mutants, work)
        rest: dict[str, Counter[str]] = {}
        if arguments.only is None:
            rest["recipes"], more = hostile.recipes(arguments.mutants * 10, work)
            bad += more
            rest["savers"] = hostile.killed_saves(arguments.mutants // 2, work)
            rest["fits"] = hostile.killed_fits(arguments.mutants // 5, work)
    text = report(counts, rest, bad, time.monotonic() - begun)
    print(text)
    if arguments.only is None:
        arguments.output.write_text(text)
    wrong = [n for (_, outcome), n in counts.items() if outcome == "silent wrong"]
    if sum(wrong) or any(c["neither"] or c["other"] for c in rest.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
