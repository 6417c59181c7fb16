"""Structure is a feature: one training step runs through few of the package's files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import zero_core as zero
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, seeded

PACKAGE = str(Path(zero.__file__).parent)


def files_of_one_step(rank: int, world_size: int, stage: int) -> list[str]:
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    seen: set[str] = set()

    def trace(frame, event, arg):
        if frame.f_code.co_filename.startswith(PACKAGE):
            seen.add(Path(frame.f_code.co_filename).stem)

    for step, ids in enumerate(batches(rank, 2)):
        sys.setprofile(trace if step == 1 else None)
        loss_of(model, ids).backward()
        zero.clip_grad_norm(opt, 1.0)
        opt.step()
        opt.zero_grad()
    sys.setprofile(None)
    return sorted(seen)


@pytest.mark.parametrize(("stage", "budget"), [(1, 10), (2, 10), (3, 14)])
def test_a_step_stays_within_the_budget(stage: int, budget: int) -> None:
    for files in run_ranks(files_of_one_step, 2, 2, stage):
        assert {"hooks", "buckets", "collectives", "shared_memory", "optimizer"} <= set(files)
        assert len(files) <= budget, files
