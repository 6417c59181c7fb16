"""The optimizers of this package on a model of zero-core, at stage 0: its precision, loss scale and states, our wire.

In: gradients that zero-core leaves local, since `LocalGradients` reduces nothing. Out: masters stepped by one of our
optimizers, published by zero-core. `ZeroCompressedOptimizer` is zero-core's own optimizer but for what ranks must agree
on, which here is not in the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from zero_core import LossScaler, Shard, ShardedOptimizer, UnitStep, sharded
from zero_core.claims import Member

from ..errors import CompressConfigError, CompressStateError
from ..traffic import Entry
from .base import CompressedOptimizer
from .rounds import Round
from .zero_one_adam import ZeroOneAdam


class _Done:
    """A collective that has nothing to do: a `zero_core.Handle`."""

    def wait(self) -> None:
        """Return."""


class LocalGradients:
    """`zero_core.Collectives` for stage 0 that leave every gradient where it is, for an optimizer that sends momenta.

    Args:
        group: the ranks; `zero_core.shard(..., stage=0, collectives=LocalGradients)` passes it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_gather(self, shard: Tensor, out: Tensor, *, tag: int) -> _Done:
        """See `zero_core.Collectives.all_gather`: at stage 0, `out` is whole already."""
        return _Done()

    def reduce_scatter(self, full: Tensor, out: Tensor, *, tag: int) -> _Done:
        """See `zero_core.Collectives.reduce_scatter`: at stage 0, `out` is a part of `full`."""
        return _Done()

    def trim(self) -> None:
        """See `zero_core.Collectives.trim`."""


