"""The quantized patch embedding."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from optimum_regcache.config import ActivationsConfig, WeightsConfig
from optimum_regcache.layers.linear import QuantLinear


class QuantPatchEmbedding(nn.Module):
    """A patch embedding (convolution with kernel = stride, or linear over ready patches) as a `QuantLinear`.

    The flattened weight is [out, channels * kernel_h * kernel_w]. ``weight`` is an empty tensor: the models read its dtype
    to cast the pixels.
    """

    weight: torch.Tensor

    def __init__(self, linear: QuantLinear, kernel_size: tuple[int, int] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.kernel_size = kernel_size
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=linear.weight.device), persistent=False)

    @classmethod
    def empty_like(
        cls, module: nn.Module, weights: WeightsConfig, activations: ActivationsConfig
    ) -> QuantPatchEmbedding:
        """The same shape without weights. Raises `TypeError` as :meth:`from_float`."""
        flat, kernel = _flat_linear(module)
        return cls(QuantLinear.empty_like(flat, weights, activations), kernel, flat.weight.dtype)

    @classmethod
    def from_float(
        cls, module: nn.Module, weights: WeightsConfig, activations: ActivationsConfig
    ) -> QuantPatchEmbedding:
        """Quantize an `nn.Linear`, or an `nn.Conv2d` whose stride equals its kernel.

        Raises:
            TypeError: any other module.
        """
        flat, kernel = _flat_linear(module)
        return cls(QuantLinear.from_float(flat, weights, activations), kernel, flat.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolution: [B, C, H, W] -> [B, out, H / kernel_h, W / kernel_w]; linear: [..., in] -> [..., out]."""
        if self.kernel_size is None:
            return self.linear(x)
        height, width = x.shape[-2] // self.kernel_size[0], x.shape[-1] // self.kernel_size[1]
        y = self.linear(unfold_patches(x, self.kernel_size))
        return y.transpose(1, 2).reshape(x.shape[0], -1, height, width)


def _is_special(module: nn.Conv2d) -> bool:
    padded = module.padding not in ((0, 0), 0, "valid")
    return padded or tuple(module.dilation) != (1, 1) or module.groups != 1


def _flat_linear(module: nn.Module) -> tuple[nn.Linear, tuple[int, int] | None]:
    """The patch embedding as a linear layer over unfolded patches, and its kernel size (None if it is linear)."""
    if isinstance(module, nn.Linear):
        return module, None
    plain = isinstance(module, nn.Conv2d) and tuple(module.stride) == tuple(module.kernel_size)
    if not isinstance(module, nn.Conv2d) or not plain or _is_special(module):
        raise TypeError(
            "Only a patch embedding that is a linear layer, or a Conv2d with stride equal to its kernel, can be "
            "quantized. Set modules.patch_embedding=False for this model."
        )
    flat = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
    flat.weight = nn.Parameter(module.weight.detach().flatten(1), requires_grad=False)
    if module.bias is not None:
        flat.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return flat, (module.kernel_size[0], module.kernel_size[1])


def unfold_patches(x: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
    """[B, C, H, W] -> [B, patches, C * kernel_h * kernel_w]."""
    return F.unfold(x, kernel_size, stride=kernel_size).transpose(1, 2)
