"""One unit under ZenFlow: chosen rows in compact form on the device, everything in full form on the host.

In: gradients. Out: updated rows in the unit's shard; and a `FlatStep` over the rest. The two forms of a state are never
both right for one row, see Note [Two forms]. Next: `zenflow_stepper` says when what happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import accel_kernels as ak
import torch
from zero_core import ShardSlot, UnitStep
from zero_core.flat_unit import FlatUnit

from .compact_rows import CompactRows, sum_of_squares
from .importance import Rows, num_channels, pick, rows_of
from .row_set import RowSet
from .store_stepper import FlatStep, StoreStepper
from .window import Operand
from .zenflow_schedule import Progress

# Note [Two forms]
# Chosen rows: values and moments in compact form are right, and the full form holds whatever the passes over whole
# shards left there. The others: the full form is right. `settle` writes the compact form into the full one, so that
# whoever saves or loads states meets them by name as those of any optimizer; `resume` takes the rows out again.

# Note [Counts of two forms]
# A chosen row has been stepped at every step, the others once a window, and Adam's bias correction asks how often. A
# row that changes form takes its bias-corrected moments along: m / (1 - beta1^old) = m' / (1 - beta1^new), v likewise.

logger = logging.getLogger(__name__)

KEYS = (
    "zenflow_sum", "zenflow_next", "zenflow_chosen", "zenflow_held", "zenflow_late_step", "zenflow_under_way",
    "zenflow_num_steps", "zenflow_num_held", "zenflow_selection_age",
)  # fmt: skip


class ZenUnit:
    """See the module.

    Args:
        unit: one whose optimizer state rests in a store.
        stepper: steps whole shards, and knows where their states rest.
        overlap: updates of the rest become visible later than they are computed.

    Attributes:
        slots: those that have moved so far.
        chosen: slot -> which of its channels are, bool, on the CPU.
        is_settled: the full form is right for every row.
    """

    def __init__(self, unit: FlatUnit, stepper: StoreStepper, *, overlap: bool) -> None:
        self.unit = unit
        self.slots: list[ShardSlot] = []
        self.chosen: dict[int, torch.Tensor] = {}
        self.is_settled = True
        self.under_way: list[ShardSlot] = []
        self._stepper = stepper
        self._overlap = overlap
        self._held: dict[int, int] = {}
        self._late_steps: dict[int, int] = {}
        self._late_slots: list[ShardSlot] = []
        self._compact: CompactRows
        self._sum: torch.Tensor | None = None
        self._other_sum: torch.Tensor | None = None
        self._next: torch.Tensor | None = None
        self._is_empty = True
        self._num_edits = unit.num_edits

    # -- the chosen rows ---------------------------------------------------------------------------------------

    def take(self, grad: torch.Tensor) -> None:
        """The chosen rows of a gradient; kept for `step`."""
        self._compact.take_gradient(grad)

    def step(self, item: UnitStep, scale: float) -> None:
        """Step the chosen rows with what `take` took, and count the step of every slot that moves."""
        self._compact.step(item.slots, self._stepper, scale)

    def publish(self) -> None:
        """Write the chosen rows to the shard."""
        self._compact.publish(self._shard())

    # -- the rest ----------------------------------------------------------------------------------------------

    def at_once(self, scale: float) -> tuple[float, float]:
        """Sum of squares of what `take` took, times the scale, and how many elements it is."""
        return sum_of_squares([self._compact.grads]) * scale**2, float(self._compact.rows.numel)

    def hold(self, slots: Iterable[ShardSlot]) -> None:
        """Count a gradient of these slots."""
        for slot in slots:
            self._held[slot.place.index] = self._held.get(slot.place.index, 0) + 1

    @property
    def has_rest(self) -> bool:
        """Whether any row of the shard waits."""
        return bool(self._late_slots)

    def accumulation(self, scale: float) -> Callable[[torch.Tensor], None]:
        """What adds a gradient to the window's sum; what it says of chosen rows is not looked at."""
        assert self._sum is not None
        is_first, self._is_empty = self._is_empty, False
        return partial(_add, self._sum, scale=scale, is_first=is_first)

    def rest(self) -> tuple[float, float]:
        """Sum of squares of the accumulated gradients that wait, and how many elements they are."""
        if not self._late_slots or self._is_empty:
            return 0.0, 0.0
        assert self._sum is not None
        parts = [self._sum[slot.place.start : slot.place.stop] for slot in self._late_slots]
        rows = self._compact.rows
        compact = rows.take(self._sum, torch.empty(rows.numel, device=self.unit.device))
        spans = [rows.spans[slot.place.index] for slot in self._late_slots]
        chosen = [compact[start:stop] for start, stop in spans]
        squares = sum_of_squares(parts) - sum_of_squares(chosen)
        return max(squares, 0.0), float(sum(p.numel() for p in parts) - sum(c.numel() for c in chosen))

    def late_step(self, *, late: bool) -> FlatStep | None:
        """The step over the rest with the mean of the window's gradients, for which another window makes room.

        Args:
            late: leave the shard alone; `land` takes the new values over.
        """
        held = {slot.place.index: self._held.get(slot.place.index, 0) for slot in self.slots}
        for index, count in held.items():
            self._late_steps[index] += count > 0
        slots = [slot for slot in self._late_slots if held[slot.place.index]]
        self._held.clear()
        self._is_empty = True
        if not slots:
            return None
        assert self._sum is not None
        counts = {held[slot.place.index] for slot in slots}
        if len(counts) > 1:
            for slot in slots:
                self._sum[slot.place.start : slot.place.stop].mul_(1.0 / held[slot.place.index])
        scale = 1.0 / counts.pop() if len(counts) == 1 else 1.0
        rule, unit = self._stepper.rule, self.unit
        segments = [
            rule.segment(s.place.start, s.place.stop, s.group, self._late_steps[s.place.index]) for s in slots
        ]
        grad = Operand(self._sum, torch.float32, written=False)
        if not late:
            operands = self._stepper.operands(unit, self.slots, grad)
        else:
            states = self._stepper.states(unit, self.slots)
            self.under_way = slots
            self._sum, self._other_sum = self._other_sum, self._sum
            assert self._next is not None
            if unit.has_separate_master:
                operands = [self._stepper.master(unit), grad, *states]
                operands.append(Operand(self._next, self._next.dtype, read=False))
            else:
                operands = [Operand(self._next, self._next.dtype), grad, *states]
        return FlatStep(self._numel, operands, segments, scale, unit.has_separate_master)

    def prepare_next(self) -> None:
        """Where the shard is the master: what the late step starts from. Rows that wait do not change meanwhile."""
        if self.unit.has_separate_master or self._next is None:
            return
        if self.unit.resting is not None:
            self.unit.resting.store.fetch(self.unit.resting.name, self._next).wait()
        else:
            assert self.unit.shard is not None
            self._next.copy_(self.unit.shard)

    def land(self) -> None:
        """Take over what a finished late step computed."""
        if self.under_way:
            assert self._next is not None
            shard = self._shard()
            for slot in self.under_way:
                start, stop = slot.place.start, slot.place.stop
                shard[start:stop].copy_(self._next[start:stop])
            self.under_way = []

    @property
    def is_edited(self) -> bool:
        """Whether somebody else has written the parameters since this looked."""
        return self.unit.num_edits != self._num_edits

    def take_edits(self) -> None:
        """What was written counts: a late step that began before is dropped, and must have been waited for."""
        if self.under_way:
            logger.warning(
                "%s was edited while an update of it was under way, which is dropped; call flush() before edits",
                self.unit.label,
            )
            self.under_way = []
        unit = self.unit
        if unit.has_separate_master:
            assert unit.master is not None
            self._compact.rows.put(
                self._compact.values, unit.master
            )  # so that what was not written keeps its digits
            unit.set_values(unit.values(), keep_unchanged=True)
        self._take_values()

    # -- choosing, saving, loading -----------------------------------------------------------------------------

    def choose(self, chosen: Mapping[int, torch.Tensor]) -> None:
        """Have other rows in compact form.

        Args:
            chosen: slot -> which channels, bool; slots that are not in it keep theirs.
        """
        full = self._to_full()
        demoted = {index: self.chosen[index] & ~after for index, after in chosen.items()}
        promoted = {index: after & ~self.chosen[index] for index, after in chosen.items()}
        self.chosen |= chosen
        self._rescale(full, demoted, ahead=False)
        self._rescale(full, promoted, ahead=True)
        self._from_full(full)

    def settle(self, progress: Progress) -> None:
        """Write all there is into `inner.state` and the master, under names."""
        self._to_full()
        for slot in self.slots:
            place, index = slot.place, slot.place.index
            state = self._stepper.inner.state[slot.master]
            mask = torch.zeros(self._numel, dtype=torch.uint8)
            for rows, pieces in pick(self._rows_of(slot), self.chosen[index]):
                rows.view(mask)[pieces] = 1
            state["zenflow_chosen"] = mask[place.start : place.stop].clone()
            if self._sum is not None:
                state["zenflow_sum"] = self._sum[place.start : place.stop]
            if self._next is not None:
                state["zenflow_next"] = self._next[place.start : place.stop]
            age = -1 if progress.selection_age is None else progress.selection_age
            state |= {
                "zenflow_held": self._held.get(index, 0),
                "zenflow_late_step": self._late_steps[index],
                "zenflow_under_way": int(slot in self.under_way),
                "zenflow_num_steps": progress.num_steps,
                "zenflow_num_held": progress.num_held,
                "zenflow_selection_age": age,
            }
        self.is_settled = True

    def knows(self, slots: Iterable[ShardSlot]) -> bool:
        """Whether these have moved before."""
        return all(slot.place.index in self.chosen for slot in slots)

    def resume(self, slots: Sequence[ShardSlot]) -> None:
        """Take over what `inner.state` says; a state without anything of ZenFlow is one that nothing waits for.

        Args:
            slots: that move, besides those that have moved before.
        """
        edited = self.is_edited
        known = {slot.place.index: slot for slot in (*self.slots, *slots)}
        self.slots = sorted(known.values(), key=lambda slot: slot.place.start)
        self.under_way, self._held = [], {}
        for slot in self.slots:
            place, state = slot.place, self._stepper.inner.state[slot.master]
            self.chosen[place.index] = self._chosen_in(slot, state.get("zenflow_chosen"))
            self._late_steps[place.index] = int(state.get("zenflow_late_step", state.get("step", 0)))
            if state.get("zenflow_held"):
                self._held[place.index] = int(state["zenflow_held"])
            if state.get("zenflow_under_way"):
                self.under_way.append(slot)
        full = [view for _, view in self._stepper.placed(self.unit, self.slots)]
        self._from_full(full)
        if self.under_way and self._next is None:
            self._next = self._host(self.unit.dtype)
        for name, flat_tensor in (("zenflow_sum", self._sum), ("zenflow_next", self._next)):
            for slot in self.slots if flat_tensor is not None else ():
                assert flat_tensor is not None
                view = flat_tensor[slot.place.start : slot.place.stop]
                kept = self._stepper.inner.state[slot.master].get(name)
                if kept is not None and kept.data_ptr() != view.data_ptr():
                    view.copy_(kept)
        self._is_empty = not self._held
        self.is_settled = False
        if edited:
            self.take_edits()

    def forget(self) -> None:
        """After the last late step: states of a plain optimizer, with one count a slot."""
        full = self._to_full()
        self._rescale(full, {index: ~chosen for index, chosen in self.chosen.items()}, ahead=True)
        for slot in self.slots:
            state_of = self._stepper.inner.state[slot.master]
            for key in KEYS:
                state_of.pop(key, None)
        self._sum = self._other_sum = self._next = None
        self.is_settled = True

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _numel(self) -> int:
        start, stop = self.unit.local
        return stop - start

    def _shard(self) -> torch.Tensor:
        """The shard, to be written; waits for what is on its way to a store."""
        unit = self.unit
        assert unit.shard is not None
        unit.forget_prefetched()
        return unit.shard if unit.resting is None else unit.resting.view()

    def _rows_of(self, slot: ShardSlot) -> list[Rows]:
        place = slot.place
        return rows_of(place.slot.shape, place.start, place.param_start, place.numel)

    def _chosen_in(self, slot: ShardSlot, mask: torch.Tensor | None) -> torch.Tensor:
        """Which channels of a slot are chosen, by a mask over this rank's part; all, where none is chosen among."""
        place = slot.place
        chosen = torch.zeros(num_channels(place.slot.shape) or 1, dtype=torch.bool)
        if not num_channels(place.slot.shape):
            return ~chosen
        if mask is not None:
            flat = torch.zeros(self._numel, dtype=torch.bool)
            flat[place.start : place.stop] = mask.cpu() != 0
            for rows in self._rows_of(slot):
                chosen[rows.first : rows.first + rows.num] |= rows.view(flat)[:, 0]
        return chosen

    def _row_set(self, channels: Mapping[int, torch.Tensor]) -> RowSet:
        picked = {
            slot.place.index: pick(self._rows_of(slot), channels[slot.place.index])
            for slot in self.slots
            if slot.place.index in channels
        }
        return RowSet(picked, self.unit.device)

    def _rescale(
        self, full: Sequence[torch.Tensor], channels: Mapping[int, torch.Tensor], *, ahead: bool
    ) -> None:
        """Moments of channels whose form changes, see Note [Counts of two forms]."""
        rows = self._row_set(channels)
        for number, state in enumerate(full):
            rows.scale(state, {slot.place.index: self._ratio(slot, number, ahead) for slot in self.slots})

    def _ratio(self, slot: ShardSlot, number: int, ahead: bool) -> float:
        """What moment `number` is multiplied by; `ahead`: from the rest's count to that of the chosen, or back."""
        now = int(self._stepper.inner.state[slot.master].get("step", 0))
        late = self._late_steps[slot.place.index]
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
        return full

    def _from_full(self, full: Sequence[torch.Tensor]) -> None:
        """Take the chosen rows out of the full form, and make room for sums where rows wait."""
        unit = self.unit
        self._compact = CompactRows(self._row_set(self.chosen), full, unit.dtype, unit.has_separate_master)
        self._take_values()
        self._late_slots = [
            slot for slot in self.slots if pick(self._rows_of(slot), ~self.chosen[slot.place.index])
        ]
        if self._late_slots and self._sum is None:
            self._sum = self._host(torch.float32)
            if self._overlap:
                self._other_sum, self._next = self._host(torch.float32), self._host(unit.dtype)

    def _host(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self._numel, dtype=dtype, pin_memory=self.unit.device.type != "cpu")

    def _take_values(self) -> None:
        """The chosen rows as master and shard have them."""
        assert self.unit.master is not None
        assert self.unit.shard is not None
        self._compact.take_values(self.unit.master, self.unit.shard)
        self._num_edits = self.unit.num_edits


def _add(total: torch.Tensor, grad: torch.Tensor, *, scale: float, is_first: bool) -> None:
    grad = grad.cpu()
    if is_first:
        ak.cast_copy(grad, total, scale=scale)
    else:
        total.add_(grad, alpha=scale)
