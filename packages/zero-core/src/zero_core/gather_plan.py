"""PURE: in which order all ranks gather units, and what to gather ahead of use.

In: what this rank uses, and what all ranks have said at a meeting. Out: which units to gather next, in an order that
is the same on every rank whatever each of them uses.

Note [One order of gathers]
A gather needs every rank, but a rank may skip a layer, see no image, or generate fewer tokens than another. So a
rank's life is cut into segments (`Kind`), and in each every rank performs the gathers of the same kind of segment
last time, in that order, needed or not: who does not use a unit passes it over, handing out its shard and keeping
nothing. What is not in that order comes after it: a rank that needs more, or has arrived at its next segment, calls a
meeting, and all hear what everyone wants (`decide`). What came about so is the order of the next time. Where all ranks
do the same, as nearly always, that costs a few numbers at the start of each segment.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field


class Kind(enum.IntEnum):
    """What a segment is. Where ranks have come to different ones the lowest runs first; the others hand out shards."""

    EVALUATION = 0
    FORWARD = 1
    LOCAL_BACKWARD = 2
    BACKWARD = 3
    REST = 4

    @property
    def label(self) -> str:
        """For messages."""
        return {
            Kind.EVALUATION: "a forward without gradients",
            Kind.FORWARD: "a forward",
            Kind.LOCAL_BACKWARD: "a backward under no_sync",
            Kind.BACKWARD: "a backward",
            Kind.REST: "the end of a backward, a step, or another call of all ranks",
        }[self]


@dataclass(frozen=True)
class Word:
    """What one rank says at a meeting.

    Attributes:
        kind: the segment that it is in (with a want), or is about to begin.
        want: the unit that it needs and that is not in the order; -1 for none.
        first: the first unit of the segment about to begin; -1 where it has none.
        needed: which of the segment's gathers so far it had a use for.
    """

    kind: Kind
    want: int = -1
    first: int = -1
    needed: frozenset[int] = frozenset()

    def numbers(self, num_gathers: int) -> list[int]:
        """As int64 numbers, as many on every rank."""
        masks = [0] * (num_gathers // 32 + 1)
        for position in self.needed:
            masks[position // 32] |= 1 << position % 32
        return [int(self.kind), self.want, self.first, *masks]

    @staticmethod
    def of(numbers: Sequence[int]) -> Word:
        """From `numbers`."""
        kind, want, first, *masks = numbers
        needed = (32 * i + bit for i, mask in enumerate(masks) for bit in range(32) if mask >> bit & 1)
        return Word(Kind(kind), want, first, frozenset(needed))


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a meeting: gather one more unit, begin a segment, or end, since they cannot go on.

    Attributes:
        gather: the unit to gather now, or None.
        segment: kind and first unit of the segment to begin, where `gather` is None.
        parted: the ranks of a backward and those past it, where no common way is left.
    """

    gather: int | None = None
    segment: tuple[Kind, int] = (Kind.REST, -1)
    parted: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def decide(words: Sequence[Word]) -> Decision:
    """The same decision on every rank, from what all have said, by rank."""
    wants = [word for word in words if word.want >= 0]
    if wants:
        # Who is behind comes first: it will come to the others' units too.
        backwards = wants[0].kind in (Kind.LOCAL_BACKWARD, Kind.BACKWARD)
        pick = max if backwards else min
        return Decision(gather=pick(word.want for word in wants))
    kind = min(word.kind for word in words)
    first = next(word.first for word in words if word.kind is kind)
    if kind is Kind.BACKWARD and any(word.kind is not kind for word in words):
        ranks = range(len(words))
        inside = tuple(r for r in ranks if words[r].kind is kind)
        return Decision(parted=(inside, tuple(r for r in ranks if r not in inside)))
    return Decision(segment=(kind, first))


@dataclass
class _Record:
    """What a segment was: the gathers of all ranks, and this rank's uses."""

    gathers: list[int] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)


