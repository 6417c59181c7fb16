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

from .claims import steps_whole_tensors, take_over
from .errors import ZeroConfigError
from .flat_unit import FlatUnit
from .hooks import Lane
from .norms import Measured, clip_factor, global_norm
from .precision import LossScaler, OverflowReport, PeakHistory, locate_overflow
from .publish import Publisher
from .steppers import ShardOptimizer, ShardSlot, UnitStep, choose_stepper
from .whole import WholeParameter, WholeStepper

if TYPE_CHECKING:
    from .api import Sharded

logger = logging.getLogger(__name__)


class ShardedOptimizer(Optimizer):
    """Steps a sharded model with any torch optimizer whose update of a parameter needs that parameter alone.

    The groups, hyperparameters and state of `optimizer` stay where they are; only the parameters in its groups are
    replaced by this rank's shards of them, so LR schedulers attach to either object as usual. AdamW, Adam, Adagrad
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
        self._dormant: list[tuple[nn.Parameter, dict[str, Any]]] = []
        self.whole: list[WholeParameter] | None = None
        if whole:
            overlap = self._sharded.overlap.enabled
            stepper = WholeStepper(optimizer, [], self._sharded.wire, overlap=overlap)
            self.whole = stepper.owned
        self._chooses_stepper = stepper is None
        self._stepper = stepper or choose_stepper(optimizer, [])
        self._take_over([(param, group) for group in optimizer.param_groups for param in group["params"]])
        if self._dormant and not self._claimed:
            raise ZeroConfigError(
                "ShardedOptimizer: every parameter of the optimizer is frozen; nothing can be trained"
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        gatherer = self._sharded.gatherer
        self._publisher = Publisher(
            self._sharded.wire,
            gatherer.refresh if gatherer else None,
            limit_bytes=self._sharded.reducer.limit_bytes if self._sharded.overlap.enabled else 0,
            late=self._sharded.late,
        )
        if scaler is not None:
            scaler.bind(self)
        self._norm: tuple[int, torch.Tensor] | None = None  # of which gradients, and their norm
        self._max_norm: float | None = None
        self._num_steps = 0
        self._peaks = PeakHistory(0 if scaler is None else scaler.history)
        self.last_step_skipped = False
        self.overflow_report: OverflowReport | None = None

    def _take_over(self, params: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """Have slices of these parameters, or the whole ones, in their groups from now on."""
        state = self._sharded
        state.reducer.adopt_unfrozen()
        whole = self.whole is not None
        taken = take_over(self.inner, params, state.units, state.precision, whole=whole)
        self._dormant += taken.dormant
        for claim in taken.claims:
            self._claimed.setdefault(claim.unit.index, set()).add(claim.index)
            claim.unit.claimed_by[claim.index] = weakref.ref(self)
        for unit, slots in taken.slots.items():
            self.slots[unit] = sorted([*self.slots.get(unit, []), *slots], key=lambda slot: slot.place.start)
        self._lanes = [lane for lane in state.reducer.lanes if lane.unit.index in self._claimed]
        if (whole or self._chooses_stepper) and any(lane.unit.stores.optimizer for lane in self._lanes):
            raise ZeroConfigError(
                "ShardedOptimizer: this model's optimizer state is to rest in a store, and this one would keep it "
                "on the device; use zero_offload_nvme.OffloadedOptimizer (for elementwise optimizers), or no store"
            )
        if isinstance(self._stepper, WholeStepper):
            self._stepper.add(taken.claims)
        elif self._chooses_stepper:  # state lies with the slots, and the new one finds it there
            self._stepper = choose_stepper(self.inner, self._lanes)

    def _wake(self) -> None:
        """Take over parameters that were frozen when the optimizer was built, and need gradients now."""
        awake = [pair for pair in self._dormant if pair[0].requires_grad]
        if awake:
            self._dormant = [pair for pair in self._dormant if not pair[0].requires_grad]
            self._take_over(awake)

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
                for item in self._stepper.step(work, self._factor()):
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
            param_group: parameters and options, as for the torch optimizer.

        Raises:
            ZeroConfigError: a parameter is not the model's, or is in a group already.
        """
        if not hasattr(self, "_publisher"):  # torch's constructor
            super().add_param_group(param_group)
            return
        claimed = {id(self._sharded.units[u].params[i]) for u, slots in self._claimed.items() for i in slots}
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        known = {id(param) for unit in self._sharded.units for param in unit.params}
        wrong = [tuple(p.shape) for p in given if id(p) in claimed or id(p) not in known]
        if wrong:
            raise ZeroConfigError(
                f"add_param_group: parameters of shapes {wrong[:4]} are stepped by this optimizer already, or are not "
                "the model's"
            )
        given_ids = {id(param) for param in given}
        self._dormant = [pair for pair in self._dormant if id(pair[0]) not in given_ids]
        self.inner.add_param_group({**param_group, "params": given})
        group = self.inner.param_groups[-1]
        if self.inner.param_groups is not self.param_groups:
            self.param_groups.append(group)
        self._take_over([(param, group) for param in group["params"]])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this optimizer's parameters.

        Args:
            set_to_none: give their memory back until the next backward, as torch does; False keeps it.
        """
        self._sharded.reducer.zero_grad(self._claimed, free=set_to_none)
        self._norm = self._max_norm = None

    def grad_norm(self) -> torch.Tensor:
        """The global 2-norm of the averaged, unscaled, unclipped gradients; every rank calls it.

        Returns:
            float32 scalar tensor, equal on all ranks.
        """
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
        """This rank's part of the state, for the same world size and stage; see `sharded_state` for any other."""
        self.settle()
        self.take_edits()
        masters = {
            u.name: u.master for u in self._sharded.units if u.index in self.slots and u.master is not None
        }
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {
            "inner": self.inner.state_dict(),
            "whole_tensors": self.whole is not None,
            "masters": masters,
            "scaler": scaler,
            "num_steps": self._num_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this rank's `state_dict()`.

        Raises:
            ZeroConfigError: the state is of another world size, stage or model, or of whole tensors and this
                optimizer has slices (or the other way round).
        """
        if state_dict["whole_tensors"] != (self.whole is not None):
            raise ZeroConfigError(
                "load_state_dict: one of the two optimizers steps whole tensors, the other slices; build this one with "
                f"whole_tensors={state_dict['whole_tensors']}"
            )
        self.settle()
        self._sharded.reducer.assemble()
        held = {u.name: u for u in self._sharded.units if u.index in self.slots}
        saved = state_dict["masters"]
        mismatch = sorted(set(held) ^ set(saved)) or [
            name
            for name, unit in held.items()
            if unit.master is None or unit.master.shape != saved[name].shape
        ]
        if mismatch:
            raise ZeroConfigError(
                f"load_state_dict: the shards of {', '.join(map(repr, mismatch[:4]))} differ in presence or size from "
                "those of this model; it was saved at another world size or stage: use sharded_state for that"
            )
        self.take_edits()  # what was written before belongs to what is loaded, and must not be taken for newer
        groups = self.inner.param_groups
        self.inner.load_state_dict(copy.deepcopy(state_dict["inner"]))  # torch would share its tensors
        # Torch puts new group dictionaries in the place of those that schedulers and this object hold.
        for group, loaded in zip(groups, self.inner.param_groups, strict=True):
            group.update(loaded)
        self.inner.param_groups = groups
        self.state = self.inner.state
        if self.scaler is not None and state_dict["scaler"] is not None:
            self.scaler.load_state_dict(state_dict["scaler"])
        self._num_steps = state_dict["num_steps"]
        # Every rank publishes every unit, one that has no part of it too: the gather is collective.
        for unit in [unit for unit in self._sharded.units if unit.index in self._claimed]:
            if unit.name in held:
                assert unit.master is not None
                unit.settle()
                unit.master.copy_(saved[unit.name])
            self._publisher.publish(unit, cast=True)
        self._publisher.finish()

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


def clip_grad_norm(optimizer: ShardedOptimizer, max_norm: float) -> torch.Tensor:
    """Clip the gradients of the next step by their global norm over all shards; every rank calls it.

    Costs one read of this rank's gradients and one all-reduce of two numbers; the scaling itself rides on the step.

    Returns:
        float32 scalar tensor: the norm before clipping, equal on all ranks.

    Raises:
        ZeroConfigError: `max_norm` is not positive.
    """
    return optimizer.clip_grad_norm(max_norm)


def grad_norm(optimizer: ShardedOptimizer) -> torch.Tensor:
    """The global norm that `clip_grad_norm` would report, without clipping; every rank calls it."""
    return optimizer.grad_norm()
