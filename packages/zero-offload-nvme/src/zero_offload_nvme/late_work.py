"""What goes on while training does: sums of gradients, the late step, and the landing of its values.

In: units and what is to be done with them. Out: the same done in two threads, each in the order in which it was given:
one for what waits, one for what writes parameters, for which whoever touches them first waits. Next: `zenflow_stepper`
gives the work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Event

import torch
from zero_core.flat_unit import FlatUnit
from zero_core.late import LateArrivals

from .background import Background, Job, after, queued_on
from .store_stepper import FlatStep, StoreStepper, run
from .window import Window
from .zenflow_unit import ZenUnit

# Note [Two windows]
# While a late step goes on in the thread, units whose parameters alone rest in a store are stepped by whoever trains.
# Blocks of the two must not meet in one window.


class _Sums:
    """Gradients of one step that are to be added; whoever comes first adds them, but not before `landing`.

    What arrives is waited for soon, sums are not, and the two would share cores and memory.
    """

    def __init__(
        self, adding: Sequence[Callable[[], None]], device: torch.device, landing: Job | None = None
    ) -> None:
        self.landing = landing
        self._adding = deque(adding)
        self._device = device
        self._queued = queued_on(device)
        self.done = Event()

    def add(self) -> None:
        """In the thread alone."""
        if self._adding:
            with after(self._queued, self._device):
                while self._adding:
                    self._adding.popleft()()
        self.done.set()


class LateWork:
    """See the module.

    Args:
        stepper: whose rule and window the late step uses; see Note [Two windows].
        arrivals: has the parameters of a unit wait for their values where they are used.
        device: of the units.
    """

    def __init__(self, stepper: StoreStepper, arrivals: LateArrivals, device: torch.device) -> None:
        self._stepper = stepper
        self._arrivals = arrivals
        self._device = device
        self._background = Background("zenflow")
        self._arriving = Background("zenflow-arrivals")  # not behind a late step, which may take long
        self._coming: list[tuple[ZenUnit, tuple[Callable[[], None], ...]]] = []
        self._adding: list[Callable[[], None]] = []
        self._sums = _Sums([], device)
        self._sums.add()
        self._late: Job | None = None
        self._landing: Job | None = None
        self._window: Window | None = None

    def check_open(self) -> None:
        """Raise if this is closed."""
        self._background.check_open()

    def check(self) -> None:
        """Raise what a thread has met."""
        self._background.check()
        self._arriving.check()

    def close(self) -> None:
        """End the threads when they have done what they were given; raises what they met."""
        try:
            self._background.close()
        finally:
            self._arriving.close()

    def arrive(self, zen: ZenUnit, *work: Callable[[], None]) -> None:
        """Have work that writes a unit's parameters done after `begin`; whoever uses them first waits for it."""
        self._coming.append((zen, work))

    def add(self, adding: Callable[[], None]) -> None:
        """Add a gradient to its window's sum, after `begin`."""
        self._adding.append(adding)

    def forget(self) -> None:
        """Drop what has been given since `begin`: by a step that ended with an error."""
        self._coming.clear()
        self._adding.clear()

    def begin(self, late: Sequence[ZenUnit] = ()) -> None:
        """Let the threads begin: the step is over, from which they would take memory bandwidth and the interpreter.

        Args:
            late: units to step what has waited in, after all that was given; sums that come meanwhile go between.
        """
        steps = [step for zen in late if (step := zen.waiting.step(zen.slots, late=True)) is not None]
        if self._adding:
            self.wait_for_sums()
        coming, self._coming = self._coming, []
        for zen, work in coming:
            self._begin_arrival(zen, work)
        if self._adding:
            sums = _Sums(self._adding, self._device, self._landing)

            def add() -> None:
                if sums.landing is not None:
                    sums.landing.wait()
                sums.add()

            self._submit(add)
            self._sums, self._adding = sums, []
        if steps:
            self._begin_late_step(late, steps)

    def _begin_arrival(self, zen: ZenUnit, work: Sequence[Callable[[], None]]) -> None:
        stream = _current_stream(self._device)

        def inside() -> None:
            with torch.no_grad(), stream:
                _each(work)

        self._landing = self._arriving.submit(inside)
        self._arrivals.expect(zen.unit, self._landing)

    def _begin_late_step(self, zens: Sequence[ZenUnit], steps: Sequence[FlatStep]) -> None:
        window, landing = self.window_for(zens[0].unit), self._landing

        def work() -> None:
            if landing is not None:
                landing.wait()  # it reads what this step writes; and those before it are done
            for zen in zens:
                zen.waiting.prepare()
            for _ in run(self._stepper.rule, window, steps):
                if self._sums.landing is None or self._sums.landing.is_done():
                    self._sums.add()

        self._late = self._submit(work)

    def window_for(self, unit: FlatUnit) -> Window:
        """The late steps' own."""
        if self._window is None:
            self._window = self._stepper.hand_over_window(unit)
        return self._window

    def wait_for_sums(self) -> None:
        """Return when gradients that were given have been added."""
        while not self._sums.done.wait(0.1):
            self.check()

    def wait_for_late_step(self) -> None:
        """Return when the late step that has begun has ended."""
        if self._late is not None:
            self._late.wait()
            self._late = None

    def wait(self) -> None:
        """Return when nothing is under way."""
        self.check()
        self.wait_for_sums()
        self.wait_for_late_step()

    def _submit(self, work: Callable[[], None]) -> Job:
        """Work that waits, for which what the device has been given so far comes first."""
        queued = queued_on(self._device)

        def inside() -> None:
            with torch.no_grad(), after(queued, self._device):
                work()

        return self._background.submit(inside)


def _each(work: Sequence[Callable[[], None]]) -> None:
    for each in work:
        each()


def _current_stream(device: torch.device) -> AbstractContextManager[object]:
    """Work in another thread goes after what is queued here: the last backward still reads old values."""
    if device.type == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.current_stream(device))
