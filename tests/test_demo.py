"""`optimum-cli regcache demo`: what the page shows is what the models say; nothing is asked of other machines."""
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import MODELS
from PIL import Image

from optimum_regcache.commands.demo import FLOAT, NAIVE, REGCACHE, Demo
from optimum_regcache.commands.demo_page import OnlySelf, readable, require_port
from optimum_regcache.commands.pictures import shade_patches
from optimum_regcache.encoders.tower import has_classifier


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo.open("clip-scenes-induced")


def test_a_look_at_an_image(demo: Demo) -> None:
    look = demo.look(demo.example(2), demo.classes)
    assert list(look.predictions) == list(look.cosines) == list(look.outliers) == [FLOAT, NAIVE, REGCACHE]
    assert next(iter(look.predictions[FLOAT])) == demo.classes[demo.source.report_images[2]["label"]]
    assert look.cosines[FLOAT][:2] == pytest.approx((1, 1), abs=1e-5)
    assert look.cosines[REGCACHE][0] > 0.98 > look.cosines[NAIVE][0]
    assert look.cosines[REGCACHE][2] < 0.2 * look.cosines[FLOAT][2]
    assert list(look.patches) == [NAIVE, REGCACHE]
    assert look.norms.svg.startswith("<svg")
    assert look.block >= 3
    assert demo.installed.startswith("prefix from block 3")


def test_other_classes_and_pictures(demo: Demo) -> None:
    look = demo.look(Image.new("L", (50, 90), 77), ["a red star", " a red star ", "", "a blue ring"])
    assert sum(look.predictions[FLOAT].values()) == pytest.approx(1)
    assert set(look.predictions[NAIVE]) == {"a red star", "a blue ring"}
    with pytest.raises(ValueError, match="Name at least one class"):
        demo.look(demo.example(0), [" "])


def test_a_saved_folder_is_opened_beside_its_original(tmp_path: Path, run: Any) -> None:
    few = ("--num-samples", 24, "--num-report", 8, "--quick", "--no-recommend")
    assert run("quantize", "--model", "siglip-scenes-induced", *few, "--output", tmp_path / "out")[0] == 0
    found = Demo.open(str(tmp_path / "out"))
    look = found.look(found.example(0), found.classes[:5])
    assert list(look.predictions) == [FLOAT, NAIVE, REGCACHE]
    assert all(0 <= value <= 1 for value in look.predictions[FLOAT].values())
    with pytest.raises(ValueError, match="--preset has no effect: --model is quantized already"):
        Demo.open(str(tmp_path / "out"), preset="w4a4")
    (tmp_path / "out" / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="does not say where its float original is"):
        Demo.open(str(tmp_path / "out"))


def test_an_encoder_without_texts_has_cosines_and_its_own_classes() -> None:
    demo = Demo.open("planted-outlier")
    look = demo.look(demo.example(0))
    assert bool(look.predictions) == has_classifier(demo.source.model)
    assert len(look.cosines) == 3


def test_models_of_patches_are_refused(tmp_path: Path) -> None:
    from transformers import Siglip2ImageProcessor

    for number in range(40):
        Image.new("RGB", (32, 32), (6 * number, 0, 0)).save(tmp_path / f"{number}.png")
    MODELS["siglip2"].build().save_pretrained(tmp_path / "m")
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="needs a model that takes whole pictures"):
        Demo.open(str(tmp_path / "m"), str(tmp_path))


def test_an_option_without_effect() -> None:
    with pytest.raises(ValueError, match="--float-model has no effect"):
        Demo.open("planted-outlier", original="x")


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, error = run("demo")
    assert code == 2
    assert "The demo needs gradio" in error
    assert "pip install 'optimum-regcache[demo]'" in error


def test_a_port_in_use_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setattr(Demo, "open", lambda *args, **options: pytest.fail("work was done"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = run("demo", "--port", port)
    assert code == 2
    assert error.startswith(f"error: The demo cannot listen at 127.0.0.1, port {port}: Address already in use")
    assert "Give another --port, or leave it out for a free one" in error
    require_port("127.0.0.1", port)  # free again
    for host, number, message in (
        ("127.0.0.1", 70000, "--port must lie between 1 and 65535, got 70000"),
        ("192.0.2.1", None, "cannot listen at 192.0.2.1: .* --host must be an address of this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            require_port(host, number)


def test_an_upload_that_is_no_image_is_told(tmp_path: Path) -> None:
    def opened(path: Path) -> Image.Image:
        with Image.open(path) as picture:
            return picture.convert("RGB")

    read = readable(opened, KeyError)
    Image.new("RGB", (64, 64), 7).save(tmp_path / "whole.png")
    assert read(tmp_path / "whole.png").size == (64, 64)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("text.png", "cut.png"):
        with pytest.raises(KeyError, match=r"This image cannot be read \(\w+\)\. Save it again as PNG or JPEG"):
            read(tmp_path / name)


def test_browsers_are_told_to_load_nothing_from_other_machines() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"x"})

    async def send(message: Any) -> None:
        sent.append(message)

    with contextlib.suppress(StopIteration):
        OnlySelf(app)({}, None, send).send(None)
    (first, policy), body = sent[0]["headers"], sent[1]
    assert first == (b"a", b"b")
    assert policy[0] == b"content-security-policy"
    assert policy[1].startswith(b"default-src 'self' data: blob:")
    assert b"http" not in policy[1]
    assert body == {"type": "http.response.body", "body": b"x"}


def test_patches_are_shaded_by_their_values() -> None:
    drawn = shade_patches(
        Image.new("RGB", (4, 4), (0, 0, 255)), torch.tensor([0.0, 1.0, 0.0, torch.nan]), (2, 2), side=8
    )
    assert [drawn.getpixel(at) for at in ((1, 1), (6, 1), (1, 6), (6, 6))] == [(0, 0, 255), (214, 0, 60)] * 2
