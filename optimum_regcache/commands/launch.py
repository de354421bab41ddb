"""Commands in several processes: `quantize` shares its search, the main process does all else and speaks for all."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch

from optimum_regcache.commands.failures import explain

GRACE = 10.0  # seconds in which torchrun ends this process if the main one has failed, too


def require_device(device: str) -> None:
    """Make sure that there is one.

    Raises:
        ValueError: there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine or this PyTorch build has no CUDA. Use --device cpu.")


def shared(command: str, device: str, job: Callable[[], None]) -> None:
    """Run ``job`` in all processes of this run, if torchrun started several.

    Raises:
        ValueError: a command that has nothing to share.
    """
    if not os.environ.get("WORLD_SIZE"):
        return job()
    from optimum_regcache.search import processes

    if processes.launched() > 1:
        if command != "quantize":
            raise ValueError(f"{command} runs in one process. Start it with optimum-cli, without torchrun.")
        processes.start(device)
    job()
    return processes.end()


def fail(error: BaseException, debug: bool) -> NoReturn:
    """Print the line of an error, and leave with its exit code.

    The main process speaks at once. Another one waits, for the main one mostly fails with the same error and torchrun then ends
    all; if it goes on, the error is this process's own.
    """
    if debug:
        traceback.print_exception(error)
    code, line = explain(error)
    if os.environ.get("WORLD_SIZE"):
        from optimum_regcache.search.processes import number

        if number():
            time.sleep(GRACE)
            line = f"process {number()}: {line}"
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)
