"""Quantized collectives as the paper's equations say, in one process, and a model to train."""

from __future__ import annotations

import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress import ops
from comm_compress.gather import Once
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat
from torch import nn


def through(values: torch.Tensor, form: BlockFormat, out: torch.dtype = torch.float32) -> torch.Tensor:
    """What becomes of numbers that travel."""
    message = torch.empty(form.message_bytes(values.numel()), dtype=torch.uint8)
    ops.encode(values.contiguous(), message, form)
    back = torch.empty(values.numel(), dtype=out)
    ops.decode(message, back, form)
    return back


def simulated_gather(shards: list[torch.Tensor], form: BlockFormat) -> torch.Tensor:
    return torch.cat([through(shard, form, shard.dtype) for shard in shards])


def simulated_reduce(fulls: list[torch.Tensor], grid: Grid, form: BlockFormat) -> list[torch.Tensor]:
    """For each rank: the mean of its slices, each hop quantized once and summed in fp32."""
    n = fulls[0].numel() // grid.num_ranks
    found = []
    for rank in range(grid.num_ranks):
        sums = []
        for node in range(grid.num_nodes):
            members = grid.inside(node * grid.node_size)
            parts = [fulls[member][rank * n : (rank + 1) * n] for member in members]
            if grid.node_size > 1:
                parts = [through(part, form) for part in parts]
            sums.append(torch.stack([part.float() for part in parts]).sum(0) if len(parts) > 1 else parts[0])
        if grid.num_nodes > 1:
            sums = [through(part, form) for part in sums]
        found.append(sum(part.float() for part in sums) * (1.0 / grid.num_ranks))
    return found


WORDS, WIDTH = 23, 24


class Block(nn.Module):
    """Odd sizes, a scalar, and a parameter in a dtype of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH + 1)
        self.down = nn.Linear(3 * WIDTH + 1, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, WORDS, (2, 6), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())


def shard(model: nn.Module, stage: int, collectives, **more) -> tuple[nn.Module, zero.ShardedOptimizer]:
    model = zero.shard(model, dist.group.WORLD, stage=stage, collectives=collectives, **more)
    return model, zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    rank: int,
    steps: range,
    accumulate: int = 1,
    device: str = "cpu",
) -> list[float]:
    """Losses of this rank's batches."""
    losses = []
    for step in steps:
        for micro in range(accumulate):
            loss = loss_of(model, batch(rank, step * accumulate + micro).to(device)) / accumulate
            loss.backward()
            losses.append(float(loss))
        opt.step()
        opt.zero_grad()
    return losses


class SimulatedCollectives:
    """zero-core's own, and what quantization makes of their values worked out on each rank by itself."""

    def __init__(
        self, group: dist.ProcessGroup, grid: Grid, weights: BlockFormat | None, grads: BlockFormat | None
    ):
        self.plain = zero.PlainCollectives(group)
        self.grid, self.weights, self.grads, self.rank = grid, weights, grads, group.rank()

    def all_gather(self, shard, out, *, tag):
        return self.plain.all_gather(shard, out, tag=tag)

    def is_exact(self, nbytes, dtype, *, trainable):
        return self.weights is None

    def gather_weights(self, shard, out, *, tag, version, trainable):
        handle = self.plain.all_gather(shard().clone(), out, tag=tag)
        form = self.weights
        if form is None:
            return handle
        then = lambda: out.copy_(simulated_gather(list(out.view(self.grid.num_ranks, -1)), form))  # noqa: E731
        return Once(handle, then)

    def reduce_scatter(self, full, out, *, tag):
        if self.grads is None:
            return self.plain.reduce_scatter(full, out, tag=tag)
        every = torch.empty(self.grid.num_ranks, full.numel(), dtype=full.dtype)
        handle = self.plain.all_gather(full, every.view(-1), tag=tag)
        form = self.grads
        return Once(handle, lambda: out.copy_(simulated_reduce(list(every), self.grid, form)[self.rank]))

    def trim(self):
        self.plain.trim()
