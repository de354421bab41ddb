"""The scripts that users run by hand: training of the reference encoders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_reference.py"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["clip-scenes", "clip-scenes-induced", "siglip-scenes-induced"])
def test_training_script_trains_saves_and_resumes(recipe: str, tmp_path: Path):
    def train(output: str, checkpoint: str, steps: int) -> str:
        command = [sys.executable, str(SCRIPT), recipe, "--output", str(tmp_path / output)]
        command += ["--checkpoint", str(tmp_path / checkpoint), "--steps", str(steps)]
        command += ["--images", "64", "--batch-size", "16"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout

    stdout = train("a", "a.ckpt", 4)
    stages = ["base", "induction"] if "induced" in recipe else ["base"]
    for stage in stages:
        assert f"{stage} step 4: " in stdout
    train("b", "b.ckpt", 4)
    assert f"resumed {stages[-1]} at step 4" in train("b", "b.ckpt", 4)
    first, second = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[k], second[k]) for k in first)  # one seed, one result; finished runs stay the same
    processor = AutoProcessor.from_pretrained(tmp_path / "a")
    ids = processor.tokenizer("a red ring").input_ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "a red ring"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [("base", 3), ("induction", 23)], ids=lambda s: s[0])
def test_an_interrupted_training_gives_the_identical_encoder(stop: tuple[str, int], tmp_path: Path):
    """Stopped at a checkpoint in the middle of a stage, with registers and deletion at work, then resumed."""
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = [{str(SCRIPT.parent)!r}]; import train_reference as t\n"
        "from dataclasses import replace\n"
        "full = t.RECIPES['clip-scenes-induced']\n"
        "t.RECIPES['clip-scenes-induced'] = replace(full, induction=replace(full.induction, plain_steps=0))\n"
        "t.SAVE_EVERY = 1; stop = sys.argv.pop()\n"
        "t.SceneTask.accuracy = lambda *args: 0.0  # only for the log\n"
        "save = t.Run.save\n"
        "def stopping(self, stage, step, *rest):\n"
        "    save(self, stage, step, *rest)\n"
        "    if f'{stage} {step}' == stop: raise SystemExit(3)\n"
        "t.Run.save = stopping; t.main()"
    )

    def train(name: str, stop: str) -> int:
        arguments = [
            "clip-scenes-induced",
            "--output",
            str(tmp_path / name),
            "--checkpoint",
            str(tmp_path / f"{name}.ckpt"),
        ]
        arguments += ["--steps", "26", "--images", "64", "--batch-size", "16", stop]
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=600).returncode

    assert train("whole", "never") == 0
    assert train("parts", f"{stop[0]} {stop[1]}") == 3
    assert train("parts", "never") == 0
    whole, parts = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path):
    import train_reference
    from reference_training.recipes import RECIPES

    recipe, checkpoint = RECIPES["clip-scenes"], tmp_path / "x.ckpt"
    torch.save({"identity": {"recipe": repr(recipe), "seed": 1}, "stage": "base", "step": 5}, checkpoint)
    with pytest.raises(ValueError, match=r"x\.ckpt belongs to a training with another recipe, seed or amounts"):
        train_reference.Run(recipe, 0, checkpoint)
