"""The step under ZenFlow: important channels now, the rest a window at a time, in a thread if wanted.

In: zero-core's `UnitStep`s. Out: the same units, with their chosen rows updated, and at the end of a window the others
too. What a step does is `zenflow_schedule`'s to say, how one unit does it `zenflow_unit`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.optim import Adam, AdamW, Optimizer
from zero_core import ShardSlot, UnitStep
from zero_core.collectives import Wire
from zero_core.flat_unit import FlatUnit

from .background import Background, Job
from .errors import OffloadConfigError
from .store_stepper import StoreStepper, run
from .zenflow import ZenFlow
from .zenflow_choice import most_important_channels
from .zenflow_schedule import Progress, Selection, ends_window, is_ripe, is_stale, is_warming_up, selection
from .zenflow_unit import ZenUnit

# Note [When the rest changes]
# Values of the rest become visible at the end of a window alone: without overlap those of this window, with overlap
# those of the window before, which the thread has computed meanwhile. So training sees the same numbers however fast
# the thread is. Before channels are chosen anew, what is under way lands first.


Part: TypeAlias = "tuple[FlatUnit, Sequence[ShardSlot]]"


class ZenFlowStepper:
    """A `zero_core.ShardOptimizer` over stores.

    Args:
        inner: torch's AdamW or Adam, with options that the fused kernels know.
        policy: what is stepped when.
        wire: the ranks that share one set of shards.
        window_bytes: as for `StoreStepper`.

    Raises:
        OffloadConfigError: another optimizer, or other options.
    """

    casts = True

    def __init__(self, inner: Optimizer, policy: ZenFlow, wire: Wire, *, window_bytes: int) -> None:
        if type(inner) not in (AdamW, Adam):
            raise OffloadConfigError(
                f"overlap='zenflow' with {type(inner).__name__}: expected AdamW or Adam, whose moments can be carried "
                "over between steps now and steps later; use overlap='exact'"
            )
        self.policy = policy
        self.exact = StoreStepper(inner, window_bytes=window_bytes)
        self.progress = Progress()
        self._wire = wire
        self._units: dict[int, ZenUnit] = {}
        self._background = Background("zenflow")
        self._accumulating: list[Job] = []
        self._sums_to_do: list[Callable[[], None]] = []
        self._late: Job | None = None

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`.

        Raises:
            OSError: a store cannot read or write, now or in the thread since the last call; go on from a checkpoint.
        """
        self.exact.check()
        self._background.check()
        stored = [item for item in work if item.unit.stores.optimizer is not None]
        parts = [(item.unit, item.slots) for item in stored]
        self._read_progress(parts)
        if is_warming_up(self.policy, self.progress):
            yield from self.exact.step(work, scale)
            self.progress = self.progress.stepped(exact=True)
            return
        factor = float(scale)
        self._resume(parts)
        self._wait_for_sums()
        self._take_edits()
        if not self.policy.overlap_step:  # a state with overlap may have been loaded
            self._land([zen for zen in self._active() if zen.under_way])
        self._select(stored, factor)
        for item in stored:
            self._units[item.unit.index].take(item.grad)
        ends = ends_window(self.policy, self.progress, is_ripe=self._is_ripe(factor))
        yield from self._step(work, scale, factor, ends=ends)
        self.progress = self.progress.stepped(ended=ends)

    @torch.no_grad()
    def settle(self) -> None:
        """Have `inner.state` and masters say all that there is; the next step takes it from there."""
        self._wait()
        for zen in self._active():
            zen.settle(self.progress)

    @torch.no_grad()
    def flush(self, parts: Sequence[Part]) -> None:
        """Apply all that waits, and go on as a plain optimizer that has yet to choose channels.

        Args:
            parts: units with optimizer state in a store, and this rank's slots of them; to be published afterwards.
        """
        self._wait()
        state = self.exact.inner.state
        waiting = [
            (unit, [s for s in slots if "zenflow_num_steps" in state.get(s.master, {})])
            for unit, slots in parts
        ]
        self._resume([part for part in waiting if part[1]])
        self._take_edits()
        active = self._active()
        self._land(active)
        if self.progress.num_held:
            for _ in self._late_steps(active):
                pass
        for zen in active:
            zen.publish()
            zen.forget()
        self.progress = replace(self.progress, num_held=0, selection_age=None)

    def close(self) -> None:
        """End the thread when it has done what it was given; raises what it met."""
        self._background.close()

    # -- parts of a step ---------------------------------------------------------------------------------------

    def _step(
        self, work: Sequence[UnitStep], scale: torch.Tensor | float, factor: float, *, ends: bool
    ) -> Iterator[UnitStep]:
        """Every unit that moves; at the end of a window also those that moved in it before."""
        at_work = {item.unit.index for item in work}
        others = (
            [_nothing(zen.unit) for zen in self._active() if zen.unit.index not in at_work] if ends else []
        )
        overlap = self.policy.overlap_step
        if ends and overlap:
            self._wait_for_late()
        for item in [*work, *others]:
            zen = self._units.get(item.unit.index)
            if zen is None:
                yield from self.exact.step([item], scale)
                continue
            zen.step(item, factor)
            zen.hold(item.slots)
            if item.slots and zen.has_rest:
                self._accumulate(zen, item, factor)
            if ends and not overlap:
                continue
            if ends:
                self._land([zen])
            else:
                zen.publish()
            yield item
        self._begin_sums()
        if ends and overlap:
            self._begin_late_steps()
        elif ends:
            items = {item.unit.index: item for item in [*work, *others]}
            for zen in self._late_steps(self._active()):
                zen.publish()
                yield items[zen.unit.index]

    def _accumulate(self, zen: ZenUnit, item: UnitStep, factor: float) -> None:
        add = zen.accumulation(factor)
        if self.policy.overlap_step:
            self._sums_to_do.append(partial(add, item.lend()))
        else:
            add(item.grad)

    def _begin_sums(self) -> None:
        """Not before the step is over: the thread would take memory bandwidth from it."""
        self._accumulating += [self._background.submit(each) for each in self._sums_to_do]
        self._sums_to_do.clear()

    def _late_steps(self, zens: Sequence[ZenUnit]) -> Iterator[ZenUnit]:
        """Step the rest of units here and now; yields every unit, in order, when it is final."""
        steps = [zen.late_step(late=False) for zen in zens]
        moving = [(zen, step) for zen, step in zip(zens, steps, strict=True) if step is not None]
        left = iter(zens)
        if moving:
            window = self.exact.window_for(zens[0].unit)
            for position in run(self.exact.rule, window, [step for _, step in moving]):
                for zen in left:
                    yield zen
                    if zen is moving[position][0]:
                        break
        yield from left

    def _begin_late_steps(self) -> None:
        """Have the thread step the rest of all units, after the sums that it was given."""
        zens = self._active()
        steps = [step for zen in zens if (step := zen.late_step(late=True)) is not None]
        if not steps:
            return
        window = self.exact.window_for(zens[0].unit)

        def work() -> None:
            for zen in zens:
                zen.prepare_next()
            for _ in run(self.exact.rule, window, steps):
                pass

        self._late = self._background.submit(torch.no_grad()(work))

    def _select(self, stored: Sequence[UnitStep], factor: float) -> None:
        """Choose channels, if it is time to."""
        todo = selection(self.policy, self.progress)
        if todo is Selection.KEEP:
            return
        best, held = most_important_channels(stored, self._units, self.policy.topk_ratio, self._wire)
        best_sum = sum(float(values[chosen].sum()) for values, chosen in best.values())
        if todo is Selection.IF_STALE and not is_stale(self.policy, held=held, best=best_sum):
            return
        self._wait_for_late()
        self._land(self._active())
        for item in stored:
            zen, unit = self._units[item.unit.index], item.unit.index
            zen.choose({
                slot.place.index: best[unit, slot.place.index][1]
                for slot in item.slots
                if (unit, slot.place.index) in best
            })  # fmt: skip
        self.progress = self.progress.selected()

    def _is_ripe(self, factor: float) -> bool:
        """Whether the rest has become important, on all ranks together."""
        if self.policy.update_interval != "auto" or not self.progress.num_held:
            return False
        pairs = [(*zen.rest(), *zen.at_once(factor)) for zen in self._active()]
        sums = torch.tensor(pairs, dtype=torch.float64).view(-1, 4).sum(0).to(self._wire.device)
        self._wire.all_reduce("importance of the rest", sums, dist.ReduceOp.SUM).wait()
        rest, num_rest, chosen, num_chosen_elements = sums.tolist()
        return is_ripe(self.policy, rest=(rest, num_rest), chosen=(chosen, num_chosen_elements))

    # -- forms of the state ------------------------------------------------------------------------------------

    def _active(self) -> list[ZenUnit]:
        return [zen for _, zen in sorted(self._units.items()) if not zen.is_settled]

    def _read_progress(self, parts: Sequence[Part]) -> None:
        """Where states may have been loaded: how far training has come, as they say."""
        if self._active():
            return
        for _, slots in parts:
            for slot in slots:
                state = self.exact.inner.state.get(slot.master, {})
                if "zenflow_num_steps" in state:
                    age = int(state["zenflow_selection_age"])
                    self.progress = Progress(
                        num_steps=int(state["zenflow_num_steps"]),
                        num_held=int(state["zenflow_num_held"]),
                        selection_age=None if age < 0 else age,
                    )
                    return
        self.progress = replace(self.progress, num_held=0, selection_age=None)

    def _resume(self, parts: Sequence[Part]) -> None:
        """Have every unit in two forms, with these slots and all others that have moved so far."""
        self._read_progress(parts)
        moving = {unit.index: slots for unit, slots in parts}
        for unit, _ in parts:
            if unit.index not in self._units:
                self._units[unit.index] = ZenUnit(unit, self.exact, overlap=self.policy.overlap_step)
        for index, zen in self._units.items():
            if not zen.is_settled and not zen.knows(moving.get(index, ())):
                self.settle()
        for index, zen in self._units.items():
            if zen.is_settled:
                zen.resume(moving.get(index, ()))

    def _take_edits(self) -> None:
        """What somebody wrote to parameters counts; what was computed from the old values does not."""
        edited = [zen for zen in self._active() if zen.is_edited]
        if edited:
            self._wait_for_late()
        for zen in edited:
            zen.take_edits()

    # -- work under way ----------------------------------------------------------------------------------------

    def _land(self, zens: Sequence[ZenUnit]) -> None:
        for zen in zens:
            zen.unit.settle()
            zen.land()
            zen.publish()  # the late step went over chosen rows too

    def _wait_for_sums(self) -> None:
        while self._accumulating:
            self._accumulating.pop().wait()

    def _wait_for_late(self) -> None:
        if self._late is not None:
            self._late.wait()
            self._late = None

    def _wait(self) -> None:
        self._background.check()
        self._wait_for_sums()
        self._wait_for_late()


def _nothing(unit: FlatUnit) -> UnitStep:
    """A unit that has no gradient at this step."""
    empty = torch.empty(0)
    return UnitStep(unit, empty, [], lambda: empty)
