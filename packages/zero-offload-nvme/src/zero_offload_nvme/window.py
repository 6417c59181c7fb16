"""A bounded window of host memory through which blocks of tensors pass: read k + 1, step k, write k - 1.

In: `Operand`s, tensors that a kernel reads or writes, each in host memory, on a device or in a store. Out: for one
block after another CPU tensors to compute on, read ahead and written behind. Next: `store_stepper` runs the kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import accel_kernels as ak
import torch
from zero_core import Handle
from zero_core.collectives import is_done

from .blocks import DEPTH, Block
from .host_store import copy_later
from .maps import pinned_empty


class Place(Protocol):
    """Where ranges of a flat tensor can be had and put."""

    def fetch(self, out: torch.Tensor, start: int) -> Handle:
        """Fill `out` with elements from `start` on."""

    def put(self, values: torch.Tensor, start: int) -> Handle:
        """Keep values from element `start` on."""


@dataclass(frozen=True)
class InStore:
    """A tensor that a store keeps."""

    store: Any
    name: str

    def fetch(self, out: torch.Tensor, start: int) -> Handle:
        """See `Place`."""
        return self.store.fetch(self.name, out, start)  # type: ignore[no-any-return]

    def put(self, values: torch.Tensor, start: int) -> Handle:
        """See `Place`."""
        return self.store.put(self.name, values, start)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OnDevice:
    """A tensor that is copied to where it is computed on, and back."""

    tensor: torch.Tensor

    def fetch(self, out: torch.Tensor, start: int) -> Handle:
        """See `Place`."""
        return copy_later(out, self.tensor[start : start + out.numel()])

    def put(self, values: torch.Tensor, start: int) -> Handle:
        """See `Place`."""
        return copy_later(self.tensor[start : start + values.numel()], values)


@dataclass(frozen=True)
class Operand:
    """One tensor of a step.

    Attributes:
        at: in host memory, or where its ranges are.
        dtype: of its elements.
        read, written: what the step does with it; what it does not write in a block must be read all the same.
        to: where results go, when not back to `at`.
    """

    at: torch.Tensor | Place
    dtype: torch.dtype
    read: bool = True
    written: bool = True
    to: torch.Tensor | Place | None = None

    @property
    def target(self) -> torch.Tensor | Place:
        """Where results go."""
        return self.at if self.to is None else self.to


class _Room:
    """Memory for one block of a few tensors, and the writes that still come from it."""

    def __init__(self, block_bytes: int, *, pin: bool, engine: ak.TransferEngine | None) -> None:
        self._block_bytes = block_bytes
        self._pin = pin
        self._engine = engine
        self._buffers: dict[int, torch.Tensor] = {}  # by the operand's number
        self.writes: list[Handle] = []

    def buffer(self, number: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        if number not in self._buffers:
            self._buffers[number] = (
                pinned_empty(self._block_bytes, torch.uint8)
                if self._pin
                else ak.aligned_empty(self._block_bytes, register=self._engine)
            )
        return self._buffers[number][: numel * dtype.itemsize].view(dtype)

    def settle(self) -> list[OSError]:
        """Wait for the writes; what became of those that failed."""
        writes, self.writes = self.writes, []
        return _settle(writes)


class Window:
    """Room for `depth` blocks.

    Args:
        block_elements: of a block, at most; of 8 bytes at most.
        depth: blocks being read, stepped and written at once.
        pin: memory that a device copies to and from.
        engine: that most blocks come and go by; memory that is not pinned is registered with it.
    """

    def __init__(
        self,
        block_elements: int,
        *,
        depth: int = DEPTH,
        pin: bool = False,
        engine: ak.TransferEngine | None = None,
    ) -> None:
        self.block_elements = block_elements
        self.depth = depth
        self._rooms = [_Room(block_elements * 4, pin=pin, engine=engine) for _ in range(depth)]

    def through(
        self,
        blocks: Iterable[Block],
        operands: Sequence[Sequence[Operand]],
        meanwhile: Callable[[], bool] | None = None,
        *,
        leave_writes: bool = False,
    ) -> Iterator[tuple[Block, list[torch.Tensor]]]:
        """Each block with its tensors on the CPU; what was written to them by the next turn is kept.

        Args:
            blocks: in order.
            operands: for each unit.
            meanwhile: called where a block is waited for, and again until it returns False: nothing is left to do.
            leave_writes: the last blocks may be on their way to their stores when the iteration ends; those of the next
                one are read meanwhile, and `settle` waits for the last.

        When the iteration ends, nothing else is on its way, and unless it ends with an error all has been kept.

        Raises:
            OSError: a store cannot read or write.
        """
        coming, todo = deque[tuple[Block, _Room, list[torch.Tensor], list[Handle]]](), deque(blocks)
        free = deque(self._rooms)
        finished = False
        try:
            while todo or coming:
                while todo and free and len(coming) < self.depth - 1:
                    block, room = todo.popleft(), free.popleft()
                    coming.append((block, room, *_read(block, room, operands[block.unit])))
                block, room, tensors, reads = coming[0]
                while meanwhile is not None and not all(map(is_done, reads)) and meanwhile():
                    pass
                for read in reads:
                    read.wait()
                coming.popleft()
                yield block, tensors
                for tensor, operand in zip(tensors, operands[block.unit], strict=True):
                    if operand.written and not isinstance(operand.target, torch.Tensor):
                        room.writes.append(operand.target.put(tensor, block.start))
                free.append(room)
            finished = True
        finally:
            if finished:
                self._rooms = [*free]  # first the one that has been written from for longest
                if not leave_writes:
                    self.settle()
            else:  # the error that ended the iteration is the one to be seen
                for _, _, _, reads in coming:
                    _settle(reads)
                self._settle_rooms()

    def settle(self) -> None:
        """Return when nothing is on its way.

        Raises:
            OSError: a store cannot write.
        """
        for error in self._settle_rooms():
            raise error

    def _settle_rooms(self) -> list[OSError]:
        return [error for room in self._rooms for error in room.settle()]


def _settle(handles: Iterable[Handle]) -> list[OSError]:
    """Wait for all; what became of those that failed."""
    return [error for error in map(_failure, handles) if error is not None]


def _failure(handle: Handle) -> OSError | None:
    try:
        handle.wait()
    except OSError as error:
        return error
    return None


def _read(block: Block, room: _Room, operands: Sequence[Operand]) -> tuple[list[torch.Tensor], list[Handle]]:
    """Begin to read a block; its tensors, and what is to be waited for."""
    for error in room.settle():
        raise error
    tensors: list[torch.Tensor] = []
    reads: list[Handle] = []
    for number, operand in enumerate(operands):
        at, target = operand.at, operand.target
        if isinstance(target, torch.Tensor):
            tensors.append(target[block.start : block.stop])
        else:
            tensors.append(room.buffer(number, block.stop - block.start, operand.dtype))
        if at is target and isinstance(at, torch.Tensor):
            continue
        if operand.read or not block.is_covered:
            place = OnDevice(at) if isinstance(at, torch.Tensor) else at
            reads.append(place.fetch(tensors[-1], block.start))
    return tensors, reads
