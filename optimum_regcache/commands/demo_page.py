"""The page of `optimum-cli regcache demo`, made with Gradio: it asks no machine but this one for anything."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib import import_module
from typing import Any

from optimum_regcache.commands.demo import FLOAT, Demo
from optimum_regcache.config.validation import require

_SELF = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
_LEGEND = "Magenta: at least 20 times the median token. Grey: the largest others. Crossed out: deleted."
_FONTS = ["system-ui", "sans-serif"]
_CSS = ".norms svg {max-width: 40rem; width: 100%; height: auto} footer {display: none}"


def need_gradio() -> Any:
    """The module, which sends no statistics.

    Raises:
        ImportError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        return import_module("gradio")
    except ImportError as error:
        raise ImportError(f"The demo needs gradio ({error}): pip install 'optimum-regcache[demo]'.") from error


def require_port(host: str, port: int | None) -> None:
    """Make sure, before any work, that the page can listen; ``port`` None: at any port.

    Raises:
        ValueError: it is in use, not for this user or no port, or this machine has no such address.
    """
    require(port is None or 1 <= port <= 65535, f"--port must lie between 1 and 65535, got {port}.")
    reason = None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
    place = host if port is None else f"{host}, port {port}"
    require(
        reason is None,
        f"The demo cannot listen at {place}: {reason}. Give another --port, or leave it out for a free one; --host must be an "
        "address of this machine.",
    )


def readable(read: Callable[[Any], Any], shown: type[Exception]) -> Callable[[Any], Any]:
    """``read`` of an upload that ends in ``shown``, which the page shows, for a file that is no image."""

    def preprocess(upload: Any) -> Any:
        try:
            return read(upload)
        except shown:
            raise
        except Exception as error:  # Pillow has many, for what is broken or too large
            raise shown(f"This image cannot be read ({type(error).__name__}). Save it again as PNG or JPEG.") from error

    return preprocess


class OnlySelf:
    """ASGI middleware: browsers load scripts, fonts and pictures of this server alone."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _SELF)]
            await send(message)

        await self.app(scope, receive, sent)


def build_page(demo: Demo) -> Any:
    """The page as `gradio.Blocks`."""
    gr, names = need_gradio(), list(demo.models)

    def compare(picture: Any, classes: str) -> list[Any]:
        if picture is None:
            raise gr.Error("Choose or upload an image first.", duration=5)
        try:
            look = demo.look(picture, classes.splitlines())
        except ValueError as error:
            raise gr.Error(str(error), duration=10) from error
        shown = [look.predictions.get(name) for name in names]
        table = [[name, f"{c:.4f}", f"{p:.4f}", f"{n:.1f}"] for name, (c, p, n) in look.cosines.items()]
        outliers = [look.outliers[name] for name in names]
        differences = [look.patches[name] for name in names if name != FLOAT]
        where = f"Outlier tokens at block {look.block}"
        return [*shown, table, f"### {where}\n{_LEGEND}", *outliers, *differences, look.norms.svg]

    def choose(event: Any, classes: str) -> list[Any]:
        picture = demo.example(event.index)
        return [picture, *compare(picture, classes)]

    choose.__annotations__["event"] = gr.SelectData
    source = demo.source
    with gr.Blocks(title="RegCache", analytics_enabled=False) as page:
        gr.Markdown(
            f"# {source.title}: float, plain quantization, RegCache\nInstalled: {demo.installed}. {source.note}"
        )
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(type="pil", label="Image", sources=["upload", "clipboard"], height=260)
                image.preprocess = readable(image.preprocess, gr.Error)
                classes = gr.Textbox(
                    "\n".join(demo.classes),
                    label="Classes, one on each line",
                    lines=4,
                    max_lines=6,
                    visible=demo.zero_shot,
                )
                button = gr.Button("Compare", variant="primary")
            gallery = gr.Gallery(demo.examples(), label="Examples", columns=6, height=330, allow_preview=False, scale=2)
        with gr.Row():
            predictions = [gr.Label(label=name, num_top_classes=5, visible=demo.predicts) for name in names]
        table = gr.Dataframe(
            headers=["variant", "cosine to float", "cosine of patches", "largest token"],
            interactive=False,
            label="Figures",
        )
        where = gr.Markdown(f"### Outlier tokens\n{_LEGEND}")
        with gr.Row():
            outliers = [gr.Image(label=name, buttons=[], height=300, format="png") for name in names]
        gr.Markdown("### Patches that differ from float\nRed: cosine 0 or below. As they are: cosine 1.")
        with gr.Row():
            differences = [
                gr.Image(label=name, buttons=[], height=300, format="png") for name in names if name != FLOAT
            ]
        gr.Markdown("### Norms per block")
        norms = gr.HTML(elem_classes="norms")
        results = [*predictions, table, where, *outliers, *differences, norms]
        button.click(compare, [image, classes], results, api_name="compare")
        gallery.select(choose, [classes], [image, *results], api_name=False)
    return page


def serve(demo: Demo, host: str, port: int | None, browser: bool, wait: bool = True) -> tuple[Any, str]:
    """Show the page until interrupted, or go on at once without ``wait``.

    Returns:
        (the page, which `close` ends; its address).
    """
    gr = need_gradio()
    page = build_page(demo)
    middleware = import_module("starlette.middleware").Middleware(OnlySelf)
    _, address, _ = page.launch(
        server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, share=False,
        ssr_mode=False, footer_links=[], css=_CSS, theme=gr.themes.Default(font=_FONTS, font_mono=["monospace"]),
        app_kwargs={"middleware": [middleware]},
    )  # fmt: skip
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()
    return page, address
