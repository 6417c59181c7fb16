"""fp16: scaling changes nothing where nothing overflows; an overflow on one rank skips the step on all, by name."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, relative_error, seeded


def scaled_and_not(rank: int, world_size: int, stage: int) -> float:
    states = []
    for scaler in (None, zero.LossScaler(2.0**10, dynamic=False)):
        model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage)
        opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=scaler)
        for ids in batches(rank, 3):
            loss = loss_of(model, ids)
            (scaler.scale(loss) if scaler else loss).backward()
            norm = zero.clip_grad_norm(opt, 0.5)
            assert 0.5 < norm.item() < 50
            opt.step()
            opt.zero_grad()
        states.append(zero.full_state_dict(model))
    return relative_error(*states)


@pytest.mark.parametrize("stage", [0, 3])
def test_power_of_two_scale_changes_no_bit_in_fp32(stage: int) -> None:
    assert max(run_ranks(scaled_and_not, 2, 2, stage)) <= 1e-7


def overflow_on_one_rank(rank: int, world_size: int, stage: int):
    scaler = zero.LossScaler(2.0**8, growth_interval=2, hysteresis=2)
    precision = zero.Precision(compute=torch.float16)
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage, precision=precision)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=scaler)
    log = []
    for step, ids in enumerate(batches(rank, 6)):
        before = zero.full_state_dict(model)
        loss = scaler.scale(loss_of(model, ids))
        if step in (1, 2) and rank == world_size - 1:
            loss = loss + model.blocks[1].up(torch.full((1, 19), 6e4, dtype=torch.float16)).sum() * 1e4
        loss.backward()
        opt.step()
        moved = relative_error(zero.full_state_dict(model), before)
        log.append((opt.last_step_skipped, scaler.value, moved > 0))
        report = opt.overflow_report
        if report is not None:
            assert report.parameter.startswith("blocks.1.up")
            assert report.module == "blocks.1.up"
            assert report.step == step + 1
            assert "blocks.1.up" in str(report)
        opt.zero_grad()
    return log


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_overflow_skips_on_all_ranks_and_adapts_the_scale(stage: int) -> None:
    logs = run_ranks(overflow_on_one_rank, 2, 2, stage)
    assert logs[0] == logs[1]
    assert logs[0] == [
        (False, 256.0, True),
        (True, 256.0, False),  # hysteresis tolerates one
        (True, 128.0, False),
        (False, 128.0, True),
        (False, 256.0, True),  # two finite steps
        (False, 256.0, True),
    ]


def test_scaler_arithmetic() -> None:
    scaler = zero.LossScaler(8.0, growth_interval=1, min_scale=4.0)
    scaler.update(overflow=True)
    assert scaler.value == 4.0
    with pytest.raises(OverflowError, match="smallest scale"):
        scaler.update(overflow=True)
    scaler.update(overflow=False)
    assert scaler.value == 8.0
    other = zero.LossScaler(2.0)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    static = zero.LossScaler(8.0, dynamic=False)
    static.update(overflow=True)
    assert static.value == 8.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_scale": 0.0},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.5},
        {"hysteresis": 0},
        {"min_scale": 2.0**20},
    ],
)
def test_scaler_refuses(wrong: dict) -> None:
    with pytest.raises(zero.ZeroConfigError, match=next(iter(wrong))):
        zero.LossScaler(**wrong)
