"""Messages among the ranks of one group; the one module that moves bytes.

In: a message for each rank, or one for all. Out: a handle; once it is done, what came from each rank was seen by
`then`. On the CPU they travel as zero-core's do: with a tag, through memory that ranks of one machine share or as
messages of the group, and a wait ends at its deadline. On an accelerator by the back end's own collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import zero_core as zero

from .traffic import Entry

Then = Callable[[Sequence[torch.Tensor]], object]


@dataclass
class Done:
    """Nothing to wait for: a `zero_core.Handle`."""

    def wait(self) -> None:
        """Return."""


@dataclass
class _Works:
    """A work of the back end, then something to do with what arrived; `keep` must outlive it."""

    work: dist.Work
    then: Callable[[], object]
    keep: Sequence[torch.Tensor]

    def wait(self) -> None:
        """Have the current stream wait, and go on."""
        self.work.wait()
        self.then()


class Hop:
    """One group's way for messages.

    Args:
        group: the ranks; None: this rank alone.
        near: for each rank of the group, whether it shares this one's node (for counting).
        timeout_s: deadline of a wait on the CPU.
        shared_memory: as for `zero_core.PlainCollectives`.

    Every rank of `group` must make one at the same time.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, near: Sequence[bool], timeout_s: float, *, shared_memory: bool
    ) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.near = near
        self.plain: zero.PlainCollectives | None = None
        if group is not None:
            self.plain = zero.PlainCollectives(group, timeout_s, shared_memory=shared_memory)
            if torch.device("cpu") in group._device_types:
                self.plain.way()  # while all are here: the first message may go in the middle of a backward

    def swap(self, sent: torch.Tensor, tag: int, then: Then, entry: Entry) -> zero.Handle:
        """Send `sent[r]` to every other rank r; `then` gets what each sent here, and this rank's own for itself.

        Args:
            sent: [ranks, bytes], uint8, contiguous; must not change before the handle is done.
            tag: of these messages.
            then: called once, when all are there.
            entry: counts them.
        """
        self._count(sent.shape[1], entry)
        if self.plain is None:
            then(list(sent))
            return Done()
        if sent.device.type == "cpu":
            return self.plain.way().swap(list(sent), tag, then=then)
        assert self.group is not None
        return swap_by_backend(self.group, sent, then)

    def gather(self, own: torch.Tensor, tag: int, then: Then, entry: Entry) -> zero.Handle:
        """Send one message, [bytes], to every other rank; `then` gets each rank's, this one's too."""
        self._count(own.numel(), entry)
        if self.plain is None:
            then([own])
            return Done()
        if own.device.type == "cpu":
            return self.plain.way().swap([own] * self.size, tag, then=then)
        assert self.group is not None
        return gather_by_backend(self.group, own, then)

    def _count(self, nbytes: int, entry: Entry) -> None:
        for rank in range(self.size):
            if rank != self.rank:
                entry.count(nbytes, near=self.near[rank])

    def trim(self) -> None:
        """Give scratch memory back."""
        if self.plain is not None:
            self.plain.trim()


def swap_by_backend(group: dist.ProcessGroup, sent: torch.Tensor, then: Then) -> zero.Handle:
    """See `Hop.swap`; all ranks of the group make their calls in one order."""
    into = torch.empty_like(sent)
    work = dist.all_to_all_single(into.view(-1), sent.view(-1), group=group, async_op=True)
    return _Works(work, lambda: then(list(into)), [sent, into])


def gather_by_backend(group: dist.ProcessGroup, own: torch.Tensor, then: Then) -> zero.Handle:
    """See `Hop.gather`; all ranks of the group make their calls in one order."""
    into = own.new_empty(group.size(), own.numel())
    work = dist.all_gather_into_tensor(into.view(-1), own, group=group, async_op=True)
    return _Works(work, lambda: then(list(into)), [own, into])
