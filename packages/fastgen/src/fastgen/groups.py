"""PURE: the order of requests: which come first, which wait, and which run.

In: requests as they arrive, are begun, lose their blocks and end. Out: the best that waits, the worst that runs.
Next: `scheduler`.

Note [One order]
A request's place is fixed when it arrives: `(priority * patience_steps + step of arrival, number of arrival)`. A
request that has waited `patience_steps` longer is so as good as one of the next better priority, without anything being
counted or sorted again; equals are in order of arrival, also after a preemption. Only requests before it in this order
can keep a request waiting or take its blocks, and these are finitely many: nothing starves (with patience).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from .request import Request, Sequence, Status


@dataclass(eq=False)
class Group:
    """A request's sequences, which wait, run and lose their blocks together.

    Attributes:
        request: theirs.
        key: the place in the order; lower is better.
        live: sequences that have not ended.
        status: WAITING, RUNNING, SWAPPED or FINISHED.
        most_live: sequences that it may have in a forward.
        num_slots: of these, those that it may still have.
        num_forked: sequences made so far.
        moved_step: the step in which it last began to run, or was sent away; -1 before it has ever run.
    """

    request: Request
    key: tuple[int, int]
    live: list[Sequence]
    status: Status = Status.WAITING
    num_forked: int = 1
    moved_step: int = -1

    def __post_init__(self) -> None:
        self.most_live = self.num_slots = self.request.params.num_sequences

    def fork(self, children: list[Sequence]) -> None:
        """There are more sequences."""
        self.live += children
        self.request.sequences += children
        self.num_forked += len(children)

    def end(self, sequence: Sequence) -> None:
        """One sequence has ended. Of a sample no others come; of beams they do."""
        self.live.remove(sequence)
        if self.num_forked > 1 and not self.request.params.beam_width:
            self.num_slots = len(self.live)


def place(priority: int, patience_steps: int, step: int, arrival: int) -> tuple[int, int]:
    """A request's place, see Note [One order]."""
    return (priority * patience_steps + step, arrival) if patience_steps else (priority, arrival)


@dataclass
class Order:
    """Groups that wait, and those that run, the best first.

    Attributes:
        running: sorted by their place.
    """

    running: list[Group] = field(default_factory=list)
    _heap: list[tuple[tuple[int, int], Group]] = field(default_factory=list)
    _num_gone: int = 0  # of the heap's, those that have ended

    @property
    def num_waiting(self) -> int:
        """Groups that wait, the swapped ones included."""
        return len(self._heap) - self._num_gone

    def waiting(self) -> Iterator[Group]:
        """Groups that wait, the swapped ones included; in no order."""
        return (group for _, group in self._heap if group.status is not Status.FINISHED)

    def wait(self, group: Group) -> None:
        """Put a group among those that wait, according to its place."""
        heapq.heappush(self._heap, (group.key, group))

    def best_waiting(self) -> Group | None:
        """The next to run."""
        while self._heap and self._heap[0][1].status is Status.FINISHED:
            heapq.heappop(self._heap)
            self._num_gone -= 1
        return self._heap[0][1] if self._heap else None

    def begin(self, group: Group) -> None:
        """The best that waits runs."""
        heapq.heappop(self._heap)
        bisect.insort(self.running, group, key=_key)

    def stop_worst(self) -> Group:
        """The worst that runs runs no more."""
        return self.running.pop()

    def end(self, group: Group) -> None:
        """A group is over, wherever it was; its status still says where."""
        if group.status is Status.RUNNING:
            del self.running[bisect.bisect_left(self.running, group.key, key=_key)]
            group.status = Status.FINISHED
            return
        group.status = Status.FINISHED
        self._num_gone += 1
        if self._num_gone > 64 and self._num_gone * 2 > len(
            self._heap
        ):  # do not keep the prompts of many that left
            self._heap = [(group.key, group) for group in self.waiting()]
            heapq.heapify(self._heap)
            self._num_gone = 0


def _key(group: Group) -> tuple[int, int]:
    return group.key
