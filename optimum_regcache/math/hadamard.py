"""Hadamard matrices, and the orthogonal transforms that spread outlier channels (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch

MAX_BLOCK = 512


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley(order: int) -> int:
    """1 or 2 if Paley's construction I or II builds ``order``, else 0."""
    if order % 4 == 0 and _is_prime(order - 1):
        return 1
    return 2 if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1 else 0


def has_hadamard(order: int) -> bool:
    """Whether :func:`hadamard_matrix` can build ``order``."""
    if order < 2 or order % 2:
        return order == 1
    return has_hadamard(order // 2) or _paley(order) > 0


def hadamard_matrix(order: int) -> torch.Tensor:
    """A Hadamard matrix H, with H H^T = order * I: 2^k by Sylvester's doubling, m * 2^k from Paley's matrix of order m.

    Paley I has m = q + 1 for a prime q = 3 mod 4 (4, 8, 12, 20, 24, 44, ...), Paley II m = 2 (q + 1) for a prime
    q = 1 mod 4 (12, 28, 36, 60, ...). Doubling has precedence. Checkpoints depend on the entries: never change them.

    Returns:
        float64 [order, order] of +1 and -1, on the CPU.

    Raises:
        ValueError: an order that neither construction reaches.
    """
    if not has_hadamard(order):
        raise ValueError(
            f"No Hadamard matrix of order {order} can be built: it takes 2^k, or 2^k times q + 1 (prime q = 3 mod 4) or "
            "2 (q + 1) (prime q = 1 mod 4). block_order(n) gives the largest order that divides n channels."
        )
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if has_hadamard(order // 2):
        half = hadamard_matrix(order // 2)
        return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)), 0)
    if _paley(order) == 1:
        return torch.eye(order, dtype=torch.float64, device="cpu") + _conference(order - 1, -1.0)
    conference = _conference(order // 2 - 1, 1.0)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    return torch.kron(conference, pair) + torch.kron(torch.eye(order // 2, dtype=torch.float64, device="cpu"), diagonal)


def _conference(q: int, corner: float) -> torch.Tensor:
    """[q + 1, q + 1]: the quadratic characters of i - j mod q, bordered by a row of ones and a column of ``corner``."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor(
        [0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64, device="cpu"
    )
    index = torch.arange(q, device="cpu")
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64, device="cpu")
    matrix[1:, 0], matrix[0, 0] = corner, 0.0
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def block_order(channels: int) -> int:
    """The largest order of at most 512 that :func:`hadamard_matrix` can build and that divides ``channels``.

    3072 and 1536 give 512, 1152 and 768 give 384, 4304 gives 16, odd numbers give 1 (nothing to transform).

    Raises:
        ValueError: ``channels`` < 1.
    """
    if channels < 1:
        raise ValueError(f"The number of channels must be at least 1, got {channels}.")
    top = min(channels, MAX_BLOCK)
    return next(order for order in range(top, 0, -1) if channels % order == 0 and has_hadamard(order))


def block_hadamard(x: torch.Tensor, order: int) -> torch.Tensor:
    """``x @ B``, where B is block-diagonal with orthonormal blocks diag(s) H / sqrt(order).

    H is :func:`hadamard_matrix`. The signs s are the Rudin-Shapiro sequence (+1 where the binary index has an even number
    of adjacent ones): rows with flipped signs still make a Hadamard matrix, but a constant offset, such as the mean of GELU
    outputs, no longer gathers in the one column of H that is all ones. For orders 4^k it spreads evenly over all columns.
    The blocks are applied as Kronecker factors, H_ab = H_a x H_b, at a + b instead of a * b products per channel.

    Args:
        x: float [..., n].
        order: size of a block, for example ``block_order(n)``. Checkpoints depend on it.

    Returns:
        [..., n] in the dtype of ``x``, with the same l_2 norm over the last axis.

    Raises:
        ValueError: ``order`` does not divide n, or cannot be built.
    """
    channels = x.shape[-1]
    if order < 1 or channels % order:
        raise ValueError(
            f"Blocks of {order} do not divide {channels} channels; block_order({channels}) gives an order that does."
        )
    if order == 1:
        return x
    compiling = torch.compiler.is_compiling()  # a cache must not keep tensors that belong to a trace
    signs, left, right = (_factors if compiling else _cached_factors)(order, x.dtype, x.device)
    # normalised first: in float16 the sums could overflow
    blocks = (x * order**-0.5).unflatten(-1, (channels // order, order)) * signs
    blocks = blocks.reshape(-1, left.shape[0], right.shape[0]) @ right
    return (blocks if left.shape[0] == 1 else left @ blocks).reshape(x.shape)


def rotate_mlp_input_weight(weight: torch.Tensor, order: int) -> torch.Tensor:
    """The weight that a linear layer needs behind :func:`block_hadamard`: W' = W B (docs/method.md 11.9).

    y = x W^T = (x B) (W B)^T, since B B^T = I. Computed in float64.

    Args:
        weight: float [out, n].
        order: size of a block; it divides n.

    Returns:
        [out, n] in the dtype of ``weight``.

    Raises:
        ValueError: ``order`` does not divide n, or cannot be built.
    """
    return block_hadamard(weight.double(), order).to(weight.dtype)


def orthogonal_matrix(channels: int, seed: int = 0) -> torch.Tensor:
    """An orthogonal matrix that spreads every channel over all others: diag(random signs) H / sqrt(n), all of one size.

    Where no Hadamard matrix of order n can be built, it is a random orthogonal matrix (QR of a Gaussian one).

    Returns:
        float64 [n, n], on the CPU.

    Raises:
        ValueError: ``channels`` < 1.
    """
    if channels < 1:
        raise ValueError(f"The number of channels must be at least 1, got {channels}.")
    generator = torch.Generator("cpu").manual_seed(seed)
    if has_hadamard(channels):
        bits = torch.randint(0, 2, (channels, 1), generator=generator, device="cpu")
        return (2.0 * bits.double() - 1) * hadamard_matrix(channels) * channels**-0.5
    gaussian = torch.randn(channels, channels, generator=generator, dtype=torch.float64, device="cpu")
    q, r = cast("Any", torch.linalg).qr(gaussian)
    return q * r.diagonal().sign()


def rotation_matrix(channels: int, seed: int = 0) -> torch.Tensor:
    """An orthogonal R with R 1 = 1 that spreads every channel; made for a residual stream that is read by LayerNorm.

    R = (I - 2 v v^T / v^T v) S with v = S 1 - 1: the spreading matrix S (:func:`orthogonal_matrix`), then the reflection
    that takes S 1 to 1. The reflection changes one dimension only, so the entries stay near 1 / sqrt(n).

    A LayerNorm without affine part commutes with such a rotation, LN(x R) = LN(x) R for row vectors x, so that neither
    RMSNorm nor centred weights are needed (docs/method.md 11.9): R^T 1 = R^-1 1 = 1, hence the mean x R 1 / n = x 1 / n is the
    same; 1^T R = 1^T, hence x R minus its mean is (x minus its mean) R; and R keeps the l_2 norm of that, hence the variance.

    Args:
        channels: n.
        seed: of the random signs.

    Returns:
        float64 [n, n], on the CPU.

    Raises:
        ValueError: ``channels`` < 1.
    """
    spread = orthogonal_matrix(channels, seed)
    difference = spread.sum(1) - 1
    length = difference @ difference
    if length < 1e-18 * channels:
        return spread
    return spread - torch.outer(difference, (2 / length) * (difference @ spread))


def _factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signs [a b], H_a [a, a] and H_b [b, b], with H_ab = H_a x H_b and a about sqrt(order)."""
    signs = torch.tensor([1.0 - 2 * ((i & (i >> 1)).bit_count() % 2) for i in range(order)], dtype=dtype, device=device)
    left = 1
    while order > 64 and 4 * left * left <= order and has_hadamard(order // (2 * left)):
        left *= 2
    return signs, hadamard_matrix(left).to(device, dtype), hadamard_matrix(order // left).to(device, dtype)


@lru_cache(maxsize=32)
def _cached_factors(
    order: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # they may meet a backward pass later
        return _factors(order, dtype, device)
