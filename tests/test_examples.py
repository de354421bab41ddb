"""The notebooks of examples/ are stored without outputs and say what to install; `make examples` runs them."""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_bare_and_begin_with_what_to_install(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first, *rest = notebook["cells"]
    assert first["cell_type"] == "markdown"
    assert 'pip install -e ".[examples]"' in "".join(first["source"])
    code = [cell for cell in rest if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert max(len(cell["source"]) for cell in code) <= 20
    assert any("# yours:" in "".join(cell["source"]) for cell in code)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_every_notebook_is_listed() -> None:
    assert len(NOTEBOOKS) == 5
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in listed for path in NOTEBOOKS)
