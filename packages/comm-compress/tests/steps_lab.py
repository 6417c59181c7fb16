"""Small problems for the optimizers: parameters of odd sizes, and gradients that differ from rank to rank.

A gradient is a function of (parameters, rank, step), the same in a rank's process and in a simulation of all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

SHAPES: list[tuple[int, ...]] = [(3, 5), (7,), (), (1,), (0,), (2, 3, 4), (13,)]


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Values from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One fp32 vector."""
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def layers_of(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[slice]:
    """Where each parameter lies in the vector; empty ones are left out."""
    edges = [0]
    for shape in shapes:
        edges.append(edges[-1] + math.prod(shape))
    return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]


def gradient(x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """Of rank `rank`'s loss at step `step` (from 1): a noisy bowl, whose bottom is elsewhere on every rank."""
    generator = torch.Generator().manual_seed(100_003 * rank + step)
    bottom = torch.linspace(-1, 1, x.numel()).roll(3 * rank + 1)
    steep = torch.linspace(0.3, 3.0, x.numel())
    return steep * (x - bottom) + 0.3 * torch.randn(x.numel(), generator=generator)


def set_gradients(params: Sequence[torch.nn.Parameter], rank: int, step: int) -> None:
    """Put this rank's gradient where backward would."""
    whole = gradient(flat(params), rank, step)
    start = 0
    for param in params:
        numel = param.numel()
        param.grad = whole[start : start + numel].view(param.shape).to(param.dtype)
        start += numel


def rate(step: int, base: float = 0.05) -> float:
    """A rate that rises and then falls."""
    return base * min(1.0, step / 4) * 0.97**step


def world_group() -> dist.ProcessGroup:
    """All ranks."""
    return dist.distributed_c10d._get_default_group()
