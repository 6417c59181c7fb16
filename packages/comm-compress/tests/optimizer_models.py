"""A small model with odd shapes, and loops over it, for tests of the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comm_compress as cc
import torch
from torch import nn

INTERVALS = {"var_freeze_step": 6, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 3}
SMALL = cc.Compression(bucket_bytes=600)  # several buckets


class Net(nn.Module):
    """A convolution, linear layers, norms, a bias alone, a scalar, a part that only some inputs use."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 3, 2)
        self.norm = nn.LayerNorm(12)
        self.first = nn.Linear(12, 11)
        self.side = nn.Linear(11, 11)
        self.last = nn.Linear(11, 5)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0))
        self.to(dtype)

    def forward(self, x: torch.Tensor, *, side: bool = True) -> torch.Tensor:
        y = self.conv(x).flatten(1)
        y = self.first(self.norm(y))
        if side:
            y = y + self.side(torch.tanh(y))
        return self.last(torch.tanh(y)) * self.gain


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one rank and step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(4, 1, 3, 3, generator=generator)
    return x.to(dtype), x.flatten(1)[:, :5].to(dtype)


def loss_of(model: nn.Module, rank: int, step: int, *, side: bool = True) -> torch.Tensor:
    """Mean squared error, fp32."""
    dtype = next(model.parameters()).dtype
    x, y = batch(rank, step, dtype)
    return (model(x, side=side) - y).float().square().mean()


BUILD: dict[str, Callable[..., Any]] = {
    "OneBitAdam": lambda params, **kw: cc.OneBitAdam(params, **{"lr": 1e-2, "freeze_step": 5, **kw}),
    "OneBitLamb": lambda params, **kw: cc.OneBitLamb(params, **{"lr": 1e-2, "freeze_step": 5, **kw}),
    "ZeroOneAdam": lambda params, **kw: cc.ZeroOneAdam(params, **{"lr": 1e-2, **INTERVALS, **kw}),
}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def not_raising() -> Iterator[None]:
    """Says in a test that the point is that nothing is raised."""
    yield
