"""One unit under ZenFlow: chosen rows in compact form on the device, everything in full form on the host.

In: gradients. Out: updated rows in the unit's shard, and what waits (`WaitingRows`). The two forms of a state are never
both right for one row, see Note [Two forms]. Next: `zenflow_stepper` says when what happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from zero_core import ShardSlot, UnitStep
from zero_core.flat_unit import FlatUnit
from zero_core.steppers import UNFINISHED

from .compact_rows import CompactRows, sum_of_squares
from .importance import as_mask, from_mask, pick, rows_in
from .row_set import RowSet
from .store_stepper import StoreStepper
from .waiting_rows import WaitingRows
from .zenflow import ZenFlow
from .zenflow_schedule import Progress

# Note [Two forms]
# Chosen rows: values and moments in compact form are right, and the full form holds whatever the passes over whole
# shards left there. The others: the full form is right. `settle` writes the compact form into the full one, so that
# whoever saves or loads states meets them by name as those of any optimizer; `resume` takes the rows out again.

# Note [Counts of two forms]
# A chosen row has been stepped at every step, the others less often (or later), and Adam's bias correction asks how
# often. A row that changes form takes its bias-corrected moments along: m / (1 - beta1^old) = m' / (1 - beta1^new).

logger = logging.getLogger(__name__)

KEYS = (
    "zenflow_sum", "zenflow_next", "zenflow_chosen", "zenflow_held", "zenflow_late_step", "zenflow_under_way",
    UNFINISHED, *Progress.KEYS,
)  # fmt: skip


class ZenUnit:
    """See the module.

    Args:
        unit: one whose optimizer state rests in a store.
        stepper: steps whole shards, and knows where their states rest.
        policy: what a late step is.

    Attributes:
        slots: those of this rank that have moved so far.
        chosen: slot -> which of its channels are, bool, on the CPU; of other ranks' slots too, where that is known.
        waiting: the rows that are not.
        is_settled: the full form is right for every row.
    """

    def __init__(self, unit: FlatUnit, stepper: StoreStepper, policy: ZenFlow) -> None:
        self.unit = unit
        self.slots: list[ShardSlot] = []
        self.chosen: dict[int, torch.Tensor] = {}
        self.waiting = WaitingRows(unit, stepper, policy)
        self.is_settled = True
        self._stepper = stepper
        self._policy = policy
        self._num_steps: dict[int, int] = {}
        self._compact: CompactRows
        self._num_edits = unit.num_edits

    # -- the chosen rows ---------------------------------------------------------------------------------------

    def take(self, grad: torch.Tensor) -> None:
        """The chosen rows of a gradient; kept for what `stepping` returns."""
        self._compact.take_gradient(grad)

    def stepping(self, item: UnitStep, scale: float) -> Callable[[], None]:
        """Count the step of every slot that moves; what is returned steps the chosen rows with what `take` took."""
        for slot in item.slots:
            self._num_steps[slot.place.index] += 1
        self.waiting.hold(item.slots)
        rule = self._stepper.rule
        segments = self._compact.segments(item.slots, self._num_steps, rule)
        return partial(self._compact.step, segments, rule, scale)

    def publish(self) -> None:
        """Write the chosen rows to the shard."""
        self._compact.publish(self._shard())

    @property
    def published(self) -> torch.Tensor:
        """The chosen rows in the parameters' dtype, compact."""
        return self._compact.published

    def at_once(self, scale: float) -> tuple[float, float]:
        """Sum of squares of what `take` took, times the scale, and how many elements it is."""
        return sum_of_squares([self._compact.grads]) * scale**2, float(self._compact.rows.numel)

    def rest(self) -> tuple[float, float]:
        """Sum of squares of the accumulated gradients that wait, and how many elements they are."""
        parts = self.waiting.sums()
        if not parts or self.waiting.sum is None:
            return 0.0, 0.0
        rows = self._compact.rows
        compact = rows.take(self.waiting.sum, torch.empty(rows.numel, device=self.unit.device))
        spans = [rows.spans[slot.place.index] for slot in self.waiting.slots]
        chosen = [compact[start:stop] for start, stop in spans]
        squares = sum_of_squares(parts) - sum_of_squares(chosen)
        return max(squares, 0.0), float(sum(p.numel() for p in parts) - sum(c.numel() for c in chosen))

    def landing(self) -> Callable[[], None]:
        """What is returned makes visible what a finished late step computed; it went over chosen rows too."""
        slots, self.waiting.under_way = self.waiting.under_way, []

        def land() -> None:
            self.waiting.land(self._shard(), slots)
            self.publish()

        return land

    # -- edits and choices -------------------------------------------------------------------------------------

    @property
    def is_edited(self) -> bool:
        """Whether somebody else has written the parameters since this looked."""
        return self.unit.num_edits != self._num_edits

    def take_edits(self) -> None:
        """What was written counts; a late step that began before is dropped, and must have been waited for."""
        if self.waiting.under_way:
            logger.warning(
                "%s was edited while an update of it was under way, which is dropped; call flush() before edits",
                self.unit.label,
            )
        self.waiting.forget_next()
        unit, compact = self.unit, self._compact
        if unit.has_separate_master:
            assert unit.master is not None
            compact.rows.put(compact.values, unit.master)  # so that what was not written keeps its digits
            unit.set_values(unit.values(), keep_unchanged=True)
        self._take_values()

    def choose(self, chosen: Mapping[int, torch.Tensor]) -> None:
        """Have other rows in compact form; what was under way must have landed.

        Args:
            chosen: slot -> which channels, bool; slots that are not in it keep theirs.
        """
        full = self._to_full()
        before = {index: self.chosen.get(index, ~after & after) for index, after in chosen.items()}
        self.chosen |= chosen
        self._rescale(full, {index: before[index] & ~after for index, after in chosen.items()}, ahead=False)
        self._rescale(full, {index: after & ~before[index] for index, after in chosen.items()}, ahead=True)
        self._from_full(full)

    # -- saving, loading ---------------------------------------------------------------------------------------

    def settle(self, progress: Progress) -> None:
        """Write all there is into `inner.state` and the master, under names."""
        self._to_full()
        waiting = self.waiting
        for slot in self.slots:
            place, index = slot.place, slot.place.index
            state = self._stepper.inner.state[slot.master]
            state["zenflow_chosen"] = as_mask(place, self.chosen[index])
            for name, flat in (("zenflow_sum", waiting.sum), ("zenflow_next", waiting.next)):
                if flat is not None:
                    state[name] = flat[place.start : place.stop]
            state |= {
                "zenflow_held": waiting.held.get(index, 0),
                "zenflow_late_step": waiting.num_steps[index],
                "zenflow_under_way": int(slot in waiting.under_way),
                UNFINISHED: 1,
                **progress.as_state(),
            }
        self.is_settled = True

    def knows(self, slots: Iterable[ShardSlot]) -> bool:
        """Whether these have moved before."""
        return all(slot.place.index in self._num_steps for slot in slots)

    def resume(self, slots: Sequence[ShardSlot]) -> None:
        """Take over what `inner.state` says; a state without anything of ZenFlow is one that nothing waits for.

        Args:
            slots: that move, besides those that have moved before.
        """
        edited, waiting = self.is_edited, self.waiting
        known = {slot.place.index: slot for slot in (*self.slots, *slots)}
        self.slots = sorted(known.values(), key=lambda slot: slot.place.start)
        waiting.forget_next()
        waiting.held.clear()
        for slot in self.slots:
            index, state = slot.place.index, self._stepper.inner.state[slot.master]
            self.chosen[index] = from_mask(slot.place, state.get("zenflow_chosen"))
            if "zenflow_chosen" not in state and self._policy.topk_ratio == 1:  # there is nothing to choose
                self.chosen[index].fill_(True)
            self._num_steps[index] = int(state.get("step", 0))
            waiting.num_steps[index] = int(state.get("zenflow_late_step", self._num_steps[index]))
            if state.get("zenflow_held"):
                waiting.held[index] = int(state["zenflow_held"])
            if state.get("zenflow_under_way"):
                waiting.under_way.append(slot)
        self._from_full([view for _, view in self._stepper.placed(self.unit, self.slots)])
        for name, flat in (("zenflow_sum", waiting.sum), ("zenflow_next", waiting.next)):
            for slot in self.slots if flat is not None else ():
                assert flat is not None
                view = flat[slot.place.start : slot.place.stop]
                kept = self._stepper.inner.state[slot.master].get(name)
                if kept is not None and kept.data_ptr() != view.data_ptr():
                    view.copy_(kept)
        self.is_settled = False
        if edited:
            self.take_edits()

    def forget(self) -> None:
        """After the last late step: states of a plain optimizer, with one count a slot."""
        full = self._to_full()
        mine = {slot.place.index: ~self.chosen[slot.place.index] for slot in self.slots}
        self._rescale(full, mine, ahead=True)
        for slot in self.slots:
            state_of = self._stepper.inner.state[slot.master]
            for key in KEYS:
                state_of.pop(key, None)
        self.waiting.give_room_back()
        self.chosen.clear()
        self._num_steps.clear()
        self.is_settled = True

    # -- inside ------------------------------------------------------------------------------------------------

    def _shard(self) -> torch.Tensor:
        """The shard, to be written; waits for what is on its way to a store."""
        unit = self.unit
        assert unit.shard is not None
        unit.forget_prefetched()
        return unit.shard if unit.resting is None else unit.resting.view()

    def _row_set(self, channels: Mapping[int, torch.Tensor]) -> RowSet:
        places = [slot.place for slot in self.slots if slot.place.index in channels]
        return RowSet(
            {place.index: pick(rows_in(place), channels[place.index]) for place in places}, self.unit.device
        )

    def _rescale(
        self, full: Sequence[torch.Tensor], channels: Mapping[int, torch.Tensor], *, ahead: bool
    ) -> None:
        """Moments of channels whose form changes, see Note [Counts of two forms]."""
        rows = self._row_set(channels)
        for number, state in enumerate(full):
            rows.scale(state, {slot.place.index: self._ratio(slot, number, ahead) for slot in self.slots})

    def _ratio(self, slot: ShardSlot, number: int, ahead: bool) -> float:
        """What moment `number` is multiplied by; `ahead`: from the rest's count to that of the chosen, or back."""
        now, late = self._num_steps[slot.place.index], self.waiting.num_steps[slot.place.index]
        if now == late:
            return 1.0
        beta = float(slot.group["betas"][number])
        of_now, of_late = 1 - beta**now, 1 - beta**late
        if ahead:
            return of_now / of_late if late else 1.0  # moments of no steps are zero
        return of_late / of_now if now else 1.0

    def _to_full(self) -> list[torch.Tensor]:
        """Write the compact form into the full one; the moments in full form."""
        full = [view for _, view in self._stepper.placed(self.unit, self.slots)]
        self._compact.write(full, self.unit.master if self.unit.has_separate_master else None)
        for slot in self.slots:
            state, count = self._stepper.inner.state[slot.master], self._num_steps[slot.place.index]
            if count or "step" in state:
                state["step"] = torch.tensor(float(count))
        return full

    def _from_full(self, full: Sequence[torch.Tensor]) -> None:
        """Take the chosen rows out of the full form, and make room for sums where rows wait."""
        unit = self.unit
        self._compact = CompactRows(self._row_set(self.chosen), full, unit.dtype, unit.has_separate_master)
        self._take_values()
        self.waiting.slots = [
            slot for slot in self.slots if pick(rows_in(slot.place), ~self.chosen[slot.place.index])
        ]
        self.waiting.make_room()

    def _take_values(self) -> None:
        """The chosen rows as master and shard have them."""
        assert self.unit.master is not None
        assert self.unit.shard is not None
        self._compact.take_values(self.unit.master, self.unit.shard)
        self._num_edits = self.unit.num_edits
