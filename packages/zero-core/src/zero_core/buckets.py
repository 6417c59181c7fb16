"""Where gradients land: each unit's flat gradient buffer, who has arrived, and in which order units are reduced.

In: a parameter's gradient, from `hooks`. Out: a full flat gradient once every parameter of a unit has arrived.
Reductions start in a fixed order, the same on every rank, so that ranks whose gradients arrive in different orders
(or not at all) still issue the same collectives. Next: `collectives` reduces it, `accumulate` keeps the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from .collectives import Handle, is_done
from .flat_unit import FlatUnit


class BufferPool:
    """Flat buffers reused within one backward pass: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._read: list[tuple[Handle, torch.Tensor]] = []  # by somebody, until the handle is done

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A buffer of `numel` elements with whatever was in it."""
        nbytes = numel * dtype.itemsize
        read, self._read = self._read, []
        for handle, raw in read:
            if is_done(handle):
                self._free.append(raw)
            else:
                self._read.append((handle, raw))
        for position, raw in enumerate(self._free):
            if raw.numel() >= nbytes and raw.device == device:
                return self._free.pop(position)[:nbytes].view(dtype)
        return torch.empty(nbytes, dtype=torch.uint8, device=device).view(dtype)

    def give(self, buffer: torch.Tensor, after: Handle | None = None) -> None:
        """Return a buffer that `take` gave, to be used again when a handle is done."""
        raw = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(buffer.untyped_storage())
        if after is None:
            self._free.append(raw)
        else:
            self._read.append((after, raw))

    def clear(self) -> None:
        """Free the memory; what somebody reads, when that has ended."""
        self._free.clear()
        self._read.clear()


class GradBucket:
    """The full gradients of one unit, in one flat buffer.

    Stages 0 and 1 keep the buffer; stages 2 and 3 have it from the first gradient of a backward pass to the
    reduction. A slot of `flat` is either blank (the next gradient is written) or filled (the next is added).

    Attributes:
        flat: [unit numel] in the reduce dtype, or None.
        num_expected: parameters that need gradients; some may be frozen meanwhile.
        this_pass: slots whose gradient came in the backward pass under way.
        used: slots that had a gradient since gradients were last zeroed.
    """

    def __init__(self, unit: FlatUnit, dtype: torch.dtype, pool: BufferPool) -> None:
        self.unit = unit
        self.dtype = dtype
        self.flat: torch.Tensor | None = None
        self.views: list[torch.Tensor] = []
        self.num_expected = len(unit.params)
        self.this_pass: set[int] = set()
        self.used: set[int] = set()
        self._filled: set[int] = set()
        self._scattered = False
        self._carried: torch.Tensor | None = None
        self._pool = pool

    @property
    def complete(self) -> bool:
        """Whether every slot that needs one got its gradient in this backward pass."""
        return len(self.this_pass) >= self.num_expected

    def land(self, index: int, grad: torch.Tensor, *, overwrite: bool = False) -> None:
        """Put one parameter's gradient into its place: written into a blank slot, added to a filled one.

        Args:
            index: the slot.
            grad: the parameter's shape, any floating dtype; may be the slot's own view, added to by autograd.
            overwrite: the gradient replaces what the slot holds.
        """
        self._open()
        grad = grad.to_dense() if grad.is_sparse else grad
        view = self.views[index]
        if grad.data_ptr() != view.data_ptr():
            if index in self._filled and not overwrite:
                view.add_(grad)
            else:
                view.copy_(grad)
        self._filled.add(index)
        self.this_pass.add(index)
        self.used.add(index)

    def seal(self) -> torch.Tensor:
        """The full gradient with blank slots zeroed, to be reduced; from stage 2 on, no longer this bucket's."""
        flat = self._open()
        for index, view in enumerate(self.views):
            if index not in self._filled:
                view.zero_()
                self._filled.add(index)
        if self.unit.stage >= 2:
            self._let_go()
        return flat

    def retire(self, full: torch.Tensor, *, keep: bool) -> None:
        """After the reduction of `full`: keep the mean in place (stage 0, 1), or blank or free the buffer."""
        if self.unit.stage >= 2:
            self._pool.give(full)
        elif not keep:
            self._filled.clear()
        else:
            self._scattered = self.unit.stage == 1

    def add_carried(self, reduced: torch.Tensor) -> None:
        """Stage 1: to a slice just reduced, add the mean of the earlier micro-batches that `_open` put aside."""
        if self._carried is not None:
            reduced.add_(self._carried)
            self._carried = None

    def zero(self, *, free: bool) -> None:
        """Forget all contributions; the memory of stages 0 and 1 stays for the next ones, or is given back."""
        self._scattered = False
        self._carried = None
        self._filled.clear()
        self.this_pass.clear()
        self.used.clear()
        if self.unit.stage >= 2:
            self._give_back()
        elif free:
            self.flat, self.views = None, []
        elif self.flat is not None:
            self._blank_gaps(self.flat)

    def zero_slots(self, slots: Iterable[int]) -> None:
        """Forget the contributions of some slots, where the others belong to another optimizer."""
        slots = set(slots)
        for index in slots:
            self.used.discard(index)
            if index in self._filled:
                self.views[index].zero_()
        if self._carried is not None:
            for part in self.unit.local_slots:
                if part.index in slots:
                    self._carried[part.start : part.stop].zero_()

    def _open(self) -> torch.Tensor:
        if self.flat is None:
            layout, device = self.unit.layout, self.unit.device
            if self.unit.stage >= 2:
                self.flat = self._pool.take(layout.numel, self.dtype, device)
            else:
                self.flat = torch.empty(layout.numel, dtype=self.dtype, device=device)
            self._blank_gaps(self.flat)
            self.views = self.unit.views_of(self.flat)
        if self._scattered:
            # Stage 1 after a reduction: this rank's slice holds the mean, the rest nothing of meaning. The mean waits
            # aside, the buffer starts from zero, and the two are added once the next reduction is done.
            self._carried = self.flat[slice(*self.unit.slice)].clone()
            self.flat.zero_()
            self._scattered = False
        return self.flat

    def _blank_gaps(self, flat: torch.Tensor) -> None:
        for lo, hi in self.unit.layout.gaps:
            flat[lo:hi].zero_()

    def _give_back(self) -> None:
        if self.flat is not None:
            self._pool.give(self.flat)
        self._let_go()

    def _let_go(self) -> None:
        self.flat, self.views = None, []
        self._filled.clear()


