"""Settings that differ from their default and would change nothing. They are refused when a model is quantized, never when a
stored config or recipe is opened."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import MISSING, fields
from typing import Any

from optimum_regcache.config.model import PARTS, RegCacheConfig
from optimum_regcache.config.parts import RegistersConfig
from optimum_regcache.config.recipe import DELETION_REFINEMENTS, SearchConfig
from optimum_regcache.config.validation import plain, require


def default_of(part: type, name: str) -> Any:
    """Default of a field of a config part."""
    found = next(f for f in fields(part) if f.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def changed_fields(config: RegCacheConfig) -> dict[tuple[str, str], Any]:
    """(part, field) -> value, of every field that differs from its default."""
    values = {
        (name, f.name): getattr(getattr(config, name), f.name) for name, cls in PARTS.items() for f in fields(cls)
    }
    return {key: value for key, value in values.items() if value != default_of(PARTS[key[0]], key[1])}


def require_effect(config: RegCacheConfig, exempt: Collection[tuple[str, str]] = ()) -> None:
    """Refuse settings that nothing reads.

    Args:
        config: as it is to be quantized.
        exempt: (part, field) that a method sets whether it is read or not.

    Raises:
        ValueError: naming the field, why it has no effect and what to do.
    """
    changed = changed_fields(config)
    for part, names, reason in _unread(config):
        for name in names:
            if (part, name) in changed and (part, name) not in exempt:
                raise ValueError(
                    f"{part}.{name}={_plain(changed[part, name])} has no effect: {reason}, or leave it out."
                )


def require_search_effect(search: SearchConfig, config: RegCacheConfig) -> None:
    """Refuse search settings that a search with ``config`` does not read.

    Raises:
        ValueError: as :func:`require_effect`.
    """
    for names, reason in _unread_by_search(search, config):
        for name in names:
            value = getattr(search, name)
            require(
                value == default_of(SearchConfig, name),
                f"search.{name}={_plain(value)} has no effect: {reason}, or leave it out.",
            )
    for name in search.refinements:
        require_refinement(name, search, config)


def require_refinement(name: str, search: SearchConfig, config: RegCacheConfig) -> None:
    """Refuse a refinement that a search with ``config`` cannot make.

    Raises:
        ValueError: with the reason and what to do.
    """
    if name == "clusters":
        require(
            config.registers.kv_mode == "in_context" and search.strategy == "averaged_tokens",
            "search.refinements holds 'clusters', which are averages of tokens in context. Use registers.kv_mode='in_context' "
            "and search.strategy='averaged_tokens', or leave it out.",
        )
    if name not in DELETION_REFINEMENTS:
        return
    changes = DELETION_REFINEMENTS[name]
    require(
        search.max_delete > 0 and any(getattr(config.deletion, field) != value for field, value in changes.items()),
        f"search.refinements holds {name!r}, which has no effect: no deletion is searched, or it is of this form in any case. "
        "Use search.max_delete above 0 and another deletion, or leave it out.",
    )
    config.replace(
        registers=RegistersConfig(mode="none"), deletion={"block": 0, "count": 1, **changes}
    )  # or says why not


def usable_refinements(search: SearchConfig, config: RegCacheConfig) -> tuple[str, ...]:
    """Those of ``search.refinements`` that a search with ``config`` can make."""

    def usable(name: str) -> bool:
        try:
            require_refinement(name, search, config)
        except ValueError:
            return False
        return True

    return tuple(name for name in search.refinements if usable(name))


def require_patches(search: SearchConfig, config: RegCacheConfig) -> None:
    """Refuse a search for patch tokens that are not there.

    Raises:
        ValueError: an objective on patch tokens, and a deletion that leaves their places out.
    """
    require(
        search.objective != "patch_cosine" or config.deletion.fill != "none",
        "search.objective='patch_cosine' compares all patch tokens, and deletion.fill='none' leaves deleted ones out. Use "
        "deletion.fill='neighbour_mean', or another objective.",
    )


def unread_by_search(search: SearchConfig, config: RegCacheConfig) -> set[str]:
    """Fields of ``search`` that a search with ``config`` does not read."""
    return {name for names, _ in _unread_by_search(search, config) for name in names}


def require_search_unused(search: SearchConfig, config: RegCacheConfig) -> None:
    """Refuse search settings where nothing is searched; the seed divides the images in any case.

    Raises:
        ValueError: naming the field.
    """
    for name in (f.name for f in fields(search) if f.name != "seed"):
        value = getattr(search, name)
        require(
            value == default_of(SearchConfig, name),
            f"search.{name}={_plain(value)} has no effect: nothing is searched with registers.mode={config.registers.mode!r}. "
            "Use registers.mode='search', or leave it out.",
        )


def _plain(value: Any) -> str:
    return repr(plain(value))


def _unread(config: RegCacheConfig) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(part, fields, reason with advice)."""
    a, registers, deletion = config.activations, config.registers, config.deletion
    if a.mode == "dynamic":
        names = ("observer", "percentile", "momentum")
        yield "activations", names, "dynamic scales come from each input. Use activations.mode='static'"
    for name, observer in (("percentile", "percentile"), ("momentum", "moving_average")):
        if a.observer != observer:
            yield "activations", (name,), f"the observer is {a.observer!r}. Use activations.observer={observer!r}"
    if a.outlier_tokens == "clip":
        yield "activations", ("outlier_ratio",), "no token is left out. Use activations.outlier_tokens='per_token'"
    if "noisyquant" not in {entry["name"] for entry in config.methods}:
        yield "activations", ("mlp_out_offset",), "the stored vector stays zero. Use the method noisyquant"
    if not config.attention.quantize:
        names = tuple(f.name for f in fields(config.attention) if f.name != "quantize")
        yield "attention", names, "the attention products stay float. Use attention.quantize=true"
    if registers.mode != "fixed":
        names = ("num_registers", "num_copies", "refinement")
        found = "the search finds it" if registers.mode == "search" else "there are no registers"
        yield "registers", names, f"{found}. Use registers.mode='fixed'"
    if registers.mode == "none":
        yield "registers", ("kv_mode",), "there are no registers. Use registers.mode='search' or 'fixed'"
    if registers.mode == "search":
        yield "deletion", ("block",), "the search finds the block. Use registers.mode='fixed' or 'none'"
    elif not deletion.active:
        names = tuple(f.name for f in fields(deletion))
        yield "deletion", names, "no token is deleted. Use deletion.count"
    if deletion.rule == "topk":
        yield "deletion", ("kappa",), "the rule is 'topk'. Use deletion.rule='threshold'"


def _unread_by_search(search: SearchConfig, config: RegCacheConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """(fields, reason with advice)."""
    if search.strategy == "single_token":
        names = ("blocks_before", "top_tokens")
        yield names, "single tokens of the sensitive block are tried. Use search.strategy='averaged_tokens'"
    else:
        yield ("num_candidates",), "tokens are averaged. Use search.strategy='single_token'"
    if search.sensitive_block is not None:
        names = ("sensitivity", "sensitivity_images")
        yield names, "the sensitive block is given, nothing is scanned. Use search.sensitive_block=null"
    if not config.methods:
        yield ("retune",), "the final quantizer is the one of the search. Use it with a method"
