"""Named amounts of work of a search: settings that `SearchConfig` and `DataConfig` have anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optimum_regcache.config.effects import unread_by_search, usable_refinements
from optimum_regcache.config.validation import require

if TYPE_CHECKING:
    from optimum_regcache.config.recipe import Recipe

EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "search": {
            "sensitivity": "block",
            "sensitivity_images": 16,
            "blocks_before": 1,
            "num_copies": (1.0, 4.0),
            "max_delete": 4,
        },
        "data": {"num_samples": 96},
    },
    "thorough": {
        "search": {
            "sensitivity": "linear",
            "sensitivity_images": 128,
            "scopes": ("onwards", "single"),
            "num_copies": (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 15.0),
            "max_delete": 16,
            "retune": True,
            "refinements": ("replace", "late_deletion"),
        },
        "data": {"num_samples": 512},
    },
}


def with_effort(recipe: Recipe, name: str) -> Recipe:
    """``recipe`` with the settings of an effort wherever it has the default; what it sets otherwise stays.

    Settings that the search of ``recipe`` would not read (``retune`` without a method, say) are left out, and so are
    refinements that it could not make.

    Args:
        recipe: its quantization tells what its search reads.
        name: one of `EFFORTS`.

    Raises:
        ValueError: an unknown name, or a recipe that searches nothing.
    """
    require(name in EFFORTS, f"Unknown effort {name!r}; expected one of {', '.join(EFFORTS)}.")
    mode = recipe.quantization.registers.mode
    require(
        mode == "search",
        f"The effort {name!r} has no effect: nothing is searched with registers.mode={mode!r}. Use registers.mode='search', "
        "or leave it out.",
    )
    unread = unread_by_search(recipe.search, recipe.quantization)
    changed: dict[str, Any] = {}
    for section, values in EFFORTS[name].items():
        part: Any = getattr(recipe, section)
        default: Any = type(part)()
        free = [field for field in values if field not in unread and getattr(part, field) == getattr(default, field)]
        changed[section] = replace(part, **{field: values[field] for field in free})
        if "refinements" in free:
            usable = usable_refinements(changed[section], recipe.quantization)
            changed[section] = replace(changed[section], refinements=usable)
    return replace(recipe, **changed)
