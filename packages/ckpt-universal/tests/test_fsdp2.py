"""FSDP2 as it is: module and optimizer are leaves; another number of ranks, or none, goes on with the same losses."""

from __future__ import annotations

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

run_ranks = pytest.importorskip("zero_core.testing").run_ranks  # spawns processes
GLOBAL_BATCH = 12


def build(seed, sharded):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(3)), nn.Linear(10, 3))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model[:3]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, first, steps):
    """Losses over the global batch, whatever the number of ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, first + steps):
        batch = torch.randn(GLOBAL_BATCH, 10, generator=torch.Generator().manual_seed(step))
        loss = model(batch[rank::world]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def save_rank(rank, root):
    model, optimizer = build(0, sharded=True)
    train(model, optimizer, 0, 3)
    ckpt.save(root, {"model": model, "optimizer": optimizer}, step=3)
    return train(model, optimizer, 3, 4)


def load_rank(rank, root, sharded):
    model, optimizer = build(7, sharded)
    ckpt.load(root, into={"model": model, "optimizer": optimizer})
    return train(model, optimizer, 3, 4)


def test_losses_go_on(tmp_path):
    expected = run_ranks(save_rank, 2, tmp_path)[0]
    for world, sharded in [(1, False), (2, True), (3, True), (4, True)]:
        assert run_ranks(load_rank, world, tmp_path, sharded)[0] == pytest.approx(expected, rel=1e-6)
