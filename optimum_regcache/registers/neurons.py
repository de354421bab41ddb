"""Test-time registers: MLP units that write the outlier lose their activation to one token, or to a constant K/V pair.

Jiang et al., "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010; docs/method.md 11.12). A few hidden units,
the register neurons, write the massive activation onto a few patches. Two ways to keep the patches clean:

- token: :func:`set_register_neurons`. One more token runs along, and takes over the activation of these units.
- kv: :func:`zero_register_neurons` silences the units in the weights, :func:`register_cache_from_neurons` gives attention
  the mean key and value of such a token. No token is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.bars import bar
from optimum_regcache.config.validation import require
from optimum_regcache.encoders.passes import Batch, PaddingMask, run_tower
from optimum_regcache.encoders.sharing import replace_value, shared_copy
from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.encoders.visiting import visit_tokens
from optimum_regcache.registers.cache import RegisterCache
from optimum_regcache.registers.install import prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.neuron_activation import RegisterNeuronActivation

OUTLIER_RATIO = 3.0  # l2 norm of an outlier token over the median token, at least
UNIT_RATIO = 3.0  # activation of a register neuron on outlier tokens over that on the other patches, at least
Neurons = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class RegisterNeurons:
    """Result of :func:`find_register_neurons`.

    Attributes:
        neurons: (block, hidden unit), highest score first; empty if nothing should be installed.
        scores: mean absolute activation on outlier tokens, for each of ``neurons``.
        detection_block: block at whose output the outlier tokens were told apart.
        threshold: l2 norm above which a patch token is an outlier.
        highest_block: last block whose units were ranked; None if there are no outliers.
        outliers: outlier tokens found.
        images: images that have one.
        reason: why ``neurons`` is empty, else "".
    """

    neurons: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    detection_block: int
    threshold: float
    highest_block: int | None
    outliers: int
    images: int
    reason: str = ""

    def by_block(self) -> dict[int, list[int]]:
        """Block -> hidden units, both ascending: what the functions below take."""
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
    progress: bool = True,
) -> RegisterNeurons:
    """Rank hidden units by their activation on outlier tokens (docs/method.md 11.12).

    Outlier tokens are the patch tokens whose l2 norm at the output of the detection block exceeds the threshold. The score
    of a unit is |fc2 input|, mean over the outlier tokens of an image, then over the images that have any. CLS, trained
    registers and padding do not count. Units whose score is less than :data:`UNIT_RATIO` times the same mean over the other
    patches are left out: all tokens need them (the authors' code has a sparsity filter to this end). Two passes over
    ``batches``; what is kept are norms and sums.

    Args:
        model: float model or tower. Registers stay installed: what is found is what writes outliers in spite of them.
        batches: images without labels; the paper uses 500.
        detection_block: default: the block whose output has the largest ratio of maximum to median norm. The last block
            would do for CLIP, but that of DINOv2 shrinks its outliers again.
        threshold: default: mean + 3 sigma of the tokens up to :data:`OUTLIER_RATIO` times the median, and no less than that.
            Larger ones do not take part: a tenth of all tokens, equal and however large, stays below mean + 3 sigma of all.
            Without the floor every encoder has outliers: three sigma leave out some tokens of any distribution.
        highest_block: last block whose units are ranked; default: the first block at whose output at least half as many
            tokens exceed the threshold as at the detection block. Later units read the outlier, they did not write it.
        top_k: units to return at most.
        progress: show progress bars.

    Returns:
        The units, or none and the reason if there are no outlier tokens, or no unit that is specific to them.

    Raises:
        ValueError: no images; a block that does not exist; register neurons or deletion installed; a SwiGLU MLP.
    """
    tower = find_tower(model)
    depth = len(tower.blocks)
    _check_plain_mlp(tower)
    for name, block in (("detection_block", detection_block), ("highest_block", highest_block)):
        require(block is None or 0 <= block < depth, f"{name}={block}, but the encoder has blocks 0 to {depth - 1}.")
    require(top_k >= 1, f"top_k must be at least 1, got {top_k}.")
    require(len(batches) > 0, "No images to find register neurons in.")
    runtime = prepare_tower(model)
    require(
        not runtime.extra_token and not runtime.deletion.active,
        "Register neurons or deletion are installed in this model and hide what is to be found. Remove them first: "
        "set_register_neurons(model, None), set_deletion(model, DeletionConfig()).",
    )
    norms = _output_norms(tower, batches, progress)
    flat = [torch.cat([n[n >= 0] for n in block]) for block in norms]
    if detection_block is None:
        detection_block = max(range(depth), key=lambda b: float(flat[b].max() / flat[b].median()))
    if threshold is None:
        threshold = _outlier_threshold(flat[detection_block])
    outliers = [n > threshold for n in norms[detection_block]]
    count, images = sum(int(o.sum()) for o in outliers), sum(int(o.any(1).sum()) for o in outliers)
    if count == 0:
        peak = float(flat[detection_block].max())
        largest = f"the largest l2 norm at the output of block {detection_block} is {peak:.4g}"
        reason = f"no outlier tokens: {largest}, the threshold is {threshold:.4g}"
        return RegisterNeurons((), (), detection_block, threshold, None, 0, 0, reason)
    if highest_block is None:
        highest_block = next(b for b in range(depth) if 2 * int((flat[b] > threshold).sum()) >= count)
    ordinary = [(n >= 0) & (n <= threshold) for n in norms[detection_block]]
    groups = [torch.stack(pair) for pair in zip(outliers, ordinary, strict=True)]
    scores = _scores(tower, bar(batches, "register neurons", shown=progress), groups, highest_block)
    specific = scores[:, 0].masked_fill(scores[:, 0] < UNIT_RATIO * scores[:, 1], 0.0).flatten()
    values, order = specific.topk(min(top_k, len(specific)))
    found: list[int] = cast("Any", order[values > 0]).tolist()
    reason = "" if found else f"no unit is {UNIT_RATIO:g} times as active on the outlier tokens as on the other patches"
    top: list[float] = cast("Any", values[: len(found)]).tolist()
    neurons = tuple(divmod(i, scores.shape[-1]) for i in found)
    return RegisterNeurons(neurons, tuple(top), detection_block, threshold, highest_block, count, images, reason)


def _outlier_threshold(norms: torch.Tensor) -> float:
    floor = OUTLIER_RATIO * norms.median()
    ordinary = norms[norms <= floor]
    return float(torch.maximum(floor, ordinary.mean() + 3 * ordinary.std(correction=0)))


def _output_norms(tower: Tower, batches: Sequence[Batch], progress: bool) -> list[list[torch.Tensor]]:
    """For each block and batch the l2 norms of its output tokens, float [B, N] on the CPU; -1 for tokens that do not count."""
    norms: list[list[torch.Tensor]] = [[] for _ in tower.blocks]
    padding = PaddingMask()

    def hook(block: int) -> Any:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            x = cast("Any", output[0] if isinstance(output, tuple) else output)
            ignored = ~padding.valid(x.shape[0], x.shape[1], x.device)
            ignored |= ~tower.patches_at(block).mask(x.shape[1], x.device)
            norms[block].append(x.float().norm(dim=-1).masked_fill(ignored, -1.0).cpu())

        return seen

    handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(tower.blocks)]
    _run(tower, bar(batches, "outlier tokens", shown=progress), handles, padding)
    return norms


def _scores(tower: Tower, batches: Iterable[Batch], groups: list[torch.Tensor], highest_block: int) -> torch.Tensor:
    """Mean |fc2 input| over the tokens of each group in an image, then over the images that have any.

    ``groups`` holds bool [G, B, N] for each batch; returns float64 [blocks, G, M] on the CPU.
    """
    totals: dict[int, torch.Tensor] = {}
    remaining = [iter(groups) for _ in range(highest_block + 1)]

    def visit(site: str, block: int, x: torch.Tensor, valid: torch.Tensor) -> None:
        if site == "fc2" and block <= highest_block:
            weight = next(remaining[block]).to(x.device).float()
            weight = weight / weight.sum(2, keepdim=True).clamp(min=1)
            score = torch.einsum("gbn,bnm->gm", weight, x.abs().float()).double().cpu()
            totals[block] = totals[block] + score if block in totals else score

    visit_tokens(tower.module, batches, visit)
    images = torch.stack([group.any(2).sum(1) for group in groups]).sum(0)
    return torch.stack([totals[b] for b in range(highest_block + 1)]) / images.clamp(min=1)[:, None]


def _run(tower: Tower, batches: Iterable[Batch], handles: list[Any], padding: PaddingMask) -> None:
    """Feed the hooks behind ``handles``, then remove them."""
    try:
        for batch in batches:
            padding.start(batch)
            run_tower(tower, batch)
    finally:
        for handle in handles:
            handle.remove()


def set_register_neurons(model: nn.Module, neurons: Neurons | None) -> None:
    """Install the test-time register token, in place; replaces whatever was installed before.

    A token that starts at zero is inserted after the leading tokens before the first block and dropped after the last one,
    so outputs keep their shape; hidden states in between have one token more. The MLPs may be float or quantized. The
    largest activation is taken in each image by itself. Deletion never takes the register token.

    Args:
        model: model or tower.
        neurons: block -> hidden units; None or empty removes the token and the changes of the MLPs.

    Raises:
        ValueError: a block or unit that does not exist; a SwiGLU MLP, a backbone, or padded inputs (SigLIP2).
    """
    chosen = {block: sorted(set(units)) for block, units in (neurons or {}).items() if len(units)}
    tower = find_tower(model)
    if chosen:
        _check_token(tower)
        _check_neurons(tower, chosen)
    runtime = prepare_tower(model)
    for block in tower.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, RegisterNeuronActivation):
                    setattr(parent, name, child.inner)
    for block, units in chosen.items():
        mlp, name = _activation(tower, block)
        setattr(mlp, name, RegisterNeuronActivation(mlp.get_submodule(name), units, tower.patches_at(block)))
    runtime.extra_token = bool(chosen)


@torch.no_grad()
def zero_register_neurons(model: nn.Module, neurons: Neurons) -> None:
    """Silence hidden units in the weights, in place: row and bias of the MLP's input projection become zero, and act(0) = 0.

    Alone this takes a sink away that the encoder needs (OpenCLIP-B zero-shot: 70.4 % -> 55.6 % in the paper); install a
    register cache along with it.

    Args:
        model: float model or tower.
        neurons: block -> hidden units.

    Raises:
        ValueError: a block or unit that does not exist; a SwiGLU MLP; a quantized layer; an activation with act(0) != 0.
    """
    tower = find_tower(model)
    _check_neurons(tower, neurons)
    layers: dict[int, Any] = {block: tower.norm_consumers(block, 1)[0] for block in neurons}
    for block, linear in layers.items():
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise ValueError(
                f"The MLP of block {block} is quantized ({type(linear).__name__}). Zero register neurons in the float model, "
                "then quantize it."
            )
        mlp, name = _activation(tower, block)
        activation: Any = mlp.get_submodule(name)
        activation = getattr(activation, "inner", activation)  # of a RegisterNeuronActivation
        if bool(activation(torch.zeros(1, device=linear.weight.device)).abs() > 0):
            raise ValueError(
                f"The activation function {type(activation).__name__} is not zero at zero, so no weight silences a unit. Use "
                "set_register_neurons (variant 'token')."
            )
    for block, units in neurons.items():
        for parameter in layers[block].parameters():  # weight and bias; a model that shares them does not change
            value = parameter.clone()
            value[list(units)] = 0
            replace_value(parameter, value)


@torch.inference_mode()
def register_cache_from_neurons(
    model: nn.Module, batches: Sequence[Batch], neurons: Neurons, *, progress: bool = True
) -> RegisterCache:
    """Mean key and value of the test-time register token over images, for a model whose register neurons are zeroed.

    The rows begin behind the first block with register neurons, where the token first carries what they write. Before, it is
    a token that the encoder never saw and attends to all the same: rows for all blocks cost siglip-scenes-induced 15 points.

    Args:
        model: float model or tower with its register neurons intact; a copy of it is run, without registers and deletion.
        batches: images; the paper uses 1,000.
        neurons: block -> hidden units.
        progress: show a progress bar.

    Returns:
        One row of K and V, float32 on the CPU, for every block after the first one with register neurons, one copy.

    Raises:
        ValueError: no neurons or no images; all neurons in the last block; otherwise as :func:`set_register_neurons`.
    """
    blocks = [block for block, units in neurons.items() if len(units)]
    require(bool(blocks), "No register neurons to make a register cache from.")
    require(len(batches) > 0, "No images to make a register cache from.")
    model = shared_copy(model)
    set_registers(model, None)
    set_deletion(model, DeletionConfig())
    set_register_neurons(model, neurons)
    tower = find_tower(model)
    depth, first = len(tower.blocks), min(blocks) + 1
    require(
        first < depth,
        f"All register neurons are in block {depth - 1}, the last one: no attention follows that could read a register cache. "
        "zero_register_neurons alone takes their outliers away.",
    )
    sums: tuple[dict[int, torch.Tensor], ...] = ({}, {})  # keys, values

    def hook(store: dict[int, torch.Tensor], block: int, columns: slice) -> Any:
        def seen(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            row = output[:, tower.num_prefix_tokens, columns].double().sum(0).cpu()
            store[block] = store[block] + row if block in store else row

        return seen

    handles = [
        projection.register_forward_hook(hook(store, block, columns))
        for block in range(first, depth)
        for (projection, columns), store in zip(tower.key_value(block), sums, strict=True)
    ]
    _run(tower, bar(batches, "register cache", shown=progress), handles, PaddingMask())
    images = sum(len(next(iter(batch.values()))) for batch in batches)
    heads = tower.num_heads
    keys, values = ({b: (s / images).float().reshape(heads, 1, -1) for b, s in store.items()} for store in sums)
    return RegisterCache(keys, values, depth)


def _activation(tower: Tower, block: int) -> tuple[nn.Module, str]:
    """The MLP of a block, and the name of its activation function there: the child that is no projection."""
    family, parent = tower.family, tower.mlp_out_name(block).rpartition(".")[0]
    mlp = tower.blocks[block].get_submodule(parent)
    projections = family.mlp_in + family.mlp_out
    names = [name for name, _ in mlp.named_children() if f"{parent}.{name}" not in projections]
    require(len(names) == 1, f"{type(mlp).__name__} has no single activation function; its other parts are {names}.")
    return mlp, names[0]


def _check_plain_mlp(tower: Tower) -> None:
    require(
        not tower.is_gated(0),
        f"{type(tower.module).__name__} has an MLP that multiplies two branches (SwiGLU); register neurons are defined for "
        "fc2(act(fc1(x))) only. Use RegCache's own registers (registers.mode='search').",
    )


def _check_token(tower: Tower) -> None:
    name, kv = type(tower.module).__name__, "Use zero_register_neurons (variant 'kv')."
    require(
        not tower.is_backbone,
        f"{name} reshapes every hidden state to the patch grid, where a test-time register token has no place. Use the model "
        "class instead of the backbone, or zero_register_neurons (variant 'kv').",
    )
    require(
        not tower.family.packed,
        f"{name} packs the patches of all images into one sequence, where a test-time register token has no place. {kv}",
    )
    require(
        not tower.num_queries,
        f"{name} reads all tokens behind its queries as patches, where a test-time register token has no place. {kv}",
    )
    require(
        not tower.family.adds_positions(tower.config),
        f"{name} adds position embeddings of all tokens between its blocks, and a test-time register token has none. {kv}",
    )
    require(
        not tower.family.always_mask,
        f"{name} pads its images, and the MLP does not know which tokens are padding: their activations would move to the "
        "test-time register token. Use RegCache's own registers (registers.mode='search').",
    )


def _check_neurons(tower: Tower, neurons: Neurons) -> None:
    _check_plain_mlp(tower)
    depth = len(tower.blocks)
    for block, units in neurons.items():
        require(0 <= block < depth, f"Register neurons of block {block}, but the encoder has blocks 0 to {depth - 1}.")
        width: int = tower.mlp_out(block).in_features  # type: ignore[assignment]
        bad = [unit for unit in units if not 0 <= unit < width]
        require(not bad, f"Register neurons {bad} of block {block}, but its MLP has units 0 to {width - 1}.")
