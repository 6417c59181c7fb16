"""`OffloadedOptimizer`: zero-core's optimizer, with its state in a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from zero_core import LossScaler, Precision, ShardedOptimizer, ShardSlot, ZeroStateError, sharded
from zero_core.flat_unit import FlatUnit
from zero_core.hooks import Lane
from zero_core.late import LateArrivals
from zero_core.stores import rewritten

from .early import EarlyCount
from .errors import OffloadConfigError
from .last_backward import LastBackwardStepper
from .speculation import SpeculativeStepper
from .zenflow import ZenFlow
from .zenflow_stepper import ZenFlowStepper


class OffloadedOptimizer(ShardedOptimizer):
    """Steps a model that was sharded with `store=`; its results are bit for bit those without, but for "zenflow".

    Args:
        model: a model that `zero_core.shard(..., store=...)` returned.
        optimizer: torch's AdamW, Adam, Adagrad or SGD on its parameters, or one of this package's; for "zenflow"
            torch's AdamW or Adam.
        overlap: "exact": a step begins when all is known (see `last_backward`), and ends when all is stepped.
            "speculative": a unit's step begins in a thread as soon as its gradient is reduced, and counts if it is not
            clipped, does not overflow, and nothing else is otherwise than it was taken for; else it is done again.
            "zenflow": what matters most is stepped at once, the rest a window of steps at a time, in a thread while
            training goes on.
        zenflow: for "zenflow"; None: as `ZenFlow()`.
        scaler: as for `zero_core.ShardedOptimizer`.
        window_bytes: host memory for blocks of states on their way from and to a drive.
        shadow_bytes: for "speculative" and `last_backward`: room for results that do not count yet, in stores and host
            memory together. Units that find none, of those whose gradients come last, are stepped when backward is
            over. None: as much as it takes.

    Raises:
        OffloadConfigError: an optimizer or masters that no kernel steps in blocks; `zenflow` without its `overlap`;
            "zenflow" or "speculative" without any optimizer state in a store, or with a store that has no `swap`.
        zero_core.ZeroConfigError: as `zero_core.ShardedOptimizer`.

    `step` raises OSError for what a store could not do, then or in the thread since the last call. If it was the thread
    of "speculative", parameters, states and counts are as they were, and it may be called again.
    Bytes per rank: `window_bytes`, whatever the size of the model; in the store 4 bytes an element of the shard for
    each state, and 4 for the master where that is separate. With "speculative" all of these twice, and the shard
    itself; with `last_backward` the shard alone twice. With "zenflow" besides, in host memory: 4 bytes an element
    for sums of gradients, and with `overlap_step` 4 more and the parameter's own size; on the device 16 bytes for each
    element that is stepped at once; and `window_bytes` twice where parameters of some units rest in a store and their
    states do not.
    Source: ZeRO-Offload (Ren et al., 2021), section 4; ZeRO-Infinity (Rajbhandari et al., 2021), section 5.2; ZenFlow
    (Lan et al., 2025); SuperOffload (Lian et al., 2026).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        overlap: Literal["exact", "speculative", "zenflow"] = "exact",
        zenflow: ZenFlow | None = None,
        scaler: LossScaler | None = None,
        window_bytes: int = 192 << 20,
        shadow_bytes: int | None = None,
    ) -> None:
        if overlap not in ("exact", "speculative", "zenflow"):
            raise OffloadConfigError(
                f"overlap: expected 'exact', 'speculative' or 'zenflow', got {overlap!r}"
            )
        if zenflow is not None and overlap != "zenflow":
            raise OffloadConfigError(
                f"zenflow=... with overlap={overlap!r} would have no effect; say overlap='zenflow', or leave it out"
            )
        if shadow_bytes is not None and (overlap == "zenflow" or shadow_bytes < 0):
            raise OffloadConfigError(
                f"shadow_bytes={shadow_bytes} with overlap={overlap!r}: expected bytes, 0 or more, for 'speculative' "
                "or 'exact'"
            )
        state = sharded(model)
        if overlap != "exact" and not any(unit.trainable and unit.stores.optimizer for unit in state.units):
            raise OffloadConfigError(
                f"overlap={overlap!r}: expected optimizer state in a store, and all of this model's is on the device, "
                "where nothing would be late; shard with store=HostStore() or Stores(optimizer=...)"
            )
        _check_masters(optimizer, state.units, state.precision)
        self.overlap = overlap
        self._zenflow: ZenFlowStepper | None = None
        self._arrivals: LateArrivals | None = None
        self._speculative: SpeculativeStepper | None = None
        self._exact: LastBackwardStepper | None = None
        if overlap == "zenflow":
            self._arrivals = state.late or LateArrivals(state.units)
            self._zenflow = ZenFlowStepper(
                optimizer,
                zenflow or ZenFlow(),
                state.wire,
                self._arrivals,
                self._stored_parts,
                window_bytes=window_bytes,
            )
        elif overlap == "speculative":
            _check_stores(state.units)
            self._speculative = SpeculativeStepper(
                optimizer, window_bytes=window_bytes, shadow_bytes=shadow_bytes
            )
        else:
            self._exact = LastBackwardStepper(optimizer, window_bytes=window_bytes, shadow_bytes=shadow_bytes)
        stepper = self._zenflow or self._speculative or self._exact
        assert stepper is not None
        self._in_thread: ZenFlowStepper | SpeculativeStepper | LastBackwardStepper = stepper
        super().__init__(model, optimizer, scaler=scaler, stepper=stepper)
        self._early = self._speculative or self._exact
        if self._early is not None:
            self._early.early.slots = self.slots
            state.reducer.watch(self._reduced)

    @property
    def has_stored_state(self) -> bool:
        """Whether any state of this optimizer rests in a store."""
        return any(lane.unit.stores.optimizer is not None for lane in self._lanes)

    @property
    def early_steps(self) -> EarlyCount:
        """What the thread has been given during backward, and what became of it, on this rank."""
        return EarlyCount() if self._early is None else self._early.early.count

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the last backward before `step`, under "exact": units are stepped as they are reduced, in a thread.

        What is promised: nothing between this and `step` will change gradients, rates, parameters or states, and
        neither clipping nor a scaler the factor of gradients. New values of parameters show after `step`, as always.
        The first step of all makes states, and begins in `step`.

        Raises:
            zero_core.ZeroStateError: another `overlap`; a scaler; gradients that are to be clipped. Later, from
                whatever breaks the promise (`clip_grad_norm`, `zero_grad`, `state_dict`, ...), or from `step`.
            OffloadConfigError: no optimizer state in a store, or a store that has no `swap`.
            OSError, OffloadMemoryError: a store has no room for values that do not show yet; nothing has begun.
        """
        if self._exact is None:
            raise ZeroStateError(
                "last_backward() is for overlap='exact'; 'speculative' finds out by itself, 'zenflow' steps later"
            )
        if self.scaler is not None or self._max_norm is not None:
            what = "a scaler may skip the step" if self.scaler is not None else "gradients are to be clipped"
            raise ZeroStateError(f"last_backward(): {what}; leave it out, or use overlap='speculative'")
        if not self.has_stored_state:
            raise OffloadConfigError("last_backward(): no optimizer state of this model is in a store")
        units = [lane.unit for lane in reversed(self._lanes) if lane.unit.stores.optimizer is not None]
        _check_stores(units)
        with self._exact.promised(units):
            yield

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        if self._speculative is None:
            yield
            if self._zenflow is not None:
                self._zenflow.begin()
            return
        self._speculative.early.check()
        try:
            yield
        finally:  # a step that was skipped, or ended with an error
            self._speculative.early.drop_all()

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """See `zero_core.ShardedOptimizer.clip_grad_norm`."""
        if self._exact is not None:
            self._exact.check_unchanged("clip_grad_norm")
        return super().clip_grad_norm(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `zero_core.ShardedOptimizer.zero_grad`."""
        if self._exact is not None:
            self._exact.check_unchanged("zero_grad")
        super().zero_grad(set_to_none)

    def _reduced(self, lane: Lane) -> None:
        """A gradient has been reduced, during backward or in `step`."""
        unit, claimed = lane.unit, self._claimed.get(lane.unit.index, set())
        wanted = {index for index, param in enumerate(unit.params) if param.requires_grad}
        if unit.stores.optimizer is None or not wanted <= claimed:
            return
        if any(unit.claimed_by[index]() is not self for index in wanted):
            return  # another optimizer has come after this one
        if self._speculative is not None:
            self._speculative.reduced(lane, self._unscale())
        elif self._exact is not None and wanted <= lane.bucket.used:
            self._exact.reduced(lane, self._unscale())

    def room_for_state(self, slot: ShardSlot, key: str) -> torch.Tensor | None:
        """See `zero_core.ShardedOptimizer.room_for_state`: in the store at once, and not in memory until a step."""
        return self._in_thread.exact.room_for(self.unit_of(slot), slot, key)

    @contextmanager
    def being_replaced(self) -> Iterator[None]:
        """See `zero_core.ShardedOptimizer.being_replaced`; steps begun during backward do not count then."""
        with nullcontext() if self._early is None else self._early.replaced():
            yield
        for unit, _ in self._stored_parts():
            store = unit.stores.optimizer
            assert store is not None
            for name in ("master", *unit.stored_states):
                rewritten(store, unit.key(name))

    def settle(self) -> None:
        """See `zero_core.ShardedOptimizer.settle`; waits for the thread, and raises what it met."""
        self._in_thread.settle()

    @torch.no_grad()
    def flush(self) -> None:
        """Apply what waits, now; every rank calls it. With "exact" nothing ever does.

        Afterwards parameters and state are those of a plain optimizer: whatever loads such a state, on any number of
        ranks, may load it. The next step chooses channels anew. Call it before parameters are written by hand, before
        they are exported or evaluated for the last time, and before a checkpoint that another kind of optimizer loads.

        Raises:
            OSError: a store cannot read or write, now or in the thread since the last call.
        """
        if self._zenflow is None:
            return
        self._sharded.reducer.assemble()
        units = [unit for unit, _ in self._stored_parts()]
        for unit in units:
            unit.settle()
            unit.take_edits()
        self._zenflow.flush()
        for unit in units:
            self._publisher.publish(unit, cast=False)
        self._publisher.finish()

    def close(self) -> None:
        """End the thread, when it has done what it was given; raises what it met. Steps that need one then raise."""
        try:
            self._in_thread.close()
        finally:
            if self._arrivals is not None and self._arrivals is not self._sharded.late:
                self._arrivals.close()

    def __enter__(self) -> OffloadedOptimizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """See `zero_core.ShardedOptimizer.state_dict`.

        Under "zenflow" it says what waits too, and may be loaded on the same number of ranks; see `flush`.
        """
        found = super().state_dict()
        if self._zenflow is not None:
            found["values"] = {
                slot.name: unit.values()[slot.place.start : slot.place.stop].clone()
                for unit in self._ahead()
                for slot in self.slots.get(unit.index, [])
            }
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `zero_core.ShardedOptimizer.load_state_dict`."""
        with self.being_replaced():
            super().load_state_dict(state_dict)
        values = state_dict.get("values", {})
        for unit in self._ahead():
            unit.settle()
            for slot in self.slots.get(unit.index, []):
                if slot.name in values:
                    assert unit.shard is not None
                    unit.forget_prefetched()
                    unit.shard[slot.place.start : slot.place.stop].copy_(values[slot.name])
            self._publisher.publish(unit, cast=False)
        self._publisher.finish()

    def _stored_parts(self) -> list[tuple[FlatUnit, list[ShardSlot]]]:
        """Units with optimizer state in a store that this steps, and this rank's slots of them."""
        units = [unit for unit in self._sharded.units if unit.index in self._claimed]
        return [(unit, self.slots.get(unit.index, [])) for unit in units if unit.stores.optimizer is not None]

    def _ahead(self) -> list[Any]:
        """Units whose masters may know values that the parameters have yet to take."""
        units = [unit for unit in self._sharded.units if unit.index in self._claimed]
        return [unit for unit in units if unit.has_separate_master and unit.stores.optimizer is not None]


