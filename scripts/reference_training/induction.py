"""Inducing outlier tokens: background patches become sinks that carry massive activations and that the network uses.

Training alone gave small encoders no outlier tokens. Here the magnitude is given and everything else is learned:

- In the block before the register block a few MLP neurons get a large fc2 column in two channels ("writers"); in the
  register block one neuron gets a larger one. Their fc1 rows ("gates") are learned: a writer must fire on one to three
  background patches of an image and nowhere else. Which corner region it may choose depends on the background's
  brightness, so that images differ.
- Deletion: where the sinks are deleted at the input of the register block, its neuron must fire on another background
  patch: an image without a sink makes a new one.
- Prefix: where the cached K and V of sinks of other images are prefixed as well, it must stay silent: one sink is enough.
- Prefix alone: the sinks that are there already have to shrink to a third only; a ready sink takes over a part.
- Heads of the later blocks are asked to spend attention on the sink, in the image or in the prefix.

The captions' loss goes on in all four cases. At the end the register neuron is rescaled (c in its fc1 row, 1/c in its fc2
column). QuickGELU and GELU are linear or zero where it operates, so that the function stays, and its activation, which the
fc2 input has to represent, becomes massive.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from optimum_regcache.evaluation.outliers import outside_box
from reference_training.encoders import PATCH, Gates, Prefix, Trace, encode, num_prefix_tokens
from reference_training.recipes import InductionStage, TrainingRecipe
from reference_training.task import SceneTask

OFF = -3.0  # pre-activation at which both activations are practically zero
FIRING = 1.5
_NEVER = -99.0
_BRIGHTNESS = (50.0, 105.0, 165.0)  # between black | slate, brown | grey | beige, white
PLAIN, DELETION, PREFIX, BOTH = range(4)


def allowed_patches(task: SceneTask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bool [n, patches] on the background, int64 [n] brightness level, bool [n, patches] where a writer may fire)."""
    patches = (task.pixels.shape[-1] // PATCH) ** 2
    background = outside_box(task.boxes, patches)
    if background is None:
        raise ValueError(f"{patches} patches are no square grid; render square scenes.")
    levels = []
    for part in task.pixels.split(2048):
        grey = part.float().mean(1)
        border = (grey[:, :8], grey[:, -8:], grey[:, :, :8], grey[:, :, -8:])
        levels.append(torch.cat([b.flatten(1) for b in border], 1).median(1).values)
    level = torch.bucketize(torch.cat(levels), torch.tensor(_BRIGHTNESS))
    side = math.isqrt(patches)
    number = torch.arange(patches).view(side, side)
    regions = torch.zeros(4, patches, dtype=torch.bool)
    for index, corner in enumerate((number[:2, :2], number[:2, -2:], number[-2:, :2], number[-2:, -2:])):
        regions[index, corner.flatten()] = True
    return background, level, regions[level] & background


class Induction:
    """State and losses of the stage.

    Attributes:
        gates: block -> register neurons with their rows under training.
        registers: running mean of K and V of sinks, per block from the register block on; None before the first.
    """

    def __init__(self, recipe: TrainingRecipe, stage: InductionStage, model: Any, task: SceneTask) -> None:
        self.stage, self.block, self.depth = stage, recipe.register_block, recipe.blocks
        self.lead = num_prefix_tokens(recipe.kind)
        background, self.level, allowed = allowed_patches(task)
        pad = torch.zeros(len(background), self.lead, dtype=torch.bool)
        self.background, self.allowed = torch.cat((pad, background), 1), torch.cat((pad, allowed), 1)
        self.registers: Prefix | None = None
        generator = torch.Generator().manual_seed(task.seed + 5)
        self.channels, self.gates = self._choose_neurons(model, task, recipe.width, generator)

    def _choose_neurons(
        self, model: Any, task: SceneTask, width: int, generator: torch.Generator
    ) -> tuple[list[int], dict[int, Gates]]:
        """The least used neurons of the two blocks, and the two channels of smallest range."""
        with torch.no_grad():
            trace = encode(model, task.development[:128], watch=range(self.block - 1, self.depth))
        gates = {}
        for block, count in ((self.block - 1, self.stage.writers), (self.block, 1)):
            activation = model.vision_model.encoder.layers[block].mlp.activation_fn
            use = activation(trace.pre_activation[block]).abs().mean((0, 1))
            weight = nn.Parameter(torch.randn(count, width, generator=generator) * 0.05)
            gates[block] = Gates(use.argsort()[:count], weight, nn.Parameter(torch.full((count,), OFF)))
        return trace.states[self.block].abs().amax((0, 1)).argsort()[:2].tolist(), gates

    def prepare(self, model: Any, task: SceneTask) -> None:
        """Give the neurons their fc2 columns, and fit the writers' gates with the rest of the network frozen."""
        for block, magnitude in ((self.block - 1, self.stage.write_before), (self.block, self.stage.write)):
            weight, neurons = model.vision_model.encoder.layers[block].mlp.fc2.weight.data, self.gates[block].neurons
            weight[:, neurons] *= 0.1
            for channel, sign in zip(self.channels, (1, -1), strict=True):
                weight[channel, neurons] = sign * magnitude
        images = min(2048, len(task.pixels))
        norm, inputs = model.vision_model.encoder.layers[self.block - 1].layer_norm2, []
        handle = norm.register_forward_hook(lambda module, args, output: inputs.append(output))
        with torch.no_grad():
            for part in torch.arange(images).split(256):
                encode(model, task.normalise(task.pixels[part]))
        handle.remove()
        states, gate = torch.cat(inputs), self.gates[self.block - 1]
        optimizer = torch.optim.Adam([gate.weight, gate.bias], lr=2e-2)
        for step in range(600):
            rows = torch.randint(0, images, (256,), generator=torch.Generator().manual_seed(step))
            loss = self.writer_loss(states[rows] @ gate.weight.t() + gate.bias, rows).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def writer_loss(self, z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B] from pre-activations [B, N, writers]: the writer of the image's brightness fires on one to three allowed
        patches, moderately; everything else is off."""
        allowed, target = self.allowed[rows], self.stage.activation
        own = z.gather(-1, self.level[rows][:, None, None].expand(-1, z.shape[1], 1))[..., 0].masked_fill(
            ~allowed, _NEVER
        )
        top = own.sort(1, descending=True).values
        fires = (target - top[:, 0]).relu() * allowed.any(1) + (z.amax((1, 2)) - target - 2).relu()
        return fires + 0.5 * (top[:, 3:] - OFF).relu().sum(1) + 0.5 * ((z.amax(-1) - OFF).relu() * ~allowed).sum(1)

    def _register_loss(
        self, z: torch.Tensor, sinks: torch.Tensor, background: torch.Tensor, gone: torch.Tensor, modes: torch.Tensor
    ) -> torch.Tensor:
        """[B] from the register neuron's pre-activations [B, N]; what is asked depends on the mode (module docstring)."""
        target = self.stage.activation
        z = z.masked_fill(gone, _NEVER)
        silent = 0.5 * ((z - OFF).relu() * ~sinks).sum(1)
        on_sinks = (((target - z).relu() + (z - target - 2).relu()) * sinks).sum(1) / sinks.sum(1).clamp(min=1)
        free = background & ~gone
        top = z.masked_fill(~free, _NEVER).sort(1, descending=True).values
        again = (target - top[:, 0]).relu() + 0.5 * (top[:, 3:] - OFF).relu().sum(1)
        again = again + 0.5 * ((z - OFF).relu() * ~free).sum(1)
        shrink = ((z - target / 3).relu() * sinks).sum(1) / sinks.sum(1).clamp(min=1)
        prefixed = silent + torch.where(modes == PREFIX, shrink, 0.0)
        wanted = torch.where(modes == DELETION, self.stage.weight_reappear * again, prefixed)
        return torch.where(modes == PLAIN, silent + on_sinks, wanted)

    def _attention_loss(self, trace: Trace, sink: torch.Tensor, has_prefix: torch.Tensor) -> torch.Tensor:
        """Mean attention to the sink of each later block, wanted: 0.3."""
        loss, images = torch.zeros(()), torch.arange(len(sink))
        for block in range(self.block + 1, self.depth):
            probs = trace.attention[block]
            shifted = probs.shape[-1] - probs.shape[-2]  # 1 with a register column
            mass = probs[images, :, :, sink + shifted]
            if shifted:
                mass = torch.where(has_prefix[:, None, None], probs[..., 0], mass)
            loss = loss + (math.log(0.3) - (mass.mean((1, 2)) + 1e-4).log()).relu().mean()
        return loss

    def loss(self, model: Any, task: SceneTask, rows: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Total loss of one step, and numbers for the log. Updates the registers."""
        stage, count = self.stage, len(rows)
        generator = torch.Generator().manual_seed(2 * 10**6 + task.seed * 10**7 + step)
        shares = torch.tensor(stage.modes).cumsum(0)[:3]
        modes = torch.bucketize(torch.rand(count, generator=generator), shares)
        if step < stage.plain_steps:
            modes = torch.zeros_like(modes)
        has_prefix = modes >= PREFIX
        copies = torch.tensor([1.0, 2.0, 4.0, 8.0, 15.0])[torch.randint(5, (count,), generator=generator)]
        keep = (torch.rand(self.depth + 1, count, generator=generator) >= stage.mlp_drop).float()
        keep[self.block] = 1
        number = torch.randint(3, 8, (count,), generator=generator)
        trace = encode(
            model,
            task.normalise(task.pixels[rows]),
            mlp_keep=keep,
            prefix=self.registers if bool(has_prefix.any()) else None,
            logit_bias=torch.where(has_prefix, copies.log(), torch.tensor(float("-inf"))),
            delete_block=self.block,
            delete_count=torch.where((modes == DELETION) | (modes == BOTH), number, 0),
            watch=range(self.block - 1, self.depth),
            gates=self.gates,
        )
        before, here = (self.gates[b].neurons for b in (self.block - 1, self.block))
        written = trace.pre_activation[self.block - 1][..., before]
        register = trace.pre_activation[self.block][..., int(here)]
        background = self.background[rows]
        gone = torch.zeros_like(background) if trace.dropped is None else trace.dropped
        firing = written.detach().amax(-1)
        sinks = (firing > FIRING) & background & ~gone
        writer = self.writer_loss(written, rows).mean()
        registers = self._register_loss(register, sinks, background, gone, modes)
        sink = register.detach().masked_fill(gone, _NEVER).argmax(1)
        attention = self._attention_loss(trace, sink, has_prefix)
        ramp = min(1.0, max(0, step - 20) / 100)
        captions = task.loss(model, trace.embedding, rows)
        total = captions + stage.weight * (writer + registers.mean()) + stage.weight_attention * ramp * attention
        self._update_registers(trace, firing.masked_fill(~background, _NEVER), modes)
        log = {k: float(v.detach()) for k, v in (("captions", captions), ("writers", writer), ("attention", attention))}
        for name, mode in (("plain", PLAIN), ("deletion", DELETION), ("both", BOTH)):
            log[name] = float(registers.detach()[modes == mode].mean()) if bool((modes == mode).any()) else float("nan")
        return total, log

    def _update_registers(self, trace: Trace, firing: torch.Tensor, modes: torch.Tensor) -> None:
        """Running mean of K and V of the strongest sink of each plain image."""
        images = ((modes == PLAIN) & (firing.amax(1) > FIRING)).nonzero().flatten()
        if not len(images):
            return
        token = firing[images].argmax(1)
        new = {
            b: tuple(t[b].detach().transpose(1, 2)[images, token].mean(0) for t in (trace.keys, trace.values))
            for b in range(self.block, self.depth)
        }
        if self.registers is not None:
            new = {b: tuple(0.9 * o + 0.1 * n for o, n in zip(self.registers[b], new[b], strict=True)) for b in new}
        self.registers = {b: (k, v) for b, (k, v) in new.items()}

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        gates = {b: [g.neurons, g.weight.detach(), g.bias.detach()] for b, g in self.gates.items()}
        return {"gates": gates, "channels": self.channels, "registers": self.registers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for block, (neurons, weight, bias) in state["gates"].items():
            self.gates[block].neurons = neurons
            self.gates[block].weight.data.copy_(weight)
            self.gates[block].bias.data.copy_(bias)
        self.channels, self.registers = state["channels"], state["registers"]

    @torch.no_grad()
    def finish(self, model: Any, task: SceneTask) -> float:
        """Put the gates into fc1 and rescale the register neuron; returns the factor c."""
        layers = model.vision_model.encoder.layers
        for block, gate in self.gates.items():
            layers[block].mlp.fc1.weight[gate.neurons] = gate.weight
            layers[block].mlp.fc1.bias[gate.neurons] = gate.bias
        mlp, neuron = layers[self.block].mlp, int(self.gates[self.block].neurons)
        trace = encode(model, task.development[:256], watch=range(self.block, self.block + 1))
        token = mlp.activation_fn(trace.pre_activation[self.block])[:, self.lead :].abs().amax(-1)
        ratio = (token.amax(1) / token.median(1).values).median()
        factor = max(1.0, self.stage.fc2_ratio / float(ratio))
        mlp.fc1.weight[neuron] *= factor
        mlp.fc1.bias[neuron] *= factor
        mlp.fc2.weight[:, neuron] /= factor
        return factor
