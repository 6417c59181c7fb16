"""Parts as messages or through shared memory: the same bytes, in any order, bounded memory, nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_core import memory_files, shared_memory
from zero_core.testing import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def full_of(rank: int, case: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * case + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def many_at_once(rank: int, world_size: int, shared_memory: bool) -> str:
    """Forty gathers and reductions of every dtype under way, finished in an order of each rank's own."""
    plain = zero.PlainCollectives(group(), 30.0, shared_memory=shared_memory)
    pending = []
    for case in range(40):
        numel = (case * 37 % 400) * world_size
        dtype = DTYPES[case % len(DTYPES)]
        fulls = [full_of(r, case, numel, dtype) for r in range(world_size)]
        if case % 2:
            out = torch.empty(numel, dtype=dtype)
            shards = [full[: numel // world_size] for full in fulls]
            handle = plain.all_gather(shards[rank], out, tag=case)
            expected = torch.cat([full[: numel // world_size] for full in fulls])
        else:
            out = torch.empty(numel // world_size, dtype=dtype)
            handle = plain.reduce_scatter(fulls[rank].clone(), out, tag=case)
            mean = (
                torch.stack([f.to(torch.promote_types(dtype, torch.float32)) for f in fulls]).sum(0)
                / world_size
            )
            expected = mean.view(world_size, -1)[rank].to(dtype)
        pending.append((case, handle, out, expected))
    random.Random(rank).shuffle(pending)
    for case, handle, out, expected in pending:
        handle.wait()
        rounding = 2 * torch.finfo(out.dtype).eps
        torch.testing.assert_close(
            out, expected, rtol=rounding, atol=rounding, msg=lambda text, c=case: f"{c}: {text}"
        )
    return type(plain._way).__name__


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shared_memory", [False, True])
def test_any_number_in_any_order(world_size: int, shared_memory: bool) -> None:
    ways = run_ranks(many_at_once, world_size, world_size, shared_memory)
    assert set(ways) == {"SharedMemory" if shared_memory and world_size > 1 else "Messages"}


def again_and_again(rank: int, world_size: int) -> tuple[int, int]:
    plain = zero.PlainCollectives(group())
    full, out = torch.empty(30_000), torch.empty(30_000 // world_size)
    for step in range(60):
        full.fill_(step + rank)
        plain.reduce_scatter(full, out, tag=step % 2).wait()
        assert torch.equal(out, torch.full_like(out, step + (world_size - 1) / 2))
        if rank == step % world_size:
            time.sleep(0.002)  # ranks out of step: a block is reused only when the slowest has read it
    assert isinstance(plain._way, shared_memory.SharedMemory)
    return len(plain._way._blocks), len(plain._way._maps)


def test_blocks_are_reused() -> None:
    for blocks, maps in run_ranks(again_and_again, 3, 3):
        assert blocks <= 3, "as many as are under way while a slow rank has yet to read"
        assert maps == 3, "one a rank, however many blocks"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=12))
def test_a_ring_gives_notes_in_order_and_is_never_overrun(bursts: list[int]) -> None:
    numbers = memoryview(bytearray(8 * 8 * (1 + shared_memory.Ring.SLOTS))).cast("q")
    writer, reader = shared_memory.Ring(numbers), shared_memory.Ring(numbers)
    posted, taken = [], []
    for position, burst in enumerate(bursts):
        for _ in range(burst):
            if position % 2:
                note = reader.take()
                assert (note is None) == (len(taken) == len(posted))
                taken += [] if note is None else [note]
            else:
                note = shared_memory.Note(len(posted), *(7**k - len(posted) for k in range(4)))
                fits = writer.post(note)
                assert fits == (len(posted) - len(taken) < shared_memory.Ring.SLOTS)
                posted += [note] if fits else []
    assert taken == posted[: len(taken)]


def more_than_a_ring_holds(rank: int, world_size: int) -> None:
    plain = zero.PlainCollectives(group(), 30.0)
    outs = [torch.empty(world_size) for _ in range(3 * shared_memory.Ring.SLOTS)]
    shards = [torch.tensor([10.0 * position + rank]) for position in range(len(outs))]
    handles = [
        plain.all_gather(shard, out, tag=i) for i, (shard, out) in enumerate(zip(shards, outs, strict=True))
    ]
    for position, handle in enumerate(handles):
        handle.wait()
        assert outs[position].tolist() == [10.0 * position + r for r in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_all_send_more_than_a_ring_holds_do_not_block_each_other(world_size: int) -> None:
    run_ranks(more_than_a_ring_holds, world_size, world_size)


def left_alone(rank: int, how: str) -> tuple[str, float]:
    plain = zero.PlainCollectives(group(), 2.0 if how == "stays away" else 60.0)
    plain.all_gather(torch.ones(4), torch.empty(8), tag=1).wait()
    if rank == 1:
        if how == "dies":
            os._exit(3)
        if how == "forks":
            child = os.fork()
            if child == 0:
                del plain
                gc.collect()
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(0.5)
            plain.all_gather(torch.ones(4), torch.empty(8), tag=2).wait()
        elif how == "sends and goes":
            plain.all_gather(torch.ones(4), torch.empty(8), tag=2)
        elif how == "stays away":
            time.sleep(5)
        return "", 0.0
    start, out = time.monotonic(), torch.zeros(8)
    handle = plain.all_gather(torch.ones(4), out, tag=2)
    try:
        if how == "sends and goes":
            time.sleep(0.5)
        handle.wait()
        assert out.tolist() == [1.0] * 8
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "went well", time.monotonic() - start


@pytest.mark.parametrize(
    ("how", "message", "within_s"),
    [
        ("dies", "rank 1 has ended", 2.0),
        ("closes", "rank 1 has ended", 2.0),
        ("stays away", "rank 1 did not come within 2 s", 4.0),
        ("sends and goes", "went well", 2.0),
        ("forks", "went well", 5.0),
    ],
)
def test_a_wait_ends_with_its_peer(how: str, message: str, within_s: float) -> None:
    text, seconds = run_ranks(left_alone, 2, how, tolerate=(1,) if how == "dies" else ())[0]
    assert text == message
    assert seconds < within_s


def closed_with_its_owner(rank: int) -> tuple[int, int]:
    gc.collect()
    before = open_files_in_memory()
    plain = zero.PlainCollectives(group())
    plain.all_gather(torch.ones(64), torch.empty(128), tag=1).wait()
    during = open_files_in_memory() - before
    dist.barrier()
    del plain
    gc.collect()
    return during, open_files_in_memory() - before


def open_files_in_memory() -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum("memfd:zero_core" in os.readlink(link) for link in links if link.is_symlink())


def test_nothing_is_left_when_the_collectives_are_gone() -> None:
    for during, after in run_ranks(closed_with_its_owner, 2):
        assert during >= 2, "this rank's file and the other's"
        assert after == 0


def one_cannot(rank: int, world_size: int, how: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and how == "has no memfd":
            patch.delattr(os, "memfd_create")
        elif rank == 1 and how == "may not open":
            patch.setattr(os, "open", _refuse)
        elif rank == 1 and how == "is another machine":
            patch.setattr(memory_files.Path, "read_text", lambda self: "another-boot-id")
        elif rank == 1 and how == "is in another namespace":
            patch.setattr(os, "getpid", lambda: 1)
        plain = zero.PlainCollectives(group())
        out = torch.empty(4 * world_size)
        plain.all_gather(torch.full((4,), float(rank)), out, tag=5).wait()
    assert torch.equal(out, torch.arange(world_size).repeat_interleave(4).float())
    return type(plain._way).__name__


def _refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    "how", ["has no memfd", "may not open", "is another machine", "is in another namespace"]
)
def test_all_fall_back_to_messages_if_one_rank_cannot_share(how: str) -> None:
    assert run_ranks(one_cannot, 3, 3, how) == ["Messages"] * 3


def no_memory(rank: int) -> str:
    plain = zero.PlainCollectives(group(), 3.0)
    plain.all_gather(torch.ones(4), torch.empty(8), tag=1).wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _full)
        with pytest.raises(
            RuntimeError, match=r"no \d+ bytes of shared memory to be had: No space left on device"
        ):
            plain.all_gather(torch.ones(100_000), torch.empty(200_000), tag=2)
    return "refused"


def _full(*args):
    raise OSError(28, "No space left on device")


def test_memory_that_is_not_there_is_an_error_not_a_crash() -> None:
    assert run_ranks(no_memory, 2) == ["refused"] * 2
