"""From a config as given to one that is ready to be quantized with: made once, at the entrance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import logging

from optimum_regcache.config import DeletionConfig, RegCacheConfig, RegistersConfig, RewritesConfig
from optimum_regcache.config.effects import changed_fields, default_of, require_effect
from optimum_regcache.config.model import PARTS
from optimum_regcache.config.validation import require
from optimum_regcache.methods.base import Method
from optimum_regcache.methods.registry import build_methods

logger = logging.get_logger(__name__)

# what only methods set, besides `rewrites`
_FORMS = {
    "outlier_tokens": "clip",
    "post_activation": "uniform",
    "mlp_out_offset": False,
    "mlp_out_hadamard": False,
}
_DEFAULT = object()  # stands for the default of a field, whatever it is


@dataclass(frozen=True)
class ResolvedConfig:
    """A config that is ready to be quantized with; only :func:`resolve` makes one, and everything behind takes it as it is.

    Attributes:
        config: with everything that its methods ask of it; every setting that differs from its default has an effect.
        methods: built, in the order of the pipeline.
    """

    config: RegCacheConfig
    methods: tuple[Method, ...]

    @property
    def needs_images(self) -> bool:
        """Whether the pipeline looks at calibration images: static scales, attention operands, or a method that does."""
        c = self.config
        static = c.activations.mode == "static" or c.attention.quantize or bool(c.modules.mixed_precision)
        return static or any(method.needs_images for method in self.methods)

    @property
    def image_users(self) -> str:
        """Who needs them, for a message."""
        names = [method.name for method in self.methods if method.needs_images]
        return f"The methods {', '.join(names)}" if names else "Static activations"

    def untrained(self) -> ResolvedConfig:
        """The same without methods that train, for comparisons that would take too long with them."""
        methods = tuple(method for method in self.methods if not method.trains)
        return ResolvedConfig(self.config.replace(methods=tuple(method.to_dict() for method in methods)), methods)

    def installing(self, registers: RegistersConfig, deletion: DeletionConfig) -> ResolvedConfig:
        """The same with registers and deletion in place of those to be searched; no method decides about them in advance."""
        return replace(self, config=self.config.replace(registers=registers, deletion=deletion))


def check_composition(methods: Sequence[Method]) -> None:
    """Refuse combinations that make no sense.

    Raises:
        ValueError: two methods that decide the same thing or exclude each other, or a method given twice, with the reason.
    """
    names = [method.name for method in methods]
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(not repeated, f"Method given twice: {', '.join(repeated)}.")
    deciders: dict[str, list[str]] = {}
    for method in methods:
        if method.provides:
            deciders.setdefault(method.provides, []).append(method.name)
        for other, reason in method.excludes.items():
            require(other not in names, f"{method.name} cannot be combined with {other}: {reason}")
    for what, several in deciders.items():
        require(len(several) == 1, f"{' and '.join(several)} both decide the {what}; use one of them.")


def resolve(config: RegCacheConfig) -> ResolvedConfig:
    """``config`` with everything its methods ask of it, and its methods. Resolving the result's config gives the same again.

    Raises:
        ValueError: an unknown method or parameter; see :func:`check_composition`; a method that needs static activations under
            dynamic ones; or a setting without effect: one that a method replaces, or that nothing reads.
    """
    methods = build_methods(config)
    check_composition(methods)
    given = _without_findings(config, methods)
    resolved, setters = _configure(given, methods)
    unfit = [method.name for method in methods if method.needs_static and resolved.activations.mode == "dynamic"]
    require(
        not unfit,
        f"{', '.join(unfit)} fit something to stored activation scales, but activations are dynamic: their scale is "
        "another one for each token. Use static activations, or leave these methods out.",
    )
    _require_kept(given, resolved, setters)
    require_effect(resolved, exempt=_made_by(methods, resolved))
    for method in methods:
        for name, reason in method.unread(resolved).items():
            value = getattr(method, name)
            require(
                value == default_of(type(method), name),
                f"{method.name}.{name}={value!r} has no effect: {reason}. Change that, or leave it out.",
            )
    return ResolvedConfig(resolved.replace(methods=tuple(method.to_dict() for method in methods)), tuple(methods))


def without_methods(config: RegCacheConfig) -> RegCacheConfig:
    """``config`` without its methods and without what they had set, for others to take their place."""
    methods = build_methods(config)
    plain = _without_findings(config, methods, warn=False).replace(rewrites=RewritesConfig(), methods=())
    defaults: dict[str, dict[str, Any]] = {}
    for part, name in _made_by(methods, config):
        defaults.setdefault(part, {})[name] = default_of(PARTS[part], name)
    return plain.replace(**defaults)


def _configure(config: RegCacheConfig, methods: Sequence[Method]) -> tuple[RegCacheConfig, dict[tuple[str, str], str]]:
    """What the methods make of ``config``, and who replaced a setting of it ("" where methods set it, but none of these)."""
    setters: dict[tuple[str, str], str] = {}
    steps: list[tuple[str, Callable[[RegCacheConfig], RegCacheConfig]]] = [("", _without_forms if methods else _plain)]
    steps += [(method.name, method.configure) for method in methods]
    for name, step in steps:
        before, config = changed_fields(config), step(config)
        after = changed_fields(config)
        setters |= {key: name for key, value in before.items() if after.get(key, _DEFAULT) != value}
    return config, setters


def _plain(config: RegCacheConfig) -> RegCacheConfig:
    return config.replace(rewrites=RewritesConfig())


def _without_forms(config: RegCacheConfig) -> RegCacheConfig:
    return config.replace(rewrites=RewritesConfig(), activations=_FORMS)


def _require_kept(given: RegCacheConfig, resolved: RegCacheConfig, setters: dict[tuple[str, str], str]) -> None:
    """Refuse settings of ``given`` that are another value in ``resolved``."""
    for (part, name), value in changed_fields(given).items():
        final = getattr(getattr(resolved, part), name)
        if final == value:
            continue
        setter = setters[part, name]
        why = f"the method {setter} sets it to {final!r}" if setter else "methods set it, and none of those given does"
        raise ValueError(
            f"{part}.{name}={list(value) if isinstance(value, tuple) else value!r} has no effect: {why}. Leave it out, or "
            f"choose other methods than {[entry['name'] for entry in given.methods]}."
        )


def _made_by(methods: Sequence[Method], config: RegCacheConfig) -> set[tuple[str, str]]:
    """The (part, field) of ``config`` whose value is what the methods set, away from the default."""
    made: dict[tuple[str, str], Any] = changed_fields(_configure(RegCacheConfig(), methods)[0]) if methods else {}
    return {key for key, value in changed_fields(config).items() if made.get(key, _DEFAULT) == value}


def _without_findings(config: RegCacheConfig, methods: Sequence[Method], warn: bool = True) -> RegCacheConfig:
    """``config`` without what its methods found when it was fitted: they look for it again."""
    given = changed_fields(config)
    for method in methods:
        for part, name in method.finds:
            if (part, name) not in given:
                continue
            if warn:
                found = list(given[part, name])
                logger.warning(f"{part}.{name}={found} is what {method.name} looks for itself; it is looked for again.")
            config = config.replace(**{part: {name: default_of(PARTS[part], name)}})
    return config
