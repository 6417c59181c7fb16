"""What each rank holds of a state, and what all of them agree on: who writes which chunk.

In: a state tree. Out: its tensors and values apart (`Taken`), and, once every rank has heard the layouts of all,
`Agreed` with the pieces that this one is to write. Next: `save` or `async_save`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import msgpack
import torch

from .boxes import Box
from .errors import CheckpointError, ConfigError
from .plan import Assignment, Held, plan_chunks
from .tree import Boxes, Part, flatten
from .values import dtype_name, pack
from .writer import Piece

Ranges = tuple[slice, ...]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype, tuple[Box, ...]]]


@dataclass(frozen=True)
class Taken:
    """A state, taken apart.

    Attributes:
        parts: of tensors, by name; they share the state's memory.
        values: the rest, packed: independent of the objects that it came from.
        layout: what this rank holds: shape, dtype and boxes of each part.
    """

    parts: dict[str, Part]
    values: bytes
    layout: Layout

    @property
    def told(self) -> bytes:
        """The layout, for the others."""
        packed: bytes = msgpack.packb(
            {
                name: [shape, dtype_name(dtype), dtype.itemsize, [[box.start, box.sizes] for box in boxes]]
                for name, (shape, dtype, boxes) in self.layout.items()
            }
        )
        return packed


def take_apart(state: Mapping[str, Any], boxes: Boxes | None = None) -> Taken:
    """The state's tensors, and what is left when they are taken out.

    Args:
        state: the tree.
        boxes: of an earlier one; grows.

    Raises:
        ConfigError: it cannot be stored.
    """
    flat = flatten(state, boxes)
    layout = {
        name: (part.shape, part.dtype, tuple([box for box, _ in part.pieces]))
        for name, part in flat.parts.items()
    }
    return Taken(flat.parts, pack(flat.values, "state"), layout)


@dataclass(frozen=True)
class Agreed:
    """What all ranks hold, and which of them writes what; good for every state of the same layout.

    Attributes:
        rank: this one.
    """

    rank: int
    holdings: list[dict[str, Held]]
    plan: list[list[Assignment]]

    @staticmethod
    def of(told: Sequence[bytes], rank: int, chunk_bytes: int) -> Agreed:
        """Deal out what all ranks told, by rank; the same on every one of them.

        Raises:
            ConfigError: ranks disagree about a tensor, or nobody holds some part of one.
        """
        return Agreed(rank, *_dealt_out(tuple(told), chunk_bytes))

    @cached_property
    def cuts(self) -> list[tuple[str, int, Ranges | None]]:
        """Where each chunk that this rank has been assigned lies: in which piece of the part, and where in it."""
        held = self.holdings[self.rank]
        return [(chunk.name, *_cut(held[chunk.name].boxes, chunk)) for chunk in self.plan[self.rank]]

    def pieces(self, taken: Taken) -> list[Piece]:
        """Views of what this rank has been assigned."""
        found = []
        for name, at, ranges in self.cuts:
            values = taken.parts[name].pieces[at][1]
            found.append(Piece(name, values if ranges is None else values[ranges]))
        return found


@lru_cache(maxsize=1)  # a run saves the same layout again and again
def _dealt_out(
    told: tuple[bytes, ...], chunk_bytes: int
) -> tuple[list[dict[str, Held]], list[list[Assignment]]]:
    """What all ranks hold, and what each is to write; nothing but the arguments decides."""
    holdings = [_heard(each) for each in told]
    try:
        return holdings, plan_chunks(holdings, chunk_bytes)
    except ValueError as error:  # the same on every rank
        raise ConfigError(f"save: {error}") from None


def _heard(told: bytes) -> dict[str, Held]:
    return {
        name: Held(
            tuple(shape), dtype, itemsize, tuple(Box(tuple(start), tuple(sizes)) for start, sizes in boxes)
        )
        for name, (shape, dtype, itemsize, boxes) in msgpack.unpackb(told).items()
    }


def _cut(boxes: Sequence[Box], chunk: Assignment) -> tuple[int, Ranges | None]:
    """Which of the boxes a chunk lies in, and where in it; None: it is all of it."""
    for at, box in enumerate(boxes):
        if box == chunk.box:
            return at, None
        inside = all(
            a <= b and b + n <= a + m
            for a, m, b, n in zip(box.start, box.sizes, chunk.box.start, chunk.box.sizes, strict=True)
        )
        if inside:
            ranges = zip(box.start, chunk.box.start, chunk.box.sizes, strict=True)
            return at, tuple(slice(b - a, b - a + n) for a, b, n in ranges)
    raise CheckpointError(f"save: {chunk.name}: the plan assigns {chunk.box}, which is not held here")
