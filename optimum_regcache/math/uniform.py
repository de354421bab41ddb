"""Pure quantization functions. Tensors in, tensors out.

Conventions: ``real = scale * (code - zero_point)``; codes are ``round(x * (1 / scale)) + zero_point`` with half-to-even
rounding, which is what `torch.fake_quantize_per_tensor_affine` computes; all execution backends share these codes.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

PART_VALUES = 2**16  # weights are rounded in parts of so many values
_BYTES_ARE_CODES = sys.byteorder == "little"  # the bytes of a word are its four 8-bit codes in order


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code: ``[-2^(b-1), 2^(b-1) - 1]`` if symmetric, else ``[0, 2^b - 1]``."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def choose_qparams(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the range [low, high], widened to contain zero.

    Args:
        low, high: range ends, any common shape, float.
        bits: 2 to 8.
        symmetric: ``s = max(|low|, |high|) / (2^(b-1) - 1)``, z = 0; otherwise ``s = (high - low) / (2^b - 1)``,
            ``z = round(-low / s)``.

    Returns:
        ``(scale float32, zero_point int32)`` of the shape of ``low``. An empty range (all zero) gets scale 1.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    span = torch.maximum(-low, high) if symmetric else high - low
    scale = span / (2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
    scale = torch.where(scale <= torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)  # nan stays nan
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    quantum = 2**bits - 1
    return scale, torch.round(-low / scale).clamp(0, quantum).to(torch.int32)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    """Integer codes of ``x`` as float32 (whole numbers); ``scale`` and ``zero_point`` broadcast against ``x``."""
    lowest, highest = code_range(bits, symmetric)
    return torch.clamp(torch.round(x.float() * (1.0 / scale)) + zero_point, lowest, highest)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """``scale * (codes - zero_point)`` in float32."""
    return (codes.float() - zero_point) * scale


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    """Quantize then dequantize; float32 result of the shape of ``x`` (simulated quantization).

    Gradients pass straight through wherever ``x`` is not clipped; scale and zero point are constants for them.
    """
    value = dequantize(quantize(x, scale, zero_point, bits, symmetric), scale, zero_point)
    if not gradient_wanted(x):
        return value
    lowest, highest = (scale * (code - zero_point) for code in code_range(bits, symmetric))
    return straight_through(x, value, lowest, highest)


def gradient_wanted(x: torch.Tensor) -> bool:
    """Whether autograd records what is done with ``x``."""
    return x.requires_grad and torch.is_grad_enabled()


def straight_through(
    x: torch.Tensor, value: torch.Tensor, lowest: torch.Tensor | float, highest: torch.Tensor | float
) -> torch.Tensor:
    """``value`` with the gradient of ``x`` where ``lowest <= x <= highest``, and none elsewhere (clipped straight-through
    estimator; arXiv 1308.3432, 1902.08153).

    Args:
        x: what was rounded.
        value: the result of rounding, shape of ``x``, float32.
        lowest, highest: the range that is not clipped, broadcast against ``x``.
    """
    x = x.float()
    inside = torch.where(((x >= lowest) & (x <= highest)).detach(), x, x.detach())
    return value.detach() + (inside - inside.detach()).nan_to_num(0.0)


def dynamic_qparams(x: torch.Tensor, bits: int, symmetric: bool, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point from the input itself.

    Returns:
        ``per_token``: shape [..., 1] for ``x`` of shape [..., features]; ``per_tensor``: shape [], of the finite values, so
        that an image of nan does not take the scale from the others of its batch.
    """
    x = x.float()
    if granularity == "per_token":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        x = torch.where(x.isfinite(), x, 0.0)
        low, high = x.amin(), x.amax()
    return choose_qparams(low, high, bits, symmetric)


PERCENTILES = (0.999, 0.9999, 0.99999)


