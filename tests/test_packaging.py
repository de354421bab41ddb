"""What an installation holds and what an import costs."""
# pyright: reportMissingImports=false

from __future__ import annotations

import configparser
import re
import subprocess
import sys

import pytest
from docs_tools import ROOT, tracked

import check_distribution as cd

IMPORT = """
import sys
{first}
before = set(sys.modules)
import optimum_regcache
print(*sorted(set(sys.modules) - before))
"""


def imported(first: str) -> set[str]:
    """Modules that importing the package adds to those of the statement ``first``."""
    code = IMPORT.format(first=first)
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_an_import_adds_nothing_to_what_transformers_loads_for_a_model() -> None:
    roots = {name.partition(".")[0] for name in imported("from transformers import AutoModel, CLIPModel")}
    assert roots <= {"optimum_regcache", "xxhash"}


def test_an_import_loads_none_of_what_only_some_commands_need() -> None:
    # transformers itself loads jinja2 and torch._inductor for any model (the test above)
    unwanted = [
        "datasets",
        "pandas",
        "sklearn",
        "matplotlib",
        "onnx",
        "openvino",
        "evaluate",
        "optimum",
        "rich",
        "torchvision",
    ]
    assert not imported("").intersection(unwanted)


def test_every_folder_of_code_is_packaged() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {path.parent.relative_to(ROOT) for path in tracked("optimum_regcache/*.py")}
    folders.remove((ROOT / "optimum_regcache/commands/cli").relative_to(ROOT))
    moved = {"optimum.commands.register", "optimum_regcache.recipes"}
    assert listed == {".".join(folder.parts) for folder in folders} | moved


def test_the_versions_of_python_are_those_that_were_run() -> None:
    setup, table = (ROOT / name for name in ("setup.cfg", "docs/results/versions.md"))
    named = set(re.findall(r"Python :: (3\.\d+)", setup.read_text(encoding="utf-8")))
    passed = r"^\| [\d.]+ \| [\d.]+ \| (3\.\d+) \|.*\| passed \|$"
    rows = re.findall(passed, table.read_text(encoding="utf-8"), re.M)
    assert named == set(rows)


@pytest.mark.parametrize(
    ("archive", "wheel", "message"),
    [
        ({}, {}, "not in the archive: README.md (MANIFEST.in)"),
        ({"README.md": b"", "notes.txt": b""}, {}, "in the archive, and not under version control: notes.txt"),
        ({"README.md": b""}, {"a.py": b""}, "differs between the two wheels: a.py"),
        ({"README.md": b"see /home/me/x"}, {}, "a path of a machine in the archive: README.md: /home/me"),
    ],
)
def test_what_is_wrong_with_a_distribution_is_named(
    archive: dict[str, bytes], wheel: dict[str, bytes], message: str
) -> None:
    assert cd.problems({"README.md", ".gitignore"}, archive, wheel, {}) == [message]


def test_code_that_the_wheel_lacks_is_named() -> None:
    name = "optimum_regcache/page.css"
    assert cd.problems({name}, {name: b""}, {}, {}) == [f"not in the wheel: {name} (setup.cfg)"]
