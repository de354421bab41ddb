"""Test-time registers (arXiv 2506.08010, G): register neurons lose their activation to a token, or to a K/V pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_regcache.config import DeletionConfig
from optimum_regcache.config.validation import one_of, require
from optimum_regcache.methods.base import Method, PipelineState
from optimum_regcache.registers import get_register_cache, set_deletion, set_registers
from optimum_regcache.registers.neurons import (
    find_register_neurons,
    register_cache_from_neurons,
    set_register_neurons,
    zero_register_neurons,
)


@dataclass(frozen=True)
class TestTimeRegisters(Method):
    """A few MLP hidden units write the outlier; they are found on the calibration images.

    With a RegCache prefix installed, ``kv`` only silences the neurons: the prefix takes the place of its own K/V pair.
    Where the encoder has no outlier tokens, nothing is changed.

    Attributes:
        variant: ``kv`` (units silenced in the weights; mean key and value of a register as a constant pair: the
            attention-bias form) or ``token`` (one more token that takes over the units' activation at run time).
        top_k: units.
    """

    __test__: ClassVar[bool] = False  # not a test class, whatever its name says to pytest

    variant: str = "kv"
    top_k: int = 10
    name: ClassVar[str] = "test_time_registers"
    paper: ClassVar[str] = "Vision Transformers Don't Need Trained Registers (arXiv 2506.08010)"
    finds: ClassVar[tuple[tuple[str, str], ...]] = (("rewrites", "register_neurons"),)
    cache_effect: ClassVar[str] = "kv: installs a cache of its own unless RegCache's is there; token: none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.name, "variant", self.variant, ("kv", "token"))
        require(self.top_k >= 1, f"test_time_registers.top_k must be at least 1, got {self.top_k}.")

    def select(self, fit: PipelineState) -> None:
        installed, deletion = get_register_cache(fit.model), fit.config.deletion
        set_registers(fit.model, None)
        set_deletion(fit.model, DeletionConfig())
        try:
            found = find_register_neurons(fit.model, fit.batches, top_k=self.top_k, progress=fit.progress)
            neurons = found.by_block()
            own = None
            if neurons and self.variant == "kv" and installed is None:
                own = register_cache_from_neurons(fit.model, fit.batches, neurons, progress=fit.progress)
        finally:
            set_registers(fit.model, installed)
            set_deletion(fit.model, deletion)
        texts = tuple(f"{block}:{neuron}" for block in sorted(neurons) for neuron in sorted(neurons[block]))
        fit.measured[self.name] = {"neurons": list(texts), "variant": self.variant, "note": found.reason}
        if not neurons:
            return
        if self.variant == "token":
            set_register_neurons(fit.model, neurons)
            fit.config = fit.config.replace(rewrites={"register_neurons": texts})
            return
        zero_register_neurons(fit.model, neurons)
        if own is not None:
            set_registers(fit.model, own)
            registers = {
                "mode": "fixed",
                "blocks": own.blocks,
                "num_registers": own.num_registers,
                "num_copies": own.num_copies,
            }
            fit.config = fit.config.replace(registers=registers)
