"""Old names in stored configs and recipes, and what they are called today. No other module knows them.

What version 0.1.0 wrote opens with the same meaning; these names are read, never written.
"""

from __future__ import annotations

from typing import Any

from optimum_regcache.config.validation import is_mapping, require

FIELDS = {
    "quantization.modules.sixteen_bit": "quantization.modules.mixed_precision",
    "search.kv_mode": "quantization.registers.kv_mode",
}
ADDED: dict[str, dict[str, Any]] = {  # fields that came later, and what a stored part without them means
    "deletion": {"action": "delete"},
    "registers": {"refinement": None},
}
METHODS = {"sixteen_bit": "mixed_precision"}
STRATEGIES = {"v2": "single_token", "v4": "averaged_tokens"}


def migrate_part(name: str, values: Any) -> Any:
    """The mapping of a part of `RegCacheConfig` under today's field names; anything else is returned as it is.

    Raises:
        ValueError: a field under its old and its new name at once.
    """
    if name != "modules" or not is_mapping(values) or "sixteen_bit" not in values:
        return values
    require(
        "mixed_precision" not in values,
        "modules holds both sixteen_bit and mixed_precision, the old and the new name of one field; keep mixed_precision.",
    )
    return {"mixed_precision" if key == "sixteen_bit" else key: value for key, value in values.items()}


def complete_part(name: str, values: Any) -> Any:
    """A stored part under today's field names, with those of `ADDED` that it lacks; anything else as it is."""
    values = migrate_part(name, values)
    return {**ADDED.get(name, {}), **values} if is_mapping(values) else values


def migrate_method(name: str) -> str:
    """Today's name of a method."""
    return METHODS.get(name, name)


def migrate_field(path: str) -> str:
    """Today's path of a recipe field such as ``search.kv_mode``."""
    return FIELDS.get(path, path)


def migrate_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """The mapping of a recipe under today's names; the argument stays as it is.

    ``search.kv_mode`` moves to ``registers.kv_mode``. The old search read its own field only, and fixed registers that of
    ``registers``; so the old field wins where registers are searched, and is dropped where they are not. A complete old recipe
    was searched by ``coordinate``, whatever round to nearest lost.
    """
    values = dict(values)
    quantization, search = values.get("quantization"), values.get("search")
    if is_mapping(quantization):
        values["quantization"] = quantization = {k: migrate_part(k, v) for k, v in quantization.items()}
    if not is_mapping(search):
        return values
    search = values["search"] = dict(search)
    if isinstance(search.get("strategy"), str) and search["strategy"] in STRATEGIES:
        search["strategy"] = STRATEGIES[search["strategy"]]
    if "noise_sigmas" in search and "algorithm" not in search and "sensitivity" in search:  # saved complete, by 0.1.0
        search |= {"algorithm": "coordinate", "always": True}
    if "kv_mode" in search:
        values["quantization"] = _with_kv_mode(quantization, search.pop("kv_mode"))
    return values


def _with_kv_mode(quantization: Any, kv_mode: Any) -> Any:
    if quantization is None:
        return {"registers": {"kv_mode": kv_mode}}
    if not is_mapping(quantization):  # a complete config
        searched = quantization.registers.mode == "search"
        return quantization.replace(registers={"kv_mode": kv_mode}) if searched else quantization
    registers: Any = quantization.get("registers") or {}
    if not is_mapping(registers):
        return quantization
    if registers.get("mode", "search") != "search":
        return quantization
    return {**quantization, "registers": {**registers, "kv_mode": kv_mode}}
