"""Rotation of residual stream and attention heads (QuaRot, arXiv 2404.00456, for pre-LN encoders; docs/method.md 11.9).

Every function changes a float model in place and leaves what it computes as it is. Vectors are rows: ``hidden @ R``.
"""

from __future__ import annotations

import torch
from torch import nn

from optimum_regcache.encoders.tower import Tower, find_tower
from optimum_regcache.math.hadamard import orthogonal_matrix, rotation_matrix
from optimum_regcache.registers import prepare_tower
from optimum_regcache.rewrites.norms import (
    add_to_bias,
    affine_norm,
    attention_linears,
    exact,
    float_linear,
    map_registers,
    separate_projections,
    store,
)


def fold_norm_affine(tower: Tower) -> None:
    """Move weight and bias of both LayerNorms of every block into all layers that read them.

    W' = W diag(gamma), bias' = bias + W beta. The norms keep their parameters, which become 1 and 0, so that the state dict
    has the same names. Consumers without a bias get one, see `optimum_regcache.rewrites.norms.add_to_bias`.

    Raises:
        ValueError: a quantized layer, a LayerNorm without affine parameters, or a result that overflows the model's dtype.
    """
    for block in range(len(tower.blocks)):
        for number in (0, 1):
            norm = affine_norm(tower, block, number)
            for linear in [float_linear(module) for module in tower.norm_consumers(block, number)]:
                weight = exact(linear.weight)
                add_to_bias(tower, linear, weight @ exact(norm.bias))
                store(linear.weight, weight * exact(norm.weight))
            store(norm.weight, torch.ones_like(norm.weight))
            store(norm.bias, torch.zeros_like(norm.bias))


def fold_layer_scale(tower: Tower) -> None:
    """Move the LayerScale behind each branch into the layer before it: W' = diag(lambda) W, bias' = lambda * bias.

    The lambdas become 1. Families without LayerScale stay as they are.

    Raises:
        ValueError: a quantized layer, or a result that overflows the model's dtype.
    """
    for block in range(len(tower.blocks)):
        for scale, linear in zip(tower.layer_scales(block), _writers(tower, block), strict=False):
            store(linear.weight, exact(linear.weight) * exact(scale)[:, None])
            if linear.bias is not None:
                store(linear.bias, exact(linear.bias) * exact(scale))
            store(scale, torch.ones_like(scale))


def rotate_residual(model: nn.Module, seed: int = 0) -> None:
    """Rotate the residual stream between the first and the last block: hidden' = hidden @ R (docs/method.md 11.9).

    The affine part of the norms and LayerScale are folded first. Then every layer that writes to the stream (output
    projection, MLP output) gets W' = R^T W, bias' = R^T bias, and every layer that reads it through a LayerNorm W' = W R.
    R (:func:`~optimum_regcache.math.hadamard.rotation_matrix`) commutes with LayerNorm, so the stream needs no centring.
    The first block multiplies its input by the buffer ``rotation``, the last one its output by the transpose. Registers stay
    as they are: keys and values do not change (docs/method.md 10).

    Hidden states between the blocks (``output_hidden_states``) are rotated; the first and the last are not. Deletion by
    ``score="linf"`` turns the states back for the ranking (D^2 products a token, in one block), so that it chooses the same
    tokens as before.

    Args:
        model: float model.
        seed: of the rotation.

    Raises:
        ValueError: rotated already; a backbone, whose inner hidden states are its output; position embeddings between the
            blocks; a quantized layer.
    """
    prepare_tower(model)
    tower = find_tower(model)
    _check_rotatable(tower)
    fold_norm_affine(tower)
    fold_layer_scale(tower)
    weight = tower.norm(0, 0).weight
    rotation = rotation_matrix(weight.shape[0], seed)
    for block in range(len(tower.blocks)):
        for linear in _writers(tower, block):
            r = rotation.to(linear.weight.device)
            store(linear.weight, r.T @ exact(linear.weight))
            if linear.bias is not None:
                store(linear.bias, r.T @ exact(linear.bias))
        for module in (*tower.norm_consumers(block, 0), *tower.norm_consumers(block, 1)):
            linear = float_linear(module)
            store(linear.weight, exact(linear.weight) @ rotation.to(linear.weight.device))
    _install(tower, rotation)