def _check_masters(optimizer: Optimizer, units: Sequence[FlatUnit], precision: Precision) -> None:
    """Refuse masters and gradients that no kernel steps."""
    given = {id(param) for group in optimizer.param_groups for param in group["params"]}
    stepped = [unit for unit in units if any(id(param) in given for param in unit.params)]
    wrong = {str(precision.master_dtype(unit.dtype)) for unit in stepped} - {str(torch.float32)}
    if wrong:
        raise OffloadConfigError(
            f"masters of {', '.join(sorted(wrong))}: kernels step torch.float32 block by block; shard with "
            "Precision(master=torch.float32), or take zero_core.ShardedOptimizer and no store"
        )
    if stepped and any(precision.accumulate_dtype(unit.dtype) == torch.float64 for unit in stepped):
        raise OffloadConfigError(
            "gradients of torch.float64: kernels take torch.float32, torch.bfloat16 and torch.float16; shard with "
            "Precision(accumulate=torch.float32), or take zero_core.ShardedOptimizer and no store"
        )


def _check_stores(units: Sequence[FlatUnit]) -> None:
    """Refuse stores in which results cannot wait."""
    stores = [store for unit in units for store in (unit.stores.optimizer, unit.stores.params)]
    wrong = {type(store).__name__ for store in stores if store is not None and not hasattr(store, "swap")}
    if wrong:
        raise OffloadConfigError(
            f"{', '.join(sorted(wrong))}: expected a store with swap(name, other), as HostStore and NvmeStore have, so "
            "that results can wait there until they count"
        )
