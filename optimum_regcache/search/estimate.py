"""How much a fit will compute, before it begins."""

from __future__ import annotations

from optimum_regcache.config.recipe import SearchConfig
from optimum_regcache.search.algorithms import ALGORITHMS
from optimum_regcache.search.plan import ReferenceParts
from optimum_regcache.search.sensitivity import COARSE_BLOCKS, coarse_images
from optimum_regcache.search.setups import Space


def expected_work(parts: ReferenceParts, search: SearchConfig, depth: int, linears: int) -> dict[str, float]:
    """Block-forwards of each stage. A quantized one takes about as long as a float one: less with integer kernels, more where
    it is simulated.

    Args:
        parts: images.
        search: settings.
        depth: blocks.
        linears: linear layers in all blocks.
    """
    calibration, selection, confirmation = (len(p) for p in (parts.calibration, parts.selection, parts.confirmation))
    images = min(search.sensitivity_images, selection)
    scanned = images * depth / 2  # from a block to the end, on average
    coarse = (depth + COARSE_BLOCKS * linears / depth) * coarse_images(images) / max(images, 1) + COARSE_BLOCKS
    steps = {"linear": linears, "block": depth, "coarse": coarse}
    starts = search.blocks_before + 1 if search.strategy == "averaged_tokens" else search.num_candidates
    space = Space(((0, None, "onwards"),) * starts * len(search.scopes), search.num_copies, search.max_delete)
    trials = ALGORITHMS[search.algorithm](space, search, selection).work()
    both = (calibration + selection) * depth
    return {
        "features": (selection + confirmation) * depth,
        "naive": both,
        "sensitivity": 0.0 if search.sensitive_block is not None else steps[search.sensitivity] * scanned,
        "mining": both,
        "search": trials * both / 2 + 4 * (calibration + confirmation) * depth,
    }
