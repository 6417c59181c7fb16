"""What the products mean: fp32 sums over the inner dimension, rounded once to the dtype of the activations."""

from __future__ import annotations

import torch
from torch import Tensor


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    y = x.to(torch.float32) @ weight.to(torch.float32).T
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype) if out is None else out.copy_(y)


@torch.no_grad()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """See ``accel_kernels.linear``."""
    return _product(x, weight, bias, out)


def dequantize_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """Fp32 ``weight * scale``, a scale for each row."""
    return weight.to(torch.float32) * scale.unsqueeze(1)


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Fp32 ``(q - zero) * scale``; byte j of a row holds elements 2j (low four bits) and 2j + 1 (high four)."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).to(torch.float32)
    q = q.view(packed.shape[0], 2 * packed.shape[1] // group_size, group_size)
    offset = 8.0 if zero is None else zero.to(torch.float32).unsqueeze(-1)
    return ((q - offset) * scale.unsqueeze(-1)).reshape(packed.shape[0], 2 * packed.shape[1])


@torch.no_grad()
def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """See ``accel_kernels.linear_int8``."""
    return _product(x, dequantize_int8(weight, scale), bias, out)


@torch.no_grad()
def linear_int4(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """See ``accel_kernels.linear_int4``."""
    return _product(x, dequantize_int4(packed, scale, zero, group_size), bias, out)
