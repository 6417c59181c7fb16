"""How parts travel between CPU ranks as tagged messages; `shared_memory` is the other way.

In: what goes to each rank, and a tag. Out: a handle; once it is done, what came from each rank. `collectives` makes
gathers and reductions of it. Parts with different tags never meet, and a wait ends at its deadline.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import TypeAlias

import torch
import torch.distributed as dist

Then = Callable[[Sequence[torch.Tensor]], object]


@dataclass
class Works:
    """Works of the process group, then something to do with what arrived: a `collectives.Handle`.

    A time-out of None leaves the deadline to the back end. `keep` holds what must outlive the works. `watcher` can
    wait for them beside this rank's work, from the first question on; `arrival` is its answer.
    """

    works: Sequence[dist.Work]
    timeout_s: float | None
    then: Callable[[], object] | None = None
    keep: Sequence[torch.Tensor] = field(default_factory=list)
    watcher: Watcher | None = None
    arrival: Future[None] | None = None

    def is_done(self) -> bool:
        """Whether `wait` need not wait for another rank, as far as is known."""
        if self.arrival is None and self.watcher is not None:
            self.arrival = self.watcher.watch(self)
        return self.arrival is None or self.arrival.done()

    def wait(self) -> None:
        """Finish."""
        if self.arrival is None:
            self.arrive()
        else:
            self.arrival.result()
        if self.then is not None:
            self.then()

    def arrive(self) -> None:
        """Wait for the works alone."""
        for work in self.works:
            if self.timeout_s is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout_s))


_Queue: TypeAlias = "SimpleQueue[tuple[Works, Future[None]] | None]"


class Watcher:
    """A thread that waits for works, so that their rank may go on serving others; gloo's works cannot be asked."""

    def __init__(self) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._queue.put, None)

    def watch(self, works: Works) -> Future[None]:
        """Done when the works are."""
        arrival: Future[None] = Future()
        self._queue.put((works, arrival))
        if self._thread is None:
            self._thread = threading.Thread(target=_watch, args=(self._queue,), name="zero_core", daemon=True)
            self._thread.start()
        return arrival


def _watch(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        works, arrival = item
        try:
            works.arrive()
        except BaseException as error:  # the rank that waits raises it
            arrival.set_exception(error)
        else:
            arrival.set_result(None)
        del item, works, arrival


def exchange(
    group: dist.ProcessGroup,
    sent: Sequence[torch.Tensor],
    received: Sequence[torch.Tensor],
    tag: int,
    timeout_s: float,
    then: Callable[[], object] | None = None,
    watcher: Watcher | None = None,
) -> Works:
    """Send `sent[r]` to every other rank r and receive `received[r]` from it; empty tensors do not travel.

    Args:
        group: a group whose messages carry tags (gloo).
        sent: what goes to each rank, contiguous; the entry of this rank is not looked at.
        received: where to put what comes from each rank, likewise.
        tag: of these messages; a receive never matches another tag.
        timeout_s: deadline of the handle's `wait`.
        then: called when everything has arrived.
        watcher: see `Works`.
    """
    rank, works = group.rank(), []
    for step in range(1, group.size()):  # everyone starts with the next rank, so that no rank is flooded
        peer, source = (rank + step) % group.size(), (rank - step) % group.size()
        if received[source].numel():
            from_rank = dist.get_global_rank(group, source)
            works.append(dist.irecv(as_bytes(received[source]), from_rank, group=group, tag=tag))
        if sent[peer].numel():
            works.append(
                dist.isend(as_bytes(sent[peer]), dist.get_global_rank(group, peer), group=group, tag=tag)
            )
    return Works([work for work in works if work is not None], timeout_s, then, [*sent, *received], watcher)


class Messages:
    """The parts themselves as messages; works between any ranks."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self._scratch: list[torch.Tensor] = []
        self._watcher = Watcher()

    def swap(
        self,
        sent: Sequence[torch.Tensor],
        tag: int,
        *,
        into: Sequence[torch.Tensor] | None = None,
        then: Then | None = None,
    ) -> Works:
        """Exchange equal parts with every other rank.

        Args:
            sent: what goes to each rank; contiguous, of one size and dtype.
            tag: of these parts.
            into: where to put what comes from each rank; None keeps it until `then` returns.
            then: called with what came from each rank (this rank's own entry: what it would have sent itself).
        """
        rank, size = self.group.rank(), self.group.size()
        if into is not None:
            call = None if then is None else lambda: then(into)
            return exchange(self.group, sent, into, tag, self.timeout_s, call, self._watcher)
        nbytes = sent[rank].numel() * sent[rank].element_size() * (size - 1)
        scratch = self._borrow(nbytes)
        parts = list(scratch[:nbytes].view(sent[rank].dtype).view(size - 1, -1)) if size > 1 else []
        received = [*parts[:rank], sent[rank], *parts[rank:]]

        def finish() -> None:
            if then is not None:
                then(received)
            self._scratch.append(scratch)

        return exchange(self.group, sent, received, tag, self.timeout_s, finish, self._watcher)

    def _borrow(self, nbytes: int) -> torch.Tensor:
        """Bytes for what arrives; kept between exchanges, since fresh pages cost more than the copy."""
        for position, buffer in enumerate(self._scratch):
            if buffer.numel() >= nbytes:
                return self._scratch.pop(position)
        return torch.empty(nbytes, dtype=torch.uint8)

    def trim(self) -> None:
        """Give scratch memory back."""
        self._scratch.clear()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: what travels is moved, not interpreted."""
    return tensor.detach().view(-1).view(torch.uint8)
