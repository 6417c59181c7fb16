"""The optimizer a user holds: an ordinary torch optimizer, stepping this rank's shards.

In: gradient shards, complete after `backward`. Out: published parameters. `step` is the whole story: finish the
reductions, agree on overflow, fold unscaling and clipping into one factor, step each unit, publish it.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from .claims import (
    Member,
    check_stores,
    check_trainable,
    fill_groups,
    find_members,
    steps_whole_tensors,
    take_over,
)
from .errors import ZeroConfigError
from .flat_unit import FlatUnit
from .hooks import Lane
from .norms import Measured, clip_factor, global_norm
from .precision import LossScaler, OverflowReport, PeakHistory, locate_overflow
from .publish import Publisher
from .saved_layout import Layout, describe, renumber
from .steppers import ShardOptimizer, ShardSlot, StepGuard, UnitStep, choose_stepper
from .whole import WholeParameter, WholeStepper

if TYPE_CHECKING:
    from .api import Sharded

logger = logging.getLogger(__name__)


class ShardedOptimizer(Optimizer):
    """Steps a sharded model with any torch optimizer whose update of a parameter needs that parameter alone.

    The groups, hyperparameters and state of `optimizer` stay where they are; only the parameters in its groups are
    replaced by this rank's shards of them, so LR schedulers attach to either object as usual; `step` and `zero_grad`
    are this object's, and `optimizer.step()` by hand raises `ZeroStateError`. AdamW, Adam, Adagrad
    and SGD run as one fused pass over each flat shard; others run themselves, and so does one with step hooks of its
    own (register later ones on this object). One that looks at whole tensors (Adafactor, Muon, LAMB) is given whole
    parameters, each on the one rank that owns it.

    Args:
        model: a model that `zero_core.shard` returned.
        optimizer: built on `model.parameters()` (or some of them, in any groups), before or after sharding.
        scaler: scales losses and skips steps that overflow; the caller calls `scaler.scale(loss).backward()`.
        stepper: where and how a shard is stepped; None chooses.
        whole_tensors: the update of one element looks at others of its parameter (norms, factors, matrices), so give
            `optimizer` whole parameters. None knows torch's own; say True for such an optimizer from elsewhere,
            which cannot be recognised.

    Attributes:
        inner: the torch optimizer, with its groups and state.
        slots: unit index -> the parts of parameters that this rank holds (and steps, if elementwise).
        whole: the parameters that this rank steps as a whole; None if the optimizer gets slices.
        last_step_skipped: the last `step` found a non-finite gradient under a scaler and changed nothing.
        overflow_report: where that gradient was. Without a scaler, a step whose gradients have been clipped (or whose
            norm was asked for) finds it too, warns once, and goes on as torch does.

    Raises:
        ZeroConfigError: the optimizer holds a parameter that is not the model's, or nothing but frozen ones, or is
            known to need more than one parameter at a time; the scaler is another optimizer's.

    Bytes per rank: the state of `optimizer` and the master copy, for this rank's shards only. With whole tensors the
    state is that of the parameters it owns: 1/N of them, and at most one parameter more. The step then takes twice
    the owned masters besides (they and their gradients, whole), and three exchanges of P/N elements of the master's
    dtype (gradients and masters to the owners, masters back). At stage 0 every rank steps all, and nothing travels.
    Source: ZeRO (Rajbhandari et al., 2020), section 5.1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scaler: LossScaler | None = None,
        stepper: ShardOptimizer | None = None,
        whole_tensors: bool | None = None,
    ) -> None:
        from .api import sharded

        self._sharded: Sharded = sharded(model)
        whole = steps_whole_tensors(optimizer, whole_tensors)
        if whole and stepper is not None:
            raise ZeroConfigError(
                "ShardedOptimizer: a stepper gets slices, and this optimizer needs whole tensors; leave one of "
                "stepper= and whole_tensors= out"
            )
        self.inner = optimizer
        self.scaler = scaler
        self.slots: dict[int, list[ShardSlot]] = {}
        self._claimed: dict[int, set[int]] = {}
        self._members = find_members(optimizer.param_groups, self._sharded.units)
        self._dormant: list[Member] = []
        self.whole: list[WholeParameter] | None = None
        if whole:
            overlap = self._sharded.overlap.enabled
            stepper = WholeStepper(optimizer, self._sharded.wire, overlap=overlap)
            self.whole = stepper.owned
        self._norm: tuple[int, torch.Tensor] | None = None  # of which gradients, and their norm
        self._chooses_stepper = stepper is None
        self._stepper = stepper or choose_stepper(optimizer, [])
        self._check(self._members)
        check_trainable(self._members)
        if scaler is not None:
            scaler.bind(self)
        self._take_over(self._members)
        self._guard = StepGuard(optimizer)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        gatherer = self._sharded.gatherer
        self._publisher = Publisher(
            self._sharded.wire,
            gatherer.refresh if gatherer else None,
            limit_bytes=self._sharded.reducer.limit_bytes if self._sharded.overlap.enabled else 0,
            late=self._sharded.late,
        )
        self._max_norm: float | None = None
        self._num_steps = 0
        self._peaks = PeakHistory(0 if scaler is None else scaler.history)
        self.last_step_skipped = False
        self.overflow_report: OverflowReport | None = None

    def _check(self, members: list[Member]) -> None:
        """Refuse what this optimizer cannot step, before anything of a torch optimizer changes."""
        self._sharded.reducer.adopt_unfrozen()
        if self._chooses_stepper or self.whole is not None:
            check_stores(members)

    def _take_over(self, members: list[Member]) -> None:
        """Step these from now on, but for those that nothing trains yet; groups list what stands for them."""
        state = self._sharded
        awake = [member for member in members if member.unit.trainable]
        slots = take_over(self.inner, awake, state.precision, whole=self.whole is not None)
        for member in awake:
            self._claimed.setdefault(member.unit.index, set()).add(member.index)
            member.unit.claimed_by[member.index] = weakref.ref(self)
        for unit, parts in slots.items():
            self.slots[unit] = sorted([*self.slots.get(unit, []), *parts], key=lambda slot: slot.place.start)
        self._lanes = [lane for lane in state.reducer.lanes if lane.unit.index in self._claimed]
        if isinstance(self._stepper, WholeStepper):
            self._stepper.add(awake)
        elif self._chooses_stepper:  # state lies with the slots, and the new one finds it there
            self._stepper = choose_stepper(self.inner, self._lanes)
        self._dormant = [
            each for each in self._members if each.index not in self._claimed.get(each.unit.index, ())
        ]
        for member in self._dormant:
            self.inner.state.pop(member.param, None)
        fill_groups(self._members)
        self._norm = None

    def _wake(self) -> None:
        """Take over parameters that were frozen when the optimizer was built, and need gradients now."""
        if any(member.param.requires_grad or member.unit.trainable for member in self._dormant):
            self._check(self._dormant)
            self._take_over(self._dormant)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from the gradients accumulated since `zero_grad`; every rank calls it.

        Raises:
            CollectiveError: another rank died or did not come.
            OverflowError: a dynamic loss scale has reached its minimum and gradients still overflow.
        """
        with self._stepping():
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._wake()
            self._sharded.reducer.finish()
            self._num_steps += 1
            self._sharded.wire.fate.num_steps += 1
            used = self._agree_on_used()
            self.overflow_report = self._find_overflow(before=self.overflow_report)
            self.last_step_skipped = self.scaler is not None and self.overflow_report is not None
            if not self.last_step_skipped:
                for lane in self._lanes:
                    lane.unit.settle()
                    lane.unit.take_edits()
                work = [self._unit_step(lane, used) for lane in self._lanes if lane.shard.value is not None]
                factor = self._factor()
                with self._guard:
                    for item in self._stepper.step(work, factor):
                        self._publisher.publish(item.unit, cast=not self._stepper.casts, moving=item.moving)
            self._publisher.finish()
            self._norm = self._max_norm = None
            if self.scaler is not None:
                self.scaler.update(self.overflow_report)
            return loss

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Around every step, for classes with more to do: torch's hooks would run twice in a `step` of their own."""
        yield

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step more parameters of the model, such as those of a layer that was unfrozen; every rank calls it.

        Args:
            param_group: parameters (or pairs of `named_parameters()`) and options, as for the torch optimizer.

        Raises:
            ZeroConfigError: a parameter is not the model's, or is in a group already.
        """
        if not hasattr(self, "_publisher"):  # torch's constructor
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        params = [each[1] if isinstance(each, tuple) else each for each in given]  # as of named_parameters()
        found = find_members([{"params": params}], self._sharded.units)
        known = [member.name for member in found if self.steps(member.unit, member.index)]
        if known:
            raise ZeroConfigError(f"add_param_group: this optimizer steps {known[:4]} already")
        self._check(found)
        self.inner.add_param_group({**param_group, "params": given})
        group = self.inner.param_groups[-1]
        if self.inner.param_groups is not self.param_groups:
            self.param_groups.append(group)
        added = find_members([group], self._sharded.units)
        given_ids = {id(param) for param in params}
        self._members = [member for member in self._members if id(member.param) not in given_ids] + added
        self._take_over(added)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this optimizer's parameters.

        Args:
            set_to_none: give their memory back until the next backward, as torch does; False keeps it. Either way a
                parameter that no backward reaches afterwards is left alone by the step, where torch after False
                steps it with zeros.
        """
        self._wake()
        self._sharded.reducer.zero_grad(self._claimed, free=set_to_none)
        self._norm = self._max_norm = None

    def grad_norm(self) -> torch.Tensor:
        """The global 2-norm of the averaged, unscaled, unclipped gradients; every rank calls it.

        Returns:
            float32 scalar tensor, equal on all ranks.
        """
        self._wake()
        norm = self._scaled_norm()
        return (norm if self.scaler is None else norm / self.scaler.value).float()

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Scale the next step's gradients so that their global norm is at most `max_norm`; returns the norm before."""
        if not max_norm > 0:
            raise ZeroConfigError(f"clip_grad_norm: expected max_norm > 0, got {max_norm!r}")
        self._max_norm = float(max_norm)
        return self.grad_norm()

    def settle(self) -> None:
        """Have `inner.state` and the masters say all that the stepper knows; whoever reads or writes them calls it.

        A stepper that keeps states in a form of its own puts them there, and takes them from there at the next step.
        """

    @contextmanager
    def being_replaced(self) -> Iterator[None]:
        """Around a load of all parameters, masters and states: what was under way for them does not matter any more."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, for the same rank, world size and stage; see `sharded_state` for any other.

        Of the parameters it holds this optimizer's masters: in fp32 these are the parameters. Tensors are live memory.
        """
        self.settle()
        self._wake()
        self.take_edits()
        return {
            "layout": self._layout(),
            "inner": self.inner.state_dict(),
            "masters": {slot.name: master for slot, master in self._masters()},
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "num_steps": self._num_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this rank's `state_dict()`; every rank calls it with its own.

        The masters in it are written, and so are the parameters of this optimizer (of no other): weights that are to
        be others than those that it was saved with are loaded after it.

        Raises:
            ZeroConfigError: on some rank the state is of another rank, world size, stage or model, or of parameters
                that are frozen here, or of whole tensors where this optimizer has slices (or the other way round); or
                ranks have states of different steps. On every rank, before anything has changed.
        """
        from .agreement import agree_to_load

        self.settle()
        self._wake()
        self._sharded.reducer.assemble()
        agree_to_load(self._sharded.everyone, state_dict, self._layout())
        saved, masters = state_dict["layout"], state_dict["masters"]
        if isinstance(self._stepper, WholeStepper):
            self._stepper.deal_as(saved["owners"])
            fill_groups(self._members)
        self.take_edits()  # what was written before belongs to what is loaded, and must not be taken for newer
        groups = self.inner.param_groups
        inner = renumber(state_dict["inner"], saved, self._layout())
        self.inner.load_state_dict(copy.deepcopy(inner))  # torch would share its tensors
        # Torch puts new group dictionaries in the place of those that schedulers and this object hold.
        for group, loaded in zip(groups, self.inner.param_groups, strict=True):
            group.update(loaded)
        self.inner.param_groups = groups
        self.state = self.inner.state
        if self.scaler is not None and state_dict["scaler"] is not None:
            self.scaler.load_state_dict(state_dict["scaler"])
        self._num_steps = state_dict["num_steps"]
        for slot, master in self._masters():
            if slot.name in masters:  # it may have been frozen then
                master.copy_(masters[slot.name])
        # Every rank publishes every unit, one that has no part of it too: the gather is collective.
        for unit in [unit for unit in self._sharded.units if unit.index in self._claimed]:
            self._publisher.publish(unit, cast=True)
        self._publisher.finish()

    def _layout(self) -> Layout:
        """What `state_dict` says of this optimizer."""
        state, stepper = self._sharded, self._stepper
        owners = stepper.owners() if isinstance(stepper, WholeStepper) else None
        parts = [slot for slots in self.slots.values() for slot in slots]
        return describe(
            self.param_groups, self._members, self._dormant, parts, state.wire.group, state.stage, owners
        )

    def _masters(self) -> Iterator[tuple[ShardSlot, torch.Tensor]]:
        """This rank's slots with their masters, settled."""
        for index, slots in self.slots.items():
            unit = self._sharded.units[index]
            unit.settle()
            for slot in slots:
                assert unit.master is not None
                yield slot, unit.master[slot.place.start : slot.place.stop]

    def room_for_state(self, slot: ShardSlot, key: str) -> torch.Tensor | None:
        """Where state that a load brings and that no step has made yet is to lie; None: where the parameter does.

        Args:
            slot: of this rank.
            key: name in `inner.state`.
        """
        return None

    def take_edits(self) -> None:
        """What was written to parameters goes into the masters, which must be settled."""
        for unit in self._sharded.units:
            unit.settle()
            unit.take_edits()

    def steps(self, unit: FlatUnit, index: int) -> bool:
        """Whether a parameter of the model is among those of this optimizer, on whichever rank its parts lie."""
        return unit in self._sharded.units and index in self._claimed.get(unit.index, ())

    def unit_of(self, slot: ShardSlot) -> FlatUnit:
        """The unit that a slot lies in."""
        return next(self._sharded.units[index] for index, slots in self.slots.items() if slot in slots)

    # -- parts of a step --------------------------------------------------------------------------------------

    def _agree_on_used(self) -> set[tuple[int, int]] | None:
        """The (unit, slot) pairs that had a gradient on some rank; None for all.

        A rank that used every parameter knows the answer, and need not wait for it.
        """
        slots = [(lane.unit.index, i) for lane in self._lanes for i in range(len(lane.unit.params))]
        mine = [i in lane.bucket.used for lane in self._lanes for i in range(len(lane.unit.params))]
        flags = torch.tensor(mine, dtype=torch.uint8, device=self._sharded.wire.device)
        pending = self._sharded.everyone.all_reduce("agreement on used parameters", flags, dist.ReduceOp.MAX)
        if all(mine):
            self._publisher.after(pending)
            return None
        pending.wait()
        return {slot for slot, flag in zip(slots, flags.tolist(), strict=True) if flag}

    def _unit_step(self, lane: Lane, used: set[tuple[int, int]] | None) -> UnitStep:
        unit, grad = lane.unit, lane.shard.value
        assert grad is not None
        slots, moving = self.slots.get(unit.index, []), self._claimed[unit.index]
        if used is not None:
            slots = [slot for slot in slots if (unit.index, slot.place.index) in used]
            moving = {index for index in moving if (unit.index, index) in used}
        return UnitStep(unit, grad, slots, lane.shard.lend, moving)

    def _scaled_norm(self) -> torch.Tensor:
        reducer = self._sharded.reducer
        reducer.finish()
        if self._norm is None or self._norm[0] != reducer.generation:
            shards: list[torch.Tensor | Measured] = []
            for lane in self._lanes:
                is_whole = len(self._claimed[lane.unit.index]) == len(lane.unit.params)
                known = lane.shard.measured if is_whole else None
                value = lane.shard.value if known is None else None
                if known is not None:
                    shards.append(known)
                elif value is not None and is_whole:
                    shards.append(value)
                elif value is not None:
                    parts = (slot.place for slot in self.slots.get(lane.unit.index, []))
                    shards += [value[part.start : part.stop] for part in parts]
            norm = global_norm(shards, self._sharded.wire, replicated=self._sharded.stage == 0)
            self._norm = (reducer.generation, norm)
        return self._norm[1]

    def _find_overflow(self, before: OverflowReport | None) -> OverflowReport | None:
        """Look at the norm, where a scaler needs it or it has been asked for: all ranks see the same one."""
        if self.scaler is None and self._norm is None:
            return None
        if bool(torch.isfinite(self._scaled_norm())):
            if self.scaler is not None:
                self._peaks.record(self._lanes)
            return None
        report = locate_overflow(self._lanes, self._sharded.wire, self._num_steps, self.scaler, self._peaks)
        if not report.skipped and before is None and self._sharded.everyone.group.rank() == 0:
            logger.warning("%s", report)
        return report

    def _factor(self) -> torch.Tensor | float:
        """What gradients are multiplied by in the step: unscaling and clipping."""
        if self._max_norm is None:
            return self._unscale()
        factor = clip_factor(self.grad_norm(), self._max_norm) * self._unscale()
        return factor if factor.is_cuda else float(factor)

    def _unscale(self) -> float:
        return 1.0 if self.scaler is None else 1.0 / self.scaler.value
