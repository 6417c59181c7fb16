"""`OffloadedOptimizer`: zero-core's optimizer, with its state in a store."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from zero_core import LossScaler, ShardedOptimizer, sharded
from zero_core.late import LateArrivals

from .errors import OffloadConfigError
from .store_stepper import StoreStepper
from .zenflow import ZenFlow
from .zenflow_stepper import ZenFlowStepper


class OffloadedOptimizer(ShardedOptimizer):
    """Steps a model that was sharded with `store=`; with `overlap="exact"` its results are bit for bit those without.

    Args:
        model: a model that `zero_core.shard(..., store=...)` returned.
        optimizer: torch's AdamW, Adam, Adagrad or SGD on its parameters; for "zenflow" AdamW or Adam.
        overlap: "exact": a step ends when all is stepped. "zenflow": what matters most is stepped at once, the rest a
            window of steps at a time, in a thread while training goes on.
        zenflow: for "zenflow"; None: as `ZenFlow()`.
        scaler: as for `zero_core.ShardedOptimizer`.
        window_bytes: host memory for blocks of states on their way from and to a drive.

    Raises:
        OffloadConfigError: an optimizer that no kernel steps block by block; `zenflow` without its `overlap`, or
            without any optimizer state in a store.
        zero_core.ZeroConfigError: as `zero_core.ShardedOptimizer`.

    Bytes per rank: `window_bytes`, whatever the size of the model; in the store 4 bytes an element of the shard for
    each state, and 4 for the master where that is separate. With "zenflow" besides, in host memory: 4 bytes an element
    for sums of gradients, and with `overlap_step` 4 more and the parameter's own size; on the device 16 bytes for each
    element that is stepped at once.
    Source: ZeRO-Offload (Ren et al., 2021), section 4; ZeRO-Infinity (Rajbhandari et al., 2021), section 5.2; ZenFlow
    (Lan et al., 2025).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        overlap: Literal["exact", "zenflow"] = "exact",
        zenflow: ZenFlow | None = None,
        scaler: LossScaler | None = None,
        window_bytes: int = 192 << 20,
    ) -> None:
        if overlap not in ("exact", "zenflow"):
            raise OffloadConfigError(f"overlap: expected 'exact' or 'zenflow', got {overlap!r}")
        if zenflow is not None and overlap != "zenflow":
            raise OffloadConfigError(
                f"zenflow=... with overlap={overlap!r} would have no effect; say overlap='zenflow', or leave it out"
            )
        self._zenflow: ZenFlowStepper | None = None
        if overlap == "zenflow":
            state = sharded(model)
            if not any(unit.trainable and unit.stores.optimizer for unit in state.units):
                raise OffloadConfigError(
                    "overlap='zenflow': expected optimizer state in a store, and all of this model's is on the device, "
                    "where nothing would be late; shard with store=HostStore() or Stores(optimizer=...)"
                )
            self._arrivals = state.late or LateArrivals(state.units)
            self._zenflow = ZenFlowStepper(
                optimizer, zenflow or ZenFlow(), state.wire, self._arrivals, window_bytes=window_bytes
            )
        stepper = self._zenflow or StoreStepper(optimizer, window_bytes=window_bytes)
        super().__init__(model, optimizer, scaler=scaler, stepper=stepper)

    def settle(self) -> None:
        """See `zero_core.ShardedOptimizer.settle`; waits for the thread, and raises what it met."""
        if self._zenflow is not None:
            self._zenflow.settle()

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
        units = [unit for unit in self._sharded.units if unit.index in self._claimed]
        units = [unit for unit in units if unit.stores.optimizer is not None]
        for unit in units:
            unit.settle()
            unit.take_edits()
        self._zenflow.flush([(unit, self.slots.get(unit.index, [])) for unit in units])
        for unit in units:
            self._publisher.publish(unit, cast=False)
        self._publisher.finish()

    def close(self) -> None:
        """End the thread, when it has done what it was given; raises what it met. Steps that need one then raise."""
        if self._zenflow is not None:
            try:
                self._zenflow.close()
            finally:
                if self._arrivals is not self._sharded.late:
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
            found["values"] = {unit.name: unit.values().clone() for unit in self._ahead()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `zero_core.ShardedOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        values = state_dict.get("values", {})
        for unit in self._ahead():
            if unit.name in values:
                unit.settle()
                assert unit.shard is not None
                unit.shard.copy_(values[unit.name])
            self._publisher.publish(unit, cast=False)
        self._publisher.finish()

    def _ahead(self) -> list[Any]:
        """Units whose masters may know values that the parameters have yet to take."""
        units = [unit for unit in self._sharded.units if unit.index in self._claimed]
        return [unit for unit in units if unit.has_separate_master and unit.stores.optimizer is not None]
