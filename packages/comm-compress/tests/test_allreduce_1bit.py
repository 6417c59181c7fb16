"""The 1-bit all-reduce against the paper's equations in one process: any number of ranks, any length, any dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress import CompressConfigError, CompressStateError, OneBitState, allreduce_1bit
from comm_compress.allreduce_1bit import start_allreduce_1bit
from comm_compress.wire_1bit import chunk_ranges, sent_1bit
from papers_1bit import TwoPhases
from wire_lab import counted
from zero_core.testing import run_ranks

LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 63, 65, 127, 1001]
ROUNDS = 6


def part(rank: int, length: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * length + 10 * step + rank)
    return (torch.randn(length, generator=generator) * (1 + step)).to(dtype)


def world_group() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()


def reduce_all(rank: int, dtype: torch.dtype, norm: Any) -> dict[int, list[torch.Tensor]]:
    found = {}
    for length in LENGTHS:
        state, results = None, []
        for step in range(ROUNDS):
            tensor = part(rank, length, step, dtype)
            state = allreduce_1bit(tensor, world_group(), state, norm=norm)
            results.append(tensor)
        assert state is not None
        found[length] = [*results, state.worker_error, state.server_error]
    return found


@pytest.mark.parametrize(
    ("world", "dtype", "norm"),
    [(1, torch.float32, "l2"), (2, torch.float32, "l2"), (3, torch.float32, "l2"), (4, torch.float32, "l2"),
     (3, torch.bfloat16, "l2"), (2, torch.float16, "l1")],
)  # fmt: skip
def test_equals_the_equations(world: int, dtype: torch.dtype, norm: str) -> None:
    ranks = run_ranks(reduce_all, world, dtype, norm)
    for length in LENGTHS:
        paper = TwoPhases(length, world, norm)
        for step in range(ROUNDS):
            want = paper.mean([part(rank, length, step, dtype) for rank in range(world)]).to(dtype)
            for rank in range(world):
                torch.testing.assert_close(ranks[rank][length][step], want)
                assert torch.equal(ranks[rank][length][step], ranks[0][length][step])  # bit for bit
        for rank in range(world):
            worker, server = ranks[rank][length][-2:]
            start, stop = chunk_ranges(length, world)[rank]
            torch.testing.assert_close(worker, paper.workers[rank], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(server, paper.server[start:stop], rtol=1e-5, atol=1e-5)


def several(rank: int) -> None:
    group = world_group()
    wire = zero.Wire(group, zero.PlainCollectives(group), torch.device("cpu"), 30.0)
    tensors = {length: part(rank, length, 0) for length in LENGTHS}
    alone = {length: tensor.clone() for length, tensor in tensors.items()}
    for tensor in alone.values():
        allreduce_1bit(tensor, group)
    started = {
        length: start_allreduce_1bit(
            tensor,
            wire,
            OneBitState.zeros(length, group.size(), rank, torch.device("cpu"), f"tensor {length}"),
        )
        for length, tensor in tensors.items()
    }
    order = sorted(started, reverse=rank % 2 == 1)  # ranks need not wait in one order
    for length in order:
        started[length].advance()
    for length in reversed(order):
        started[length].wait()
        started[length].wait()  # again, for nothing
        assert started[length].is_ready()
    for length in LENGTHS:
        assert torch.equal(tensors[length], alone[length])


def test_several_under_way_at_once_are_those_one_after_another() -> None:
    run_ranks(several, 3)


def count(rank: int) -> list[tuple[int, int]]:
    sizes = []
    for length in LENGTHS:
        with counted() as messages:
            allreduce_1bit(part(rank, length, 0), world_group())
        sizes.append((length, sum(messages)))
    return sizes


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bytes_are_those_of_the_formula(world: int) -> None:
    for rank, sizes in enumerate(run_ranks(count, world)):
        assert sizes == [(length, sent_1bit(length, world, rank).total) for length in LENGTHS]


def feed_back(rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sums over 300 rounds of what was wanted and what came, and the largest error of one round."""
    state, wanted, came, worst = None, torch.zeros(97), torch.zeros(97), 0.0
    for step in range(300):
        parts = [part(peer, 97, step % 7) for peer in range(2)]
        tensor = parts[rank].clone()
        state = allreduce_1bit(tensor, world_group(), state)
        wanted += (parts[0] + parts[1]) / 2
        came += tensor
        worst = max(worst, float((tensor - (parts[0] + parts[1]) / 2).abs().max()))
    return wanted / 300, came / 300, worst


def test_errors_do_not_add_up() -> None:
    for wanted, came, worst in run_ranks(feed_back, 2):
        assert worst > 3  # one round is far off
        assert (wanted - came).abs().max() < worst / 20  # the mean of many is not


def overflow(rank: int) -> None:
    group, state = world_group(), OneBitState.zeros(20, 2, rank, torch.device("cpu"))
    allreduce_1bit(part(rank, 20, 1), group, state)
    worker, server = state.worker_error.clone(), state.server_error.clone()
    tensor = part(rank, 20, 2)
    if rank == 1:
        tensor[3] = float("inf")
    allreduce_1bit(tensor, group, state)
    assert torch.isnan(tensor[:10]).all()  # on both ranks: whoever looks for overflow finds it
    assert torch.isfinite(tensor[10:]).all()
    assert torch.isfinite(state.worker_error).all()
    assert torch.isfinite(state.server_error).all()
    if rank == 1:
        assert torch.equal(state.worker_error[:10], worker[:10])
    if rank == 0:
        assert torch.equal(state.server_error, server)
    state.reset()
    assert not state.worker_error.any()
    assert not state.server_error.any()


def test_an_overflow_is_not_hidden_and_does_not_stay() -> None:
    run_ranks(overflow, 2)


def misuse(rank: int) -> None:
    group = world_group()
    with pytest.raises(CompressConfigError, match=r"flat contiguous tensor, got shape \(2, 3\)"):
        allreduce_1bit(torch.zeros(2, 3), group)
    with pytest.raises(CompressConfigError, match="flat contiguous"):
        allreduce_1bit(torch.zeros(6)[::2], group)
    with pytest.raises(
        CompressStateError, match=r"residuals of 5 and 3 elements \(rank 0 of 2\), got 4 and 2"
    ):
        allreduce_1bit(torch.zeros(5), group, OneBitState.zeros(4, 2, 0, torch.device("cpu")))


def test_misuse_is_explained() -> None:
    run_ranks(misuse_first, 2)


def misuse_first(rank: int) -> None:
    if rank == 0:
        misuse(rank)


def leave_alone(rank: int) -> str:
    if rank == 1:
        return ""
    with pytest.raises(zero.CollectiveError) as failure:
        allreduce_1bit(torch.zeros(100), world_group(), timeout_s=1.0)
    return str(failure.value)


def test_a_rank_that_does_not_come_is_an_error_with_a_name() -> None:
    assert "tensor, to servers" in run_ranks(leave_alone, 2)[0]
