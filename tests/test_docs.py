"""The documentation holds what it promises: links lead somewhere, commands parse, the reference is complete."""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from docs_tools import LINK, ROOT, anchors, blocks, commands, pages, prose, tracked
from optimum.commands.register.register_regcache import RegCacheCommand

import optimum_regcache
from optimum_regcache.methods.registry import METHODS

# sections of notes that are not in the repository: a capital letter, a point and a number, or "methods" and such a section
DANGLING = re.compile(
    r"(?<![\w.])[A-L]\.\d+(?:-\d+)?(?![\w.]*\()\b|\b[Mm]ethods?(?:\.md)?,? (?:section )?[A-L0]\b[.)]|\b[Mm]ethod\s+notes\b"
)
REFERENCE = ROOT / "docs" / "reference"
COMMON = ("quantize", "run", "analyze", "evaluate")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of the commands."""
    found = {}
    for info in RegCacheCommand.SUBCOMMANDS:
        found[info.name] = argparse.ArgumentParser(info.name, exit_on_error=False)
        info.subcommand_class.parse_args(found[info.name])
    return found


def shell_commands() -> list[tuple[str, str]]:
    """(where, command) of every shell block and of every command in a code span."""
    found = []
    for page in pages():
        name = str(page.relative_to(ROOT))
        for block in blocks(page):
            if block.kind in ("bash", "sh", "console"):
                found += [(f"{name}:{block.line}", command) for command in commands(block.text)]
        spans = re.findall(r"`((?:optimum-cli regcache|make) [^`]+)`", page.read_text(encoding="utf-8"))
        found += [(name, " ".join(span.split())) for span in spans]
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}; there are {sorted(anchors(target))}"


def test_every_command_line_parses() -> None:
    known, count = parsers(), 0
    for where, command in shell_commands():
        words = shlex.split(command, comments=True)
        if words[:2] != ["optimum-cli", "regcache"] or words[2] == "--help":
            continue
        name, options = words[2], words[3:]
        assert name in known, f"{where}: {command}"
        if not options or "--help" in options or any("..." in word for word in options):
            continue
        writes = "--output" in known[name]._option_string_actions
        if writes and "--output" not in options and "`" not in command:  # a code span may leave the output out
            options = [*options, "--output", "out"]
        try:
            _, unknown = known[name].parse_known_args(options)
        except (argparse.ArgumentError, SystemExit) as error:
            pytest.fail(f"{where}: {command}\n{error}")
        assert not unknown, f"{where}: unknown {unknown} in: {command}"
        count += 1
    assert count > 30


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for where, command in shell_commands():
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            asked = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
            assert set(asked) <= targets, f"{where}: {command}"


def test_every_script_exists() -> None:
    for where, command in shell_commands():
        for path in re.findall(r"\b(?:scripts|benchmarks|tests)/[\w/]+\.py\b", command):
            assert (ROOT / path).is_file(), f"{where}: {command}"


def test_the_page_of_commands_knows_every_option() -> None:
    sections = re.split(r"^## ", (REFERENCE / "commands.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    listed = {section.split("\n", 1)[0]: set(re.findall(r"^\| `(--[\w-]+)`", section, re.M)) for section in sections}
    for name, parser in parsers().items():
        wanted = {text for action in parser._actions for text in action.option_strings} - {"-h", "--help"}
        common = listed["Common options"] if name in COMMON else set()
        common |= listed["Model options"] if name not in ("build", "push", "report") else set()
        common -= {"--overwrite"} if name == "demo" else set()  # it writes nothing
        own = listed[name] | (listed["quantize"] - {"--recipe"} if name == "run" else set())
        assert own | (common - {"--recipe"} if name == "run" else common) == wanted, name


def test_the_reference_names_everything_public() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    public = {f"optimum_regcache.{name}" for name in optimum_regcache.__all__}
    methods = {f"{cls.__module__}.{cls.__name__}" for cls in METHODS.values()}
    assert public | methods <= listed, f"docs/reference/ misses {sorted((public | methods) - listed)}"


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in tracked("docs/*.md"):
        assert str(page.relative_to(ROOT / "docs")) in contents, page


def test_the_concept_picture_is_small_and_drawn_by_the_script() -> None:
    picture = ROOT / "docs" / "images" / "concept.png"
    assert picture.stat().st_size < 200_000
    assert "concept.png" in (ROOT / "scripts" / "draw_concept.py").read_text(encoding="utf-8")


def test_code_cites_sections_that_exist() -> None:
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", method, re.M))
    cited = set()
    for path in tracked("*.py", "*.md", "*.cpp", "*.h"):
        cited |= set(re.findall(r"docs/method\.md (\d+(?:\.\d+)?)", path.read_text(encoding="utf-8")))
    assert cited <= numbers, f"no such section of docs/method.md: {sorted(cited - numbers)}"


@pytest.mark.parametrize(
    "text", ["(A.8)", "A.7-2, J.6", "(RegCache A.4 to A.8)", "methods I.2", "(methods 0.3)", "H.10:"]
)
def test_a_dangling_reference_is_recognised(text: str) -> None:
    assert DANGLING.search(text)


@pytest.mark.parametrize(
    "text", ["docs/method.md 11.4", "arXiv 2106.08295, 3.1", "D.Selection", "methods A and B", "W.T @ x"]
)
def test_other_texts_are_no_dangling_reference(text: str) -> None:
    assert not DANGLING.search(text)


def test_nothing_cites_what_is_not_in_the_repository() -> None:
    found = []
    for path in tracked("*.py", "*.md", "*.cpp", "*.h", "*.yaml", "*.yml", "*.cfg", "*.toml", "Makefile", ".ci/*"):
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if DANGLING.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "Cite docs/method.md, or a paper with its equation:\n" + "\n".join(found)