class _Stepper:
    """Our optimizer where zero-core steps: a `zero_core.ShardOptimizer`."""

    casts = False

    def __init__(self, step: Callable[[float], None]) -> None:
        self._step = step

    def step(self, work: Sequence[UnitStep], scale: Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`."""
        self._step(float(scale))
        yield from work


class ZeroCompressedOptimizer(ShardedOptimizer):
    """Steps a model that `zero_core.shard(..., stage=0, collectives=LocalGradients)` returned.

    What zero-core does stays: parameters in the dtype of `Precision`, masters, accumulation in any dtype, loss scaling,
    full values, state. Gradients are this rank's own until the optimizer averages them (warm-up), or for ever. Norms
    are those of `CompressedOptimizer.clip_grad_norm`; an overflow on any rank is seen by all, at every step.

    Args:
        model: see above.
        optimizer: `OneBitAdam`, `ZeroOneAdam` or `OneBitLamb` on its parameters; its ranks are the model's.
        scaler: as for `zero_core.ShardedOptimizer`.

    Raises:
        CompressConfigError: the model was sharded otherwise; the optimizer is none of these, has taken steps, or has
            another group.
        zero_core.ZeroConfigError: as `zero_core.ShardedOptimizer`.

    Bytes a parameter and rank: those of the optimizer for fp32 parameters, and zero-core's at stage 0 (parameter,
    gradient, and a master of 4 where parameters are not fp32).
    """

    inner: CompressedOptimizer

    def __init__(
        self, model: nn.Module, optimizer: CompressedOptimizer, *, scaler: LossScaler | None = None
    ) -> None:
        state = sharded(model)
        if not isinstance(optimizer, CompressedOptimizer):
            raise CompressConfigError(
                f"expected OneBitAdam, ZeroOneAdam or OneBitLamb, got {type(optimizer).__name__}; others need "
                "zero_core.ShardedOptimizer, and collectives that reduce"
            )
        if state.stage != 0 or not isinstance(state.wire.collectives, LocalGradients):
            raise CompressConfigError(
                f"{type(optimizer).__name__}: expected a model whose gradients stay local, got stage {state.stage} "
                f"with {type(state.wire.collectives).__name__}; shard it with zero_core.shard(model, mesh, stage=0, "
                "collectives=comm_compress.LocalGradients), and ask the optimizer for shard=True where ZeRO stage 1 is "
                "wanted"
            )
        if state.everyone is not state.wire:
            raise CompressConfigError(
                f"{type(optimizer).__name__}: expected all data-parallel ranks in one dimension of the mesh, got "
                "replicas; pass mesh of one dimension"
            )
        optimizer.use_group(state.wire.group)
        optimizer.agrees_always = True
        self._open: tuple[int, Round] | None = None
        self._num_edits = sum(unit.num_edits for unit in state.units)
        super().__init__(model, optimizer, scaler=scaler, stepper=_Stepper(self._step_inner))
        if (
            optimizer.compression.reduce_dtype is None
        ):  # that of the gradients; the optimizer sees fp32 masters
            widest = max((lane.shard.dtype for lane in self._lanes), key=lambda dtype: dtype.itemsize)
            optimizer.compression = replace(optimizer.compression, reduce_dtype=widest)

    def _take_over(self, members: list[Member]) -> None:
        super()._take_over(members)
        taken = [slot for slots in self.slots.values() for slot in slots]
        self.inner.call_parameters({id(slot.master): (slot.name, slot.place.slot.shape) for slot in taken})

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """An overflow on any rank skips the step, with a scaler or without."""
        yield
        self.last_step_skipped = self.last_step_skipped or self.inner.last_step_skipped
        self._open = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `zero_core.ShardedOptimizer.zero_grad`."""
        self._open = None
        super().zero_grad(set_to_none)

    @contextmanager
    def shared_values(self) -> Iterator[None]:
        """Inside, parameters are what all ranks have in common (`ZeroOneAdam.shared_values`); every rank calls it."""
        if isinstance(self.inner, ZeroOneAdam) and self.inner.steps_since_sync:
            with self.inner.shared_values():
                self._publish()
                yield
            self._publish()
        else:
            yield

    def entries(self) -> Iterator[Entry]:
        """See `CompressedOptimizer.entries`."""
        return self.inner.entries()

    def compressed_scalars(self) -> dict[str, Any]:
        """See `SavedOptimizer.scalars`."""
        return self.inner.scalars()

    def compressed_state(self) -> dict[str, Shard]:
        """See `SavedOptimizer.sharded_state`; names are zero-core's names of parameters."""
        return self.inner.sharded_state()

    def compressed_room(self, scalars: Mapping[str, Any]) -> dict[str, Shard]:
        """See `SavedOptimizer.sharded_room`."""
        return self.inner.sharded_room(scalars)

    def load_compressed(self, scalars: Mapping[str, Any], room: Mapping[str, Shard]) -> None:
        """See `SavedOptimizer.load_sharded_state`; call it once parameters and masters are loaded."""
        with self._values_belong():
            self.inner.load_sharded_state(scalars, room)
            self._publish()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `zero_core.ShardedOptimizer.load_state_dict`; parameters may have been loaded before."""
        with self._values_belong():
            super().load_state_dict(state_dict)

    @contextmanager
    def _values_belong(self) -> Iterator[None]:
        """Around a load: what has been written to parameters so far belongs to the state that comes."""
        with torch.no_grad():
            self.take_edits()
        yield
        self._num_edits = sum(unit.num_edits for unit in self._sharded.units)

    def _publish(self) -> None:
        for unit in self._sharded.units:
            if unit.index in self._claimed:
                self._publisher.publish(unit, cast=True)
        self._publisher.finish()

    # -- what ranks agree on ----------------------------------------------------------------------------------

    def _agree_on_used(self) -> set[tuple[int, int]] | None:
        """Nothing: the optimizer asks for what it needs to know."""
        return None

    def _scaled_norm(self) -> Tensor:
        norm = self._round().norm
        self._norm = (self._sharded.reducer.generation, torch.tensor(norm, dtype=torch.float64))
        return self._norm[1]

    def _round(self) -> Round:
        """The step under way, begun once for the gradients that there are."""
        reducer = self._sharded.reducer
        reducer.finish()
        if self._open is None or self._open[0] != reducer.generation:
            self._open = reducer.generation, self.inner.begin(self._local_gradients())
        return self._open[1]

    def _step_inner(self, factor: float) -> None:
        edits = sum(unit.num_edits for unit in self._sharded.units)
        edited = edits != self._num_edits
        if edited and isinstance(self.inner, ZeroOneAdam) and self.inner.steps_since_sync:
            raise CompressStateError(
                "something wrote parameters while each rank had its own (ZeroOneAdam between synchronizations), so "
                "that it is not known what all have in common; call optimizer.inner.synchronize() before it"
            )
        self._num_edits = edits
        if edited:
            self.inner.take_values()
        self.inner.finish(self._round(), factor)

    def _local_gradients(self) -> list[Tensor | None]:
        places = self.inner.places()
        grads: list[Tensor | None] = [None] * len(places)
        for lane in self._lanes:
            for slot in self.slots.get(lane.unit.index, []) if lane.shard.value is not None else []:
                if slot.place.index in lane.bucket.used:
                    assert lane.shard.value is not None
                    grads[places[id(slot.master)]] = lane.shard.value[slot.place.start : slot.place.stop]
        return grads
