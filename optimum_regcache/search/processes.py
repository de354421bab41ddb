"""Several processes of one fit, as torchrun starts them: who computes what, and how all of them get all results.

Each process has its own copy of the model and of the images. A configuration is computed by one process on all images, never
by several on a share, so every score has the bits that one process alone would find. With one process nothing here does
anything: no process group is made, and nothing is sent.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from optimum_regcache.config.validation import require

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = timedelta(days=7)  # a process that is gone is noticed by torchrun, one that computes may take its time
_alone = 0


def launched() -> int:
    """Processes that torchrun (or another launcher) started for this run; 1 if this one was started by itself."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in names) else 1


def number() -> int:
    """Of this process among those that were launched, whether they have met or not; 0 is the main one."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def local_processes() -> int:
    """How many of them share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)) if launched() > 1 else 1


def start(device: str) -> None:
    """Meet the other processes: by gloo for ``cpu``, by nccl for ``cuda``, where each process gets a GPU of its own.

    It is called by the command line before the model is opened. Without it the processes meet at their first exchange, with
    nccl if there is a GPU for each.

    Raises:
        ValueError: fewer GPUs than processes.
    """
    if launched() == 1:
        return
    require(
        device == "cpu" or _enough_gpus(),
        f"{local_processes()} processes on this machine need as many GPUs; there are {torch.cuda.device_count()}. Give "
        "torchrun a smaller --nproc_per_node.",
    )
    _state(cpu=device == "cpu")


def end() -> None:
    """Close what `start` opened."""
    if launched() > 1 and torch.distributed.is_initialized():
        _state().destroy_process_group()


def world_size() -> int:
    """Processes that share the work now."""
    return 1 if _alone or launched() == 1 else int(_state().num_processes)


def rank() -> int:
    """Number of this process; 0 is the main one."""
    return 0 if world_size() == 1 else number()


def is_main() -> bool:
    """Whether this process writes, reports and prints."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside it this process shares its work with nobody, and waits for nobody."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def spread(items: Sequence[Item], compute: Callable[[Item], Result]) -> list[Result]:
    """``compute`` of every item, each in one process: that of rank r takes items r, r + `world_size`, and so on.

    All processes call it with the same items, and ``compute`` must not exchange anything itself.

    Args:
        items: what to compute.
        compute: its results are pickled; tensors belong on the CPU.

    Returns:
        The results in the order of the items, the same in every process.

    Raises:
        Exception: what ``compute`` raised in the first process that failed, with its own words, in every process.
        RuntimeError: another process is at another step.
    """
    size, own = world_size(), rank()
    if size == 1:
        return [compute(item) for item in items]
    shares = _exchange(f"{len(items)} items", lambda: [compute(item) for item in items[own::size]])
    return [shares[number % size][number // size] for number in range(len(items))]


def together(compute: Callable[[], Result]) -> Result:
    """What ``compute`` returns in this process, once it is done in all of them.

    Raises:
        Exception: as `spread` does.
    """
    if world_size() == 1:
        return compute()
    kept: list[Result] = []
    _exchange("a common step", lambda: kept.append(compute()))
    return kept[0]


def on_main(compute: Callable[[], Result]) -> Result | None:
    """``compute`` in the main process alone, while the others wait; None in these.

    Raises:
        Exception: as `spread` does.
    """
    return together(lambda: compute() if is_main() else None)


def from_main(value: Result) -> Result:
    """The value of the main process, in all of them."""
    if world_size() == 1:
        return value
    own = is_main()
    return _exchange("a value", lambda: [value] if own else [])[0][0]


def gathered(value: Result) -> list[Result]:
    """The values of all processes, by rank."""
    return [value] if world_size() == 1 else _exchange("values", lambda: value)


def _enough_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= local_processes()


def _state(cpu: bool | None = None) -> Any:
    from accelerate import PartialState

    without = not _enough_gpus() if cpu is None else cpu  # what was made first stays
    return PartialState(cpu=without, timeout=_PATIENCE)


def _exchange(step: str, compute: Callable[[], Result]) -> list[Result]:
    """What ``compute`` returns in every process, by rank."""
    from accelerate.utils import gather_object

    result, error = None, None
    try:
        result = compute()
    except Exception as failure:
        error = failure
    everything: list[Any] = gather_object([(step, result, _portable(error))])  # pyright: ignore[reportUnknownVariableType]
    for number, (_, _, failure) in enumerate(everything):
        if failure is not None:
            raise error if error is not None and number == rank() else failure
    steps = [there for there, _, _ in everything]
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"The processes of this run are at different steps: {', '.join(steps)}. Start all of them with the same arguments."
        )
    return [found for _, found, _ in everything]


def _portable(error: Exception | None) -> Exception | None:
    """``error``, or one that says the same where it cannot be sent."""
    try:
        back = pickle.loads(pickle.dumps(error))
    except Exception:
        back = None
    words = f"{type(error).__name__}: {error}"
    return error if str(back) == str(error) else RuntimeError(words)
