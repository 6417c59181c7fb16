"""Parameters on a device, stepped on the host: gradients come down, updated parameters go up, chunk by chunk.

In: rows whose masters and states lie on the host, gradients on the device. Out: parameters on the device. While chunk
k is stepped, the gradients of chunk k+1 come down and the parameters of chunk k-1 go up; two buffers a direction, each
of one chunk, are all the host memory that this takes beside masters and states.

Note [buffers in turn]: chunk k uses the buffers of number k mod 2. Its gradients are queued once chunk k-2 has been
stepped; its copy may be written once that of chunk k-2 has gone up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import accel_kernels as ak
import torch
from torch import Tensor

from .chunks import Piece, plan_chunks
from .copies import Copies, Pending
from .rows import flat
from .rules import Rule
from .steppers import Stepper

CHUNK_ELEMENTS = 1 << 23
"""32 MiB of fp32 gradients: 1.3 ms of a 25 GB/s link, so that latency and a call's cost do not show."""


@dataclass(eq=False)
class _Chunk:
    """What one chunk needs at each step, made once."""

    pieces: list[Piece]
    table: ak.StepTable
    grads: list[Tensor]  # in the buffer, one a piece
    sources: list[Tensor]  # what goes up: the buffer's low-precision copy, or the master itself


class DeviceStepper(Stepper):
    """Steps parameters that lie on one device.

    Args:
        rule: the optimizer.
        states: `Optimizer.state`.
        copies: how bytes move.
        chunk_elements: the most elements of a chunk.
    """

    def __init__(
        self,
        rule: Rule,
        states: dict[Any, dict[str, Any]],
        copies: Copies,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        super().__init__(rule, states)
        self._copies = copies
        self._chunk_elements = chunk_elements

    def _prepare(self) -> None:
        numels = [row.param.numel() for row in self._rows]
        plan = plan_chunks(numels, self._chunk_elements)
        elements = max(
            (piece.offset + piece.stop - piece.start for pieces in plan for piece in pieces), default=0
        )
        halves = any(row.param.dtype != torch.float32 for row in self._rows)
        size = 4 if any(row.param.dtype == torch.float32 for row in self._rows) else 2
        self._down = [self._copies.buffer(elements * size) for _ in plan[:2]]
        self._up = [self._copies.buffer(elements * 2 if halves else 0) for _ in plan[:2]]
        self._chunks = [self._make_chunk(pieces, number % 2, size) for number, pieces in enumerate(plan)]

    def _make_chunk(self, pieces: list[Piece], side: int, size: int) -> _Chunk:
        """`size`: bytes that an element of the widest gradient takes; those of every piece have as many."""
        rows = [self._rows[piece.index] for piece in pieces]
        masters, grads, lows, sources = [], [], [], []
        for piece, row in zip(pieces, rows, strict=True):
            assert row.master is not None  # every row of a device has one
            masters.append(_elements(row.master)[piece.start : piece.stop])
            dtype = row.param.dtype
            grads.append(_view(self._down[side], piece, dtype, size))
            low = None if dtype == torch.float32 else _view(self._up[side], piece, dtype, dtype.itemsize)
            lows.append(low)
            sources.append(masters[-1] if low is None else low)
        states = [
            [
                _elements(row.held[k])[piece.start : piece.stop]
                for piece, row in zip(pieces, rows, strict=True)
            ]
            for k in range(len(self._rule.states))
        ]
        table = ak.StepTable(self._rule.kind, masters, states, low_precision=lows)
        return _Chunk(pieces, table, grads, sources)

    def _run(self, grads: Sequence[Tensor | None], segments: Sequence[Any], which: Sequence[int]) -> None:
        given = [
            None if grad is None else _elements(row.like(grad.to(row.param.dtype)))
            for row, grad in zip(self._rows, grads, strict=True)
        ]
        # A parameter that is not dense receives its values by way of one that is, once they are all there.
        targets = [
            row.param if row.dense else torch.empty_strided(
                row.param.shape, row.strides, dtype=row.param.dtype, device=row.param.device
            )
            for row in self._rows
        ]  # fmt: skip
        self._copies.begin()
        coming = self._fetch(0, given)
        going: list[Pending] = []
        for number, chunk in enumerate(self._chunks):
            following = self._fetch(number + 1, given)
            coming.wait()
            if number >= 2:
                going[number - 2].wait()  # Note [buffers in turn]
            here = [given[piece.index] is not None for piece in chunk.pieces]
            chunk.table.step(
                [grad if moves else None for grad, moves in zip(chunk.grads, here, strict=True)],
                segments,
                [which[piece.index] for piece in chunk.pieces],
            )
            pairs = [
                (_elements(targets[piece.index])[piece.start : piece.stop], source)
                for piece, source, moves in zip(chunk.pieces, chunk.sources, here, strict=True)
                if moves
            ]
            going.append(self._copies.to_device(pairs))
            coming = following
        self._copies.end()
        for row, target, grad in zip(self._rows, targets, given, strict=True):
            if target is not row.param and grad is not None:
                row.param.copy_(target)

    def _fetch(self, number: int, given: Sequence[Tensor | None]) -> Pending:
        """Queue the gradients of one chunk; nothing beyond the last."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if number < len(self._chunks):
            chunk = self._chunks[number]
            for piece, buffer in zip(chunk.pieces, chunk.grads, strict=True):
                grad = given[piece.index]
                if grad is not None:
                    pairs.append((buffer, grad[piece.start : piece.stop]))
        return self._copies.to_host(pairs)


def _elements(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, one-dimensional."""
    return flat(tensor).detach().view(-1)


def _view(buffer: Tensor, piece: Piece, dtype: torch.dtype, size: int) -> Tensor:
    """A piece's place in a chunk's buffer, where every element has `size` bytes, as many elements of `dtype`."""
    start = piece.offset * size
    return buffer[start : start + (piece.stop - piece.start) * dtype.itemsize].view(dtype)
