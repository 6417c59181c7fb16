"""The step under speculation: each unit's begins when its gradient is reduced, and counts if it turns out right.

In: reduced gradients during backward; zero-core's `UnitStep`s, once norm and overflow are known. Out: the same units,
each either committed as it was computed meanwhile, or stepped now. Numbers are those of `StoreStepper`, always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch.optim import Optimizer
from zero_core import ShardSlot, UnitStep
from zero_core.hooks import Lane

from .early import EarlySteps
from .store_stepper import StoreStepper, is_stored

# Note [What is guessed]
# A unit's next step is taken to be like its last: after as many reductions of its gradient (micro-batches, and at
# stage 3 late gradients), of the same parameters, and with a factor that only unscales. After a step that clipped, the
# next waits for its norm, and so until one does not clip: where every step clips, nothing is computed twice. A guess
# is this rank's own business: no collective depends on it.


class SpeculativeStepper:
    """A `zero_core.ShardOptimizer` over stores.

    Args:
        inner: torch's AdamW, Adam, Adagrad or SGD, with options that the fused kernels know.
        window_bytes: as for `StoreStepper`.
        shadow_bytes: room for results that do not count yet; units that find none, those reduced last, are stepped
            when all is known. None: as much as it takes.

    Raises:
        OffloadConfigError: another optimizer, or other options.

    Source: SuperOffload (Lian et al., 2026), speculation-then-validation.
    """

    casts = True

    def __init__(self, inner: Optimizer, *, window_bytes: int, shadow_bytes: int | None) -> None:
        self.exact = StoreStepper(inner, window_bytes=window_bytes)
        self.early = EarlySteps(self.exact, with_state=True, shadow_bytes=shadow_bytes)
        self._lanes: dict[int, Lane] = {}  # in the order of their first reduction
        self._after: dict[int, int] = {}  # unit -> reductions before its last step
        self._moved: dict[int, Sequence[ShardSlot]] = {}
        self._clipped = False
        self._guess = 1.0

    def reduced(self, lane: Lane, unscale: float) -> None:
        """A unit's gradient has been reduced: step it now, if it is likely that this is the last word on it.

        Args:
            lane: the unit's, all of whose parameters that need gradients are this optimizer's.
            unscale: what gradients are multiplied by if they are not clipped.
        """
        index, self._guess = lane.unit.index, unscale
        self._lanes.setdefault(index, lane)
        if self._clipped or lane.shard.num_reduced != self._after.get(index):
            self.early.drop(lane.unit)
            return
        self.early.begin(lane, self._moved[index], unscale)

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`.

        Raises:
            OSError: a store cannot read or write. If the thread met it, nothing has changed, and this may be called
                again; else as `StoreStepper.step`.
            OffloadMemoryError: no room for results that do not count yet; likewise.
        """
        self.exact.check()
        factor = float(scale)
        kept = {item.unit.index for item in work if self._came_true(item, factor)}
        for index in list(self.early.under_way.keys() - kept):
            self.early.drop(self._lanes[index].unit)
        self.early.wait()
        self._make_room(work)
        for is_kept, items in groupby(work, lambda item: item.unit.index in kept):
            if not is_kept:
                yield from self.exact.step(list(items), scale)
                continue
            for item in items:
                self.early.commit(item.unit)
                yield item
        self._learn(work, factor)

    def settle(self) -> None:
        """States are about to be read or written: what is under way no longer counts."""
        self.early.check()
        self.early.drop_all()

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Around a load of all that a step writes: what is under way or failed does not matter any more."""
        self.early.forget()
        yield

    def close(self) -> None:
        """End the thread, and give room back; raises what it met."""
        self.early.close()

    def _came_true(self, item: UnitStep, factor: float) -> bool:
        early = self.early.under_way.get(item.unit.index)
        return early is not None and early.assumed == self.early.assume(early.lane, item.slots, factor)

    def _make_room(self, work: Sequence[UnitStep]) -> None:
        """Before a step counts: for the states of all that moves, and for what waits of those that were reduced."""
        moving = {item.unit.index for item in work if item.slots}
        for item in work:
            if is_stored(item.unit):
                self.exact.reserve(item.unit)
        for index, lane in self._lanes.items():
            if index in moving:
                self.early.make_room(lane.unit)

    def _learn(self, work: Sequence[UnitStep], factor: float) -> None:
        self._clipped = factor != self._guess
        for item in work:
            lane = self._lanes.get(item.unit.index)
            if lane is not None:
                self._after[item.unit.index] = lane.shard.num_reduced
                self._moved[item.unit.index] = list(item.slots)
