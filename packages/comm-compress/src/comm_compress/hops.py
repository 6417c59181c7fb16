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

    def swap(self, sent: Sequence[torch.Tensor], tag: int, then: Then, entry: Entry) -> zero.Handle:
        """Send `sent[r]` to every other rank r; `then` gets what each sent here, and this rank's own for itself.

        All messages are bytes, of one size on all ranks.
        """
        for rank, message in enumerate(sent):
            if rank != self.rank:
                entry.count(message.numel(), near=self.near[rank])
        if self.plain is None:
            then(sent)
            return Done()
        if sent[0].device.type == "cpu":
            return self.plain.way().swap(sent, tag, then=then)
        out = torch.cat(list(sent)) if len(sent) > 1 else sent[0]
        into = torch.empty_like(out)
        work = dist.all_to_all_single(into, out, group=self.group, async_op=True)
        return _Works(work, lambda: then(list(into.view(self.size, -1))), [out, into])

    def gather(self, own: torch.Tensor, tag: int, then: Then, entry: Entry) -> zero.Handle:
        """Send one message to every other rank; `then` gets each rank's, this one's too."""
        if own.device.type == "cpu" or self.plain is None:
            return self.swap([own] * self.size, tag, then, entry)
        for rank in range(self.size):
            if rank != self.rank:
                entry.count(own.numel(), near=self.near[rank])
        into = own.new_empty(self.size * own.numel())
        work = dist.all_gather_into_tensor(into, own, group=self.group, async_op=True)
        return _Works(work, lambda: then(list(into.view(self.size, -1))), [own, into])

    def trim(self) -> None:
        """Give scratch memory back."""
        if self.plain is not None:
            self.plain.trim()
