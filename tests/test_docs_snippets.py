"""The Python blocks of README.md and docs/how-to/ run, page by page and in order; so do the doctests of the package."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from docs_tools import ROOT, Block, blocks, tracked
from models import MODELS, PIXELS
from transformers import CLIPImageProcessor

import optimum_regcache
from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.kernels.onednn import kernel_reason

PAGES = [ROOT / "README.md", *tracked("docs/how-to/*.md")]


def python_blocks(page: Path) -> list[Block]:
    """The blocks of a page that a reader would paste into Python."""
    return [block for block in blocks(page) if block.kind == "python"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with the quantized model ``out``, and the names that a page may take for granted."""
    folder, tiny = tmp_path_factory.mktemp("docs"), MODELS["clip"]
    model, pixels = tiny.build(), tiny.inputs(batch=8)["pixel_values"]
    images = [{"pixel_values": image} for image in pixels]
    processor = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    quantizer = RegCacheQuantizer(model, processor)
    plain = RegCacheConfig.from_preset("w8a8").replace(registers={"mode": "none"})
    quantized = quantizer.quantize(folder / "out", quantization_config=plain, calibration_dataset=images)
    names = {"quantizer": quantizer, "images": images, "model": quantized, "processor": processor, "torch": torch}
    return folder, names | {"pixels": pixels, "pixel_values": pixels, "config": model.config}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(
    page: Path, prepared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = prepared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = dict(names)
    for block in python_blocks(page):
        if "fuse(" in block.text and kernel_reason() is not None:
            continue
        tree = ast.parse("\n" * block.line + block.text, str(page))  # a traceback shows the line of the page
        if block.skip is not None:  # what it imports has to exist all the same
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, str(page), "exec"), names)


def test_a_skipped_block_says_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.skip is None or len(block.skip.split()) >= 2, f"{page.name}:{block.line}"


def modules() -> Iterator[ModuleType]:
    """Every module of the package."""
    for info in pkgutil.walk_packages(optimum_regcache.__path__, "optimum_regcache."):
        if ".cli" not in info.name:  # installed as a part of optimum
            yield importlib.import_module(info.name)


def test_doctests() -> None:
    tried = 0
    for module in modules():
        failed, attempted = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert failed == 0, module.__name__
        tried += attempted
    assert tried > 0
