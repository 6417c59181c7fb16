"""Weights to int8 and int4, once, when a model is loaded; in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks_inference import FLOATS, expect
from ..errors import AccelValueError


@torch.no_grad()
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a scale for each row: largest magnitude / 127.

    Args:
        weight: ``[N, K]``, fp32, bf16 or fp16.

    Returns:
        int8 ``[N, K]`` and fp32 ``[N]``, for ``linear_int8``. A weight is off by at most scale / 2.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: not a matrix.
    """
    expect("quantize_int8", "weight", weight, FLOATS, (None, None))
    w = weight.to(torch.float32)
    if w.shape[1] == 0:
        return w.to(torch.int8), w.new_zeros(w.shape[0])
    scale = w.abs().amax(dim=1) / 127.0
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (w / divisor.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


@torch.no_grad()
def quantize_int4(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits an element, with a scale and a zero point for each group of neighbours in a row.

    Args:
        weight: ``[N, K]``, fp32, bf16 or fp16.
        group_size: a multiple of 32 that divides K.

    Returns:
        packed uint8 ``[N, K / 2]``, scale fp32 and zero uint8 ``[N, K / group_size]``, for ``linear_int4``. A
        weight is off by at most scale = (largest - smallest, 0 among them) / 15.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: not a matrix, or a group size that does not fit.
    """
    op = "quantize_int4"
    expect(op, "weight", weight, FLOATS, (None, None))
    num_outputs, num_inputs = weight.shape
    if group_size < 1 or group_size % 32 or num_inputs % group_size:
        raise AccelValueError(
            f"{op}: group_size: expected a multiple of 32 that divides K = {num_inputs}, got {group_size}"
        )
    groups = weight.to(torch.float32).reshape(num_outputs, num_inputs // group_size, group_size)
    if groups.numel() == 0:
        empty = groups.new_zeros(num_outputs, num_inputs // max(group_size, 1))
        return empty.new_zeros(num_outputs, num_inputs // 2, dtype=torch.uint8), empty, empty.to(torch.uint8)
    low, high = groups.amin(dim=-1).clamp(max=0.0), groups.amax(dim=-1).clamp(min=0.0)
    scale = (high - low) / 15.0
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / divisor).round().clamp(0, 15)
    q = (groups / divisor.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8)
    pairs = q.reshape(num_outputs, num_inputs // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), scale, zero.to(torch.uint8)
