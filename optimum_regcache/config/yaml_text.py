"""YAML of a stranger: plain values only, each key once, and an error that names the place."""

from __future__ import annotations

from typing import Any, cast

import yaml

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Refuses what a recipe has no use for: aliases (a few lines of them make gigabytes) and keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        reader = cast("Any", self)
        if reader.check_event(yaml.AliasEvent):
            mark = reader.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "aliases are not read; write the value again", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(content: bytes, what: str) -> Any:
    """Parse ``content``, called ``what`` in errors.

    Raises:
        ValueError: not UTF-8, not YAML, larger than a megabyte, nested too deeply, or with tags, aliases or a key twice.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"{what} is no recipe: it is larger than {MAX_BYTES >> 20} MB.")
    try:
        return yaml.load(content.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except yaml.constructor.ConstructorError as error:
        if "tag" not in str(error.problem):
            raise ValueError(f"{what} is not valid YAML: {error.problem}.") from None
        raise ValueError(f"{what} holds {str(error.problem).split()[-1]}; only plain values are read.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{what} is not valid YAML{place}: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
