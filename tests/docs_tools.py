"""What the tests of the documentation share: pages, links, fenced blocks, headings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(
    r"(?:<!-- test: skip (?P<skip>[^\n]+?) -->\n)?^(?P<fence>```+)(?P<kind>\w*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, line, and the reason for leaving it out, if there is one."""

    page: Path
    line: int
    kind: str
    text: str
    skip: str | None


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add, matching the patterns; in an unpacked archive all there are."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    names = listed.stdout.splitlines()
    if listed.returncode or not names:
        top = [path for path in ROOT.iterdir() if path.name == ".ci" or not path.name.startswith(".")]
        found = [path for folder in top for path in (folder.rglob("*") if folder.is_dir() else [folder])]
        relative = sorted(path.relative_to(ROOT).as_posix() for path in found)
        names = [name for name in relative if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def pages() -> list[Path]:
    """Every Markdown page of the repository."""
    return tracked("*.md")


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(source):
        line = source.count("\n", 0, match.start("fence")) + 1
        yield Block(page, line, match["kind"], match["text"], match["skip"])


def prose(page: Path) -> str:
    """The page without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(text.replace(" ", "-"))
    return found


def commands(text: str) -> list[str]:
    """Commands of a shell block: continued lines joined, comments and empty lines left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