def percentile_mse_range(
    rows: torch.Tensor, bits: int, symmetric: bool, widen: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of least squared error among :data:`PERCENTILES`, each row on its own (docs/method.md 11.5).

    Args:
        rows: float [n, values]; quantiles interpolate linearly between values.
        bits: 2 to 8.
        symmetric: the larger absolute end counts, otherwise both.
        widen: judge the range after widening it to contain zero, as :func:`choose_qparams` does; RepQ-ViT does not.

    Returns:
        (low, high), each float32 [n].
    """
    rows = rows.float()
    ordered = rows.sort(dim=1).values
    best = (ordered[:, 0], ordered[:, -1])
    best_error = torch.full((len(rows),), float("inf"), device=rows.device)
    for p in PERCENTILES:
        low, high = _sorted_quantile(ordered, 1.0 - p), _sorted_quantile(ordered, p)
        if widen:
            scale, zero = choose_qparams(low, high, bits, symmetric)
        else:
            scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
            zero = torch.round(-low / scale)
        error = (fake_quantize(rows, scale[:, None], zero[:, None], bits, symmetric) - rows).pow(2).mean(1)
        better = error < best_error
        best = tuple(torch.where(better, new, old) for new, old in zip((low, high), best, strict=True))
        best_error = torch.where(better, error, best_error)
    return best  # type: ignore[return-value]


def _sorted_quantile(ordered: torch.Tensor, q: float) -> torch.Tensor:
    """Quantile of sorted rows [n, values], linear interpolation (`torch.quantile` stops at 16 million values)."""
    place = q * (ordered.shape[1] - 1)
    below = min(int(place), ordered.shape[1] - 1)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def weight_qparams(
    weight: torch.Tensor, bits: int, granularity: str, observer: str, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight scales and zero points.

    Args:
        weight: [out, in].
        bits: 2 to 8.
        granularity: ``per_channel`` -> [out]; ``per_tensor`` -> [1].
        observer: ``minmax`` (the whole range), ``mse`` (best of 80 shrink factors 0.21 to 1.0, each row on its own) or
            ``percentile_mse`` (:func:`percentile_mse_range`).
        symmetric: zero point 0.

    Returns:
        (scale float32, zero_point int32); the zero points belong to signed codes in ``[-2^(b-1), 2^(b-1) - 1]``.
    """
    rows = weight if granularity == "per_channel" else weight.reshape(1, -1)
    parts = [_row_qparams(part.float(), bits, observer, symmetric) for part in row_parts(rows)]
    scale, zero = (torch.cat(found) for found in zip(*parts, strict=True))
    return scale, zero if symmetric else zero - 2 ** (bits - 1)


def _row_qparams(rows: torch.Tensor, bits: int, observer: str, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of float32 [rows, values], for the codes of :func:`code_range`."""
    if observer == "percentile_mse":
        low, high = percentile_mse_range(rows, bits, symmetric)
    else:
        low, high = rows.amin(1), rows.amax(1)
    scale, zero = choose_qparams(low, high, bits, symmetric)
    if observer == "mse":
        best_error = torch.full_like(scale, float("inf"))
        for step in range(21, 101):
            trial = choose_qparams(low * (step / 100), high * (step / 100), bits, symmetric)
            error = (fake_quantize(rows, trial[0][:, None], trial[1][:, None], bits, symmetric) - rows).pow(2).sum(1)
            better = error < best_error
            scale, zero = torch.where(better, trial[0], scale), torch.where(better, trial[1], zero)
            best_error = torch.where(better, error, best_error)
    return scale, zero


def row_parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a few rows each of ``rows`` [rows, values]: what is computed row by row then needs little memory."""
    return torch.split(rows, max(1, PART_VALUES // max(rows.shape[1], 1)))


def packed_weight(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """:func:`pack_codes` of the :func:`weight_codes` of ``weight`` [out, in], a few rows at a time."""
    parts = row_parts(weight)
    sizes = [len(part) for part in parts]
    scales, zeros = (torch.split(v.reshape(-1).expand(len(weight)), sizes) for v in (scale, zero_point))
    words = weight.new_empty(len(weight), -(-weight.shape[1] // codes_per_word(bits)), dtype=torch.int32)
    for target, w, s, z in zip(torch.split(words, sizes), parts, scales, zeros, strict=True):
        target.copy_(pack_codes(weight_codes(w, s, z, bits), bits))
    return words


def weight_codes(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes (whole float32 numbers) of ``weight`` [out, in] for the qparams of :func:`weight_qparams`."""
    return quantize(weight, scale.reshape(-1, 1), zero_point.reshape(-1, 1), bits, True)


def codes_per_word(bits: int) -> int:
    """How many ``bits``-wide codes fit into one 32-bit word."""
    return 32 // bits


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes along the last axis into int32 words, lowest bits first.

    Args:
        codes: [rows, n] whole numbers in ``[-2^(b-1), 2^(b-1) - 1]``.
        bits: 2 to 8.

    Returns:
        int32 [rows, ceil(n / (32 // bits))]; unused positions hold zero.
    """
    per_word = codes_per_word(bits)
    padded = F.pad(codes.to(torch.int8), (0, -codes.shape[-1] % per_word))
    if _BYTES_ARE_CODES and bits == 8:
        return padded.clone(memory_format=torch.contiguous_format).view(torch.int32)
    words = padded.new_zeros(len(padded), padded.shape[1] // per_word, dtype=torch.int32)
    for place in range(per_word):
        words |= (padded[:, place::per_word].to(torch.int32) & (2**bits - 1)) << (place * bits)
    return words


def unpack_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        words: int32 [rows, ceil(columns / (32 // bits))].
        bits: 2 to 8.
        columns: number of codes per row.

    Returns:
        int8 [rows, columns]; with 8 bits this is the memory of ``words`` where the shape allows it, so do not write into it.

    Raises:
        ValueError: the number of words does not belong to ``columns``.
    """
    expected = -(-columns // codes_per_word(bits))
    if words.shape[-1] != expected:
        raise ValueError(
            f"Packed weight has {words.shape[-1]} words per row, but {columns} columns of {bits}-bit codes need "
            f"{expected}. The checkpoint does not belong to this model or bit width."
        )
    if _BYTES_ARE_CODES and bits == 8:
        return words.contiguous().view(torch.int8)[:, :columns].contiguous()
    half = 2 ** (bits - 1)
    parts = [
        (((words >> (place * bits)) & (2**bits - 1)) ^ half).sub_(half).to(torch.int8)
        for place in range(codes_per_word(bits))
    ]
    return torch.stack(parts, -1).flatten(1)[:, :columns].contiguous()
