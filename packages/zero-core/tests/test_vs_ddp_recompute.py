"""The parity matrix over recomputation and tiles: parameters equal plain DDP's, whatever is computed again or cut."""

from __future__ import annotations

import itertools

import pytest
import torch
import zero_core as zero
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from zero_core.testing import run_ranks
from zero_core_models import Block, Untied, batches, loss_of, plain_copy, relative_error, seeded

STEPS = 5
RECOMPUTE = ("none", "full", "partitioned", "host")
KNOBS = list(itertools.product(RECOMPUTE, (False, True), (1, 3), (False, True)))


def policy(name: str, mesh: DeviceMesh) -> zero.CheckpointPolicy:
    if name == "partitioned":  # over ranks that have the same batch
        return zero.CheckpointPolicy(min_bytes=1, partition=mesh["tp"].get_group())
    return zero.CheckpointPolicy(min_bytes=1, host=True) if name == "host" else zero.CheckpointPolicy()


def freeze_some(model: nn.Module) -> None:
    model.blocks[0].up.weight.requires_grad_(False)
    for param in model.blocks[1].parameters():
        param.requires_grad_(False)


def train(model: nn.Module, optimizer, clip, dp_rank: int, accumulate: int) -> None:
    ids = iter(batches(dp_rank, STEPS * accumulate))
    for _ in range(STEPS):
        for _ in range(accumulate):
            (loss_of(model, next(ids)) / accumulate).backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def compare(rank: int, stage: int) -> dict[tuple, float]:
    """Worst relative error of each combination, on two data parallel groups of two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp_rank, group = mesh.get_local_rank("dp"), mesh["dp"].get_group()
    references, worst = {}, {}
    for knob in KNOBS:
        recompute, tiled, accumulate, frozen = knob
        start = seeded(lambda: Untied(unused=True))
        if frozen:
            freeze_some(start)
        if (accumulate, frozen) not in references:
            ddp = DistributedDataParallel(plain_copy(start), process_group=group, find_unused_parameters=True)
            clip = lambda ddp=ddp: torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)  # noqa: E731
            train(ddp, adamw(ddp), clip, dp_rank, accumulate)
            references[accumulate, frozen] = ddp.module.state_dict()
        if tiled:
            zero.tile_linear(start, max_bytes=2000)
            assert sum("tiles" in name for name, _ in start.named_modules()) > 8
        if recompute != "none":
            zero.checkpoint_modules(start, Block, policy(recompute, mesh))
        model = zero.shard(start, mesh, stage=stage)
        opt = zero.ShardedOptimizer(model, adamw(model))
        train(model, opt, lambda opt=opt: zero.clip_grad_norm(opt, 0.5), dp_rank, accumulate)
        worst[knob] = relative_error(zero.full_state_dict(model), references[accumulate, frozen])
    return worst


@pytest.mark.parametrize("stage", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2)), 3])
def test_fp32_equals_ddp(stage: int) -> None:
    for worst in run_ranks(compare, 4, stage, timeout_s=280):
        assert len(worst) == len(KNOBS)
        bad = {knob: error for knob, error in worst.items() if not error <= 1e-6}
        assert not bad
