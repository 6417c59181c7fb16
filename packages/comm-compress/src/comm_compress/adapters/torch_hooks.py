"""torch's own communication hooks, counted: casts to 16 bits, and PowerSGD.

In: a bucket, from DDP. Out: what torch's hook makes of it.
"""

# No `from __future__ import annotations`: DDP compares the annotations of a hook with classes.
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from .. import wire
from ..topology import Grid
from ..traffic import Entry
from .worker import Worker


class CastHook:
    """Gradients are averaged in 16 bits."""

    def __init__(self, kind: str, grid: Grid, group: dist.ProcessGroup, torchs: Callable[..., Any]) -> None:
        self.__name__ = self.__qualname__ = f"comm_compress_{kind}"
        self.grid = grid
        self.group = group
        self.torchs = torchs
        self.entry = Entry("all_reduce", is_timed=False)

    def __call__(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start to average a bucket's gradients over the ranks."""
        buffer = bucket.buffer()
        self.entry.begin(wire.plain_all_reduce(self.grid, buffer.numel(), buffer.element_size()))
        self.entry.sent += wire.plain_all_reduce(self.grid, buffer.numel(), 2)
        future: torch.futures.Future[torch.Tensor] = self.torchs(self.group, bucket)
        return future

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""
        yield self.entry


class PowerSGDHook:
    """On the CPU one bucket after another, and in a process group of its own; every rank makes it.

    Its collectives follow each other in callbacks, and gloo, which knows messages by their order alone, would mix those
    of two buckets, and them with what backward itself sends over DDP's group (unused parameters, `SyncBatchNorm`).
    """

    def __init__(self, kind: str, grid: Grid, state: powerSGD_hook.PowerSGDState) -> None:
        self.__name__ = self.__qualname__ = f"comm_compress_{kind}"
        self.grid = grid
        self.state = state
        state.process_group = _for_a_thread(state.process_group)
        self.entry = Entry("all_reduce", is_timed=False)
        self._worker = Worker()

    def __call__(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start to average a bucket's gradients over the ranks."""
        if bucket.buffer().device.type != "cpu":
            return self._start(bucket)
        return self._worker.add(lambda: self._start(bucket).wait())

    def _start(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        self.entry.begin(wire.plain_all_reduce(self.grid, buffer.numel(), buffer.element_size()))
        before = self.state.total_numel_after_compression
        compresses = self.state.iter >= self.state.start_powerSGD_iter
        future: torch.futures.Future[torch.Tensor] = powerSGD_hook.powerSGD_hook(self.state, bucket)
        numel = self.state.total_numel_after_compression - before if compresses else buffer.numel()
        self.entry.sent += wire.plain_all_reduce(self.grid, numel, buffer.element_size())
        return future

    def entries(self) -> Iterator[Entry]:
        """See `comm_compress.traffic`."""
        yield self.entry


def _for_a_thread(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks whose messages on the CPU meet no others; every rank calls it."""
    cpu = torch.device("cpu")
    if cpu not in group._device_types:
        return group
    made: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=group._get_backend(cpu).options._timeout,
        use_local_synchronization=True,
    )
    return made
