"""Shards inside a node, copies of them across nodes: gradients are averaged over both.

In: a unit's full gradient. Out: this rank's slice of the mean over all ranks, the same bits on all that hold it.
Gathers stay among the ranks that share one set of shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from .collectives import Collectives, Handle, is_done
from .streams import Beside


class HierarchicalCollectives:
    """Another's collectives inside, and a mean over the replicas after each reduction.

    Wire elements of a reduction of n over S shards and R replicas: n (S-1)/S inside, and 2 (n/S) (R-1)/R across.

    Args:
        inside: of the ranks that share one set of shards.
        across: of the ranks that hold the same shard.
        group: the latter.

    Source: PyTorch FSDP (Zhao et al., 2023), section 3.2.2, hybrid sharding; MiCS (Zhang et al., 2022).
    """

    def __init__(self, inside: Collectives, across: Collectives, group: dist.ProcessGroup) -> None:
        self.inside = inside
        self.across = across
        self.group = group
        self._in_order = InOrder()

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """See `Collectives.all_gather`."""
        return self.inside.all_gather(shard, out, tag=tag)

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """See `Collectives.reduce_scatter`; `out` must have a multiple of R elements."""
        part = out.view(self.group.size(), -1)[self.group.rank()]
        steps: list[Callable[[], Handle]] = [
            lambda: self.inside.reduce_scatter(full, out, tag=tag),
            lambda: self.across.reduce_scatter(out, part, tag=tag),
            lambda: self.across.all_gather(part, out, tag=tag ^ 1),
        ]
        return self._in_order.run(steps, full.device)

    def trim(self) -> None:
        """See `Collectives.trim`."""
        self.inside.trim()
        self.across.trim()


class InOrder:
    """Runs collectives each of which needs the one before, beside compute, which waits for none before it must."""

    def __init__(self) -> None:
        self._beside = Beside()

    def run(self, steps: Iterable[Callable[[], Handle]], device: torch.device) -> Handle:
        """Start them: on the CPU the first; on an accelerator all at once, on a stream of their own.

        Tensors that the steps use must live until the handle is done.
        """
        if device.type == "cpu":
            return Chain(steps)
        with self._beside.compute(device) as queued:
            for step in steps:
                step().wait()
        return queued


class Chain:
    """Collectives each of which needs the one before; goes on whenever it is looked at: a `Handle`."""

    def __init__(self, steps: Iterable[Callable[[], Handle]]) -> None:
        self._steps = deque(steps)
        self._now = self._steps.popleft()()

    def is_done(self) -> bool:
        """Whether `wait` need not wait for another rank."""
        while is_done(self._now):
            if not self._steps:
                return True
            self._go_on()
        return False

    def wait(self) -> None:
        """Finish."""
        while self._steps:
            self._go_on()
        self._now.wait()

    def _go_on(self) -> None:
        self._now.wait()
        self._now = self._steps.popleft()()
