"""Where things live: the rules of CONTRIBUTING.md that no linter checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "optimum_regcache"
MOST_LINES = 400


def source_files() -> list[Path]:
    """Python and C++ files under version control; in an unpacked archive all there are."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        folders = ("optimum_regcache", "tests", "scripts", "benchmarks")
        found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in (".py", ".cpp", ".h") and path.exists())


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert len(lengths) > 100
    long = {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MOST_LINES}
    assert not long, f"Cut these in two: {long}"


def test_one_module_stands_in_the_root_of_the_package() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "quantizer.py"]


def test_every_package_says_what_it_is_for() -> None:
    for folder in PACKAGE.rglob("__init__.py"):
        assert folder.read_text(encoding="utf-8").startswith('"""'), folder


PRIVATE = re.compile(
    r"from transformers(?:\.\w+)* import [^\n]*\b_\w+|transformers(?:\.\w+)*\._[a-z]\w*"
    r"|from transformers(?:\.\w+)*\.(?:conversion_mapping|core_model_loading|output_capturing)"
    r"|from transformers import [^\n]*\b(?:conversion_mapping|core_model_loading)"
)


@pytest.mark.parametrize(
    "line", ["from transformers.x import _y", "transformers.a._b()", "from transformers import conversion_mapping"]
)
def test_the_pattern_finds_private_names(line: str) -> None:
    assert PRIVATE.search(line)


def test_private_names_of_transformers_stand_in_one_file() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text(encoding="utf-8"))]
    assert [path.name for path in files] == ["compat.py"]
