"""Hook of mkdocs: pages of the repository that lie outside of docs/ join the site, and links across its border work.

README.md, CONTRIBUTING.md, CHANGELOG.md, recipes/README.md and examples/README.md appear as ``project/...``. Any other file that a page links to
(results as JSON, recipes, pictures) is copied to ``project/...`` as it is. A link to a file that does not exist stays as it
is, and mkdocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md", "examples/README.md")
PREFIX = "project/"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of docs/, and every other file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, PREFIX + name, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            target = _in_repository(page.src_uri, match[2])
            if target is None or target.startswith("docs/") or target in PAGES:
                continue
            uri = PREFIX + target
            if (ROOT / target).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links point to where their targets are in the site."""

    def rewritten(match: re.Match[str]) -> str:
        target = _in_repository(page.file.src_uri, match[2])
        if target is None or not (ROOT / target).exists():
            return match[0]
        uri = target.removeprefix("docs/") if target.startswith("docs/") else PREFIX + target
        folder = posixpath.dirname(page.file.src_uri)
        return f"{match[1]}{posixpath.relpath(uri, folder or '.')}{match[3] or ''}{match[4]}"

    code = [match.span() for match in CODE.finditer(markdown)]
    parts, last = [], 0
    for start, end in [*code, (len(markdown), len(markdown))]:
        parts += [LINK.sub(rewritten, markdown[last:start]), markdown[start:end]]
        last = end
    return "".join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Make "docs/method.md 4", as docstrings cite the algorithm, a link to that section."""
    headings = re.findall(r"^#{2,3} ((\d+(?:\.\d+)?)\.? .+)$", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.M)
    sections = {number: slugify(heading, "-") for heading, number in headings}
    method = posixpath.relpath("method.html", posixpath.dirname(page.file.dest_uri) or ".")

    def linked(match: re.Match[str]) -> str:
        if match[1] not in sections:
            return match[0]
        return f'<a href="{method}#{sections[match[1]]}">method {match[1]}</a>'

    return re.sub(r"docs/method\.md (\d+(?:\.\d+)?)", linked, html)


def _in_repository(page: str, link: str) -> str | None:
    """Path of a link's target from the root of the repository; None for addresses of the web and for what lies outside."""
    if re.match(r"[a-z]+:", link):
        return None
    source = PurePosixPath(page.removeprefix(PREFIX)) if page.startswith(PREFIX) else PurePosixPath("docs", page)
    target = posixpath.normpath(str(source.parent / link))
    return None if target.startswith("..") else target
