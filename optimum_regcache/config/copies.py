"""tau, the number of copies of the registers: one for all blocks, or one for each (docs/method.md 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optimum_regcache.config.validation import require


def block_copies(
    given: float | Sequence[float] | Mapping[int, float], blocks: Sequence[int], owner: str
) -> float | tuple[float, ...]:
    """What was given for tau in the one form that is stored.

    Args:
        given: one number for all blocks, one for each of ``blocks`` in their order, or block -> number.
        blocks: blocks with registers, ascending.
        owner: name of the setting, for messages.

    Returns:
        A number as it was given; otherwise one float for each block, or a single float where all are equal.

    Raises:
        ValueError: not one value for each block, or a value that is not > 0 and finite.
    """
    if isinstance(given, Mapping):
        require(
            set(given) == set(blocks),
            f"{owner} is given for blocks {sorted(given)}, but the registers are in blocks {list(blocks)}. Give one number, "
            "or one for each of these blocks.",
        )
        values = [given[b] for b in blocks]
    elif isinstance(given, Sequence):
        require(
            len(given) == len(blocks) and bool(given),
            f"{owner} holds {len(given)} values, but there are {len(blocks)} register blocks {list(blocks)}. Give one number, "
            "or one for each block.",
        )
        values = list(given)
    else:
        require(0 < given < math.inf, f"{owner} must be > 0 and finite, got {given}.")
        return given
    bad = [v for v in values if not 0 < v < math.inf]
    require(not bad, f"{owner} must be > 0 and finite in each block, got {bad}. A block without register is left out.")
    found = tuple(float(v) for v in values)
    if not found:  # an empty mapping for no blocks
        return 1.0
    return found[0] if len(set(found)) == 1 else found
