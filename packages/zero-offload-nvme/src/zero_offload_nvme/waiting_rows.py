"""The rows of a unit that wait: sums of their gradients, and the values that a late step has computed for them.

In: gradients, a window's worth. Out: a `FlatStep` over the rows, and its result in the shard when the window says so.
Whole flat tensors are summed and stepped; what they hold of chosen rows is not looked at. Next: `zenflow_unit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import accel_kernels as ak
import torch
from torch.optim import AdamW
from zero_core import ShardSlot
from zero_core.flat_unit import FlatUnit

from .maps import host_zeros
from .store_stepper import FlatStep, StoreStepper
from .window import Operand
from .zenflow import ZenFlow
from .zenflow_schedule import late_count, late_group

# Note [What a late step starts from]
# Where the shard is itself the master, a late step goes over `next`, of the shard's size, so that training reads the
# old values meanwhile. Once it has landed, the two say the same of every row that waits: the step after begins from
# `next` as it is. Only where rows came to wait, or were edited, it must be filled from the shard.


class WaitingRows:
    """See the module.

    Args:
        unit: one whose optimizer state rests in a store.
        stepper: steps whole shards, and knows where their states rest.
        policy: what a late step is, and whether its values become visible later than they are computed.

    Attributes:
        slots: those of which rows wait.
        under_way: those whose update is computed, or being computed, and is not visible.
        held: slot -> gradients in the open window.
        num_steps: slot -> what late steps count for so far, see `late_count`.
        sum: of the open window's gradients, fp32, flat; None while no row has waited.
        next: see Note [What a late step starts from]; with a separate master just new values in the shard's dtype.
    """

    def __init__(self, unit: FlatUnit, stepper: StoreStepper, policy: ZenFlow) -> None:
        self.unit = unit
        self.slots: list[ShardSlot] = []
        self.under_way: list[ShardSlot] = []
        self.held: dict[int, int] = {}
        self.num_steps: dict[int, int] = {}
        self.sum: torch.Tensor | None = None
        self.next: torch.Tensor | None = None
        self._stepper = stepper
        self._policy = policy
        self._other_sum: torch.Tensor | None = None
        self._to_divide: list[tuple[torch.Tensor, int]] = []
        self._is_empty = True
        self._is_next_right = False

    def hold(self, slots: Iterable[ShardSlot]) -> None:
        """Count a gradient of these slots."""
        for slot in slots:
            self.held[slot.place.index] = self.held.get(slot.place.index, 0) + 1

    def accumulation(self, scale: float) -> Callable[[torch.Tensor], None]:
        """What adds a gradient to the open window's sum, now or later."""
        assert self.sum is not None
        is_first, self._is_empty = self._is_empty, False
        return partial(_add, self.sum, scale=scale, is_first=is_first)

    def sums(self) -> list[torch.Tensor]:
        """The parts of the sum that belong to slots of which rows wait; empty while the window is."""
        if self._is_empty or self.sum is None:
            return []
        return [self.sum[slot.place.start : slot.place.stop] for slot in self.slots]

    def step(self, slots: Sequence[ShardSlot], *, late: bool) -> FlatStep | None:
        """The step with the mean of the window's gradients, for which another window makes room.

        Args:
            slots: all of the unit that have moved so far.
            late: leave the shard alone; `land` takes the new values over.
        """
        held = {slot.place.index: self.held.get(slot.place.index, 0) for slot in slots}
        counts: dict[int, float] = {}
        for index in (index for index, num in held.items() if num):
            self.num_steps[index], counts[index] = late_count(
                self._policy, self.num_steps[index], held[index]
            )
        moving = [slot for slot in self.slots if held[slot.place.index]]
        self.held.clear()
        self._is_empty = True
        if not moving:
            return None
        assert self.sum is not None
        nums = {held[slot.place.index] for slot in moving}
        scale = 1.0 / nums.pop() if len(nums) == 1 else 1.0
        if nums:
            self._to_divide = [
                (self.sum[slot.place.start : slot.place.stop], held[slot.place.index]) for slot in moving
            ]
        segments = [self._segment(slot, held[slot.place.index], counts[slot.place.index]) for slot in moving]
        operands = self._operands(slots, late=late)
        if late:
            self.under_way = moving
            self.sum, self._other_sum = self._other_sum, self.sum
        return FlatStep(self._numel, operands, segments, scale, self.unit.has_separate_master)

    def _segment(self, slot: ShardSlot, num_held: int, count: float) -> Any:
        group = slot.group
        decoupled = isinstance(self._stepper.inner, AdamW) or group.get("decoupled_weight_decay", False)
        group = late_group(self._policy, group, num_held, decoupled=decoupled)
        return self._stepper.rule.segment(slot.place.start, slot.place.stop, group, count)

    def _operands(self, slots: Sequence[ShardSlot], *, late: bool) -> list[Operand]:
        assert self.sum is not None
        unit, stepper = self.unit, self._stepper
        grad = Operand(self.sum, torch.float32, written=False)
        if not late:
            return stepper.operands(unit, slots, grad)
        assert self.next is not None
        states = stepper.states(unit, slots)
        if unit.has_separate_master:
            return [stepper.master(unit), grad, *states, Operand(self.next, self.next.dtype, read=False)]
        return [Operand(self.next, self.next.dtype), grad, *states]

    def prepare(self) -> None:
        """Before the `FlatStep` runs, and after all sums: see Note [What a late step starts from]."""
        for part, count in self._to_divide:
            part.div_(count)
        self._to_divide = []
        unit = self.unit
        if unit.has_separate_master or self.next is None or self._is_next_right:
            return
        if unit.resting is not None:
            unit.resting.store.fetch(unit.resting.name, self.next).wait()
        else:
            assert unit.shard is not None
            self.next.copy_(unit.shard)
        self._is_next_right = True

    def forget_next(self) -> None:
        """The shard says something else of rows that wait."""
        self.under_way = []
        self._is_next_right = False

    def land(self, shard: torch.Tensor, slots: Iterable[ShardSlot]) -> None:
        """Take over what a finished late step computed, for slots that were under way."""
        for slot in slots:
            assert self.next is not None
            start, stop = slot.place.start, slot.place.stop
            shard[start:stop].copy_(self.next[start:stop])

    def make_room(self) -> None:
        """Other slots or rows wait than before: for sums and new values of them."""
        if self.slots and self.sum is None:
            self.sum = self._host(torch.float32)
            if self._policy.overlap_step:
                self._other_sum, self.next = self._host(torch.float32), self._host(self.unit.dtype)
        if self.under_way and self.next is None:  # a state with overlap, loaded by one without
            self.next = self._host(self.unit.dtype)
        self._is_empty = not self.held
        self._is_next_right = False

    def give_room_back(self) -> None:
        """Nothing waits any more."""
        self.sum = self._other_sum = self.next = None
        self.forget_next()

    @property
    def _numel(self) -> int:
        start, stop = self.unit.local
        return stop - start

    def _host(self, dtype: torch.dtype) -> torch.Tensor:
        return host_zeros(self._numel, dtype, pin=self.unit.device.type != "cpu")


def _add(total: torch.Tensor, grad: torch.Tensor, *, scale: float, is_first: bool) -> None:
    grad = grad.cpu()
    if is_first:
        ak.cast_copy(grad, total, scale=scale)
    else:
        total.add_(grad, alpha=scale)
