"""Finished blocks of a reconstruction on disk, so that it may be killed at any moment and continued to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from transformers.utils import logging

from optimum_regcache.config.files import write_bytes
from optimum_regcache.methods._reconstruction.block import TrainedBlock
from optimum_regcache.methods._reconstruction.train import BlockRecord, Reconstruction
from optimum_regcache.methods.base import Method, PipelineState

logger = logging.get_logger(__name__)

_RECORD = "record"  # the record's JSON among the tensors of a file


class FinishedBlocks:
    """One file for each finished block: a checksum, codes, scales and the record.

    The folder is named after everything that determines the result, so another model, other images or settings have one of
    their own.

    Args:
        folder: work directory; None keeps nothing.
        fingerprint: of `fingerprint`.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.folder = None if folder is None else folder / f"reconstruction-{fingerprint}"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def kept(self, block: int, trained: TrainedBlock, trains: Callable[[], BlockRecord]) -> BlockRecord:
        """The record of ``block``, which is restored if it is finished, else trained and written.

        Raises:
            ValueError: a file that is not what was written.
        """
        if self.folder is None:
            return trains()
        path = self.folder / f"block-{block:03d}"
        if path.exists():
            found = _read(path)
            record = json.loads(bytes(found.pop(_RECORD).tolist()))
            trained.restore(found)
            return BlockRecord(**record)
        record = trains()
        text = torch.tensor(list(json.dumps(record.to_dict()).encode()), dtype=torch.uint8)
        data = save({**trained.snapshot(), _RECORD: text})
        write_bytes(path, hashlib.sha256(data).digest() + data, sync=True)
        return record


def train_blocks(method: Method, training: Reconstruction) -> None:
    """Run ``training``, with what is finished in the work directory; its records become what ``method`` measured."""
    fit = training.fit
    finished = FinishedBlocks(fit.work_dir, fingerprint(method, fit) if fit.work_dir is not None else "")
    found = training.run(finished.kept)
    fit.measured[method.name] = {"blocks": [record.to_dict() for record in found]}
    given = [record.block for record in found if not record.trained]
    if given:
        logger.warning(f"{method.name}: block(s) {given} did not get better by training and stay as they were rounded.")


def _read(path: Path) -> dict[str, torch.Tensor]:
    content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} is not what the reconstruction wrote. Delete it to train this block again.")
    return load(data)


def fingerprint(method: Method, fit: PipelineState) -> str:
    """Hexadecimal identity of everything that determines what ``method`` makes of ``fit``."""
    versions = [version(name) for name in ("optimum-regcache", "torch", "transformers")]
    device = next(fit.result.parameters()).device.type
    settings = [method.to_dict(), fit.config.to_dict(), versions, device]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for model in (fit.model, fit.result):
        _add(digest, model.state_dict().items())
    for batch in fit.training:  # what the calibration images decided is in the result
        _add(digest, sorted(batch.items()))
    return digest.hexdigest()[:32]


def _add(digest: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().flatten())  # whatever its strides
        digest.update(flat.view(torch.uint8).numpy())
