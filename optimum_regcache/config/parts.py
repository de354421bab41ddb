"""The parts of a `RegCacheConfig`: frozen dataclasses that refuse unknown keys, impossible combinations and bad values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optimum_regcache.config.copies import block_copies
from optimum_regcache.config.validation import check_bits, check_types, one_of, require

CALIBRATION_OUTLIER_RATIO = 5.0  # l_inf over the median: what a static scale need not cover; reports count fewer tokens
ACTIVATION_OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "percentile_mse")


@dataclass(frozen=True)
class WeightsConfig:
    """Weight quantization of the linear layers, s = max|w| / (2^(b-1) - 1) (docs/method.md 1).

    Attributes:
        bits: 2 to 8.
        granularity: ``per_channel`` (one scale per output row, shape [out]) or ``per_tensor`` (shape [1]).
        observer: ``minmax``, ``mse`` (scale that minimises the squared weight error) or ``percentile_mse`` (the range with
            the smallest squared error among a few percentiles: docs/method.md 11.5).
        symmetric: zero point fixed at 0, otherwise free (one per scale).
    """

    bits: int = 8
    granularity: str = "per_channel"
    observer: str = "minmax"
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bits("weights", self.bits)
        check_types(self, "weights")
        one_of("weights", "granularity", self.granularity, ("per_channel", "per_tensor"))
        one_of("weights", "observer", self.observer, ("minmax", "mse", "percentile_mse"))


@dataclass(frozen=True)
class ActivationsConfig:
    """Quantization of the inputs of the linear layers.

    The presets are static, per tensor and symmetric with the absolute maximum: the protocol of the paper's "naive" rows.

    Attributes:
        bits: 2 to 8, or 16 (simulated only).
        mode: ``static`` (scale stored after calibration) or ``dynamic`` (computed for each input; ``per_tensor`` shares it over
            the batch, so that an image's result depends on the others, ``per_token`` does not).
        granularity: ``per_tensor``; ``per_token`` (one scale per row, shape [..., 1]) needs ``mode="dynamic"``.
        symmetric: zero point fixed at 0, otherwise free.
        observer: static only: ``minmax``, ``moving_average``, ``percentile``, ``mse`` or ``percentile_mse`` (the range with the
            smallest squared error among a few percentiles: docs/method.md 11.5).
        percentile: upper percentile in percent kept by ``observer="percentile"``.
        momentum: weight of the past in ``observer="moving_average"``.
        outlier_tokens: ``clip`` (they are quantized like all others), or ``per_token``: static, symmetric only. The static
            scale is that of the normal tokens, and a token beyond its range gets a scale of its own at run time
            (the paper's oracle as a method: docs/method.md 11.3).
        outlier_ratio: with ``per_token``: tokens of more than this many times the median l_inf norm of their image do not
            take part in the calibration.
        post_activation: quantizer of the MLP output projection's input: ``uniform``, or ``twin`` (two scales, negative and
            positive values: docs/method.md 11.4; static, symmetric only).
        mlp_out_offset: the MLP output projection adds a stored vector to its input before quantizing it (docs/method.md 11.6).
        mlp_out_hadamard: the MLP output projection transforms its input by a block Hadamard matrix (docs/method.md 11.9).
    """

    bits: int = 8
    mode: str = "static"
    granularity: str = "per_tensor"
    symmetric: bool = True
    observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.9
    outlier_tokens: str = "clip"
    outlier_ratio: float = CALIBRATION_OUTLIER_RATIO
    post_activation: str = "uniform"
    mlp_out_offset: bool = False
    mlp_out_hadamard: bool = False

    def __post_init__(self) -> None:
        check_bits("activations", self.bits, sixteen=True)
        check_types(self, "activations")
        one_of("activations", "mode", self.mode, ("static", "dynamic"))
        one_of("activations", "granularity", self.granularity, ("per_tensor", "per_token"))
        one_of("activations", "observer", self.observer, ACTIVATION_OBSERVERS)
        one_of("activations", "outlier_tokens", self.outlier_tokens, ("clip", "per_token"))
        one_of("activations", "post_activation", self.post_activation, ("uniform", "twin"))
        plain = self.mode == "static" and self.symmetric
        require(
            self.outlier_tokens == "clip" or plain,
            "activations.outlier_tokens='per_token' needs mode='static' and symmetric=true.",
        )
        require(
            self.post_activation == "uniform" or plain,
            "activations.post_activation='twin' needs mode='static' and symmetric=true.",
        )
        require(
            not (self.post_activation == "twin" and (self.mlp_out_hadamard or self.outlier_tokens == "per_token")),
            "activations.post_activation='twin' splits GELU's output at zero; it can be combined neither with "
            "mlp_out_hadamard, which mixes the channels before, nor with outlier_tokens='per_token'.",
        )
        require(self.outlier_ratio > 1.0, f"activations.outlier_ratio must be > 1, got {self.outlier_ratio}.")
        require(
            not (self.mode == "static" and self.granularity == "per_token"),
            "activations.granularity='per_token' needs activations.mode='dynamic': a stored scale cannot know how many "
            "tokens an input has. Use mode='dynamic', or granularity='per_tensor'.",
        )
        require(50.0 < self.percentile <= 100.0, f"activations.percentile must be in (50, 100], got {self.percentile}.")
        require(0.0 <= self.momentum < 1.0, f"activations.momentum must be in [0, 1), got {self.momentum}.")


@dataclass(frozen=True)
class RegistersConfig:
    """The prefixed register cache (docs/method.md 4).

    Attributes:
        mode: ``search`` (to be found by `RegCacheQuantizer.fit`), ``fixed`` (positions below are final), ``none``
            (not "off", which YAML reads as false).
        blocks: 0-based blocks whose attention gets the prefix, ascending; ``fixed`` needs at least one.
        num_registers: distinct rows of K and V per block.
        num_copies: tau; copies of a row are one row with logit bias ln(tau) (docs/method.md 5), so it need not be an integer.
            One number, or a list with one for each of ``blocks``; a list of equal numbers becomes that number.
        kv_mode: ``in_context`` (K, V averaged over the images the tokens came from) or ``isolated`` (token run alone), for
            registers that are searched or mined for the given blocks.
        refinement: which of ``search.refinements`` made them, null for mined ones; only the search can make such again.
    """

    mode: str = "search"
    blocks: tuple[int, ...] = ()
    num_registers: int = 1
    num_copies: float | tuple[float, ...] = 1.0
    kv_mode: str = "in_context"
    refinement: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "registers")
        one_of("registers", "mode", self.mode, ("search", "fixed", "none"))
        one_of("registers", "kv_mode", self.kv_mode, ("in_context", "isolated"))
        require(
            list(self.blocks) == sorted(set(self.blocks)) and all(b >= 0 for b in self.blocks),
            f"registers.blocks must be distinct, ascending and >= 0, got {list(self.blocks)}.",
        )
        require(self.num_registers >= 1, f"registers.num_registers must be at least 1, got {self.num_registers}.")
        if isinstance(self.num_copies, tuple):
            copies = block_copies(self.num_copies, self.blocks, "registers.num_copies")
            object.__setattr__(self, "num_copies", copies)
        else:
            require(
                0 < self.num_copies < math.inf,
                f"registers.num_copies must be > 0 (its logarithm is the logit bias), got {self.num_copies}. "
                "To use no register set registers.mode='none'.",
            )
        require(
            self.mode != "fixed" or bool(self.blocks),
            "registers.mode='fixed' needs registers.blocks. Give the blocks, or use mode='search' or mode='none'.",
        )
        require(
            self.mode == "fixed" or not self.blocks,
            f"registers.blocks={list(self.blocks)} contradicts registers.mode={self.mode!r}. Use mode='fixed'.",
        )
        require(
            self.refinement is None or bool(self.refinement.strip()),
            "registers.refinement must not be empty; leave it out, or write null.",
        )


@dataclass(frozen=True)
class DeletionConfig:
    """What happens to the outlier tokens that still appear (docs/method.md 6). Every form has static shapes.

    Attributes:
        block: 0-based block at whose input tokens are ranked by norm; None when nothing is deleted.
        count: k~, tokens taken in each image (``topk``) or at most taken (``threshold``).
        score: norm that ranks the tokens: ``linf`` (in the original basis, also where the residual stream is rotated) or
            ``l2``, which needs no basis but may rank other tokens first.
        rule: ``topk``, or ``threshold``: only tokens with norm > ``kappa`` x the image's median norm.
        kappa: ratio for ``threshold``.
        fill: ``neighbour_mean`` puts the deleted positions back after the last block as the mean of their kept
            neighbours, so that the patch grid keeps its shape; ``none`` returns N - count tokens.
        action: ``delete``: out of the sequence at the block's input. ``replace``: overwritten there by the mean of their kept
            neighbours, and ordinary tokens from then on. ``late``: ranked at the input of the block's MLP output projection
            (fc2), and deleted before it. ``per_token``: ranked there too; nothing is deleted, and fc2 quantizes each of them
            with a scale of its own where the static one does not reach.
    """

    block: int | None = None
    count: int = 0
    score: str = "linf"
    rule: str = "topk"
    kappa: float = 5.0
    fill: str = "neighbour_mean"
    action: str = "delete"

    def __post_init__(self) -> None:
        check_types(self, "deletion")
        one_of("deletion", "score", self.score, ("linf", "l2"))
        one_of("deletion", "rule", self.rule, ("topk", "threshold"))
        one_of("deletion", "fill", self.fill, ("neighbour_mean", "none"))
        one_of("deletion", "action", self.action, ("delete", "replace", "late", "per_token"))
        require(self.count >= 0, f"deletion.count must be >= 0, got {self.count}.")
        require(
            self.count == 0 or self.block is not None,
            f"deletion.count={self.count} needs deletion.block, the block at whose input tokens are deleted.",
        )
        require(self.block is None or self.block >= 0, f"deletion.block must be >= 0, got {self.block}.")
        require(self.kappa > 1.0, f"deletion.kappa must be > 1 (a ratio to the median norm), got {self.kappa}.")
        require(
            not (self.rule == "threshold" and self.fill == "none"),
            "deletion.rule='threshold' removes a different number of tokens from each image, so the outputs of a batch "
            "only line up with fill='neighbour_mean'. Use that fill, or rule='topk'.",
        )
        require(
            not (self.action in ("replace", "per_token") and self.fill == "none"),
            f"deletion.action={self.action!r} deletes no token, so that fill='none' has nothing to leave out. Use "
            "fill='neighbour_mean', or action='delete'.",
        )

    @property
    def active(self) -> bool:
        """Whether anything can happen to a token."""
        return self.count > 0

    @property
    def inside_mlp(self) -> bool:
        """Whether tokens are taken at the input of the MLP output projection, and not at that of the block."""
        return self.active and self.action in ("late", "per_token")


@dataclass(frozen=True)
class ModulesConfig:
    """Which modules are quantized besides the linear layers of the blocks.

    Attributes:
        patch_embedding: quantize the patch embedding too.
        head: quantize projection, classifier and pooling linears too (`nn.MultiheadAttention` of SigLIP's pooling head
            stays float).
        ignore: glob patterns of module names that stay float, matched against the name within the encoder
            (``encoder.layers.11.mlp.fc2``) and against its end (``mlp.fc2``).
        mixed_precision: glob patterns (likewise) of linear layers whose input has 16 bits, static, per tensor and symmetric
            with the absolute maximum; their weights keep the nominal bits.
    """

    patch_embedding: bool = False
    head: bool = False
    ignore: tuple[str, ...] = ()
    mixed_precision: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ignore", "mixed_precision"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"modules.{name} must be a list of patterns, got the string {getattr(self, name)!r}.")
        check_types(self, "modules")


@dataclass(frozen=True)
class AttentionConfig:
    """Quantization of the two attention products, QK^T and AV (docs/method.md 1). Simulated on every machine.

    Register rows and the probabilities that fall on them stay float (docs/method.md 4).

    Attributes:
        quantize: whether query, key, probabilities and value are quantized. False is the protocol "linear layers", true the
            protocol "linear layers and attention products".
        bits: 2 to 8, of all four operands.
        symmetric: zero point of query, key and value fixed at 0, otherwise free. Probabilities have their own forms.
        granularity: of query, key and value: ``per_tensor`` (scale [1]) or ``per_head`` (scale [H]).
        probabilities: ``uniform`` (2^b levels on [0, s]), ``twin`` (docs/method.md 11.4), ``log2`` or ``log_sqrt2``
            (docs/method.md 11.5), or ``dfq`` (2^b levels on [b1, b2] with the least error of AV, docs/method.md 11.14).
        observer: as in `ActivationsConfig`, with its default percentile and momentum; for query, key, value and the upper end
            of ``uniform`` probabilities.
    """

    quantize: bool = False
    bits: int = 8
    symmetric: bool = True
    granularity: str = "per_tensor"
    probabilities: str = "uniform"
    observer: str = "minmax"

    def __post_init__(self) -> None:
        check_bits("attention", self.bits)
        check_types(self, "attention")
        one_of("attention", "granularity", self.granularity, ("per_tensor", "per_head"))
        one_of("attention", "probabilities", self.probabilities, ("uniform", "twin", "log2", "log_sqrt2", "dfq"))
        one_of("attention", "observer", self.observer, ACTIVATION_OBSERVERS)


@dataclass(frozen=True)
class RewritesConfig:
    """Changes of the float model that a checkpoint needs to know about, because they leave something at run time.

    Attributes:
        rotation: the residual stream inside the blocks is rotated: the first block multiplies its input by a stored
            orthogonal matrix, the last one turns its output back (docs/method.md 11.9).
        register_neurons: ``"block:neuron"`` of the MLP hidden units whose activation a test-time register takes over
            (docs/method.md 11.12): one token that starts at zero is added after the leading tokens and dropped after the
            last block.
    """

    rotation: bool = False
    register_neurons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "rewrites")
        for text in self.register_neurons:
            block, colon, neuron = text.partition(":")
            require(
                bool(colon) and block.isdigit() and neuron.isdigit(),
                f"rewrites.register_neurons holds 'block:neuron' texts such as '3:117', got {text!r:.80}.",
            )

    def neurons(self) -> dict[int, list[int]]:
        """Block -> register neurons."""
        found: dict[int, list[int]] = {}
        for text in self.register_neurons:
            block, neuron = map(int, text.split(":"))
            found.setdefault(block, []).append(neuron)
        return found
