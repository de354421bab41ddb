"""The two attention products QK^T and AV with quantized operands. Simulated in float on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from optimum_regcache.config import AttentionConfig
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.math import uniform
from optimum_regcache.math.nonuniform import quantize_probabilities
from optimum_regcache.registers import prepare_tower


class Operand(nn.Module):
    """One operand of an attention product; passes its input on until :meth:`set_qparams` was called.

    State: ``scale`` float32 [1] or [H], NaN before; ``zero_point`` int32 likewise (not for probabilities, whose scale is the
    parameter of their form); ``lower`` float32 [1] (the lower end of probabilities of the form ``dfq``, ``scale`` the upper).
    """

    zero_point: torch.Tensor | None
    lower: torch.Tensor | None

    def __init__(self, role: str, scales: int, config: AttentionConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.role, self.config, self.bypass = role, config, False
        self.scale = nn.Buffer(torch.full((scales,), float("nan"), dtype=torch.float32, device=device))
        zero = torch.zeros(scales, dtype=torch.int32, device=device)
        self.register_buffer("zero_point", None if role == "probabilities" else zero)
        interval = role == "probabilities" and config.probabilities == "dfq"
        self.register_buffer("lower", torch.zeros(scales, dtype=torch.float32, device=device) if interval else None)

    def set_qparams(self, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> None:
        """Store scale and zero point, each of the shape of ``scale`` or 0-dim. For ``dfq`` the scale is the upper end of the
        interval and the zero point the lower one, 0 where it is left out.

        Raises:
            ValueError: a scale that is not positive and finite, or an interval that is none.
        """
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"Scales of {self.role} must be positive and finite, got {scale.tolist()}.")
        if self.lower is not None:
            lower = torch.zeros_like(scale) if zero_point is None else zero_point
            if not bool(((lower >= 0) & (lower < scale)).all()):
                raise ValueError(
                    f"The lower end of {self.role} must be at least 0 and below the upper one, got {lower.tolist()} and "
                    f"{scale.tolist()}."
                )
            self.lower = lower.detach().to(self.scale.device, torch.float32).expand(self.scale.shape).clone()
        self.scale = scale.detach().to(self.scale.device, torch.float32).expand(self.scale.shape).clone()
        if self.zero_point is not None and zero_point is not None:
            self.zero_point = zero_point.detach().to(self.scale.device, torch.int32).expand(self.scale.shape).clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, N, d or N] -> the same, quantized and dequantized, in the dtype of ``x``.

        Raises:
            ValueError: never calibrated.
        """
        if self.bypass:
            return x
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(self.scale).all()):
            raise ValueError(f"The attention operand {self.role!r} was never calibrated.")
        scale, c = self.scale.reshape(-1, 1, 1), self.config
        if self.zero_point is None:
            lower = 0.0 if self.lower is None else self.lower.reshape(-1, 1, 1)
            return quantize_probabilities(x, scale, c.bits, c.probabilities, lower).to(x.dtype)
        return uniform.fake_quantize(x, scale, self.zero_point.reshape(-1, 1, 1), c.bits, c.symmetric).to(x.dtype)

    def _apply(self, fn: object, recurse: bool = True) -> Operand:
        exact, lower = self.scale, self.lower
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        if self.scale.dtype != torch.float32:  # scales stay float32 when the model is cast
            self.scale = exact.to(self.scale.device)
            self.lower = None if lower is None else lower.to(self.scale.device)
        return self


class AttentionProducts(nn.Module):
    """``softmax(Q K^T s + mask) V`` whose operands pass through `Operand` modules.

    Register rows and the probabilities on them stay float (docs/method.md 4): they are constants of their own range.
    """

    def __init__(self, heads: int, config: AttentionConfig, device: torch.device | None = None) -> None:
        super().__init__()
        scales = heads if config.granularity == "per_head" else 1
        self.query, self.key = (Operand(role, scales, config, device) for role in ("query", "key"))
        self.probabilities = Operand("probabilities", 1, config, device)
        self.value = Operand("value", scales, config, device)
        self.logits, self.output = nn.Identity(), nn.Identity()  # for hooks that watch the two products

    def operands(self) -> Iterator[tuple[str, Operand]]:
        """Role and module."""
        for operand in (self.query, self.key, self.probabilities, self.value):
            yield operand.role, operand

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        registers: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of image tokens.

        Args:
            query, key, value: [B, H, N, d].
            registers: keys and values of the register rows, each [H, n, d]; None without registers.
            mask: additive, [B or 1, 1, N, n + N], or None.
            scaling: of the logits.

        Returns:
            (output [B, N, H, d], probabilities [B, H, N, n + N] after quantization).
        """
        query, key, value = self.query(query), self.key(key), self.value(value)
        rows = 0
        if registers is not None:
            rows = registers[0].shape[1]
            k, v = (t.to(key).unsqueeze(0).expand(key.shape[0], -1, -1, -1) for t in registers)
            key, value = torch.cat((k, key), 2), torch.cat((v, value), 2)
        logits = self.logits(query @ key.transpose(-1, -2)) * scaling
        weights = (logits if mask is None else logits + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = torch.cat((weights[..., :rows], self.probabilities(weights[..., rows:])), -1)
        return self.output(weights @ value).transpose(1, 2), weights


def attention_products(model: nn.Module) -> Iterator[tuple[str, AttentionProducts]]:
    """Names and modules of all quantized attention products."""
    for name, module in model.named_modules():
        if isinstance(module, AttentionProducts):
            yield name, module


def install_products(model: nn.Module, config: AttentionConfig, *, bypass: bool = False) -> None:
    """Put `AttentionProducts` into every attention module of the tower, or take them out if ``config.quantize`` is false.

    Args:
        model: model or tower, prepared or not.
        config: form and granularity.
        bypass: operands pass through, so that calibration can watch them in the float model.
    """
    prepare_tower(model)
    tower = find_tower(model)
    for index in range(len(tower.blocks)):
        attention = tower.attention(index)
        products = None
        if config.quantize:
            device = next(tower.blocks[index].parameters()).device
            products = AttentionProducts(tower.num_heads, config, device)
            for _, operand in products.operands():
                operand.bypass = bypass
        attention.register_module("products", products)
