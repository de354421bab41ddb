"""Class names of a data set and class numbers of a model: matched by name, never by position alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files

_WORDNET_ID = re.compile(r"n\d{8}")
_GENERIC = re.compile(r"(label[ _-]?)?\d+", re.IGNORECASE)
_SAME_LIST = 0.95  # two lists of equal length of which so much matches, all of it at the same places, are one list


@cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id -> synonyms (``"tench, Tinca tinca"``) of the 1000 classes of ImageNet-1k, in the order of their numbers."""
    lines = (files("optimum_regcache.data") / "imagenet1k.txt").read_text(encoding="utf-8").splitlines()
    return {line[:9]: line[10:] for line in lines}


def is_generic(names: Sequence[str]) -> bool:
    """Whether the names say no more than numbers do: ``LABEL_0``, ``0``."""
    return all(_GENERIC.fullmatch(name) for name in names)


def readable_names(names: Sequence[str]) -> list[str]:
    """WordNet ids (``n01440764``) replaced by what they stand for, where ImageNet-1k has them; other names as they are."""
    return [imagenet_classes().get(name, name) if _WORDNET_ID.fullmatch(name) else name for name in names]


def unknown_wordnet_ids(names: Sequence[str]) -> list[str]:
    """WordNet ids that :func:`readable_names` cannot replace."""
    return [name for name in names if _WORDNET_ID.fullmatch(name) and name not in imagenet_classes()]


def match_classes(names: Sequence[str], id2label: Mapping[int, str], label2id: Mapping[str, int]) -> list[int | None]:
    """The model's class number for each class name of a data set, None where there is none or more than one.

    Names are compared as they are, then without regard to case, ``_``, ``-`` and spaces; each as a whole, then as a list of
    synonyms (``"tench, Tinca tinca"``). WordNet ids stand for the classes of ImageNet-1k. A name that two classes share
    (ImageNet-1k has two of ``crane``) is decided by its position, if both lists have the same length.

    Args:
        names: of the data set.
        id2label, label2id: of the model's config; a name with two numbers in them is one that two classes share.
    """
    numbers = {int(number): str(name) for number, name in id2label.items()}
    pairs = [*numbers.items(), *((int(n), str(name)) for name, n in label2id.items() if int(n) in numbers)]
    tables: list[dict[str, set[int]]] = [{} for _ in _FORMS]
    for number, name in pairs:
        for form, table in zip(_FORMS, tables, strict=True):
            for key in form(name):
                table.setdefault(key, set()).add(number)
    ranks = {name: rank for rank, name in enumerate(imagenet_classes())}
    places: list[int | None] = []
    for position, name in enumerate(names):
        one_list = len(numbers) == (len(ranks) if name in ranks else len(names))
        places.append(ranks.get(name, position) if one_list else None)
    found = [_match(name, tables, place) for name, place in zip(names, places, strict=True)]
    for position, (name, place) in enumerate(
        zip(names, places, strict=True)
    ):  # "maillot", of which one has a longer name
        if found.count(found[position]) > 1 and any(place in n for n in _candidates(name, tables)):
            found[position] = place
    known = [(position, number) for position, number in enumerate(found) if number is not None]
    same_order = len(names) == len(numbers) and all(position == number for position, number in known)
    if same_order and len(known) >= _SAME_LIST * len(names):
        return list(range(len(names)))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _whole(name: str) -> set[str]:
    return {name, *readable_names([name])}


def _synonyms(name: str) -> set[str]:
    return {part.strip() for whole in _whole(name) for part in (whole, *whole.split(","))} - {""}


# from the strictest to the loosest way to compare two names
_FORMS: tuple[Callable[[str], set[str]], ...] = (
    _whole,
    _synonyms,
    lambda name: {_plain(n) for n in _whole(name)},
    lambda name: {_plain(n) for n in _synonyms(name)},
)


def _candidates(name: str, tables: list[dict[str, set[int]]]) -> list[set[int]]:
    """Class numbers whose name is the same, from the strictest to the loosest comparison."""
    pairs = zip(_FORMS, tables, strict=True)
    return [{number for key in form(name) for number in table.get(key, ())} for form, table in pairs]


def _match(name: str, tables: list[dict[str, set[int]]], place: int | None) -> int | None:
    for numbers in _candidates(name, tables):
        if place in numbers:
            return place
        if numbers:
            return numbers.pop() if len(numbers) == 1 else None
    return None
