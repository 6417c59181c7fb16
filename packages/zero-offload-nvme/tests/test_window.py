"""A window of blocks: while a block is on its way, there is time for other work."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from zero_offload_nvme.blocks import Block, block_elements
from zero_offload_nvme.host_store import DONE
from zero_offload_nvme.window import Operand, Window


class Late:
    """A place from which reads come when `meanwhile` has been called often enough."""

    def __init__(self, values: torch.Tensor, calls: list[int], per_read: int) -> None:
        self.values, self.calls, self.per_read, self.num_reads = values, calls, per_read, 0

    def fetch(self, out: torch.Tensor, start: int):
        self.num_reads += 1
        due, place = self.num_reads * self.per_read, self

        class Coming:
            def is_done(self) -> bool:
                return len(place.calls) >= due

            def wait(self) -> None:
                out.copy_(place.values[start : start + out.numel()])

        return Coming()

    def put(self, values: torch.Tensor, start: int):
        self.values[start : start + values.numel()] = values

        class Kept:
            def wait(self) -> None:
                pass

        return Kept()


def blocks_of(numel: int, each: int) -> list[Block]:
    return [Block(0, start, start + each, (), start + each == numel) for start in range(0, numel, each)]


def pass_through(most: int) -> tuple[int, torch.Tensor]:
    calls: list[int] = []
    place = Late(torch.arange(8.0), calls, per_read=2)

    def meanwhile() -> bool:
        calls.append(1)
        return len(calls) < most

    window = Window(2)
    for _, (values,) in window.through(blocks_of(8, 2), [[Operand(place, torch.float32)]], meanwhile):
        values.add_(1)
    return len(calls), place.values


def test_what_waits_is_done_meanwhile() -> None:
    calls, values = pass_through(most=100)
    assert calls == 8  # four reads, two calls each: no more, since then they had come
    assert torch.equal(values, torch.arange(8.0) + 1)


def test_and_then_it_waits() -> None:
    calls, values = pass_through(most=3)
    assert calls >= 3
    assert torch.equal(values, torch.arange(8.0) + 1)


class Slow:
    """A place that keeps values when they are waited for; those of the elements `bad` fail then."""

    def __init__(self, values: torch.Tensor, bad: Collection[int] = ()) -> None:
        self.values, self.bad, self.log = values, bad, list[str]()

    def fetch(self, out: torch.Tensor, start: int):
        self.log.append(f"read {start}")
        out.copy_(self.values[start : start + out.numel()])
        return DONE

    def put(self, values: torch.Tensor, start: int):
        self.log.append(f"write {start}")
        place = self

        class Going:
            def is_done(self) -> bool:
                return False

            def wait(self) -> None:
                place.log.append(f"kept {start}")
                if start in place.bad:
                    raise OSError(5, f"element {start}")
                place.values[start : start + values.numel()] = values

        return Going()


def add_one(window: Window, place: Slow, *, leave_writes: bool) -> None:
    operands = [[Operand(place, torch.float32)]]
    for _, (values,) in window.through(blocks_of(8, 2), operands, leave_writes=leave_writes):
        values.add_(1)


def test_the_next_unit_is_read_while_the_last_one_is_written() -> None:
    first, second, window = Slow(torch.arange(8.0)), Slow(torch.arange(8.0)), Window(2)
    add_one(window, first, leave_writes=True)
    assert [line for line in first.log if line.startswith("kept")] == ["kept 0"]  # its room was needed
    add_one(window, second, leave_writes=True)
    # Rooms are taken in the order of their writes: each read waits for the oldest.
    assert second.log[0] == "read 0"
    assert [line for line in first.log if line.startswith("kept")] == ["kept 0", "kept 2", "kept 4", "kept 6"]
    window.settle()
    for place in (first, second):
        assert torch.equal(place.values, torch.arange(8.0) + 1)


@pytest.mark.parametrize("leave_writes", [False, True])
def test_a_write_that_fails_is_told_at_the_latest_by_settle(leave_writes) -> None:
    place, window = Slow(torch.arange(8.0), bad=[6]), Window(2)
    if leave_writes:
        add_one(window, place, leave_writes=True)
    with pytest.raises(OSError, match="element 6"):
        window.settle() if leave_writes else add_one(window, place, leave_writes=False)
    window.settle()  # told once
    assert torch.equal(place.values[:6], torch.arange(6.0) + 1)


def test_a_write_that_failed_is_told_before_its_room_is_used_again() -> None:
    place, window = Slow(torch.arange(8.0), bad=[4]), Window(2)
    add_one(window, place, leave_writes=True)
    other = Slow(torch.arange(8.0))
    with pytest.raises(OSError, match="element 4"):
        add_one(window, other, leave_writes=True)


@pytest.mark.parametrize(
    ("window_bytes", "elements"),
    [(0, 4096), (1 << 20, 20480), (32 << 20, 512 * 1024), (192 << 20, 8 * 512 * 1024)],
)
def test_blocks_are_whole_pages_and_huge_ones_where_they_can(window_bytes: int, elements: int) -> None:
    assert block_elements(window_bytes, 4) == elements
