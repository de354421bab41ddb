"""What can be quantized in a model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

from optimum_regcache.encoders.families import OUTER_HEADS, EncoderFamily, submodule
from optimum_regcache.encoders.tower import find_tower


@dataclass(frozen=True)
class Site:
    """A module that is to be quantized.

    Attributes:
        parent: name of its parent within the model ("" is the model itself).
        attribute: its name in the parent.
        kind: ``linear`` or ``patch_embedding``.
        block: 0-based block, None outside the blocks.
        role: what feeds it: ``norm1`` (query, key, value), ``attention`` (output projection), ``norm2`` (MLP input),
            ``activation`` (MLP output projection), ``other``.
        path: its name within the encoder, as the newest release of transformers names it; patterns match this.
    """

    parent: str
    attribute: str
    kind: str
    block: int | None
    role: str = "other"
    path: str = ""

    @property
    def name(self) -> str:
        """Full name within the model."""
        return f"{self.parent}.{self.attribute}" if self.parent else self.attribute


def quantization_sites(
    model: nn.Module, *, patch_embedding: bool = False, head: bool = False, ignore: tuple[str, ...] = ()
) -> list[Site]:
    """Modules to quantize, in model order; see `ModulesConfig` for the arguments.

    Raises:
        ValueError: an ``ignore`` pattern that matches nothing.
    """
    tower = find_tower(model)
    candidates: list[tuple[str, str, int | None]] = []  # (name relative to the tower, kind, block)
    outer: list[str] = []
    if patch_embedding:
        candidates.append((tower.family.patch_embedding, "patch_embedding", None))
    for index in range(len(tower.blocks)):
        prefix = tower.block_name(index)
        candidates += [(f"{prefix}.{name}", "linear", index) for name in tower.block_linears(index)]
    if head:
        candidates += [
            (path, "linear", None) for path in tower.family.head if submodule(tower.module, path) is not None
        ]
        outer = [path for path in OUTER_HEADS if tower.name and hasattr(submodule(model, path), "in_features")]
    current = {c[0]: tower.family.current_name(c[0]) for c in candidates}
    unused = [
        p
        for p in ignore
        if not any(matches(name, p) for name in current.values())
        and not any(fnmatch(o, p) for o in (OUTER_HEADS if head else ()))
    ]
    if unused:
        raise ValueError(
            f"modules.ignore pattern{'s' if len(unused) > 1 else ''} {', '.join(unused)} match no module that would be "
            f"quantized. Examples of names: {', '.join(list(current.values())[-4:])}."
        )
    kept = [c for c in candidates if not any(matches(current[c[0]], p) for p in ignore)]
    sites: list[Site] = []
    for path, kind, block in kept:
        full = f"{tower.name}.{path}" if tower.name else path
        parent, _, attribute = full.rpartition(".")
        role = "other" if block is None else _role(tower.family, path)
        sites.append(Site(parent, attribute, kind, block, role, current[path]))
    sites += [Site("", path, "linear", None, path=path) for path in outer if not any(fnmatch(path, p) for p in ignore)]
    return sites


def _role(family: EncoderFamily, path: str) -> str:
    """The `Site.role` of a linear layer of a block."""
    attention = f"{family.attention}."
    roles = {attention + family.out: "attention"}
    roles |= dict.fromkeys((attention + name for name in family.projections), "norm1")
    roles |= dict.fromkeys(family.mlp_out, "activation")
    return next((role for name, role in roles.items() if path.endswith(f".{name}")), "norm2")


def matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}")
