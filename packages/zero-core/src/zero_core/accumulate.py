"""What happens to a reduced gradient: it becomes this rank's gradient shard, or is added to it.

In: the mean over ranks of a unit's gradient, this rank's slice (stage 0: all of it). Out: `GradShard.value`, which
`norms` measures and `optimizer` consumes. `StoredGradShard` keeps it in a store.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .buckets import BufferPool
from .flat_unit import FlatUnit
from .norms import Measured
from .stores import ShardStore


class GradShard:
    """The reduced gradients of one unit on this rank, from the first reduction to `zero`.

    In stages 0 and 1 it is the matching part of the bucket's own buffer, if the dtypes agree; else a buffer of
    [local numel] in the accumulate dtype.

    Attributes:
        num_reduced: reductions since gradients were zeroed.
        version: changes whenever the gradient does.
    """

    def __init__(self, unit: FlatUnit, dtype: torch.dtype, *, in_place: bool, pool: BufferPool) -> None:
        self.unit = unit
        self.dtype = dtype
        self.in_place = in_place
        self.filled = False
        self.num_reduced = 0
        self.version = 0
        self._lent = False
        self._buffer: torch.Tensor | None = None
        self._pool = pool

    @property
    def value(self) -> torch.Tensor | None:
        """[local numel] in the accumulate dtype; None if nothing was reduced since gradients were zeroed."""
        return self._buffer if self.filled else None

    @property
    def measured(self) -> Measured | None:
        """What its norm is made of, where that is known without a look at `value`."""
        return None

    def landing(self) -> torch.Tensor:
        """Where a reduction may write: the shard itself while it is empty, else a borrowed buffer."""
        if not self.filled:
            return self._own()
        start, stop = self.unit.local
        return self._pool.take(stop - start, self.dtype, self.unit.device)

    def accept(self, reduced: torch.Tensor) -> None:
        """Take a reduced gradient over."""
        if self.in_place:
            self._buffer = reduced
        elif not self.filled:
            own = self._own()
            if own.data_ptr() != reduced.data_ptr():
                own.copy_(reduced)
        else:
            if self._lent:
                self._buffer, self._lent = self._own().clone(), False
            own = self._own()
            own.add_(reduced)
            if self.unit.stage >= 2:
                self._pool.give(reduced)
        self._count()

    def zero(self, *, free: bool) -> None:
        """Forget the gradient; the memory stays for the next one, or is given back."""
        self._forget()
        if free or self._lent:
            self._buffer, self._lent = None, False

    def lend(self) -> torch.Tensor:
        """The value, for someone who reads it until later: the next gradient goes into other memory."""
        assert self.value is not None
        if self.in_place:  # the next backward writes there, whatever is said here
            return self.value.clone()
        self._lent = True
        return self.value

    def zero_slots(self, slots: Iterable[int]) -> None:
        """Forget the gradients of some slots, where the others belong to another optimizer."""
        if self._lent and self._buffer is not None:
            self._buffer, self._lent = self._buffer.clone(), False
        wanted = set(slots)
        self.version += 1
        for part in self.unit.local_slots if self.value is not None else ():
            if part.index in wanted:
                assert self._buffer is not None
                self._buffer[part.start : part.stop].zero_()

    def _count(self) -> None:
        self.filled = True
        self.num_reduced += 1
        self.version += 1

    def _forget(self) -> None:
        self.filled = False
        self.num_reduced = 0
        self.version += 1

    def _own(self) -> torch.Tensor:
        if self._buffer is None:
            start, stop = self.unit.local
            self._buffer = torch.empty(stop - start, dtype=self.dtype, device=self.unit.device)
        return self._buffer


class StoredGradShard(GradShard):
    """The same in a store: handed over as soon as it is reduced, and read back where another one is added to it.

    Attributes:
        name: what it is called there.
    """

    def __init__(self, unit: FlatUnit, dtype: torch.dtype, store: ShardStore, pool: BufferPool) -> None:
        super().__init__(unit, dtype, in_place=False, pool=pool)
        self.store = store
        self.name = unit.key("grad")
        self._measured: tuple[int, Measured] | None = None  # of which version

    @property
    def value(self) -> torch.Tensor | None:
        """See `GradShard.value`; a view of the store, on the CPU."""
        return self.store.view(self.name) if self.filled else None

    @property
    def measured(self) -> Measured | None:
        """See `GradShard.measured`; found while the gradient was on its way to the store."""
        known = self._measured
        return known[1] if self.filled and known is not None and known[0] == self.version else None

    def landing(self) -> torch.Tensor:
        """A borrowed buffer."""
        start, stop = self.unit.local
        return self._pool.take(stop - start, self.dtype, self.unit.device)

    def accept(self, reduced: torch.Tensor) -> None:
        """Take a reduced gradient over, with its buffer."""
        if self.filled:
            before = torch.empty_like(reduced)
            self.store.fetch(self.name, before).wait()
            reduced.add_(before)
        measured = Measured.of(reduced)  # it is near, and soon is not
        arriving = self.store.put(self.name, reduced)  # or there is no room, and no gradient
        self._count()
        self._measured = self.version, measured
        self._pool.give(reduced, after=arriving)

    def zero(self, *, free: bool) -> None:
        """Forget the gradient; its place stays."""
        self._forget()

    def lend(self) -> torch.Tensor:
        """See `GradShard.lend`; a copy, on the CPU."""
        assert self.value is not None
        return self.value.clone()

    def zero_slots(self, slots: Iterable[int]) -> None:
        """See `GradShard.zero_slots`."""
        wanted, value = set(slots), self.value
        self.version += 1
        for part in self.unit.local_slots if value is not None else ():
            if part.index in wanted:
                assert value is not None
                value[part.start : part.stop].zero_()
