"""Test-time registers (Jiang et al., arXiv 2506.08010): the MLP hidden units that write outlier tokens, and what to do to them.

Two variants (methods G.3): a token that takes the units' activation over at run time, or units silenced in the weights and
one constant key and value per block in their place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optimum_regcache.architectures import Tower, find_tower
from optimum_regcache.registers.cache import RegisterCache
from optimum_regcache.registers.runtime import prepare_tower
from optimum_regcache.registers.state import TowerRuntime

MIN_RATIO = 3.0
Batch = Mapping[str, torch.Tensor]
Neurons = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class RegisterNeurons:
    """What :func:`find_register_neurons` found.

    Attributes:
        neurons: (block, hidden unit), largest score first; empty if the encoder has no outlier tokens.
        scores: mean absolute activation of each on outlier tokens.
        detection_block: outlier tokens were taken at the input of this block.
        threshold: their smallest l2 norm.
        images: images that have outlier tokens.
        reason: how the choice came about, in words.
    """

    neurons: list[tuple[int, int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    detection_block: int = 0
    threshold: float = float("nan")
    images: int = 0
    reason: str = ""

    def by_block(self) -> dict[int, list[int]]:
        """Block -> units, both ascending."""
        found: dict[int, list[int]] = {}
        for block, neuron in sorted(self.neurons):
            found.setdefault(block, []).append(neuron)
        return found


@torch.inference_mode()
def find_register_neurons(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    detection_block: int | None = None,
    threshold: float | None = None,
    highest_block: int | None = None,
    top_k: int = 10,
) -> RegisterNeurons:
    """Hidden units with the largest mean activation on outlier tokens (G.2).

    ``score[l, j]`` is the mean over images with outlier tokens of the mean over these tokens of ``|Z_l[n, j]|``, Z the input
    of the MLP output projection.

    Args:
        model: float model, without registers or deletion.
        batches: images, used twice.
        detection_block: outlier tokens are patches with an l2 norm above ``threshold`` at the input of this block; default:
            the block whose input has the largest ratio of largest to median norm.
        threshold: default: mean + 3 standard deviations of the norms there, and at least 3 times their median, so that an
            encoder without outlier tokens has none.
        highest_block: last block whose units are considered; default: the block before the first one whose input has
            tokens above ``threshold`` in half of the images.
        top_k: how many units, over all blocks.

    Raises:
        ValueError: no images.
    """
    from optimum_regcache.evaluation.norms import visit_tokens  # imports this package

    tower = find_tower(model)
    lead, depth = prepare_tower(model).num_prefix_tokens, len(tower.blocks)
    norms: list[list[torch.Tensor]] = [[] for _ in range(depth)]

    def measure(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        if site == "block":
            found = x.float().norm(dim=-1).masked_fill(~valid, torch.nan)[:, lead:]
            norms[block].extend(found.cpu().unbind(0))

    visit_tokens(model, batches, measure)  # type: ignore[arg-type]
    if not norms[0]:
        raise ValueError("No images to look for register neurons in.")
    values = [torch.cat(rows) for rows in norms]
    values = [v[~v.isnan()] for v in values]
    ratios = torch.stack([v.amax() / v.median() for v in values])
    detection = int(ratios.argmax()) if detection_block is None else detection_block
    at = values[detection]
    limit = max(float(at.mean() + 3 * at.std()), MIN_RATIO * float(at.median())) if threshold is None else threshold
    with_outliers = [sum(bool((row > limit).any()) for row in norms[b]) for b in range(depth)]
    images = with_outliers[detection]
    if images == 0:
        reason = f"no patch token has more than {MIN_RATIO:g} times the median norm (largest ratio {float(ratios.max()):.1f})"
        return RegisterNeurons([], [], detection, limit, 0, reason)
    first = next((b for b in range(depth) if with_outliers[b] >= len(norms[0]) / 2), detection)
    highest = max(0, min(first, detection) - 1) if highest_block is None else highest_block
    scores = _scores(model, batches, detection, limit, highest, lead, images)
    flat = torch.cat(scores)
    best = flat.topk(min(top_k, len(flat)))
    sizes = torch.tensor([len(s) for s in scores]).cumsum(0)
    neurons = []
    for index in best.indices.tolist():
        block = int(torch.searchsorted(sizes, index, right=True))
        neurons.append((block, index - (int(sizes[block - 1]) if block else 0)))
    reason = f"outlier tokens at the input of block {detection} in {images} of {len(norms[0])} images; blocks up to {highest}"
    return RegisterNeurons(neurons, best.values.tolist(), detection, limit, images, reason)


def _scores(
    model: nn.Module, batches: Sequence[Batch], detection: int, limit: float, highest: int, lead: int, images: int
) -> list[torch.Tensor]:
    """Score of every hidden unit of blocks 0 to ``highest``."""
    from optimum_regcache.evaluation.norms import visit_tokens

    hidden: dict[int, torch.Tensor] = {}
    sums: dict[int, torch.Tensor] = {}
    outliers: list[torch.Tensor] = []

    def collect(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        if site == "fc2" and block <= highest:
            hidden[block] = x
        if site == "block" and block == detection:
            mask = (x.float().norm(dim=-1) > limit) & valid
            mask[:, :lead] = False
            outliers[:] = [mask]
        if block == max(detection, highest) and site == "fc2":  # everything of this batch is there
            mask = outliers[0]
            chosen = mask.any(1)
            weight = (mask / mask.sum(1, keepdim=True).clamp(min=1))[chosen]
            for number, z in hidden.items():
                mean = torch.einsum("bn,bnm->m", weight, z[chosen].abs().float())
                sums[number] = sums.get(number, torch.zeros_like(mean)) + mean
            hidden.clear()

    visit_tokens(model, batches, collect)  # type: ignore[arg-type]
    return [sums[block].cpu() / images for block in range(highest + 1)]


class RegisterNeuronActivation(nn.Module):
    """An activation function after which register neurons give their value to the register token (G.3).

    For each neuron j: the register gets the value of largest magnitude over all tokens, patches get 0, leading tokens keep
    theirs.
    """

    def __init__(self, activation: nn.Module, neurons: Sequence[int], runtime: TowerRuntime) -> None:
        super().__init__()
        self.activation, self.neurons, self.runtime = activation, tuple(neurons), runtime

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, M] -> [B, N, M]; the register is the last of the leading tokens."""
        z = self.activation(x)
        place = self.runtime.num_prefix_tokens - 1
        columns = torch.tensor(self.neurons, device=z.device)
        values = z.index_select(-1, columns)
        largest = values.gather(1, values.abs().argmax(1, keepdim=True))
        tokens = torch.arange(z.shape[1], device=z.device)[None, :, None]
        values = torch.where(tokens == place, largest, torch.where(tokens > place, torch.zeros_like(values), values))
        return z.index_copy(-1, columns, values)


