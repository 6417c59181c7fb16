"""Small models with everything that makes sharding hard, and a loop to train them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

VOCAB, WIDTH = 31, 19


class Block(nn.Module):
    """Odd sizes, a scalar, a zero-size and a non-contiguous parameter, and one that no forward uses."""

    def __init__(self, width: int = WIDTH, *, unused: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width + 1)
        self.down = nn.Linear(3 * width + 1, width)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(3, width).t() / 8)
        if unused:
            self.unused = nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale * self.down(F.gelu(self.up(self.norm(x))))
        return x + (x @ self.turned) @ self.turned.t() + self.nothing.sum()


class Net(nn.Module):
    """Tied embedding and head around repeated blocks; a buffer."""

    def __init__(self, num_blocks: int = 3, *, unused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(unused=unused) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("bias", torch.linspace(-1, 1, VOCAB))
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) + self.bias.to(x.dtype)


class Untied(Net):
    """Its embedding and its head are their own."""

    def __init__(self, num_blocks: int = 3, *, unused: bool = False) -> None:
        super().__init__(num_blocks, unused=unused)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


def dp_mesh(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(-1, 1).flatten())


def batches(rank: int, count: int, seed: int = 100) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + rank)
    for _ in range(count):
        yield torch.randint(0, VOCAB, (2, 5), generator=generator)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with contiguous parameters, as sharded ones are: a transposed matmul would round differently."""
    copied = copy.deepcopy(model)
    for param in copied.parameters():
        param.data = param.data.contiguous()
    return copied


def relative_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest, over tensors, of |found - expected| / |expected| in the 2-norm; inf where not finite."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = 0.0
    for name, want in expected.items():
        if want.numel():
            error = float(
                (found[name].double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
            )
            worst = max(worst, error if error == error else float("inf"))
    return worst
