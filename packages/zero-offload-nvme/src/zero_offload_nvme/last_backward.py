"""The exact step, begun during the last backward where its user promises that nothing will change it.

In: reduced gradients inside `OffloadedOptimizer.last_backward`; zero-core's `UnitStep`s. Out: the same units, stepped.
States and separate masters are stepped where they lie, so that a broken promise cannot be taken back, only told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim import Optimizer
from zero_core import UnitStep, ZeroStateError
from zero_core.flat_unit import FlatUnit
from zero_core.hooks import Lane

from .early import EarlySteps
from .store_stepper import StoreStepper


class LastBackwardStepper:
    """A `zero_core.ShardOptimizer` over stores.

    Args:
        inner: torch's AdamW, Adam, Adagrad or SGD, with options that the fused kernels know.
        window_bytes: as for `StoreStepper`.
        shadow_bytes: room for new values that the model must not see yet; units that find none are stepped when
            backward is over. None: as much as it takes.

    Raises:
        OffloadConfigError: another optimizer, or other options.
    """

    casts = True

    def __init__(self, inner: Optimizer, *, window_bytes: int, shadow_bytes: int | None) -> None:
        self.exact = StoreStepper(inner, window_bytes=window_bytes)
        self.early = EarlySteps(self.exact, with_state=False, shadow_bytes=shadow_bytes)
        self._is_last = False
        self._half_done = ""  # why states are those of no step
        self._is_replaced = False

    @contextmanager
    def promised(self, units: Sequence[FlatUnit]) -> Iterator[None]:
        """Units whose gradients are reduced inside are stepped at once.

        Args:
            units: that may be, in the order in which they are given room.
        """
        self.settle()
        for unit in units:
            if self.exact.is_placed(unit):  # the first step makes states
                self.early.make_room(unit)
        self._is_last = True
        try:
            yield
        finally:
            self._is_last = False

    def reduced(self, lane: Lane, unscale: float) -> None:
        """A unit's gradient has been reduced, of which every parameter that needs one has got it on this rank."""
        if self._is_last and lane.unit.index not in self.early.under_way:
            slots = self.early.slots.get(lane.unit.index, [])
            moving = [slot for slot in slots if slot.place.index in lane.bucket.used]
            self.early.begin(lane, moving, unscale)

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`.

        Raises:
            OSError: as `StoreStepper.step`, if the thread met it too.
            zero_core.ZeroStateError: a promise was broken; go on from a checkpoint.
        """
        self._check_whole()
        self.exact.check()
        factor, items = float(scale), {item.unit.index: item for item in work}
        for index, early in self.early.under_way.items():
            now = self.early.assume(early.lane, items[index].slots if index in items else [], factor)
            if now != early.assumed:
                self._drop(
                    f"{early.lane.unit.label} was stepped during last_backward(), and since then something of what the "
                    f"step depends on has changed: {now.differences(early.assumed)}. Its state has moved on: go on "
                    "from a checkpoint, and leave last_backward() out, or use overlap='speculative'"
                )
                self._check_whole()
        self.early.wait()
        todo: list[UnitStep] = []
        for item in work:
            if item.unit.index not in self.early.under_way:
                todo.append(item)
                continue
            yield from self._step(todo, scale)
            self.early.commit(item.unit)
            yield item
        yield from self._step(todo, scale)

    def check_unchanged(self, what: str) -> None:
        """Refuse what would not reach units that have been stepped.

        Raises:
            zero_core.ZeroStateError: there are some.
        """
        if self.early.under_way:
            raise ZeroStateError(
                f"{what}: {len(self.early.under_way)} units have been stepped during last_backward(), which promised "
                "that step() follows; call step() first, and leave last_backward() out where this is to come before it"
            )

    def settle(self) -> None:
        """States are about to be read or written: no step may be half done."""
        if self._is_replaced:
            return
        self._check_whole()
        self.early.check()
        self.check_unchanged("the optimizer's state")

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Around a load of all that a step writes: steps that are half done go, and what they did with it."""
        self._drop(
            "units have been stepped, and their step has not counted; go on from a checkpoint, all of it"
        )
        before, self._is_replaced = self._is_replaced, True
        try:
            yield
        finally:
            self._is_replaced = before
        self._half_done = ""

    def close(self) -> None:
        """End the thread, and give room back; raises what it met, and if steps were half done."""
        try:
            self._check_whole()
            self.check_unchanged("close()")
        finally:
            self.early.close()

    def _drop(self, why: str) -> None:
        """Have no step under way; what was, and what failed, has left states behind that are half done."""
        if self.early.is_begun:
            self._half_done = why
        self.early.forget()

    def _check_whole(self) -> None:
        if self._half_done:
            raise ZeroStateError(self._half_done)

    def _step(self, todo: list[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        items = todo[:]
        todo.clear()
        if items:
            yield from self.exact.step(items, scale)
