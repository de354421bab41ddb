"""A whole ``quantize`` as a user starts it: seconds, longest silence, memory, and whether it finds what was planted.

    python benchmarks/bench_fit.py --photos FOLDER_OR_PARQUET                    # CLIP ViT-B/16 size, SYNTHETIC sink
    python benchmarks/bench_fit.py --photos PHOTOS --model DIR                   # any other model on the same photographs
    python benchmarks/bench_fit.py --photos PHOTOS --before ad64e87 --limit 1800 # an earlier revision too, up to 1,800 s
    python benchmarks/bench_fit.py --demo --before ad64e87 --repeats 3           # what ``make demo`` runs, in turns

Without ``--model`` the encoder is that of ``planted_clip.py`` and its patches are drawn on the photographs; the block, tau and
``k~`` that were found stand beside the planted ones. The command runs in a process of its own, without a terminal. A silence is
the time between two lines of it. Memory is what the process and its children cannot give back (anonymous), sampled four times
a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import psutil

from planted_clip import SIDE, SINK_BLOCK, planted_clip, trigger_patches, with_triggers

ROOT = Path(__file__).resolve().parent.parent
# optimum-cli with the command of a checkout in place of the installed one
COMMAND = """
import importlib, sys
checkout = sys.argv.pop(1)
sys.path.insert(0, checkout)
register = importlib.import_module("optimum.commands.register")
register.__path__ = register.__spec__.submodule_search_locations = [checkout + "/optimum_regcache/commands/cli"]
from optimum.commands.optimum_cli import main
main()
"""


@dataclass
class Run:
    """How one command went."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    silence: float = 0.0
    memory: float = 0.0  # MiB
    finished: bool = True


def _watch(process: subprocess.Popen[str], run: Run, stop: threading.Event) -> None:
    """Memory and CPU time of a process and its children until ``stop``."""
    while not stop.wait(0.25):
        try:
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
            run.memory = max(run.memory, sum(p.memory_full_info().uss for p in family) / 2**20)
            times = [p.cpu_times() for p in family]
            run.cpu_seconds = max(run.cpu_seconds, sum(t.user + t.system for t in times))
        except psutil.Error:
            continue


def run_command(command: list[str], limit: float) -> Run:
    """Run it and pass its lines on."""
    run, stop = Run(), threading.Event()
    begun = last = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    threads = [
        threading.Thread(target=_watch, args=(process, run, stop), daemon=True),
        threading.Timer(limit, process.kill),
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    for line in cast("IO[str]", process.stdout):
        now = time.perf_counter()
        run.silence, last = max(run.silence, now - last), now
        print(f"{now - begun:7.1f} {line[:150].rstrip()}", file=sys.stderr, flush=True)
    code = process.wait()
    stop.set()
    run.seconds = time.perf_counter() - begun
    run.silence = max(run.silence, time.perf_counter() - last)
    run.finished = code == 0
    return run


def _photographs(path: str) -> Any:
    from datasets import load_dataset

    kind = "imagefolder" if Path(path).is_dir() else "parquet"
    where: Any = {"data_dir": path} if kind == "imagefolder" else {"data_files": path}
    return load_dataset(kind, split="train", **where)["image"]


def _prepare(folder: Path, photos: str) -> tuple[str, str]:
    """The synthetic encoder and its images, written once."""
    from transformers import CLIPImageProcessor

    model, images = folder / "planted-clip-b16", folder / "images"
    if not model.exists():
        planted_clip().save_pretrained(model)
        size = {"height": SIDE, "width": SIDE}
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(model)
    if not images.exists():
        with_triggers(iter(_photographs(photos)), images)
    return str(model), str(images)


def found(output: Path) -> dict[str, Any]:
    """What the search says, and what was planted."""
    results = json.loads((output / "results.json").read_text())
    fit = results.get("fit", results)
    counts = [len(trigger_patches(i)[0]) for i in range(600)]
    return {
        "planted": {"block": SINK_BLOCK, "tokens": f"{min(counts)} to {max(counts)}"},
        "sensitive_block": fit.get("sensitive_block"),
        "chosen": fit.get("search", {}).get("chosen", {}).get("text"),
        "rows": {row["name"]: row.get("cosine") for row in results.get("rows", [])},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder or parquet file of photographs")
    parser.add_argument("--demo", action="store_true", help="the embedded encoder at three widths, without photographs")
    parser.add_argument("--model", help="in place of the synthetic encoder")
    parser.add_argument("--preset", default="w8a8")
    parser.add_argument("--before", metavar="REVISION", help="run this revision of the project in turns with this one")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which a run is stopped")
    parser.add_argument("--folder", type=Path, help="for encoder, images and results (default: a temporary one)")
    parser.add_argument("options", nargs="*", help="passed on to quantize; after --")
    arguments = parser.parse_args()
    if arguments.demo == bool(arguments.photos):
        parser.error("give either --photos or --demo")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        what = ["--preset", "w8a8", "w6a6", "w4a4"]
        if not arguments.demo:
            own = (arguments.model, arguments.photos)
            model, images = own if arguments.model else _prepare(folder, arguments.photos)
            what = ["--model", model, "--dataset", images, "--preset", arguments.preset]
        checkouts = {"this": ROOT}
        if arguments.before:
            checkouts = {arguments.before: folder / "checkout", **checkouts}
            _git("worktree", "add", "--quiet", "--detach", str(folder / "checkout"), arguments.before)
        print("| code | seconds | CPU seconds | longest silence, s | memory, MiB |\n|---|---|---|---|---|", flush=True)
        try:
            for repeat in range(arguments.repeats):
                for name, checkout in checkouts.items():
                    output = folder / f"result-{name}-{repeat}"
                    command = [sys.executable, "-c", COMMAND, str(checkout), "regcache", "quantize", *what]
                    run = run_command([*command, "--output", str(output), *arguments.options], arguments.limit)
                    print(row(name, run), flush=True)
                    if run.finished and arguments.photos and not arguments.model:
                        print(json.dumps(found(output), indent=1), flush=True)
        finally:
            if arguments.before:
                _git("worktree", "remove", "--force", str(folder / "checkout"))


def _git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True)


def row(name: str, run: Run) -> str:
    """Markdown."""
    end = "" if run.finished else " (stopped)"
    return f"| {name} | {run.seconds:.0f}{end} | {run.cpu_seconds:.0f} | {run.silence:.1f} | {run.memory:.0f} |"


if __name__ == "__main__":
    main()
