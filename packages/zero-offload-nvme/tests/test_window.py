"""A window of blocks: while a block is on its way, there is time for other work."""

from __future__ import annotations

import torch
from zero_offload_nvme.blocks import Block
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
