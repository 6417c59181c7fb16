"""Ranks that skip layers, use other experts, generate or evaluate alone: as under DDP, without a flag."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from branching_models import KINDS, Model, what
from zero_core.params import Residency
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, relative_error, seeded


def train(rank: int, world_size: int, stage: int, kind: str, accumulate: int) -> tuple[float, int]:
    start = seeded(Model)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage, overlap=zero.Overlap(timeout_s=20))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.05))
    inner = torch.optim.SGD(plain.parameters(), lr=0.05)
    differ = 0
    for step in range(6):
        for micro in range(accumulate):
            model(**what(kind, rank, 10 * step + micro)).backward()
            ways = [what(kind, r, 10 * step + micro) for r in range(world_size)]
            differ += len({str((way["plan"], way.get("extra"))) for way in ways}) > 1
            for way in ways:
                (plain(**way) / world_size).backward()
        assert all(unit.residency is Residency.SHARDED for unit in zero.sharded(model).units) or stage < 3
        opt.step()
        opt.zero_grad()
        inner.step()
        inner.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict()), differ


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 3])
def test_trains_as_under_ddp(stage: int, kind: str) -> None:
    for error, differ in run_ranks(train, 2, 2, stage, kind, 1, timeout_s=60):
        assert error <= 2e-6
        assert differ >= 3, "the ranks did the same"


@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_under_ddp_on_three_ranks_with_accumulation(kind: str) -> None:
    assert max(error for error, _ in run_ranks(train, 3, 3, 3, kind, 2, timeout_s=90)) <= 1e-5


def peak_of_whole_units(rank: int, world_size: int) -> int:
    """The most units whole at once in a backward whose ranks use other experts."""
    model = zero.shard(seeded(Model), dp_mesh(world_size), stage=3)
    units = zero.sharded(model).units
    most = 0

    def count(*_) -> None:
        nonlocal most
        most = max(most, sum(unit.residency is not Residency.SHARDED for unit in units))

    for step in range(3):
        if step == 2:
            for block in model.blocks:
                block.register_full_backward_hook(count)
        model(**what("other experts", rank, step)).backward()
    return most


def test_an_expert_without_a_gradient_does_not_keep_its_block() -> None:
    assert max(run_ranks(peak_of_whole_units, 2, 2)) <= 4, "root, in use, ahead, just done"


def generate(rank: int, world_size: int) -> float:
    """Train, evaluate on one rank alone, generate to different lengths, and train on."""
    start = seeded(Model)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=3, overlap=zero.Overlap(timeout_s=20))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.05))
    inner = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(10):
        way = what("skips layers", 0, step)
        model(**way).backward()
        plain(**way).backward()
        if rank == step % 2:
            with torch.no_grad():
                assert torch.allclose(model(**way), plain(**way))
        for optimizer in (opt, inner):
            optimizer.step()
            optimizer.zero_grad()
        num_tokens = 1 + (3 * rank + step) % 5
        x = way["x"]
        found, expected = model.generate(x, num_tokens), plain.generate(x, num_tokens)
        assert found == pytest.approx(expected, rel=1e-5)
        dist.barrier()  # as to compare what all have generated
    assert zero.full_state_dict(model).keys() == plain.state_dict().keys()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_generation_ends_where_it_ends() -> None:
    assert max(run_ranks(generate, 2, 2)) <= 2e-6


def uneven_accumulation(rank: int, world_size: int) -> float:
    """Ranks with different numbers of micro-batches between two steps, all but the last under no_sync."""
    start = seeded(Model)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=3, overlap=zero.Overlap(timeout_s=20))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.05))
    inner = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(3):
        for r in range(world_size):
            for micro in range(1 + (r + step) % 3):
                way = what("skips layers", r, 10 * step + micro)
                if r == rank:
                    if micro < (r + step) % 3:
                        with zero.no_sync(model):
                            model(**way).backward()
                    else:
                        model(**way).backward()
                (plain(**way) / world_size).backward()
        for optimizer in (opt, inner):
            optimizer.step()
            optimizer.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_ranks_may_have_more_micro_batches_than_others() -> None:
    assert max(run_ranks(uneven_accumulation, 2, 2)) <= 2e-6


def only_one_rank_accumulates(rank: int, world_size: int, stage: int) -> str:
    model = zero.shard(seeded(Model), dp_mesh(world_size), stage=stage, overlap=zero.Overlap(timeout_s=20))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.05))
    if rank == 1:
        with zero.no_sync(model):
            model(**what("skips layers", 0, 0)).backward()
    with pytest.raises(zero.CollectiveError) as caught:
        opt.step()
    return str(caught.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_alone_has_gradients_to_reduce_is_an_error_that_says_why(stage: int) -> None:
    for message in run_ranks(only_one_rank_accumulates, 2, 2, stage):
        assert "the last pass before a step is under no_sync on all of them or on none" in message
