"""PURE: which parameters share a flat bucket, where each lies in it, and which part of it is whose.

In: shapes, groups and kinds of parameters. Out: `BucketPlan`s, and runs of neighbours that are stepped alike. Works on
ints; no tensor, no process group. Next: `bucket` gives a plan its memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """A parameter before it has a place.

    Attributes:
        index: position among all parameters of the optimizer, group by group.
        name: for errors and checkpoints.
        shape: of the tensor that is stepped.
        saved_shape: in checkpoints.
        kind: what must agree within a bucket (device and dtype).
    """

    index: int
    name: str
    shape: tuple[int, ...]
    saved_shape: tuple[int, ...]
    group: int
    kind: str


@dataclass(frozen=True)
class Slot:
    """A parameter's place: elements `[start, stop)` of its bucket; `position` counts within the bucket."""

    index: int
    name: str
    shape: tuple[int, ...]
    saved_shape: tuple[int, ...]
    group: int
    position: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class BucketPlan:
    """Parameters that are reduced together, one after another, without gaps."""

    name: str
    slots: tuple[Slot, ...]

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.slots[-1].stop if self.slots else 0


def plan_buckets(members: Iterable[Member], most_elements: int, *, first: int = 0) -> list[BucketPlan]:
    """Fill buckets in order, one kind after another; a parameter larger than a bucket has one of its own.

    Args:
        members: every parameter once.
        most_elements: of a bucket of several parameters.
        first: number of the first bucket, for its name.
    """
    by_kind: dict[str, list[Member]] = {}
    for member in members:
        by_kind.setdefault(member.kind, []).append(member)
    plans: list[BucketPlan] = []
    for some in by_kind.values():
        slots: list[Slot] = []
        for member in some:
            numel = math.prod(member.shape)
            start = slots[-1].stop if slots else 0
            if slots and start + numel > most_elements:
                plans.append(BucketPlan(f"bucket {first + len(plans)}", tuple(slots)))
                slots, start = [], 0
            named = (member.index, member.name, member.shape, member.saved_shape, member.group)
            slots.append(Slot(*named, len(slots), start, start + numel))
        plans.append(BucketPlan(f"bucket {first + len(plans)}", tuple(slots)))
    return plans


@dataclass(frozen=True)
class Run:
    """Neighbouring slots that are stepped with the same numbers: elements `[start, stop)`."""

    group: int
    step: int
    start: int
    stop: int
    slots: tuple[Slot, ...]


def runs_of(plan: BucketPlan, steps: Sequence[int], moving: Collection[int] | None) -> list[Run]:
    """The slots that move, as few runs.

    Args:
        plan: the bucket.
        steps: by position: which step this is for the slot.
        moving: indices of the parameters that move; None: all.
    """
    runs: list[Run] = []
    for slot in plan.slots:
        if moving is not None and slot.index not in moving:
            continue
        step, last = steps[slot.position], runs[-1] if runs else None
        if last is not None and (last.group, last.step, last.stop) == (slot.group, step, slot.start):
            runs[-1] = Run(slot.group, step, last.start, slot.stop, (*last.slots, slot))
        else:
            runs.append(Run(slot.group, step, slot.start, slot.stop, (slot,)))
    return runs


@dataclass(frozen=True)
class Part:
    """What a range of a bucket holds of a slot.

    Attributes:
        slot: the parameter.
        first: first element of the part, in the flattened parameter.
        start, stop: the part, in the range.
    """

    slot: Slot
    first: int
    start: int
    stop: int


def parts_of(plan: BucketPlan, start: int, stop: int) -> list[Part]:
    """The parts of the slots inside `[start, stop)` of a bucket; empty ones are left out."""
    parts = []
    for slot in plan.slots:
        low, high = max(start, slot.start), min(stop, slot.stop)
        if low < high:
            parts.append(Part(slot, low - slot.start, low - start, high - start))
    return parts


def equal_part(numel: int, world: int, rank: int) -> tuple[int, int]:
    """The elements `[start, stop)` that a rank holds where all parts but the last ones have one size."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)
