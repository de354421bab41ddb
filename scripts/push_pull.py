"""Push a quantized model to a Hub on this machine, open it in other processes, and compare the outputs bit by bit.

    python scripts/push_pull.py               # quantizes an embedded encoder first
    python scripts/push_pull.py --model out   # a folder that `optimum-cli regcache quantize` wrote

Needs no account and no network: the Hub is that of the tests (tests/hub_server.py), in memory, on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer  # noqa: E402

QUICK = ("--quick", "--num-samples", "48", "--num-report", "32", "--no-recommend")
SEARCH = ("search.num_copies=[1,15]", "search.max_delete=1", "search.blocks_before=1")
LARGE = 10_000  # bytes; the real Hub takes files from 10 MB on as large ones

# arguments: name, file of the expected output, revision, whether to import
OPEN = """
import sys
import torch

name, expected, revision, with_import = sys.argv[1:]
if with_import == "True":
    import optimum_regcache
from transformers import AutoModel

model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=with_import != "True").eval()
vision = getattr(model.config, "vision_config", model.config)
side = vision.image_size
torch.manual_seed(0)
pixels = torch.rand(2, 3, side, side)
with torch.no_grad():
    tower = getattr(model, "vision_model", model)
    output = tower(pixel_values=pixels).last_hidden_state
if expected.startswith("="):
    torch.save(output, expected[1:])
elif not torch.equal(output, torch.load(expected)):
    raise SystemExit("another output")
"""


class Runner:
    """Processes whose Hub is ``hub``, each with a Hugging Face cache of its own."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder, self.expected = hub, folder, folder / "expected"

    def run(self, *command: str, cache: str, **variables: str) -> str:
        """Output of a command; ends with its errors if it fails."""
        dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(dropped)}
        env |= {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / cache), "HF_TOKEN": "dummy"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), **variables}
        result = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(command[:6])} ... failed:\n{result.stderr}")
        return result.stdout

    def push(self, model: str, *options: str) -> None:
        """`optimum-cli regcache push`."""
        print(self.run(_optimum_cli(), "regcache", "push", model, "user/model", *options, cache="push"))

    def open(
        self, what: str, name: str, revision: str = "main", *, with_import: bool = True, cache: str = "", **more: str
    ):
        """Open ``name`` in a process of its own, and compare."""
        place = str(self.expected) if self.expected.exists() else f"={self.expected}"
        command = (sys.executable, "-c", OPEN, name, place, revision, str(with_import))
        self.run(*command, cache=cache or what.replace(" ", "-"), **more)
        print(f"{what}: {'the outputs are equal' if not place.startswith('=') else 'opened'}")


def _optimum_cli() -> str:
    return str(Path(sys.executable).with_name("optimum-cli"))


def main(model: str | None) -> None:
    """Push, pull, compare."""
    with tempfile.TemporaryDirectory() as temporary, HubServer(large=LARGE) as hub:
        runner, given = Runner(hub, Path(temporary)), model
        model = str(Path(temporary, "model"))
        if given is not None:
            shutil.copytree(given, model)
        else:
            sets = [word for setting in SEARCH for word in ("--set", setting)]
            command = ("regcache", "quantize", "--model", "planted-outlier", *QUICK, *sets, "--output", model)
            runner.run(_optimum_cli(), *command, cache="push")
        runner.open("folder", model)
        runner.push(model)
        runner.open("main, by import", "user/model", cache="main")
        runner.open("main, by trust_remote_code", "user/model", with_import=False)
        runner.open("offline", "user/model", cache="main", HF_HUB_OFFLINE="1")
        runner.push(model, "--revision", "w8a8")
        runner.open("branch w8a8", "user/model", "w8a8")
        with Path(model, "README.md").open("a", encoding="utf-8") as card:
            card.write("\nProposed.\n")
        runner.push(model, "--pr")
        runner.open("pull request", "user/model", "refs/pr/1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a quantized model (default: an embedded encoder is quantized)")
    main(parser.parse_args().model)
