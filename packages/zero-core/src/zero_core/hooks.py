"""A gradient is ready: the hooks that autograd calls, and one backward pass from its first gradient to its end.

In: autograd's post-accumulate hooks. Out: reduced gradients in every unit's `GradShard`. Follow `_arrive` ->
`buckets.GradBucket.land` -> `_launch` -> `collectives.Wire.reduce` -> `_finish` -> `accumulate.GradShard.accept`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from .accumulate import GradShard, StoredGradShard
from .buckets import BufferPool, GradBucket, ReduceOrder
from .collectives import Pending, Wire
from .config import Overlap, Precision
from .errors import CollectiveError, ZeroStateError
from .flat_unit import FlatUnit
from .rows import RowBucket, reduce_rows


@dataclass(frozen=True)
class _InFlight:
    lane: Lane
    pending: Pending
    full: torch.Tensor
    out: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.full.numel() * self.full.element_size()


@dataclass(frozen=True)
class Lane:
    """One trainable unit's way: the bucket where gradients land, the shard where their mean is kept."""

    unit: FlatUnit
    bucket: GradBucket
    shard: GradShard

    @property
    def shows_grad(self) -> bool:
        """Whether `param.grad` is the averaged gradient, as under DDP: stage 0 keeps it whole."""
        return self.unit.stage == 0 and self.shard.in_place and self.bucket.dtype == self.unit.dtype


