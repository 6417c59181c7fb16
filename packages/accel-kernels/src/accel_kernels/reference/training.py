"""What the optimizer steps, the norm and the casts mean.

The order of the floating-point operations is part of the meaning: each line below is one rounding, nothing is
fused, and the optimizer steps of all back ends agree with it bit for bit (the norm agrees to fp64 rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..segments import (
    AdagradSegment,
    AdamSegment,
    Flag,
    LionSegment,
    Optimizer,
    Segment,
    SgdSegment,
)
from .random import random_32, rounding_key

__all__ = ["adagrad_step", "adam_step", "cast_copy", "grad_norm_scale", "lion_step", "sgd_step"]


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded fp32 square root; ``torch.sqrt`` may use a library that is a unit off.

    Through fp64 it is exact: no fp32 number has a root close enough to the middle of two others.
    """
    return x.to(torch.float64).sqrt().to(torch.float32)


def _adam(p: Tensor, g: Tensor, states: Sequence[Tensor], segment: Segment) -> None:
    m, v = states
    (beta1, omb1, beta2, omb2, inv_sqrt_correction2, eps, step_size, decay), flags = segment.coefficients()
    if flags & Flag.L2:
        g = g + p * decay
    m.mul_(beta1).add_(g * omb1)
    v.mul_(beta2).add_((g * g) * omb2)
    denominator = _sqrt(v) * inv_sqrt_correction2 + eps
    update = (m * step_size) / denominator
    p.copy_(p - update if flags & Flag.L2 else p * decay - update)


def _lion(p: Tensor, g: Tensor, states: Sequence[Tensor], segment: Segment) -> None:
    (m,) = states
    (beta1, omb1, beta2, omb2, lr, decay), _ = segment.coefficients()
    direction = (m * beta1 + g * omb1).sign()
    p.mul_(decay).sub_(direction * lr)
    m.mul_(beta2).add_(g * omb2)


def _adagrad(p: Tensor, g: Tensor, states: Sequence[Tensor], segment: Segment) -> None:
    (total,) = states
    (step_size, eps, l2), flags = segment.coefficients()
    if flags & Flag.L2:
        g = g + p * l2
    total.add_(g * g)
    p.sub_((g * step_size) / (_sqrt(total) + eps))


def _sgd(p: Tensor, g: Tensor, states: Sequence[Tensor], segment: Segment) -> None:
    (lr, momentum, one_minus_dampening, l2), flags = segment.coefficients()
    if flags & Flag.L2:
        g = g + p * l2
    if flags & Flag.MOMENTUM:
        (buffer,) = states
        buffer.copy_(g if flags & Flag.FIRST else buffer * momentum + g * one_minus_dampening)
        g = g + buffer * momentum if flags & Flag.NESTEROV else buffer
    p.sub_(g * lr)


RULES: dict[Optimizer, Callable[[Tensor, Tensor, Sequence[Tensor], Segment], None]] = {
    Optimizer.ADAM: _adam,
    Optimizer.LION: _lion,
    Optimizer.ADAGRAD: _adagrad,
    Optimizer.SGD: _sgd,
}


@torch.no_grad()
def step(
    optimizer: Optimizer,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    segments: Sequence[Segment],
    grad_scale: float | Tensor,
    low_precision: Tensor | None,
) -> None:
    """One optimizer step, segment by segment; elements outside all segments stay as they are."""
    for segment in segments:
        part = slice(segment.start, segment.stop)
        p = param[part]
        g = grad[part].to(torch.float32) * grad_scale
        RULES[optimizer](p, g, [state[part] for state in states], segment)
        if low_precision is not None:
            low_precision[part].copy_(p)


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Sequence[AdamSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
) -> None:
    """See ``accel_kernels.adam_step``."""
    step(Optimizer.ADAM, param, grad, (exp_avg, exp_avg_sq), segments, grad_scale, low_precision)


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    segments: Sequence[LionSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
) -> None:
    """See ``accel_kernels.lion_step``."""
    step(Optimizer.LION, param, grad, (exp_avg,), segments, grad_scale, low_precision)


def adagrad_step(
    param: Tensor,
    grad: Tensor,
    state_sum: Tensor,
    segments: Sequence[AdagradSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
) -> None:
    """See ``accel_kernels.adagrad_step``."""
    step(Optimizer.ADAGRAD, param, grad, (state_sum,), segments, grad_scale, low_precision)


def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    segments: Sequence[SgdSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
) -> None:
    """See ``accel_kernels.sgd_step``."""
    states = () if momentum_buffer is None else (momentum_buffer,)
    step(Optimizer.SGD, param, grad, states, segments, grad_scale, low_precision)


@torch.no_grad()
def grad_norm_scale(
    grads: Tensor | Sequence[Tensor], *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """See ``accel_kernels.grad_norm_scale``."""
    tensors = [grads] if isinstance(grads, Tensor) else list(grads)
    if out is None:
        device = tensors[0].device if tensors else torch.device("cpu")
        out = torch.zeros(2, dtype=torch.float64, device=device)
    for grad in tensors:
        out[0] += grad.to(torch.float64).square().sum() * (scale * scale)
        out[1] += (~grad.isfinite()).sum()
    return out


def _round_stochastically(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Fp32 ``x`` as ``dtype``: up with a probability equal to the part cut off; unbiased.

    Values beyond the largest finite one round to nearest; for fp16, those below 2^-32 become zero.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (bits + (random & 0xFFFF)) >> 16
        largest = 0x7F7F0000
    else:
        exponent = magnitude >> 23
        normal = exponent >= 113
        mantissa = torch.where(normal, magnitude, (magnitude & 0x7FFFFF) | 0x800000)
        drop = torch.where(normal, 13, 126 - exponent.clamp(min=95))
        kept = (mantissa + (random & ((1 << drop) - 1))) >> drop
        value = torch.where(normal, kept - (112 << 10), torch.where(exponent < 95, 0, kept))
        rounded = ((bits >> 16) & 0x8000) | value
        largest = 0x477FE000
    as_signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded)
    return torch.where(magnitude > largest, x.to(dtype), as_signed.to(torch.int16).view(dtype))


@torch.no_grad()
def cast_copy(
    src: Tensor,
    dst: Tensor,
    *,
    scale: float = 1.0,
    stochastic: bool = False,
    seed: int | None = None,
    first_index: int = 0,
) -> None:
    """See ``accel_kernels.cast_copy``; ``first_index`` is the place of ``src[0]`` in a larger whole."""
    x = src.to(torch.float32) * scale
    if stochastic and dst.dtype != torch.float32:
        indices = torch.arange(first_index, first_index + src.numel(), device=src.device)
        dst.copy_(_round_stochastically(x, random_32(rounding_key(seed or 0), indices), dst.dtype))
    else:
        dst.copy_(x)
