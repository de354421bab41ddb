"""Memory and time of a fit against the number of reference images: each number in a process of its own.

    python benchmarks/bench_images.py --images FOLDER_OR_PARQUET --counts 500 5000 50000
    python benchmarks/bench_images.py --images FOLDER --counts 500 5000 --budget 0.1

Anonymous memory is what a process cannot give back; pages of files that were read belong to the system, which drops them at
will. Images beyond ``--budget`` GiB go to files. The fit is the whole one: scan, mining, search, confirmation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from optimum_regcache.commands.sources import open_source
from optimum_regcache.config import RegCacheConfig
from optimum_regcache.config.recipe import DataConfig, Recipe, SearchConfig
from optimum_regcache.search.fit import fit_registers
from optimum_regcache.search.plan import QuantizationPlan, ReferenceImages

STATUS = ("RssAnon", "RssFile")


class Peak(threading.Thread):
    """Largest anonymous and file memory of this process, MiB, sampled ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = dict.fromkeys(STATUS, 0.0)
        self._over = threading.Event()

    def stop(self) -> None:
        """Sample no more."""
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            for name in STATUS:
                kib = next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
                self.highest[name] = max(self.highest[name], kib / 1024)


def one(count: int, arguments: argparse.Namespace) -> dict[str, float]:
    """A fit on ``count`` images."""
    data = DataConfig(num_samples=count, memory_budget=arguments.budget)
    recipe = Recipe(RegCacheConfig.from_preset("w8a8"), SearchConfig(always=True), data)
    source = open_source(arguments.model, arguments.images, recipe)
    peak, begun = Peak(), time.perf_counter()
    peak.start()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plan = QuantizationPlan.of(recipe)
        images = ReferenceImages(source.search_images, source.processor)
        fit = fit_registers(source.model, images, plan, work_dir=folder, progress=True)
        written = fit.parts.space.written / 2**20
    return {
        "images": len(fit.parts.everything),
        "seconds": time.perf_counter() - begun,
        "block_forwards": fit.search.block_forwards,
        "anonymous_mib": peak.highest["RssAnon"],
        "files_mib": peak.highest["RssFile"],
        "written_mib": written,
        **{f"{name}_seconds": seconds for name, seconds in fit.seconds.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clip-scenes-induced")
    parser.add_argument("--images", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--budget", type=float, default=0.1, help="data.memory_budget, GiB")
    parser.add_argument("--folder", help="for what is beyond the budget (default: that of temporary files)")
    parser.add_argument("--one", action="store_true", help="in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.counts[0], arguments)))
        return
    print("| images | seconds | ms per image | anonymous MiB | mapped MiB | in files MiB |\n|---|---|---|---|---|---|")
    for count in arguments.counts:
        command = [sys.executable, __file__, "--one", "--model", arguments.model, "--images", arguments.images]
        command += ["--counts", str(count), "--budget", str(arguments.budget)]
        command += ["--folder", arguments.folder] if arguments.folder else []
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        print(
            f"| {row['images']:.0f} | {row['seconds']:.0f} | {1000 * row['seconds'] / row['images']:.1f} | "
            f"{row['anonymous_mib']:.0f} | {row['files_mib']:.0f} | {row['written_mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
