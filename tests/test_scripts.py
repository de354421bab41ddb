"""The scripts that users run by hand: training of the embedded encoder, benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_clip_scenes.py"


@pytest.mark.slow
def test_training_script_trains_saves_and_resumes(tmp_path):
    def train(output: str, checkpoint: str, steps: int) -> str:
        command = [
            sys.executable,
            str(SCRIPT),
            "--output",
            str(tmp_path / output),
            "--images",
            "64",
            "--batch-size",
            "16",
        ]
        command += ["--checkpoint", str(tmp_path / checkpoint), "--steps", str(steps)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout

    assert "search-split zero-shot" in train("a", "a.ckpt", 3)
    train("b", "b.ckpt", 3)
    assert "resumed at step 3" in train("b", "b.ckpt", 3)
    first, second = (CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[k], second[k]) for k in first)  # seeded
    processor = CLIPProcessor.from_pretrained(tmp_path / "a")
    assert (
        processor.tokenizer.decode(processor.tokenizer("a red ring").input_ids, skip_special_tokens=True)
        == "a red ring"
    )


@pytest.mark.slow
def test_benchmark_runs_on_tiny_models(tmp_path):
    script = SCRIPT.parent.parent / "benchmarks" / "bench_cpu_int8.py"
    command = [sys.executable, str(script), "--tiny", "--output", str(tmp_path / "bench.json")]
    assert "ratio to fp32" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert (tmp_path / "bench.json").exists()
