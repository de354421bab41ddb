"""Train a reference encoder of the package from scratch: a small CLIP or SigLIP on procedural scenes.

    python scripts/train_reference.py clip-scenes-induced --output optimum_regcache/data/reference/clip-scenes-induced

Recipes: ``clip-scenes`` (captions only, no outlier tokens), ``clip-scenes-induced`` and ``siglip-scenes-induced`` (then
outlier tokens are induced, see ``scripts/reference_training/induction.py``). About an hour on one CPU core (base stage: 2,000
steps of about 1.5 s; induction: 400 to 600 of the same); several may run side by side, each uses one thread. Interrupted runs
resume from ``--checkpoint``. One seed gives one result on one machine; elsewhere the result is statistically the same.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from reference_training.encoders import build_model, build_processor, build_tokenizer, encode
from reference_training.induction import Induction
from reference_training.recipes import RECIPES, BaseStage, InductionStage, TrainingRecipe
from reference_training.task import SceneTask, make_optimizers

SAVE_EVERY = 100


class Run:
    """Model, task and checkpoint of one training run."""

    def __init__(self, recipe: TrainingRecipe, seed: int, checkpoint: Path) -> None:
        self.recipe, self.seed, self.checkpoint = recipe, seed, checkpoint
        self.identity = {"recipe": repr(recipe), "seed": seed}
        self.saved: dict[str, Any] = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {}
        if self.saved and self.saved.get("identity") != self.identity:
            raise ValueError(
                f"{checkpoint} belongs to a training with another recipe, seed or amounts. Use another --checkpoint, or delete "
                "the file to start again."
            )
        self.task = SceneTask(recipe, recipe.base.images, seed)
        self.model = build_model(recipe, self.task.tokenizer, seed)
        if self.saved:
            self.model.load_state_dict(self.saved["model"])
            print(f"resumed {self.saved['stage']} at step {self.saved['step']} from {checkpoint}", flush=True)

    def save(self, stage: str, step: int, optimizers: list[torch.optim.Optimizer], extra: dict[str, Any]) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "identity": self.identity,
            "stage": stage,
            "step": step,
            "model": self.model.state_dict(),
            "extra": extra,
        }
        temporary = self.checkpoint.with_name(f"{self.checkpoint.name}.tmp")
        torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, temporary)
        os.replace(temporary, self.checkpoint)

    def optimise(
        self,
        stage: str,
        steps: int,
        optimizers: list[torch.optim.Optimizer],
        schedule: Callable[[int], float],
        loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        evaluate: Callable[[], float],
        extra: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Steps of one stage, from the checkpoint if it holds this stage."""
        start = 0
        if self.saved.get("stage") == stage:
            start = self.saved["step"]
            for optimizer, state in zip(optimizers, self.saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        rates = [(group, group["initial_lr"]) for o in optimizers for group in _with_initial_rates(o)]
        for step in tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=10):
            for group, rate in rates:
                group["lr"] = rate * schedule(step)
            value, log = loss(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=math.log(100))
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                numbers = ", ".join(f"{k} {v:.3f}" for k, v in log.items())
                print(f"{stage} step {step + 1}: {numbers}, search-split zero-shot {evaluate():.4f}", flush=True)
                self.save(stage, step + 1, optimizers, extra())


def _with_initial_rates(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer.param_groups


def train_base(run: Run, stage: BaseStage) -> None:
    """Captions, with the MLPs of all blocks but the register block skipped at random."""
    recipe, task, model = run.recipe, run.task, run.model

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rows = task.rows(step, stage.batch_size)
        generator = torch.Generator().manual_seed(10**6 + run.seed * 10**7 + step)
        keep = (torch.rand(recipe.blocks, len(rows), generator=generator) >= stage.mlp_drop).float()
        keep[recipe.register_block] = 1
        value = task.loss(model, encode(model, task.normalise(task.pixels[rows]), mlp_keep=keep).embedding, rows)
        return value, {"captions": float(value.detach())}

    def schedule(step: int) -> float:
        return min((step + 1) / 50, max(0.02, 1 - step / stage.steps))

    optimizers = make_optimizers(model, stage.lr, stage.muon_lr)
    run.optimise("base", stage.steps, optimizers, schedule, loss, lambda: task.accuracy(model))


def induce(run: Run, stage: InductionStage, base_steps: int) -> None:
    """The second stage; ends with the rescaled register neuron in place."""
    task, model = run.task, run.model
    induction = Induction(run.recipe, stage, model, task)
    if run.saved.get("stage") == "induction":
        induction.load_state_dict(run.saved["extra"])
    else:
        induction.prepare(model, task)

    def schedule(step: int) -> float:
        return min((step + 1) / 20, 1) * max(0.05, 1 - max(0, step - stage.steps / 2) / (stage.steps / 2))

    gates = [p for g in induction.gates.values() for p in (g.weight, g.bias)]
    optimizers = [*make_optimizers(model, stage.lr, stage.muon_lr), torch.optim.Adam(gates, lr=stage.gate_lr)]
    run.optimise(
        "induction",
        stage.steps,
        optimizers,
        schedule,
        lambda step: induction.loss(model, task, task.rows(base_steps + step, stage.batch_size), step),
        lambda: task.accuracy(model, induction.gates),
        induction.state_dict,
    )
    before = encode(model, task.development, gates=induction.gates).embedding.detach()
    factor = induction.finish(model, task)
    after = encode(model, task.development).embedding.detach()
    same = float(F.cosine_similarity(before, after).mean())
    print(
        f"register neuron rescaled by {factor:.1f}; mean cosine of embeddings before and after: {same:.6f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=tuple(RECIPES))
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--checkpoint", type=Path, help="default: RECIPE.ckpt in the current directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each stage, for a trial")
    parser.add_argument("--images", type=int, help="training scenes, for a trial")
    parser.add_argument("--batch-size", type=int, help="for a trial")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipe = RECIPES[args.recipe]
    trial = {k: v for k, v in (("steps", args.steps), ("batch_size", args.batch_size)) if v is not None}
    recipe = replace(
        recipe,
        base=replace(recipe.base, **trial, images=args.images or recipe.base.images),
        induction=recipe.induction and replace(recipe.induction, **trial),
    )
    if recipe.base.images < recipe.base.batch_size:
        parser.error(f"--images {recipe.base.images} is less than one batch; give --batch-size as well")
    checkpoint = args.checkpoint or Path(f"{args.recipe}.ckpt")
    run = Run(recipe, args.seed, checkpoint)
    if run.saved.get("stage") != "induction":
        train_base(run, recipe.base)
    if recipe.induction is not None:
        induce(run, recipe.induction, recipe.base.steps)
    print(f"search-split zero-shot {run.task.accuracy(run.model):.4f}")
    run.model.eval().half()
    run.model.save_pretrained(args.output)
    # a fresh one: the tokenizer of the task remembers how it was last used
    build_processor(recipe.kind, build_tokenizer(recipe.kind)).save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
