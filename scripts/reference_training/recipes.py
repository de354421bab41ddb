"""One seeded recipe per reference encoder."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BaseStage:
    """Contrastive training on captions.

    Attributes:
        steps, batch_size: amount; ``images`` scenes are visited in a new order each epoch.
        lr: AdamW, for embeddings, norms, biases and the text tower.
        muon_lr: Muon, for the matrices of the blocks.
        mlp_drop: chance that a block's MLP is skipped for an image. The MLP of the register block never is, so that the
            network comes to depend on it.
    """

    steps: int = 2000
    batch_size: int = 128
    images: int = 32768
    lr: float = 1e-3
    muon_lr: float = 2e-3
    mlp_drop: float = 0.2


@dataclass(frozen=True)
class InductionStage:
    """Continued training in which background patches become useful sinks; see ``induction.py``.

    Attributes:
        steps, batch_size, lr, muon_lr, mlp_drop: as in `BaseStage`; ``gate_lr``: Adam, for the gates of register neurons.
        plain_steps: steps at the start without prefix or deletion.
        writers: register neurons of the block before the register block, one for each level of background brightness.
        write_before, write: what a unit of activation adds to a massive channel, in that block and in the register block.
        activation: wanted pre-activation of a register neuron on its sink; elsewhere it should stay below -3.
        modes: shares of images that are plain, with deletion, with prefix, with both.
        weight, weight_attention, weight_reappear: of the losses.
        fc2_ratio: after training the register neuron is rescaled, exactly, until the largest token at the fc2 input is this
            many times the median token.
    """

    steps: int = 400
    batch_size: int = 128
    lr: float = 1e-3
    muon_lr: float = 1.5e-3
    gate_lr: float = 1e-2
    mlp_drop: float = 0.4
    plain_steps: int = 60
    writers: int = 4
    write_before: float = 6.0
    write: float = 40.0
    activation: float = 6.0
    modes: tuple[float, float, float, float] = (0.35, 0.25, 0.10, 0.30)
    weight: float = 0.2
    weight_attention: float = 0.1
    weight_reappear: float = 2.0
    fc2_ratio: float = 256.0


@dataclass(frozen=True)
class TrainingRecipe:
    """Attributes:
    kind: ``clip`` (CLS, softmax loss) or ``siglip`` (attention pooling, sigmoid loss).
    blocks, width, heads: vision tower; 64 px, patch 8.
    register_block: the block whose MLP makes the outliers (middle of the tower).
    base, induction: the stages; ``induction`` is None for an encoder without outlier tokens.
    """

    kind: str
    blocks: int = 6
    width: int = 128
    heads: int = 4
    register_block: int = 3
    base: BaseStage = field(default_factory=BaseStage)
    induction: InductionStage | None = None


RECIPES = {
    "clip-scenes": TrainingRecipe("clip"),
    "clip-scenes-induced": TrainingRecipe("clip", induction=InductionStage()),
    # SigLIP's pooling makes it depend less on one MLP: longer, with more of the other MLPs skipped, and rescaled further
    "siglip-scenes-induced": TrainingRecipe(
        "siglip", induction=InductionStage(steps=600, mlp_drop=0.8, fc2_ratio=1024.0)
    ),
}