class GatherPlan:
    """The order of gathers in the segment under way.

    Args:
        sizes: bytes of each unit when whole.
        budget_bytes: bytes that may be gathered ahead of use at once; 0 for none.

    Attributes:
        needed: positions of the gathers so far that this rank had a use for.
    """

    def __init__(self, sizes: Sequence[int], budget_bytes: int) -> None:
        self.sizes = sizes
        self.budget_bytes = budget_bytes
        self.needed: set[int] = set()
        self._records: dict[tuple[Kind, int], _Record] = {}
        self._segment: tuple[Kind, int] = (Kind.REST, -1)
        self._last = _Record()
        self._now = _Record()
        self._ahead: dict[int, int] = {}  # unit -> position of its gather

    @property
    def num_gathers(self) -> int:
        """Gathers in this segment so far, the same on all ranks at a meeting."""
        return len(self._now.gathers)

    def begin(self, segment: tuple[Kind, int], needed: Iterable[int] = ()) -> None:
        """The segment under way has ended on all ranks, and another begins.

        Args:
            segment: kind and first unit of the new one.
            needed: positions of the ended one's gathers that some rank had a use for; others are left out next time.
        """
        if self._segment[0] is not Kind.REST:
            gathers = [self._now.gathers[position] for position in sorted(needed)]
            self._records[self._segment] = _Record(gathers, self._now.uses or self._last.uses)
        self._segment = segment
        self._last = self._records.get(segment, _Record())
        self._now = _Record()
        self._ahead.clear()
        self.needed.clear()

    def turn(self, unit: int) -> list[int] | None:
        """It is `unit`'s turn: the units to pass over (also those sent for ahead); None: it is not in the order."""
        left = self._left()
        if unit not in left:
            return None
        passed = [*self._ahead, *left[: left.index(unit)]]
        self._ahead.clear()
        self._now.gathers += left[: left.index(unit) + 1]
        self.needed.add(self.num_gathers - 1)
        return passed

    def rest(self) -> list[int]:
        """The units to pass over until the order has been gone through."""
        passed = [*self._ahead, *self._left()]
        self._now.gathers += self._left()
        self._ahead.clear()
        return passed

    def add(self, unit: int, *, needed: bool) -> None:
        """A meeting has decided that `unit` is gathered next."""
        self._now.gathers.append(unit)
        if needed:
            self.needed.add(self.num_gathers - 1)

    def use(self, unit: int) -> tuple[list[int], list[int]]:
        """`unit`, whole or on its way, is used now.

        Returns:
            The units gathered ahead of it that are passed over, and the units to send for now.
        """
        self._now.uses.append(unit)
        passed: list[int] = []
        if unit in self._ahead:
            passed = list(self._ahead)[: list(self._ahead).index(unit)]
            self.needed.add(self._ahead[unit])
            for each in [*passed, unit]:
                del self._ahead[each]
        left = self.budget_bytes - sum(self.sizes[each] for each in self._ahead)
        ahead: list[int] = []
        for candidate in self._left():
            left -= self.sizes[candidate]
            if left < 0 or candidate == unit or candidate in self._ahead:
                break
            self._ahead[candidate] = self.num_gathers
            self._now.gathers.append(candidate)
            ahead.append(candidate)
        return passed, ahead

    def coming(self, count: int) -> list[int]:
        """The units whose gathers follow those sent for, as far as is known."""
        return self._left()[:count]

    def was_whole(self, unit: int) -> None:
        """A unit that `use` sent for needs no gather on this rank; its use will not count as one's need."""
        self._ahead.pop(unit, None)

    def next_is(self, unit: int, whole: Collection[int] = ()) -> bool:
        """Whether this rank, doing as it did last time, uses `unit` next (so that it should stay whole).

        What follows a forward is the backward that has followed one before. Uses of units that are `whole` already do
        not come between: none of them needs the room.
        """
        done, last = self._now.uses, self._last.uses
        if not done or done != last[: len(done)]:
            return False
        left = last[len(done) :]
        then: list[list[int]] = [[]]
        if self._segment[0] is Kind.FORWARD:
            backwards = (Kind.LOCAL_BACKWARD, Kind.BACKWARD)
            then += [record.uses for (kind, _), record in self._records.items() if kind in backwards]
        return any(
            unit == next((use for use in [*left, *uses] if use == unit or use not in whole), -1)
            for uses in then
        )

    def _left(self) -> list[int]:
        return self._last.gathers[self.num_gathers :]
