"""Steps of single units that begin in a thread while backward goes on with others.

In: a unit whose gradient has been reduced, and what its step takes for granted (`Assumed`). Out: at the optimizer's
step, whether that has come true, and then the results, committed. When to begin, and what to do about a step that
took the wrong things for granted, is for `speculation` and `last_backward` to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from zero_core import ShardSlot
from zero_core.flat_unit import FlatUnit
from zero_core.hooks import Lane

from .background import Background, after, queued_on
from .shadow import Shadow
from .store_stepper import FlatStep, StoreStepper, run
from .window import Window


@dataclass
class EarlyCount:
    """Steps of single units on this rank.

    Attributes:
        begun: given to the thread.
        committed: that counted.
        discarded: that did not, since something was otherwise than it had been taken for.
    """

    begun: int = 0
    committed: int = 0
    discarded: int = 0


@dataclass(frozen=True)
class Assumed:
    """What a step of a unit depends on.

    Attributes:
        gradient: `GradShard.version`.
        rates: segments: which elements move, with their rates and step counts.
        factor: of the gradient: unscaling and clipping.
        edits: how often parameters, masters and states have been written, by the optimizer's user or a load.
    """

    gradient: int
    rates: tuple[Any, ...]
    factor: float
    edits: tuple[int, ...]

    def differences(self, other: Assumed) -> str:
        """Names of what differs."""
        names = [each.name for each in fields(self)]
        return ", ".join(name for name in names if getattr(self, name) != getattr(other, name))


@dataclass
class EarlyStep:
    """One that has begun.

    Attributes:
        is_wanted: False: the thread may stop.
        is_done: the thread has been through it; all results are written when `EarlySteps.wait` returns.
    """

    lane: Lane
    assumed: Assumed
    is_wanted: bool = True
    is_done: bool = False


@dataclass(frozen=True)
class _Queued:
    """A step that waits for the thread, and what the device does before it."""

    early: EarlyStep
    step: FlatStep
    after: Any


@dataclass
class EarlySteps:
    """At most one step for each unit.

    Args:
        stepper: how a unit is stepped, and where its states are.
        with_state: nothing that a step computes counts before `commit`. Else states and separate masters are stepped
            where they lie, and only what the model computes with waits.
        shadow_bytes: room for what waits; None: as much as it takes.
        slots: of every unit on this rank; the optimizer's.
    """

    stepper: StoreStepper
    with_state: bool
    shadow_bytes: int | None
    slots: dict[int, list[ShardSlot]] = field(default_factory=dict)
    count: EarlyCount = field(default_factory=EarlyCount)
    under_way: dict[int, EarlyStep] = field(default_factory=dict)
    _shadows: dict[int, Shadow] = field(default_factory=dict)
    _used_bytes: int = 0
    _failure: BaseException | None = None
    _queue: deque[_Queued] = field(default_factory=deque)
    _background: Background = field(default_factory=lambda: Background("early-step"))
    _in_use: Window | None = None  # by the thread, or what it wrote is still on its way

    def make_room(self, unit: FlatUnit) -> None:
        """Have room for the unit's results, if there is to be any.

        Raises:
            OSError, OffloadMemoryError: a store has none.
            OffloadStateError: this is closed.
        """
        self._background.check_open()
        if unit.index in self._shadows or unit.stores.optimizer is None or unit.index not in self.slots:
            return
        nbytes = Shadow.bytes_for(self.stepper, unit, with_state=self.with_state)
        if self.shadow_bytes is not None and self._used_bytes + nbytes > self.shadow_bytes:
            return
        self._shadows[unit.index] = Shadow(self.stepper, unit, with_state=self.with_state)
        self._used_bytes += nbytes

    def begin(self, lane: Lane, slots: Sequence[ShardSlot], factor: float) -> None:
        """Have the thread step a unit; nothing where there is no room, or the thread has met an error.

        Args:
            lane: with a reduced gradient.
            slots: that move.
            factor: of the gradient.
        """
        unit, shadow = lane.unit, self._shadows.get(lane.unit.index)
        self.drop(unit)
        if shadow is None or self._failure is not None or not slots or unit.is_arriving:
            return
        unit.take_edits()
        operands = shadow.operands(slots, self.stepper.reduced_grad(lane))  # a state's first write is no edit
        early = EarlyStep(lane, self.assume(lane, slots, factor))
        start, stop = unit.local
        step = FlatStep(stop - start, operands, list(early.assumed.rates), factor, unit.has_separate_master)
        self._queue.append(_Queued(early, step, queued_on(unit.device)))
        window = self.stepper.window_for(unit)
        self._background.submit(lambda: self._run_queued(window))
        self._in_use = window
        self.under_way[unit.index] = early
        self.count.begun += 1

    def assume(self, lane: Lane, slots: Sequence[ShardSlot], factor: float) -> Assumed:
        """What a step of the unit would depend on now."""
        unit, stepper = lane.unit, self.stepper
        assert unit.master is not None
        known = [slot for slot in slots if slot.master in stepper.inner.state]
        tensors = [unit.master, *(state for _, state in stepper.placed(unit, known))]
        tensors += [slot.master for slot in self.slots[unit.index]]
        if unit.shard is not None:
            tensors.append(unit.shard)
        rates = tuple(stepper.rule.next_segment(stepper.inner, slot) for slot in slots)
        edits = (unit.num_edits, *(tensor._version for tensor in tensors))
        return Assumed(lane.shard.version, rates, factor, edits)

    def drop(self, unit: FlatUnit) -> None:
        """The step of a unit that is under way, if one is, does not count."""
        early = self.under_way.pop(unit.index, None)
        if early is not None:
            early.is_wanted = False
            self.count.discarded += 1

    def drop_all(self) -> None:
        """No step that is under way counts."""
        for early in list(self.under_way.values()):
            self.drop(early.lane.unit)

    def check(self) -> None:
        """Raise what the thread has met; once, where nothing of it counted."""
        failure = self._failure
        if failure is not None:
            if self.with_state:
                self.drop_all()
                self._failure = None
            raise failure

    @property
    def is_begun(self) -> bool:
        """Whether any step is under way, or has failed."""
        return bool(self.under_way) or self._failure is not None

    def wait(self) -> None:
        """Return when the thread has nothing left to do, and all is written; raises what it met."""
        self.finish()
        self.check()

    def forget(self) -> None:
        """All that a step writes is about to be replaced: nothing that is under way or failed matters any more."""
        self.drop_all()
        self.finish()
        self._failure = None

    def commit(self, unit: FlatUnit) -> None:
        """After `wait`: the results of a unit's step are the unit's, and the step is counted."""
        early = self.under_way.pop(unit.index)
        assert early.is_done
        moving = {segment.start for segment in early.assumed.rates}
        slots = self.slots[unit.index]
        for slot in slots:
            if slot.place.start in moving:
                self.stepper.rule.advance(self.stepper.inner, slot)
        self._shadows[unit.index].commit(slots)
        self.count.committed += 1

    def close(self) -> None:
        """End the thread, and give room back; raises what the thread has met."""
        self.drop_all()
        self.finish()
        self._background.close()
        for shadow in self._shadows.values():
            shadow.release()
        self._shadows.clear()
        self.check()

    def finish(self) -> None:
        """Return when the thread has nothing left to do, and nothing is on its way to a store."""
        window, self._in_use = self._in_use, None
        if window is None:
            return

        def settle() -> None:
            try:
                window.settle()
            except OSError as error:
                self._failure = self._failure or error

        self._background.submit(settle).wait()

    def _run_queued(self, window: Window) -> None:
        """All units that wait for the thread, in one pass: one is read while the one before it is stepped."""
        some: list[_Queued] = []
        while self._queue:
            each = self._queue.popleft()
            if each.early.is_wanted and self._failure is None:
                some.append(each)
        if not some:
            return
        last, device = some[-1].after, some[-1].early.lane.unit.device
        try:
            with torch.no_grad(), after(last, device):
                through = run(
                    self.stepper.rule,
                    window,
                    [each.step for each in some],
                    lambda: any(each.early.is_wanted for each in some),
                    leave_writes=True,
                )
                deque(through, maxlen=0)
            for each in some:
                each.early.is_done = each.early.is_wanted
        except BaseException as error:  # told by `check`
            self._failure = error
