"""A rank that dies, stalls or runs another program ends the others in bounded time, by name of unit and rank."""

from __future__ import annotations

import functools
import os
import time

import pytest
import torch
import zero_core as zero
from zero_core.testing import RankFailedError, run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, seeded

TIMEOUT_S = 4.0


def fail(rank: int, world_size: int, stage: int, how: str) -> tuple[str, float]:
    overlap = zero.Overlap(timeout_s=TIMEOUT_S)
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage, overlap=overlap)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = next(iter(batches(rank, 1)))
    loss_of(model, ids).backward()
    opt.step()
    opt.zero_grad()
    start = time.monotonic()
    if rank == 1:
        if how == "dies in backward":
            model.blocks[1].register_full_backward_hook(lambda *_: os._exit(17))
        elif how == "dies in forward":
            model.blocks[1].register_forward_pre_hook(lambda *_: os._exit(17))
        elif how == "stalls":
            time.sleep(TIMEOUT_S * 3)
            return "", 0.0
    try:
        if how != "has a backward less" or rank == 0:
            loss_of(model, ids).backward()
        opt.step()
    except zero.CollectiveError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("how", ["dies in backward", "dies in forward", "stalls"])
def test_survivors_end_with_a_name(stage: int, how: str) -> None:
    results = run_ranks(fail, 2, 2, stage, how, tolerate=(0, 1) if "dies" in how else (), timeout_s=90)
    message, seconds = results[0]
    assert "rank 0 of 2" in message
    assert "unit '" in message or "agreement" in message or "meeting before" in message
    assert "rank 1" in message
    assert seconds < TIMEOUT_S * 4
    if "dies" in how:
        assert "exit code 17" in results[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_diverge_are_told_apart(stage: int) -> None:
    results = run_ranks(fail, 2, 2, stage, "has a backward less", timeout_s=90)
    for rank, (message, seconds) in enumerate(results):
        assert f"rank {rank} of 2" in message
        assert f"rank {1 - rank} was at collective" in message
        assert f"rank {1 - rank} waits for this rank, and this rank for it" in message
        assert "of step 2" in message
        assert seconds < TIMEOUT_S / 2, "two that wait for each other need no deadline"
    assert "reduction of unit '" in results[0][0]


def diverge_over_messages(rank: int) -> tuple[str, float]:
    messages = functools.partial(zero.PlainCollectives, timeout_s=TIMEOUT_S, shared_memory=False)
    overlap = zero.Overlap(timeout_s=TIMEOUT_S)
    model = zero.shard(seeded(Net), dp_mesh(2), stage=2, overlap=overlap, collectives=messages)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    start = time.monotonic()
    try:
        if rank == 0:
            loss_of(model, next(iter(batches(rank, 1)))).backward()
        opt.step()
    except zero.CollectiveError as error:
        return str(error), time.monotonic() - start
    return "", 0.0


def test_over_messages_the_deadline_tells() -> None:
    for rank, (message, seconds) in enumerate(run_ranks(diverge_over_messages, 2)):
        assert f"rank {1 - rank} was at collective" in message
        assert TIMEOUT_S / 2 < seconds < TIMEOUT_S * 4


def test_the_default_deadline() -> None:
    assert zero.Overlap().timeout_s == 300.0


def test_at_stage_3_ranks_that_part_know_it_at_once() -> None:
    for rank, (message, seconds) in enumerate(run_ranks(fail, 2, 2, 3, "has a backward less", timeout_s=90)):
        assert f"rank {rank} of 2: ranks have parted: rank 0 begins a backward at unit '" in message
        assert "rank 1 has come to the end of a backward, a step" in message
        assert seconds < TIMEOUT_S


def first_to_fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("told you so")
    time.sleep(60)


def test_helper_reports_the_first_failure_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="told you so") as info:
        run_ranks(first_to_fail, 2)
    assert info.value.rank == 1
    assert time.monotonic() - start < 40
