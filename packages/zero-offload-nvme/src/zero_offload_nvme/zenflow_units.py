"""All units under ZenFlow, and what every rank must know of them: how far training has come, which rows travel.

In: the units of a step, and states that may have been loaded. Out: the units in two forms; the same `Progress` on all
ranks, and a `RowPublisher` that fits. Next: `zenflow_stepper` steps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from zero_core import ShardSlot, UnitStep
from zero_core.collectives import PlainCollectives, Wire
from zero_core.flat_unit import FlatUnit
from zero_core.steppers import UNFINISHED

from .row_publisher import RowPublisher, learn_choices
from .store_stepper import StoreStepper
from .zenflow import ZenFlow
from .zenflow_schedule import Progress
from .zenflow_unit import ZenUnit

Part: TypeAlias = "tuple[FlatUnit, Sequence[ShardSlot]]"


class ZenUnits:
    """See the module.

    Args:
        stepper: steps whole shards, and knows where their states rest.
        policy: what a late step is.
        wire: the ranks that share one set of shards.
        beside: the same ranks, for a thread that publishes; None: `step` does.

    Attributes:
        by_index: those that have moved so far.
        progress: how far training has come.
        rows: sends chosen rows of all units; None where there is nobody to send them to, or a thread does so.
        rows_of: by unit, for that thread.
        is_plain: no collective changes what it sends, so that rows may travel alone.
    """

    def __init__(self, stepper: StoreStepper, policy: ZenFlow, wire: Wire, beside: Wire | None) -> None:
        self.by_index: dict[int, ZenUnit] = {}
        self.progress = Progress()
        self.rows: RowPublisher | None = None
        self.rows_of: dict[int, RowPublisher] = {}
        self.is_plain = isinstance(wire.collectives, PlainCollectives)
        self._stepper = stepper
        self._policy = policy
        self._wire = wire
        self._beside = beside
        self._world_size = wire.group.size()
        self._moved: dict[int, set[int]] = {}

    def __iter__(self) -> Iterator[ZenUnit]:
        """Those in two forms, in order."""
        return iter([zen for _, zen in sorted(self.by_index.items()) if not zen.is_settled])

    def agree(self, stored: Sequence[UnitStep], claimed: Sequence[Part]) -> tuple[bool, list[Part]]:
        """How far training has come, as states say that may have been loaded; ranks without any hear it from others.

        Args:
            stored: what moves.
            claimed: all that may, and this rank's slots of it.

        Returns:
            Whether any rank has yet to take the form of its states from `inner.state`; and what is to be in two forms:
            what moves, and what has moved before in a window that was loaded.
        """
        is_new = self.read_progress(claimed)
        for item in stored:
            moved = self._moved.setdefault(item.unit.index, set())
            is_new |= not moved.issuperset(item.moving)
            moved.update(item.moving)
        if self._world_size > 1:
            knows = any(item.slots for item in stored)
            numbers = [int(is_new), *(self.progress.numbers if knows else (-1, -1, -1))]
            told = torch.tensor(numbers, device=self._wire.device)
            self._wire.all_reduce("progress", told, dist.ReduceOp.MAX).wait()
            is_new, *numbers = told.tolist()
            self.progress = Progress.from_numbers(numbers)
        parts = {item.unit.index: (item.unit, list(item.slots)) for item in stored}
        for unit, slots in self._begun(claimed) if is_new else ():
            known = parts.setdefault(unit.index, (unit, []))[1]
            known += [slot for slot in slots if slot not in known]
        return bool(is_new), list(parts.values())

    def unfinished(self, parts: Sequence[Part]) -> list[Part]:
        """Of these slots, those whose states belong to a window."""
        state = self._stepper.inner.state
        found = [(unit, [s for s in slots if UNFINISHED in state.get(s.master, {})]) for unit, slots in parts]
        return [part for part in found if part[1]]

    def _begun(self, claimed: Sequence[Part]) -> list[Part]:
        """`unfinished`, with the units that are so on any rank; every rank calls it."""
        mine = {unit.index: slots for unit, slots in self.unfinished(claimed)}
        active = {zen.unit.index for zen in self}
        flags = torch.tensor([unit.index in mine.keys() | active for unit, _ in claimed], dtype=torch.int32)
        if self._world_size > 1:
            flags = flags.to(self._wire.device)
            self._wire.all_reduce("units in a window", flags, dist.ReduceOp.MAX).wait()
        begun = [unit for (unit, _), flag in zip(claimed, flags.tolist(), strict=True) if flag]
        return [(unit, mine.get(unit.index, [])) for unit in begun]

    def read_progress(self, parts: Sequence[Part]) -> bool:
        """Where states may have been loaded: how far training has come, as they say; whether they may."""
        if list(self):
            return False
        for _, slots in self.unfinished(parts):
            state = self._stepper.inner.state[slots[0].master]
            self.progress = Progress.from_numbers([float(state[key]) for key in Progress.KEYS])
            return True
        # Plain states, of a warm-up or after a flush: an Adam's own count says how many steps there have been.
        states = [self._stepper.inner.state.get(slot.master, {}) for _, slots in parts for slot in slots]
        self.progress = Progress(num_steps=max((int(state.get("step", 0)) for state in states), default=0))
        return True

    def knows_less_than(self, parts: Sequence[Part]) -> bool:
        """Whether slots move that have not moved before: units in two forms must settle, to take them in."""
        units = [(self.by_index.get(unit.index), slots) for unit, slots in parts]
        return any(zen is not None and not zen.is_settled and not zen.knows(slots) for zen, slots in units)

    def resume(self, parts: Sequence[Part]) -> None:
        """Have every unit in two forms, with these slots and all others that have moved so far."""
        moving = {unit.index: slots for unit, slots in parts}
        for unit, _ in parts:
            if unit.index not in self.by_index:
                self.by_index[unit.index] = ZenUnit(unit, self._stepper, self._policy)
        for index, zen in self.by_index.items():
            if zen.is_settled:
                zen.resume(moving.get(index, ()))

    def settle(self) -> None:
        """Have `inner.state` and masters say all that there is; nothing must be under way in a thread."""
        for zen in self:
            zen.unit.settle()
            zen.settle(self.progress)

    def learn(self, *, is_new: bool) -> None:
        """Other ranks' choices, where they are not known, and what follows from them."""
        sending = [zen for zen in self if 0 < zen.unit.stage < 3]
        if self._world_size == 1 or not sending:
            return
        if is_new:
            learn_choices(sending, self._wire)
        if self._beside is None:
            self.rows = RowPublisher(sending, self._wire)
        else:
            self.rows_of = {zen.unit.index: RowPublisher([zen], self._beside) for zen in sending}
