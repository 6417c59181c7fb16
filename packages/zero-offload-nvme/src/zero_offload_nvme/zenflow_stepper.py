"""The step under ZenFlow: important channels now, the rest a window at a time, in a thread if wanted.

In: zero-core's `UnitStep`s. Out: the same units, with their chosen rows updated, and at the end of a window the others
too. What a step does is `zenflow_schedule`'s to say, how one unit does it `zenflow_unit`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.optim import Adam, AdamW, Optimizer
from zero_core import UnitStep
from zero_core.collectives import Wire
from zero_core.flat_unit import FlatUnit
from zero_core.late import LateArrivals

from .errors import OffloadConfigError
from .late_work import LateWork
from .row_publisher import publish_whole, wire_beside
from .store_stepper import StoreStepper, run
from .zenflow import ZenFlow
from .zenflow_choice import most_important_channels
from .zenflow_schedule import Selection, ends_window, is_ripe, is_stale, is_warming_up, selection
from .zenflow_unit import ZenUnit
from .zenflow_units import Part, ZenUnits

# Note [When the rest changes]
# Values of the rest become visible at the end of a window alone: without overlap those of this window, with overlap
# those of the window before, which the thread has computed meanwhile. So training sees the same numbers however fast
# the thread is. Before channels are chosen anew, what is under way lands first.

# Note [What is published]
# Between two ends of windows nothing but chosen rows changes: stages 1 and 2 send those alone, and yield no unit to be
# gathered. Where values of the rest have landed, whole units are. Stage 3 sends nothing in a step. On the CPU a thread
# steps, lands and sends, unit by unit, while training goes on; whoever uses a unit's parameters first waits for it.


class ZenFlowStepper:
    """A `zero_core.ShardOptimizer` over stores.

    Args:
        inner: torch's AdamW or Adam, with options that the fused kernels know.
        policy: what is stepped when.
        wire: the ranks that share one set of shards; every one of them makes a stepper.
        arrivals: of the units' parameters.
        claimed: says which units have optimizer state in a store, and which slots of them this rank steps.
        window_bytes: as for `StoreStepper`.

    Raises:
        OffloadConfigError: another optimizer, or other options.
    """

    casts = True

    def __init__(
        self,
        inner: Optimizer,
        policy: ZenFlow,
        wire: Wire,
        arrivals: LateArrivals,
        claimed: Callable[[], Sequence[Part]],
        *,
        window_bytes: int,
    ) -> None:
        if type(inner) not in (AdamW, Adam):
            raise OffloadConfigError(
                f"overlap='zenflow' with {type(inner).__name__}: expected AdamW or Adam, whose moments can be carried "
                "over between steps now and steps later; use overlap='exact'"
            )
        self.policy = policy
        self.exact = StoreStepper(inner, window_bytes=window_bytes)
        self._wire = wire
        self._claimed = claimed
        self._world_size = wire.group.size()
        # A window that ends by itself has every step measure what it took.
        may_be_late = policy.overlap_step and policy.update_interval != "auto"
        self._beside = wire_beside(wire) if may_be_late and self._world_size > 1 else None
        self._may_be_late = may_be_late and (self._world_size == 1 or self._beside is not None)
        self._units = ZenUnits(self.exact, policy, wire, self._beside)
        self._late = LateWork(self.exact, arrivals, wire.device)
        self._is_whole = False
        self._to_begin: list[ZenUnit] = []

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`.

        Raises:
            OSError: a store cannot read or write, now or in the thread since the last call; go on from a checkpoint.
        """
        self.exact.check()
        self._late.check()
        self._late.check_open()
        self._late.forget()
        self._to_begin.clear()
        stored = [item for item in work if item.unit.stores.optimizer is not None]
        is_new, parts = self._units.agree(stored, self._claimed())
        if is_warming_up(self.policy, self._units.progress):
            yield from self.exact.step(work, scale)
            self._units.progress = self._units.progress.stepped(exact=True)
            return
        factor = float(scale)
        self._resume(parts)
        self._late.wait_for_sums()
        self._take_edits()
        self._is_whole = False
        if is_new and not self.policy.overlap_step:  # a state with overlap may have been loaded
            self._land_now()
        if self._select(stored, factor) or is_new:
            self._units.learn(is_new=is_new)
        for item in stored:
            if not self._arrives_late(self._units.by_index[item.unit.index]):
                self._units.by_index[item.unit.index].take(item.grad)
        ends = ends_window(self.policy, self._units.progress, is_ripe=self._is_ripe(factor))
        yield from self._step(work, scale, factor, ends=ends)
        self._units.progress = self._units.progress.stepped(ended=ends)

    @torch.no_grad()
    def begin(self) -> None:
        """Let the threads begin with what the last step has left to them."""
        late, self._to_begin = self._to_begin, []
        self._late.begin(late)

    @torch.no_grad()
    def settle(self) -> None:
        """Have `inner.state` and masters say all that there is; the next step takes it from there."""
        self._late.wait()
        self._units.settle()

    @torch.no_grad()
    def flush(self) -> None:
        """Apply all that waits, and go on as a plain optimizer that has yet to choose channels.

        What is claimed is to be published afterwards.
        """
        self._late.wait()
        self._units.read_progress(self._claimed())
        self._resume(self._units.unfinished(self._claimed()))
        self._take_edits()
        self._land_now()
        active = list(self._units)
        if self._units.progress.num_held:
            for _ in self._late_steps(active):
                pass
        for zen in active:
            zen.publish()
            zen.forget()
        self._units.progress = replace(self._units.progress, num_held=0, selection_age=None)

    def close(self) -> None:
        """End the thread when it has done what it was given; raises what it met."""
        self._late.close()

    # -- parts of a step ---------------------------------------------------------------------------------------

    def _step(
        self, work: Sequence[UnitStep], scale: torch.Tensor | float, factor: float, *, ends: bool
    ) -> Iterator[UnitStep]:
        """Every unit that moves; at the end of a window also those that moved in it before."""
        overlap, at_work = self.policy.overlap_step, {item.unit.index for item in work}
        is_whole = self._is_whole or (ends and overlap)
        others = [_nothing(zen.unit) for zen in self._units if zen.unit.index not in at_work]
        if ends and overlap:
            self._late.wait_for_late_step()
        for item in [*work, *others]:
            zen = self._units.by_index.get(item.unit.index)
            if zen is None:
                yield from self.exact.step([item], scale)
                continue
            at_once = [] if item.unit.index not in at_work else self._at_once(zen, item, factor)
            if ends and not overlap:
                _each(at_once)
                continue
            if self._arrives_late(zen):
                if at_once or ends:
                    self._late.arrive(
                        zen, *at_once, zen.landing() if ends else zen.publish, *self._sending(zen, ends)
                    )
                continue
            _each([*at_once, zen.landing() if ends else zen.publish])
            if is_whole or not (self._units.is_plain and 0 < zen.unit.stage < 3):
                yield item
        if self._units.rows is not None and not is_whole and not ends:
            self._units.rows.publish(self._units)
        self._to_begin = list(self._units) if ends and overlap else []
        if ends and not overlap:
            items = {item.unit.index: item for item in [*work, *others]}
            for zen in self._late_steps(list(self._units)):
                zen.publish()
                yield items[zen.unit.index]

    def _at_once(self, zen: ZenUnit, item: UnitStep, factor: float) -> list[Callable[[], None]]:
        """What steps the chosen rows of a unit; the others' gradient is added, or to be added later."""
        grad = item.lend() if self.policy.overlap_step and item.slots else item.grad
        todo: list[Callable[[], None]] = [zen.stepping(item, factor)]
        if self._arrives_late(zen):
            todo.insert(0, partial(zen.take, grad))
        if item.slots and zen.waiting.slots:
            add = partial(zen.waiting.accumulation(factor), grad)
            self._late.add(add) if self.policy.overlap_step else add()
        return todo

    def _late_steps(self, zens: Sequence[ZenUnit]) -> Iterator[ZenUnit]:
        """Step the rest of units here and now; yields every unit, in order, when it is final."""
        steps = [zen.waiting.step(zen.slots, late=False) for zen in zens]
        moving = [(zen, step) for zen, step in zip(zens, steps, strict=True) if step is not None]
        left = iter(zens)
        if moving:
            for zen, _ in moving:
                zen.waiting.prepare()
            window = self._late.window_for(zens[0].unit)
            for position in run(self.exact.rule, window, [step for _, step in moving]):
                for zen in left:
                    yield zen
                    if zen is moving[position][0]:
                        break
        yield from left

    def _select(self, stored: Sequence[UnitStep], factor: float) -> bool:
        """Choose channels, if it is time to; whether it was."""
        todo = selection(self.policy, self._units.progress)
        if todo is Selection.KEEP:
            return False
        best, held = most_important_channels(stored, self._units.by_index, self.policy.topk_ratio, self._wire)
        best_sum = sum(float(values[chosen].sum()) for values, chosen in best.values())
        if todo is Selection.IF_STALE and not is_stale(self.policy, held=held, best=best_sum):
            return False
        self._land_now()
        for index in {item.unit.index for item in stored}:
            self._units.by_index[index].choose(
                {slot: chosen for (unit, slot), (_, chosen) in best.items() if unit == index}
            )
        self._units.progress = self._units.progress.selected()
        return True

    def _is_ripe(self, factor: float) -> bool:
        """Whether the rest has become important, on all ranks together."""
        if self.policy.update_interval != "auto" or not self._units.progress.num_held:
            return False
        pairs = [(*zen.rest(), *zen.at_once(factor)) for zen in self._units]
        sums = torch.tensor(pairs, dtype=torch.float64).view(-1, 4).sum(0).to(self._wire.device)
        self._wire.all_reduce("importance of the rest", sums, dist.ReduceOp.SUM).wait()
        rest, num_rest, chosen, num_chosen_elements = sums.tolist()
        return is_ripe(self.policy, rest=(rest, num_rest), chosen=(chosen, num_chosen_elements))

    # -- what is visible ---------------------------------------------------------------------------------------

    def _arrives_late(self, zen: ZenUnit) -> bool:
        """Whether a thread steps and sends the unit; not where this step has had everything land."""
        return self._may_be_late and 0 < zen.unit.stage < 3 and not self._is_whole

    def _sending(self, zen: ZenUnit, ends: bool) -> list[Callable[[], None]]:
        """How the thread brings a unit's new values to the other ranks; see Note [What is published]."""
        if self._beside is None:
            return []
        if ends:
            return [partial(publish_whole, zen.unit, zen.unit.full, self._beside)]
        return [partial(self._units.rows_of[zen.unit.index].publish, [zen])]

    def _land_now(self) -> None:
        """Take over what is under way, now; whole units are published then, on all ranks."""
        self._late.wait_for_late_step()
        for zen in self._units:
            zen.unit.settle()
            zen.landing()()
        self._is_whole = True

    def _take_edits(self) -> None:
        """What somebody wrote to parameters counts; what was computed from the old values does not."""
        edited = [zen for zen in self._units if zen.is_edited]
        if edited:
            self._late.wait_for_late_step()
        for zen in edited:
            zen.take_edits()

    def _resume(self, parts: Sequence[Part]) -> None:
        """Have every unit in two forms; what has moved before settles first where there is more to hold."""
        if self._units.knows_less_than(parts):
            self.settle()
        self._units.resume(parts)


def _each(work: Sequence[Callable[[], None]]) -> None:
    for each in work:
        each()


def _nothing(unit: FlatUnit) -> UnitStep:
    """A unit that has no gradient at this step."""
    empty = torch.empty(0)
    return UnitStep(unit, empty, [], lambda: empty)