class ReduceOrder:
    """PURE: which units to reduce next, so that every rank reduces all units in one order.

    Starts as the reverse of the order of definition; `rebuild` replaces it by an order seen in a backward pass.
    """

    def __init__(self) -> None:
        self.order: list[int] = []
        self.seen: list[int] = []
        self._ready: set[int] = set()
        self._next = 0

    def add(self, unit: int) -> None:
        """One more unit, defined after the others: it is reduced first until an order has been seen."""
        self.order.insert(0, unit)

    def ready(self, unit: int, *, complete: bool = True) -> Iterator[int]:
        """`unit` has all gradients that it will have; yields the units that may start now."""
        if complete:
            self.seen.append(unit)
        self._ready.add(unit)
        while self._next < len(self.order) and self.order[self._next] in self._ready:
            self._next += 1
            yield self.order[self._next - 1]

    def rest(self) -> Iterator[int]:
        """The pass is over; yields every unit that has not started."""
        while self._next < len(self.order):
            self._next += 1
            yield self.order[self._next - 1]

    def restart(self) -> None:
        """A new pass begins."""
        self._next = 0
        self.seen.clear()
        self._ready.clear()

    def rebuild(self, seen: Sequence[int]) -> None:
        """Reduce in the order `seen` from now on; units that are not in it come last."""
        first = list(dict.fromkeys(seen))
        self.order = first + [unit for unit in self.order if unit not in set(first)]
