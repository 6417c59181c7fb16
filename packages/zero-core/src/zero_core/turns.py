"""Stage 3: gathers in the one order of all ranks, and the meetings that keep it.

In: a unit that this rank is about to use, or the segment that it is about to begin. Out: the unit whole, and part
taken in whatever gathers the others need before that. `gather_plan` decides, this module talks and moves; `gather`
says when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch

from .collectives import Pending, Wire
from .config import Overlap
from .flat_unit import FlatUnit
from .gather_plan import GatherPlan, Kind, Word, decide
from .params import ReleasedParameter, Residency
from .streams import Beside

NUM_PREFETCHED = 2
"""Shards beyond those that are gathered ahead, which a store may bring near: one on its way, one there."""


class Turns:
    """Whose turn it is to be gathered; see Note [One order of gathers].

    Args:
        units: all units of the model.
        wire: the collectives for parameters (not those of the gradients: the two need no common order).
        council: the wire over which ranks meet; its values travel from the CPU.
        overlap: the byte budget for gathers ahead of use.
        released: the class that parameters take while released.
        release_if_idle: called with a unit that was gathered for others alone.

    Attributes:
        kind: the segment that this rank is in.
        num_hits, num_misses: uses of units that were sent for ahead, and that had to be waited for from the start.
    """

    def __init__(
        self,
        units: list[FlatUnit],
        wire: Wire,
        council: Wire,
        overlap: Overlap,
        released: type[ReleasedParameter],
        release_if_idle: Callable[[FlatUnit], None],
    ) -> None:
        self.units = units
        self.wire = wire
        self.council = council
        self.released = released
        self.kind = Kind.REST
        self.num_hits = self.num_misses = 0
        self._release_if_idle = release_if_idle
        sizes = [unit.full_bytes if unit.stage == 3 else 0 for unit in units]
        budget = max(sizes, default=0) if overlap.prefetch_bytes is None else overlap.prefetch_bytes
        self._plan = GatherPlan(sizes, budget if overlap.enabled else 0)
        self._beside = Beside()
        self._on_the_way: dict[int, Callable[[], None]] = {}
        self._prefetched: set[int] = set()

    # -- this rank --------------------------------------------------------------------------------------------

    def use(self, unit: FlatUnit) -> None:
        """Have `unit` whole, and send for those that come next."""
        if unit.stage < 3:
            return
        if unit.residency is Residency.SHARDED:
            self.num_misses += 1
            self._await_turn(unit)
        elif unit.residency is Residency.GATHERING:
            self.num_hits += 1
        passed, ahead = self._plan.use(unit.index)
        self._pass_over(passed)
        for index in ahead:
            if self.units[index].residency is Residency.SHARDED:
                self.launch(self.units[index])
            else:
                self._plan.was_whole(index)
                self._hand_out(self.units[index])
        for index in self._plan.coming(NUM_PREFETCHED):
            self.units[index].prefetch()
            self._prefetched.add(index)
        self.arrive(unit)

    def is_used_next(self, unit: FlatUnit) -> bool:
        """Whether `unit` should stay whole, since its next use is expected before any other's."""
        whole = {each.index for each in self.units if each.residency is Residency.GATHERED}
        return self._plan.next_is(unit.index, whole)

    def launch(self, unit: FlatUnit, *, exact: bool = False) -> None:
        """Start the gather of a unit that rests as shards; `exact`: not to compute with, but for the values themselves.

        All ranks give the same `exact`.
        """
        if unit.residency is Residency.SHARDED:
            unit.enter(Residency.GATHERING, self.released)
            with self._back_to_shards_on_failure(unit):
                self._on_the_way[unit.index] = self._send_for(unit, exact=exact)

    def _send_for(self, unit: FlatUnit, *, exact: bool) -> Callable[[], None]:
        """Start a gather; returns the wait for it. What comes to a device from a store comes beside compute."""
        if unit.resting is None:
            return self._gather(unit, unit.full, exact=exact).wait
        with self._beside.compute(unit.device) as queued:
            pending = self._gather(unit, unit.full, exact=exact)

        def wait() -> None:
            queued.wait()
            pending.wait()

        return wait

    def _gather(self, unit: FlatUnit, into: torch.Tensor, *, exact: bool = False) -> Pending:
        if exact:
            return self.wire.gather(unit.label, self._shard_of(unit, into), into)
        shard = partial(self._shard_of, unit, into)
        return self.wire.gather_weights(
            unit.label, shard, into, version=unit.version, trainable=unit.trainable
        )

    def _shard_of(self, unit: FlatUnit, into: torch.Tensor) -> torch.Tensor:
        self._prefetched.discard(unit.index)
        return unit.to_gather(into)

    def arrive(self, unit: FlatUnit) -> None:
        """Wait until the unit is whole; its parameters may be touched then."""
        if unit.residency is Residency.GATHERING:
            with self._back_to_shards_on_failure(unit):
                self._on_the_way.pop(unit.index)()
            unit.enter(Residency.GATHERED, self.released)
        elif unit.stage == 3 and unit.residency is Residency.GATHERED:
            unit.show()

    def free(self, unit: FlatUnit) -> None:
        """Let the unit rest as shards, which take over what was written to its parameters."""
        unit.take_edits()
        unit.enter(Residency.SHARDED, self.released)

    @contextmanager
    def _back_to_shards_on_failure(self, unit: FlatUnit) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.free(unit)
            raise

    # -- the other ranks --------------------------------------------------------------------------------------

    def meet(self, kind: Kind, first: FlatUnit | None = None) -> None:
        """Begin a segment, of which `first` is used first, once no rank needs this one's shards for another.

        Raises:
            CollectiveError: the ranks have come to where no common way is left, or one of them did not come.
        """
        index = -1 if first is None else first.index
        self._pass_over(self._plan.rest())
        while self._prefetched:  # the shards may change before they are gathered
            self.units[self._prefetched.pop()].forget_prefetched()
        while True:
            words = self._hear(Word(kind, first=index, needed=frozenset(self._plan.needed)))
            decision = decide(words)
            if decision.gather is not None:
                self._plan.add(decision.gather, needed=False)
                self._pass_over([decision.gather])
                continue
            if decision.parted is not None:
                self._part(words, decision.parted)
            self._plan.begin(decision.segment, frozenset().union(*(word.needed for word in words)))
            if decision.segment[0] is kind:
                self.kind = kind
                return
            self._pass_over(self._plan.rest())

    def _await_turn(self, unit: FlatUnit) -> None:
        """Launch the gather of `unit`, after those that all ranks have before it."""
        passed = self._plan.turn(unit.index)
        if passed is not None:
            self._pass_over(passed)
        else:
            self._pass_over(self._plan.rest())
            while True:
                words = self._hear(Word(self.kind, want=unit.index, needed=frozenset(self._plan.needed)))
                chosen = decide(words).gather
                assert chosen is not None  # this rank wants one
                self._plan.add(chosen, needed=chosen == unit.index)
                if chosen == unit.index:
                    break
                self._pass_over([chosen])
        self.launch(unit)

    def _hear(self, word: Word) -> list[Word]:
        """Say a word at a meeting; returns those of all ranks."""
        what = f"meeting before {word.kind.label}"
        if word.want >= 0:
            what = f"gather of {self.units[word.want].label}"
        elif word.first >= 0:
            what += f" from {self.units[word.first].label}"
        numbers = word.numbers(self._plan.num_gathers)
        return [Word.of(each) for each in self.council.consult(what, numbers)]

    def _pass_over(self, indices: Iterable[int]) -> None:
        """Take part in gathers that other ranks may need, and keep nothing."""
        for index in indices:
            unit = self.units[index]
            if unit.residency is Residency.GATHERED:
                self._hand_out(unit)
            else:
                self.launch(unit)
                self.arrive(unit)
                self._release_if_idle(unit)

    def _hand_out(self, unit: FlatUnit) -> None:
        """Take part in the gather of a unit that is whole here."""
        unit.take_edits()
        self._gather(unit, torch.empty_like(unit.full)).wait()

    def _part(self, words: list[Word], parted: tuple[tuple[int, ...], tuple[int, ...]]) -> NoReturn:
        inside, outside = (", ".join(map(str, ranks)) for ranks in parted)
        others = words[parted[1][0]].kind.label
        raise self.wire.fail(
            f"rank {self.wire.group.rank()} of {self.wire.group.size()}: ranks have parted: rank {inside} begins a "
            f"backward at {self.units[max(word.first for word in words)].label}, rank {outside} has come to {others}. "
            "All ranks must run as many backward passes between two steps; those that only some ranks have go under "
            "zero_core.no_sync, before the last one, which all have. model.generate() is for all ranks together"
        )
