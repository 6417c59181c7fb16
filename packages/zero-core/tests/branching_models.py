"""A model whose ranks may take different ways through it, and what each does in a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, BLOCKS = 16, 5


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Routes the whole batch to one of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return x + self.experts[expert](self.norm(x))


class Model(nn.Module):
    """`plan` says which blocks run, and which of their experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.extra = nn.ModuleList(Expert() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, plan: list[tuple[int, int]], *, extra: bool = False) -> torch.Tensor:
        x = self.embed(x)
        for block, expert in plan:
            x = self.blocks[block](x, expert)
        if extra:
            for module in self.extra:
                x = x + module(x)
        return self.head(x).square().mean()

    @torch.no_grad()
    def generate(self, x: torch.Tensor, num_tokens: int) -> list[float]:
        return [float(self(x + step, [(i, 0) for i in range(BLOCKS)])) for step in range(num_tokens)]


def what(kind: str, rank: int, step: int) -> dict:
    """What a rank does in a step: its input, and its way through the model."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    coin = torch.randint(0, 2, (BLOCKS,), generator=generator).tolist()
    experts = torch.randint(0, 3, (BLOCKS,), generator=generator).tolist()
    x = torch.randn(2, WIDTH, generator=generator)
    if kind == "skips layers":
        return {"x": x, "plan": [(i, 0) for i in range(BLOCKS) if coin[i]]}
    if kind == "other experts":
        return {"x": x, "plan": list(enumerate(experts))}
    if kind == "another order":
        order = torch.randperm(BLOCKS, generator=generator).tolist()
        return {"x": x, "plan": [(i, 0) for i in order]}
    if kind == "a tower left out":
        return {"x": x, "plan": [(i, 0) for i in range(BLOCKS)], "extra": (rank + step) % 3 == 0}
    return {"x": x, "plan": [(i, experts[i]) for i in range(BLOCKS) if coin[i]] * 2, "extra": bool(coin[0])}


KINDS = ["skips layers", "other experts", "another order", "a tower left out", "everything"]
