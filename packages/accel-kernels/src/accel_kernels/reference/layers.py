"""What the small ops between products mean: fp32 inside, rounded once to the dtype of the activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See ``accel_kernels.rms_norm``."""
    if residual is not None:
        residual.copy_(x.to(torch.float32) + residual.to(torch.float32))
        x = residual
    wide = x.to(torch.float32)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = wide * inverse * (weight.to(torch.float32) + weight_offset)
    return y.to(x.dtype) if out is None else out.copy_(y)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    half = cos.shape[-1]
    part = x[..., : 2 * half]
    first, second = (
        (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    )
    a, b = first.to(torch.float32), second.to(torch.float32)
    rotated = a * cos - b * sin, b * cos + a * sin  # both, before anything is written
    first.copy_(rotated[0])
    second.copy_(rotated[1])


@torch.no_grad()
def rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False
) -> None:
    """See ``accel_kernels.rotary``."""
    cos = cos[positions].to(torch.float32).unsqueeze(1)
    sin = sin[positions].to(torch.float32).unsqueeze(1)
    for x in (q, k):
        if x is not None:
            _rotate(x, cos, sin, interleaved)


@torch.no_grad()
def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See ``accel_kernels.silu_mul``."""
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    y = F.silu(gate) * up
    return y.to(gate_up.dtype) if out is None else out.copy_(y)


@torch.no_grad()
def gelu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See ``accel_kernels.gelu_mul``."""
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    y = F.gelu(gate, approximate="tanh") * up
    return y.to(gate_up.dtype) if out is None else out.copy_(y)