def set_register_neurons(model: nn.Module, neurons: Neurons | None) -> None:
    """Install the token variant, or remove it (None or empty); the state dict keeps its names.

    Args:
        model: model or tower, float or quantized.
        neurons: block -> hidden units.

    Raises:
        ValueError: units that do not exist, or an encoder that cannot carry one more token, with the reason.
    """
    runtime, tower = prepare_tower(model), find_tower(model)
    for block in range(len(tower.blocks)):
        mlp = _mlp(tower, block)
        if isinstance(getattr(mlp, "activation_fn", None), RegisterNeuronActivation):
            mlp.activation_fn = mlp.activation_fn.activation
    runtime.extra_token = False
    if not neurons:
        return
    name = type(tower.module).__name__
    if tower.is_backbone or tower.family.always_mask:
        raise ValueError(
            f"{name} hands out its hidden states as patch grids, or takes a padding mask, so that a register token has no "
            "place in it. Use the 'kv' variant."
        )
    _check(tower, neurons)
    for block, units in neurons.items():
        mlp = _mlp(tower, block)
        mlp.activation_fn = RegisterNeuronActivation(mlp.activation_fn, units, runtime)
    runtime.extra_token = True


def zero_register_neurons(model: nn.Module, neurons: Neurons) -> None:
    """Silence units in the weights of a float model: row and bias of the MLP input projection become 0, and GELU(0) = 0.

    Raises:
        ValueError: units that do not exist, a quantized model, or an MLP of another form.
    """
    tower = find_tower(model)
    _check(tower, neurons)
    for block, units in neurons.items():
        layer: Any = tower.norm_consumers(block, 1)[0]
        if not isinstance(layer, nn.Linear):
            raise ValueError("Silence register neurons before the model is quantized.")
        with torch.no_grad():
            layer.weight[list(units)] = 0
            if layer.bias is not None:
                layer.bias[list(units)] = 0


@torch.inference_mode()
def register_cache_from_neurons(model: nn.Module, batches: Sequence[Batch], neurons: Neurons) -> RegisterCache:
    """Mean key and value of the register token over images, for the blocks behind the first register neuron (G.3, kv).

    In earlier blocks the token is still the zero vector and its key a constant without meaning, so they get no row.

    Args:
        model: float model; it is copied.
        batches: images.
        neurons: block -> hidden units.

    Raises:
        ValueError: as :func:`set_register_neurons`, or units only in the last block, which no attention follows.
    """
    from optimum_regcache.evaluation.features import move

    copied = copy.deepcopy(model)
    set_register_neurons(copied, neurons)
    tower, runtime = find_tower(copied), prepare_tower(copied)
    start, depth = min(neurons) + 1, len(tower.blocks)
    if start >= depth:
        raise ValueError("The register neurons sit in the last block; no attention follows that could read a register.")
    rows: dict[tuple[int, str], list[torch.Tensor]] = {}
    place, handles = runtime.num_prefix_tokens - 1, []

    def keep(block: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            rows.setdefault((block, name), []).append(output[:, place].double())

        return hook

    for block in range(start, depth):
        for name in (tower.family.key, tower.family.value):
            linear = tower.attention(block).get_submodule(name)
            handles.append(linear.register_forward_hook(keep(block, name)))
    try:
        for batch in batches:
            tower.module(**move(dict(batch), copied))
    finally:
        for handle in handles:
            handle.remove()
    heads = tower.config.num_attention_heads

    def mean(name: str) -> dict[int, torch.Tensor]:
        return {b: torch.cat(rows[b, name]).mean(0).float().reshape(heads, 1, -1) for b in range(start, depth)}

    return RegisterCache(mean(tower.family.key), mean(tower.family.value), depth)


def _mlp(tower: Tower, block: int) -> Any:
    """The module that holds the MLP output projection."""
    return tower.blocks[block].get_submodule(tower.mlp_out_name(block).rpartition(".")[0])


def _check(tower: Tower, neurons: Neurons) -> None:
    for block, units in neurons.items():
        if not 0 <= block < len(tower.blocks):
            raise ValueError(
                f"There is no block {block} for register neurons; blocks are 0 to {len(tower.blocks) - 1}."
            )
        if not hasattr(_mlp(tower, block), "activation_fn"):
            raise ValueError(
                "Register neurons need an MLP whose output projection reads the activation function; this encoder multiplies "
                "it by a second branch (SwiGLU)."
            )
        out: Any = tower.mlp_out(block)
        bad = [unit for unit in units if not 0 <= unit < out.in_features]
        if bad:
            raise ValueError(f"Block {block} has hidden units 0 to {out.in_features - 1}, not {bad}.")