class Entrance:
    """What happens where the model is entered: input dtypes, autocast, clean-up after an interrupted backward."""

    def __init__(self, units: list[FlatUnit], precision: Precision, reducer: Reducer) -> None:
        self.units = units
        self.has_resident = any(unit.stage < 3 for unit in units)
        self.precision = precision
        self.reducer = reducer
        self._autocasts: list[torch.autocast] = []

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Install the hooks; returns what removes them."""
        enter, leave = torch.compiler.disable(self._enter), torch.compiler.disable(self._leave)
        return [
            model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if torch._C._current_graph_task_id() == -1:
            self.reducer.abandon()
            self._check_parameters()
            while self._autocasts:  # left by a forward that was interrupted
                self._autocasts.pop().__exit__(None, None, None)
        compute = self.precision.compute
        if compute is None:
            return None
        if self.precision.autocast:
            # A backward needs the cast copies anyway; without one, a cache of them would be a second model.
            cached = torch.is_grad_enabled()
            context = torch.autocast(self.reducer.wire.device.type, dtype=compute, cache_enabled=cached)
            context.__enter__()
            self._autocasts.append(context)
            return None

        def cast(leaf: Any) -> Any:
            wrong = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != compute
            return leaf.to(compute) if wrong else leaf

        return tree_map(cast, args), tree_map(cast, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._autocasts:
            self._autocasts.pop().__exit__(None, None, None)
        if self.has_resident and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            for tensor in tensors_needing_grad(output)[0]:
                tensor.register_hook(self.reducer.meet_backward)

    def _check_parameters(self) -> None:
        for unit in self.units:
            unit.check_attached()
        self.reducer.adopt_unfrozen()


def _call_if_alive(method: WeakMethod[Callable[..., None]], *args: Any) -> None:
    """A parameter's hook must not hold its owner: Python cannot collect a cycle through a parameter's hooks."""
    alive = method()
    if alive is not None:
        alive(*args)


class Reducer:
    """Takes gradients as autograd makes them and reduces each unit as soon as it is complete.

    Every backward pass that is not under `no_sync` reduces every trainable unit once, in one order on all ranks;
    what no gradient reached counts as zero.

    Attributes:
        wire: the collectives for gradients.
        everyone: the wire of all ranks: those with whom shards are shared, and replicas.
        lanes: one for each trainable unit.
        sync: False under `no_sync`: gradients stay local.
        generation: changes whenever a gradient does.
        limit_bytes: of full buffers that may be under way at once.
        assemble: called before a wait for all ranks, some of which may have gathers to come (stage 3).
        council: stage 3: where all ranks tell each other of gradients that came after their unit's reduction.
        listeners: called with a unit when each of its parameters has its gradient, and with None at the end of a pass.
    """

    def __init__(
        self, units: list[FlatUnit], wire: Wire, everyone: Wire, precision: Precision, overlap: Overlap
    ) -> None:
        self.wire = wire
        self.everyone = everyone
        self.overlap = overlap
        self.sync = True
        self.listeners: list[Callable[[FlatUnit | None], None]] = []
        self._watchers: list[WeakMethod[Callable[[Lane], None]]] = []
        self.assemble: Callable[[], None] = lambda: None
        self.council: Wire | None = None
        self.pool = BufferPool()
        self.lanes: list[Lane] = []
        self.limit_bytes = overlap.reduce_bytes or 0
        self._precision = precision
        self._order = ReduceOrder()
        self._order_agreed = False
        self._in_flight: deque[_InFlight] = deque()
        self._pass_open = False
        self._closing: Callable[[], partial[None] | None] = lambda: None
        self._unsynced = False
        self._position: dict[int, int] = {}
        self._launched: set[int] = set()
        self._late: set[int] = set()
        self.generation = 0
        self._removers: list[RemovableHandle] = []
        self._asleep = {unit: set(range(len(unit.params))) for unit in units}
        self.adopt_unfrozen()

    def adopt_unfrozen(self) -> None:
        """Take in the gradients of parameters that need them, and did not before."""
        for unit, asleep in list(self._asleep.items()):
            awake = {index for index in asleep if unit.params[index].requires_grad}
            if awake and unit.index not in self._position:
                self._adopt(unit)
            for index in awake:
                hook = partial(_call_if_alive, WeakMethod(self._arrive), self._position[unit.index], index)
                self._removers.append(unit.params[index].register_post_accumulate_grad_hook(hook))
            self._asleep[unit] = asleep - awake
            if not self._asleep[unit]:
                del self._asleep[unit]

    def _adopt(self, unit: FlatUnit) -> None:
        unit.trainable = True
        position, param = len(self.lanes), unit.dtype
        reduce, accumulate = self._precision.reduce_dtype(param), self._precision.accumulate_dtype(param)
        bucket = (RowBucket if unit.sparse else GradBucket)(unit, reduce, self.pool)
        in_place = unit.stage <= 1 and reduce == accumulate and not unit.sparse
        shard = GradShard(unit, accumulate, in_place=in_place, pool=self.pool)
        if unit.stores.grads is not None:
            shard = StoredGradShard(unit, accumulate, unit.stores.grads, self.pool)
        self.lanes.append(Lane(unit, bucket, shard))
        self._position[unit.index] = position
        self._order.add(position)
        self._order_agreed = False
        if self.overlap.reduce_bytes is None:
            self.limit_bytes = max(self.limit_bytes, unit.layout.numel * reduce.itemsize)

    def watch(self, method: Callable[[Lane], None]) -> None:
        """Have `method` called with each lane whose gradient has been reduced, for as long as its object lives."""
        self._watchers.append(WeakMethod(method))

    def _tell_reduced(self, lane: Lane) -> None:
        self._watchers = [watcher for watcher in self._watchers if watcher() is not None]
        for watcher in self._watchers:
            _call_if_alive(watcher, lane)

    # -- one backward pass ------------------------------------------------------------------------------------

    def meet_backward(self, *_: Any) -> None:
        """A backward call runs: at its end, the pass that its gradients have opened is over.

        The model's outputs see it first. A reentrant checkpoint makes backward calls of its own inside it, whose ends
        are not the pass's.
        """
        if self._closing() is None:
            closing = partial(self._close_pass)
            self._closing = ref(closing)  # autograd drops it with its call, also when that raised
            Variable._execution_engine.queue_callback(closing)

    def open_pass(self) -> None:
        """The pass's first gradient comes, or is about to (any hook may be the first to see it)."""
        if self._pass_open and self._closing() is None:
            self.abandon()  # the backward call that opened it has raised
        self.meet_backward()
        if not self._pass_open:
            self._pass_open = True
            self._order.restart()
            for lane in self.lanes:
                lane.bucket.num_expected = sum(param.requires_grad for param in lane.unit.params)
                if not lane.bucket.num_expected:  # frozen again: it must not hold back those after it
                    self.close(lane.unit)

    @torch.no_grad()
    def close(self, unit: FlatUnit) -> None:
        """No more gradients of `unit` are to be expected in this pass: reduce it when it is its turn.

        A parameter that got none would hold the unit back until the pass ends, and with it every later one. Where one
        comes after all, it is reduced at the end.
        """
        position = self._position.get(unit.index)
        if position is not None and self.sync:
            self._ready(position, complete=False)

    def _ready(self, position: int, *, complete: bool) -> None:
        for ready in self._order.ready(position, complete=complete):
            if not self.lanes[ready].unit.sparse:
                self._launched.add(ready)
                self._launch(self.lanes[ready])

    @torch.no_grad()
    def _arrive(self, position: int, index: int, param: nn.Parameter) -> None:
        self.open_pass()
        lane = self.lanes[position]
        if position in self._launched and self.council is None:
            raise ZeroStateError(
                f"{lane.unit.label}: a gradient came after the reduction of the unit had started, as when a module is "
                "called twice under torch.utils.checkpoint(use_reentrant=True); use use_reentrant=False"
            )
        grad = param.grad
        assert grad is not None
        grad = grad.detach()  # with create_graph it has a graph of its own, which no reduction carries on
        self.generation += 1
        if position in self._launched:
            self._late.add(position)
        lane.bucket.land(index, grad, overwrite=lane.shows_grad)
        param.grad = lane.bucket.views[index] if lane.shows_grad else None
        if lane.bucket.complete:
            if self.sync and position not in self._launched:
                self._ready(position, complete=True)
            if len(lane.bucket.this_pass) == len(
                lane.unit.params
            ):  # others' gradients may need what is frozen
                self._tell(lane.unit)

    @torch.no_grad()
    def _close_pass(self) -> None:
        self._closing = lambda: None
        if not self._pass_open:  # a backward call to other leaves than our parameters
            return
        if self.sync:
            self.assemble()
            for position in self._order.rest():
                self._launch(self.lanes[position])
            self._finish_all()
            self._reduce_late()
            self._reduce_rows()
            self._agree_on_order()
        self._unsynced = not self.sync
        self._end_pass()

    def _reduce_late(self) -> None:
        """Stage 3: reduce once more what got gradients on some rank after its reduction."""
        if self.council is None:
            return
        mine = [int(position in self._late) for position in range(len(self.lanes))]
        heard = self.council.consult("late gradients", mine)
        for lane, late in zip(self.lanes, zip(*heard, strict=True), strict=True):
            if any(late):
                self._launch(lane)
        self._finish_all()

    def _reduce_rows(self) -> None:
        """Reduce sparse gradients, whose sizes the ranks have to tell each other first."""
        for lane in self.lanes:
            if isinstance(lane.bucket, RowBucket):
                reduced = lane.shard.landing()
                reduce_rows(lane.bucket, reduced, self.everyone)
                lane.shard.accept(reduced)
                self.generation += 1
                self._tell_reduced(lane)

    def _end_pass(self) -> None:
        self._pass_open = False
        self._launched.clear()
        self._late.clear()
        for lane in self.lanes:
            lane.bucket.this_pass.clear()
        self.pool.clear()
        self.wire.collectives.trim()
        self._tell(None)

    def _tell(self, unit: FlatUnit | None) -> None:
        for listener in self.listeners:
            listener(unit)

    def abandon(self) -> None:
        """End a pass that an exception cut off; called where no backward can be under way."""
        if self._pass_open:
            with suppress(CollectiveError):
                self._finish_all()
            self._unsynced = True
            self._end_pass()

    @property
    def in_flight_bytes(self) -> int:
        """Of full gradients that are being reduced."""
        return sum(flight.nbytes for flight in self._in_flight)

    # -- reductions -------------------------------------------------------------------------------------------

    def _launch(self, lane: Lane) -> None:
        if lane.unit.sparse:  # its rows travel when the pass is over
            return
        unit, full = lane.unit, lane.bucket.seal()
        out = lane.shard.landing() if unit.stage >= 2 else full[slice(*unit.slice)]
        nbytes = full.numel() * full.element_size()
        self._finish_down_to(self.limit_bytes - nbytes)
        flight = _InFlight(lane, self.wire.reduce(unit.label, full, out), full, out)
        self._in_flight.append(flight)
        if not self.overlap.enabled:
            self._finish_down_to(0)

    def _finish_down_to(self, limit_bytes: int) -> None:
        """Keep what is under way within a limit; at stage 3 a rank that is ahead goes on: others need its shards."""
        while self._in_flight and self.in_flight_bytes > limit_bytes:
            if self.council is not None and not self._in_flight[0].pending.is_done():
                break
            self._finish(self._in_flight.popleft())

    def _finish_all(self) -> None:
        while self._in_flight:
            self._finish(self._in_flight.popleft())

    def _finish(self, flight: _InFlight) -> None:
        lane, unit, reduced = flight.lane, flight.lane.unit, flight.out
        flight.pending.wait()
        if unit.stage == 0:
            full = lane.bucket.flat
            assert full is not None
            self.wire.gather(unit.label, reduced, full).wait()
            reduced = full
        lane.bucket.add_carried(reduced)
        lane.shard.accept(reduced)
        self.generation += 1
        lane.bucket.retire(flight.full, keep=lane.shard.in_place)
        if lane.shows_grad:
            for param, view in zip(unit.params, lane.bucket.views, strict=True):
                param.grad = view
        self._tell_reduced(lane)

    def _agree_on_order(self) -> None:
        """After the first pass: reduce from now on in the order in which the first rank's units completed."""
        if not self._order_agreed and self.lanes:
            seen = [
                int(i)
                for i in self.everyone.broadcast_text("order", " ".join(map(str, self._order.seen))).split()
            ]
            self._order.rebuild(seen)
            self._order_agreed = True

    # -- between passes ---------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Reduce what `no_sync` left local, so that every `GradShard` is final; collective."""
        self.abandon()
        self.assemble()
        if self._unsynced:
            for lane in reversed(self.lanes):
                self._launch(lane)
            self._finish_all()
            self._reduce_rows()
            self.pool.clear()
            self.wire.collectives.trim()
            self._unsynced = False

    def zero_grad(self, owned: Mapping[int, set[int]] | None = None, *, free: bool = True) -> None:
        """Forget gradients: all, or those of some slots (several optimizers may share a model).

        Args:
            owned: unit index -> slots.
            free: give the memory of units that have none left back, until the next backward.
        """
        self.abandon()
        for lane in self.lanes:
            slots = set(range(len(lane.unit.params))) if owned is None else owned.get(lane.unit.index, set())
            if len(slots) == len(lane.unit.params):
                lane.bucket.zero(free=free)
                lane.shard.zero(free=free)
            else:
                lane.bucket.zero_slots(slots)
                lane.shard.zero_slots(slots)
            for index in slots:
                lane.unit.params[index].grad = None
        self.generation += 1
        self.pool.clear()
        if owned is None or all(len(owned.get(e.unit.index, ())) == len(e.unit.params) for e in self.lanes):
            self._unsynced = False

    def unhook(self) -> None:
        """Remove the hooks."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()


def tensors_needing_grad(output: Any) -> tuple[list[torch.Tensor], bool]:
    """The tensors in a module's output through which a backward can come, and whether we saw all of it."""
    found, understood, seen = [], True, set()
    pending = tree_leaves(output)
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, torch.Tensor):
            if leaf.requires_grad and leaf.grad_fn is not None:
                found.append(leaf)
        elif isinstance(leaf, (tuple, list, set, frozenset)):
            pending += tree_leaves(list(leaf))  # such as a torch.Size
        elif not isinstance(leaf, _PLAIN) and not _is_array_of_numbers(leaf):
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            if is_dataclass(leaf) and not isinstance(leaf, type):
                pending += tree_leaves([getattr(leaf, field.name) for field in fields(leaf)])
            elif hasattr(leaf, "__dict__"):
                pending += tree_leaves(list(vars(leaf).values()))
            else:
                understood = False
    return found, understood


_PLAIN = (
    *(int, float, str, bool, bytes, complex, range, slice, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _is_array_of_numbers(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__module__ == "numpy" and dtype is not None and not dtype.hasobject
