"""`optimum-cli regcache demo`."""
# pyright: reportMissingImports=false

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import CommandInfo
from optimum.commands.register.regcache_base import PRESETS, Command, add_hub, hub_options


class DemoCommand(Command):
    COMMAND = CommandInfo(
        name="demo", help="A page in the browser: an image in float, plain quantization and RegCache."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_hub(parser, writes=False)
        parser.add_argument(
            "--model",
            help="float model or what `quantize` wrote: directory, Hub id or reference encoder (default: clip-scenes-induced)",
        )
        parser.add_argument("--float-model", help="of a quantized model (default: the one recorded in recipe.yaml)")
        parser.add_argument(
            "--images", "--dataset", help="image folder or Hub id (default: the embedded encoder's scenes)"
        )
        parser.add_argument("--preset", choices=PRESETS, help="bit widths for a float model (default w8a8)")
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        parser.add_argument(
            "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)"
        )
        parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
        parser.add_argument("--no-browser", action="store_false", dest="browser", help="do not open a browser")

    def job(self) -> None:
        from optimum_regcache.commands.demo import Demo
        from optimum_regcache.commands.demo_page import need_gradio, require_port, serve
        from optimum_regcache.data.reference import DEFAULT

        a = self.args
        need_gradio()  # before any work
        require_port(a.host, a.port)
        options = {"preset": a.preset, "original": a.float_model, "device": a.device, "hub": hub_options(a)}
        serve(Demo.open(a.model or DEFAULT, a.images, **options), a.host, a.port, a.browser)
