"""Updated shards back to the parameters: stage 1 and 2 gather them, stage 3 frees what it gathered of the old ones.

In: a unit whose master the optimizer has just updated. Out: `shard` in the parameters' dtype, and in stages 1 and 2
the full parameters on every rank. This ends a gradient's way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from functools import partial

from .collectives import Pending, Wire
from .flat_unit import FlatUnit
from .late import LateArrivals


def show(unit: FlatUnit, wire: Wire) -> Pending:
    """Stages 1 and 2: start to have every rank's `full` say what the shards do; every rank calls it."""
    full = unit.full
    if unit.num_exact_uses:
        return wire.gather(unit.label, unit.to_gather(full), full)
    return wire.gather_weights(
        unit.label, partial(unit.to_gather, full), full, version=None, trainable=unit.trainable
    )


class Publisher:
    """Publishes one unit after another, so that the gather of one runs beside the step of the next.

    Args:
        wire: the collectives for parameters.
        refresh: stage 3's word to the gatherer that a shard has new values.
        limit_bytes: of units being gathered at once; a larger one goes alone. 0 waits for each.
        late: takes over gathers that `finish` is not to wait for; no limit holds for them.
    """

    def __init__(
        self,
        wire: Wire,
        refresh: Callable[[FlatUnit], None] | None,
        *,
        limit_bytes: int,
        late: LateArrivals | None = None,
    ) -> None:
        self.wire = wire
        self.refresh = refresh
        self.limit_bytes = limit_bytes
        self.late = late
        self._gathers: deque[tuple[Pending, int]] = deque()
        self._others: list[Pending] = []

    def publish(self, unit: FlatUnit, *, cast: bool, moving: Collection[int] | None = None) -> None:
        """Start to publish `unit`.

        Args:
            unit: one whose master has new values.
            cast: the master has yet to be written to the shard (a fused step has done so).
            moving: slots with new values, on any rank; None: all.
        """
        unit.outdate(range(len(unit.params)) if moving is None else moving)
        if cast and unit.has_separate_master and unit.shard is not None:
            assert unit.master is not None
            unit.shard.copy_(unit.master)
        if unit.stage == 3:
            assert self.refresh is not None
            self.refresh(unit)
        elif unit.stage > 0 and self.late is not None:
            self.late.expect(unit, show(unit, self.wire))
        elif unit.stage > 0:
            nbytes = unit.full_bytes
            while self._gathers and nbytes + sum(size for _, size in self._gathers) > self.limit_bytes:
                self._gathers.popleft()[0].wait()
            self._gathers.append((show(unit, self.wire), nbytes))
            if not self.limit_bytes:
                self.finish()

    def after(self, pending: Pending) -> None:
        """Wait in `finish` for something else too."""
        self._others.append(pending)

    def finish(self) -> None:
        """Return when every parameter published may be used, or waits for its values itself."""
        while self._gathers:
            self._gathers.popleft()[0].wait()
        while self._others:
            self._others.pop().wait()
