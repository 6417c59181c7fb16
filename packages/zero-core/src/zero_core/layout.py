"""PURE: where each parameter of a unit lies in the flat buffer, and which part of it each rank holds.

In: names and shapes. Out: offsets, padding, rank ranges and their inverse. Works on ints; no tensor, no device.
Next: `units` decides which parameters share a layout, `flat_unit` gives it memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGN_ELEMENTS = 32
"""Slots start at multiples of this: 64 bytes in bf16, one cache line, so that views stay vector-aligned."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a unit: elements `[offset, offset + numel)` of the flat buffer.

    `names` holds every fully qualified name of the parameter (more than one where weights are tied).
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    offset: int

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @cached_property
    def stop(self) -> int:
        """One past the last element."""
        return self.offset + self.numel


@dataclass(frozen=True)
class LocalSlot:
    """The part of a slot that one rank holds.

    Attributes:
        slot: the whole parameter.
        index: position of the slot in its unit.
        start, stop: element range inside this rank's shard.
        param_start: first element of the part, in the flattened (row-major) parameter.
    """

    slot: Slot
    index: int
    start: int
    stop: int
    param_start: int

    @property
    def numel(self) -> int:
        """Elements in the part."""
        return self.stop - self.start


@dataclass(frozen=True)
class UnitLayout:
    """A unit's flat buffer: `numel` elements (padding included), cut into `world_size` equal shards."""

    slots: tuple[Slot, ...]
    numel: int
    world_size: int

    @cached_property
    def shard_numel(self) -> int:
        """Elements of one rank's shard."""
        return self.numel // self.world_size

    def shard_range(self, rank: int) -> tuple[int, int]:
        """The elements `[start, stop)` of the flat buffer that `rank` holds."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def local_slots(self, start: int, stop: int) -> list[LocalSlot]:
        """The parts of the slots that fall into `[start, stop)`, in order; empty parts are left out."""
        parts = []
        for index, slot in enumerate(self.slots):
            lo, hi = max(start, slot.offset), min(stop, slot.stop)
            if lo < hi:
                parts.append(LocalSlot(slot, index, lo - start, hi - start, lo - slot.offset))
        return parts

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The ranges of the flat buffer that belong to no parameter: alignment between slots, and the tail."""
        edges = [0, *(edge for slot in self.slots for edge in (slot.offset, slot.stop)), self.numel]
        return tuple((lo, hi) for lo, hi in zip(edges[::2], edges[1::2], strict=True) if lo < hi)


def plan_layout(
    names: Sequence[tuple[str, ...]],
    shapes: Sequence[tuple[int, ...]],
    world_size: int,
    align: int = ALIGN_ELEMENTS,
    replicas: int = 1,
) -> UnitLayout:
    """Lay parameters out one after another, aligned, padded so that every rank's shard has the same size.

    Args:
        names: for each parameter, all its names.
        shapes: for each parameter, its shape; scalars `()` and zero-size shapes are fine.
        world_size: number of shards.
        align: every slot starts, and every shard ends, at a multiple of this many elements.
        replicas: every shard can be cut into so many equal parts.
    """
    slots, offset = [], 0
    for param_names, shape in zip(names, shapes, strict=True):
        numel = 1
        for size in shape:
            numel *= size
        slots.append(Slot(tuple(param_names), tuple(shape), numel, offset))
        offset = round_up(offset + numel, align)
    return UnitLayout(tuple(slots), round_up(offset, math.lcm(align, replicas) * world_size), world_size)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
