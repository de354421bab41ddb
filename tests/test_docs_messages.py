"""docs/troubleshooting.md knows every error and warning text of the package, and no text that is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"

# never seen by a user who does not change the package itself
INTERNAL = (
    "module 'optimum_regcache' has no attribute",
    "The modules are replaced after the rewrites",
    "NoisyQuant needs static activations",
)


def text_of(node: ast.expr | None) -> str | None:
    """The literal text of a message, NUL for what is put in; None if it is no literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else (left or "\0") + (right or "\0")
    return None


def messages_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every exception, ``require`` and warning."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            place = 1 if function.id == "require" else 0 if re.fullmatch(r"[A-Z]\w*Error", function.id) else None
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            warns = function.value.id in ("logger", "warnings") and function.attr.startswith("warn")
            place = 0 if warns else None
        else:
            place = None
        text = text_of(node.args[place]) if place is not None and len(node.args) > place else None
        if text is not None and text.strip("\0 "):
            yield node.lineno, text


def package_messages() -> dict[str, str]:
    """Where -> text."""
    found = {}
    for path in sorted((ROOT / "optimum_regcache").rglob("*.py")):
        for line, text in messages_of(path.read_text(encoding="utf-8")):
            found[f"{path.relative_to(ROOT)}:{line}"] = text
    return found


def listed_fragments() -> list[str]:
    """Fragments in backticks in the first column of the page's tables of messages."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


def matches(fragment: str, text: str) -> bool:
    """Whether ``text`` contains the fragment; what is put in stands for anything, as does the ellipsis."""
    pattern = ".*".join(re.escape(part.strip()) for part in fragment.split("…"))
    return re.search(pattern, text, re.DOTALL) is not None


def test_the_walk_finds_messages_in_all_their_forms() -> None:
    source = (
        'raise ValueError(f"a {x} b")\nrequire(ok, "c" "d")\nreturn_ = TypeError("e")\n'
        'logger.warning(f"f {y}")\nprint("no message")\nraise StopIteration\nlogger.info("none")'
    )
    assert [text for _, text in messages_of(source)] == ["a \0 b", "cd", "e", "f \0"]


def test_every_message_has_an_entry() -> None:
    fragments = [*listed_fragments(), *INTERNAL]
    assert len(package_messages()) > 200
    missing = [
        f"{where}: {text.replace(chr(0), '…')}"
        for where, text in package_messages().items()
        if not any(matches(fragment, text) for fragment in fragments)
    ]
    assert not missing, "Add an entry to docs/troubleshooting.md (or to INTERNAL) for:\n" + "\n".join(missing)


def test_no_entry_is_left_over() -> None:
    texts = list(package_messages().values())
    stale = [f for f in [*listed_fragments(), *INTERNAL] if not any(matches(f, text) for text in texts)]
    assert not stale, f"These fragments match no message any more: {stale}"


def test_an_entry_says_cause_and_cure() -> None:
    rows = [
        line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]
    bad = [row for row in rows if len(row) != 3 or not all(cell.strip() for cell in row)]
    assert len(rows) > 100
    assert not bad
