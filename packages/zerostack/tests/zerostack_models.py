"""A small model with repeated blocks, a tied weight and a buffer, and data for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, CLASSES = 16, 11


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Small(nn.Module):
    def __init__(self, seed=0, frozen=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if frozen:
            self.blocks[0].up.requires_grad_(False)

    def forward(self, tokens):
        self.calls += 1
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, dims=1).flatten())


def batch(step, rank, size=2):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(CLASSES, (size, 6), generator=generator)


def config(stage, micro=2, **more):
    return {
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        **more,
    }


def train(engine, rank, steps):
    """The losses of some steps of an engine."""
    losses = []
    for step in steps:
        loss = engine(batch(step, rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
