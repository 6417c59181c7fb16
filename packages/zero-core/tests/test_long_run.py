"""Two thousand steps: nothing grows, and the loss is that of plain averaging."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, seeded

STEPS, WIDTH = 2000, 16


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
    )


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * rank + step % 50)
    x = torch.randn(4, WIDTH, generator=generator)
    return x, x.roll(1, 1).sin()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def train(rank: int, world_size: int, stage: int) -> tuple[float, float, list[int], list[int]]:
    start = seeded(build)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    inner = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    resident, tensors = [], []
    for step in range(STEPS):
        F.mse_loss(model(batch(rank, step)[0]), batch(rank, step)[1]).backward()
        zero.clip_grad_norm(opt, 1.0)
        opt.step()
        opt.zero_grad()
        for r in range(world_size):
            (F.mse_loss(plain(batch(r, step)[0]), batch(r, step)[1]) / world_size).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        inner.step()
        inner.zero_grad()
        if step % 500 == 499:
            resident.append(resident_bytes())
            tensors.append(live_tensors())
    with torch.no_grad():
        x, y = batch(0, 0)
        return float(F.mse_loss(model(x), y)), float(F.mse_loss(plain(x), y)), resident, tensors


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_nothing_grows_and_the_loss_agrees(stage: int) -> None:
    for ours, plain, resident, tensors in run_ranks(train, 2, 2, stage, timeout_s=240):
        assert ours == pytest.approx(plain, rel=1e-4)
        assert ours < 0.4, "it has learned nothing"
        assert tensors[-1] <= tensors[0]
        assert resident[-1] - resident[0] <= 4 << 20
