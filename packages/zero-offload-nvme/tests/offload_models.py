"""Parameters, gradients and measures that this package's tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import zero_offload_nvme as off
from torch import Tensor, nn

Make = Callable[..., torch.optim.Optimizer]

# Ours, torch's, and the options of both.
PAIRS: dict[str, tuple[Make, Make, dict[str, Any]]] = {
    "adamw": (off.CPUAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw, no decay": (
        off.CPUAdamW,
        torch.optim.AdamW,
        {"betas": (0.8, 0.95), "weight_decay": 0.0, "eps": 1e-6},
    ),
    "adam": (off.CPUAdam, torch.optim.Adam, {"lr": 1e-2}),
    "adam, L2": (off.CPUAdam, torch.optim.Adam, {"weight_decay": 0.1}),
    "adam, decoupled": (off.CPUAdam, torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adagrad": (off.CPUAdagrad, torch.optim.Adagrad, {"lr": 1e-2}),
    "adagrad, all": (
        off.CPUAdagrad,
        torch.optim.Adagrad,
        {"lr": 1e-2, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-8},
    ),
}
SHAPES = ((), (1,), (7,), (0,), (3, 0, 2), (33, 5), (2, 3, 4), (1000,), (70, 130))


def make_params(
    shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(tuple(shape), generator=generator).to(dtype)) for shape in shapes]


def copies_of(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def give_grads(*lists: Sequence[Tensor], seed: int) -> None:
    """The same random gradients to each list."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = grad.to(param.dtype).to(param.device)


def train(*pairs: tuple[torch.optim.Optimizer, Sequence[Tensor]], steps: int, seed: int = 0) -> None:
    """Step each optimizer on the same gradients."""
    for step in range(steps):
        give_grads(*(params for _, params in pairs), seed=1000 * seed + step)
        for optimizer, _ in pairs:
            optimizer.step()