def empty_rotation(model: nn.Module) -> None:
    """Buffers ``rotation`` of the right shape and dtype, NaN, for a checkpoint of a rotated model to be loaded into.

    Raises:
        ValueError: rotated already, a backbone, or position embeddings between the blocks.
    """
    prepare_tower(model)
    tower = find_tower(model)
    _check_rotatable(tower)
    channels = tower.norm(0, 0).weight.shape[0]
    _install(tower, torch.full((channels, channels), float("nan"), dtype=torch.float64, device="cpu"))


def rotate_heads(model: nn.Module, seed: int = 0) -> None:
    """Rotate query, key and value of every head by an orthogonal H [d, d] (docs/method.md 11.9).

    q' = q H and k' = k H leave the logits as they are; v' = v H is undone in the columns of the output projection. The same
    H serves all heads; it is a Hadamard matrix with random signs where the head size allows (`orthogonal_matrix`). Stored
    registers turn along, K' = K H and V' = V H; a `RegisterCache` that a user passes as ``past_key_values`` must be made
    anew from the changed model.

    Args:
        model: float model.
        seed: of H.

    Raises:
        ValueError: a quantized layer.
    """
    tower = find_tower(model)
    if tower.family.rotary:
        raise ValueError(
            f"{tower.family.name} rotates query and key by their position, and this rotation does not commute with one of the "
            "heads. Use heads=false."
        )
    if tower.family.normalizes_keys(tower.attention(0)):
        raise ValueError(
            f"{tower.family.name} normalizes query and key over all heads, which does not commute with a rotation of one head. "
            "Use heads=false."
        )
    names, width = (*separate_projections(tower), tower.family.out), tower.head_dim
    matrix = orthogonal_matrix(width, seed)
    for block in range(len(tower.blocks)):
        query, key, value, out = attention_linears(tower, block, *names)
        for linear in (query, key, value):
            h = matrix.to(linear.weight.device)
            store(linear.weight, (h.T @ exact(linear.weight).unflatten(0, (-1, width))).flatten(0, 1))
            if linear.bias is not None:
                store(linear.bias, (exact(linear.bias).unflatten(0, (-1, width)) @ h).flatten())
        h = matrix.to(out.weight.device)
        store(out.weight, (exact(out.weight).unflatten(1, (-1, width)) @ h).flatten(1))
    map_registers(model, lambda _, k, v: (k @ matrix.to(k.device), v @ matrix.to(v.device)))


def is_rotated(model: nn.Module) -> bool:
    """Whether the residual stream of ``model`` is rotated, or prepared for a rotated checkpoint."""
    return any(getattr(block, "rotation", None) is not None for block in find_tower(model).blocks)


def _check_rotatable(tower: Tower) -> None:
    if is_rotated(tower.module):
        raise ValueError("The residual stream of this model is rotated already; a second rotation cannot be stored.")
    if tower.is_backbone:
        raise ValueError(
            f"{type(tower.module).__name__} returns the hidden states between its blocks as feature maps, which a rotation of "
            "the residual stream would turn. Use the model class instead of the backbone, or rotation=False."
        )
    if tower.num_queries:
        raise ValueError(
            f"{type(tower.module).__name__} adds its queries at a later block, which a rotation of the residual stream does "
            "not turn. Use rotation=False."
        )
    if tower.family.adds_positions(tower.config):
        raise ValueError(
            f"{type(tower.module).__name__} adds position embeddings between its blocks, which a rotation of the residual "
            "stream does not turn. Use rotation=False."
        )


def _install(tower: Tower, rotation: torch.Tensor) -> None:
    """Buffers of the first and last block; two tensors, because a checkpoint cannot hold one under two names."""
    for block in {0, len(tower.blocks) - 1}:
        tower.blocks[block].rotation = rotation.to(tower.norm(block, 0).weight, copy=True)


def _writers(tower: Tower, block: int) -> list[nn.Linear]:
    """The layers whose output is added to the residual stream: output projection of attention, and of the MLP."""
    return [*attention_linears(tower, block, tower.family.out), float_linear(tower.mlp_out(block))]
