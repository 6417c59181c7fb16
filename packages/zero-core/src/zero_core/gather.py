"""Stage 3: parameters are whole around their use, and only there.

In: module hooks (a unit's module is entered or left, its backward begins) and the reducer's word that a unit's
gradients are complete. Out: uses and releases; `turns` gathers what is used, in one order on all ranks. A unit may be
freed when nothing needs it: `_forwards` counts forwards under way, `_in_backward` holds those whose backward has begun
and is not over, `_pins` counts the `hold` blocks around it.

Note [After the last gradient]
A unit's values may be needed when all its gradients have come: what was computed from a detached weight needs them, and
gives none. The backward of a call is over when that of an earlier one begins, or with the pass. Gradients only tell
that no other call of the unit is to be waited for, such as one of a graph that nobody goes back through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .collectives import Wire
from .config import Overlap
from .flat_unit import FlatUnit
from .gather_plan import Kind
from .hooks import Reducer, tensors_needing_grad
from .params import ReleasedParameter, Residency
from .turns import Turns


@dataclass
class _Entry:
    """A forward under way: its number, and the units of others whose parameters it has touched."""

    module: nn.Module
    serial: int
    touched: list[FlatUnit] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    """One forward through a module at which units are gathered. Hooks in its graph hold it, and it ends with them.

    Attributes:
        serial, last: its number in the order of entries, and that of the last call inside it.
        begun, over: how far its backward has come in the pass under way.
    """

    units: list[FlatUnit]
    serial: int
    last: int
    begun: bool = False
    over: bool = False


class Gatherer:
    """Gathers units before use and releases them after.

    Args:
        model: the sharded model.
        units: all its units; those that stay whole are watched, not moved.
        wire: the collectives for parameters (not those of the gradients: the two need no common order).
        council: the wire over which ranks meet; its values travel from the CPU.
        overlap: the byte budget for gathers ahead of use.
        released: the class that parameters take while released.
        reducer: tells when a unit's gradients are complete, and when a backward pass ends.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[FlatUnit],
        wire: Wire,
        council: Wire,
        overlap: Overlap,
        released: type[ReleasedParameter],
        reducer: Reducer,
    ) -> None:
        self.units = units
        self.reducer = reducer
        self.turns = Turns(units, wire, council, overlap, released, self._release_if_idle)
        self._pins: Counter[int] = Counter()
        self._forwards: Counter[int] = Counter()
        self._in_backward: set[int] = set()
        self._complete: set[int] = set()
        self._hooked: dict[nn.Module, WeakTensorKeyDictionary] = {}
        self._calls: WeakSet[_Call] = WeakSet()
        self._num_calls = 0
        self._entries: list[_Entry] = []
        self._not_understood: list[_Call] = []
        self._model = model
        self._removers: list[RemovableHandle] = []
        by_anchor: dict[nn.Module, list[FlatUnit]] = {model: []}
        for unit in units:
            for anchor in unit.anchors:
                by_anchor.setdefault(anchor, []).append(unit)
        for anchor, anchored in by_anchor.items():
            enter, leave = partial(self._before_forward, anchored), partial(self._after_forward, anchored)
            self._removers += [
                anchor.register_forward_pre_hook(_eager(enter), prepend=True, with_kwargs=True),
                anchor.register_forward_hook(_eager(leave), with_kwargs=True, always_call=True),
            ]
        reducer.listeners.append(self._after_backward)
        reducer.assemble = self.assemble
        released.gather_for_forward = staticmethod(_eager(self._touch))

    # -- forward ----------------------------------------------------------------------------------------------

    def _before_forward(self, units: list[FlatUnit], module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._model and not _inside_backward():
            self._entries.clear()  # whatever interrupted an earlier forward
        if _inside_backward():
            self._begin_backward(units)
            self._release_complete()  # a reentrant checkpoint's graph is gone when the next one recomputes
        elif not self._entries:
            self._begin_forward(units)
        self._num_calls += 1
        self._entries.append(_Entry(module, self._num_calls))
        for unit in units:
            self.turns.use(unit)
            self._forwards[unit.index] += 1

    def _after_forward(
        self, units: list[FlatUnit], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        serial, touched = self._leave(module)
        units = [*units, *touched]
        call = _Call(units, serial, self._num_calls)
        needs_backward, understood = tensors_needing_grad(output)
        if torch.is_grad_enabled() and module is not self._model:
            needs_backward += self._kept_on(module)
        if torch.is_grad_enabled() and not understood:
            self._not_understood.append(
                call
            )  # no tensor to hook: hold its units, rather than fail in backward
            self._calls.add(call)
        for unit in units:
            self._forwards[unit.index] -= 1
            if needs_backward and _inside_backward():
                self._in_backward.add(unit.index)  # recomputed: its backward follows at once
        if needs_backward:
            self._calls.add(call)
            for tensor in needs_backward:
                tensor.register_hook(partial(self._before_backward, call))
        for unit in units:
            if not self.turns.is_used_next(unit):
                self._release_if_idle(unit)
            elif unit.stage == 3 and self._is_idle(unit):
                # Whole for its next call alone: whatever else touches it has to ask.
                unit.hide(self.turns.released)

    def _kept_on(self, module: nn.Module) -> list[torch.Tensor]:
        """New tensors with a graph that a module or its submodules keep as attributes, such as an auxiliary loss."""
        hooked = self._hooked.setdefault(module, WeakTensorKeyDictionary())
        values = (value for part in module.modules() for value in part.__dict__.values())
        kept = [value for value in values if isinstance(value, torch.Tensor) and value.grad_fn is not None]
        # One that was written in place since has another graph.
        new = [value for value in kept if hooked.get(value) != value._version]
        for value in new:
            hooked[value] = value._version
        return new

    def _leave(self, module: nn.Module) -> tuple[int, list[FlatUnit]]:
        """The serial of the call that ends, and the units that it touched.

        Hooks of others may have kept ours from seeing an entry or an exit.
        """
        depths = [depth for depth, entry in enumerate(self._entries) if entry.module is module]
        if not depths:
            return self._num_calls, []
        ended = self._entries[depths[-1] :]
        del self._entries[depths[-1] :]
        return ended[0].serial, [unit for entry in ended for unit in entry.touched]

    def _touch(self, param: nn.Parameter) -> bool:
        """A forward computes with a parameter of a unit that is not its module's: it is this call's from now on."""
        if not self._entries:
            return False
        unit = next(unit for unit in self.units if any(each is param for each in unit.params))
        self._entries[-1].touched.append(unit)
        self.turns.use(unit)
        self._forwards[unit.index] += 1
        return True

    def _begin_forward(self, units: list[FlatUnit]) -> None:
        """An outermost forward starts: whatever an exception or a dropped graph left behind is cleaned up."""
        self.reducer.abandon()
        self._forwards.clear()
        self._in_backward.clear()
        for unit in self.units:
            self._release_if_idle(unit)
        self._meet(Kind.FORWARD if torch.is_grad_enabled() else Kind.EVALUATION, units)

    # -- backward ---------------------------------------------------------------------------------------------

    def _begin_backward(self, units: list[FlatUnit]) -> None:
        """The first use of a backward pass."""
        if self.turns.kind in (Kind.LOCAL_BACKWARD, Kind.BACKWARD):
            return
        self._meet(Kind.BACKWARD if self.reducer.sync else Kind.LOCAL_BACKWARD, units)
        coming = {unit.index for call in self._calls for unit in call.units}
        for unit in self.units:
            if unit.index not in coming:
                self.reducer.close(unit)

    def _before_backward(self, call: _Call, grad: torch.Tensor) -> None:
        self.reducer.open_pass()
        if call.units:
            self._begin_backward(call.units)
        call.begun = True
        self._end_later_calls(call.last)
        for unit in call.units:
            if unit.index not in self._in_backward:
                self.turns.use(unit)
                self._in_backward.add(unit.index)

    def _end_later_calls(self, last: int) -> None:
        """Autograd runs what was computed last first: the backward of calls entered after this one's end is over."""
        over = [call for call in self._calls if call.begun and not call.over and call.serial > last]
        for call in over:
            call.over = True
        left = {unit.index for call in self._calls if not call.over for unit in call.units}
        for unit in {unit.index: unit for call in over for unit in call.units}.values():
            if unit.index not in left:
                self.reducer.close(unit)
                self._in_backward.discard(unit.index)
                self._release_if_idle(unit)
        self._release_complete()

    def _release_complete(self) -> None:
        """Free units that have all their gradients and are in no backward; see Note [After the last gradient]."""
        begun = {unit.index for call in self._calls if call.begun and not call.over for unit in call.units}
        for index in (self._in_backward & self._complete) - begun:
            self._in_backward.discard(index)
            self._release_if_idle(self.units[index])

    def _after_backward(self, unit: FlatUnit | None) -> None:
        if unit is not None:
            self._complete.add(unit.index)
            return
        self.turns.kind = Kind.REST
        self._in_backward.clear()
        self._complete.clear()
        self._not_understood.clear()
        for call in self._calls:  # those whose graph is retained may come again
            call.begun = call.over = False
        for each in self.units:
            self._release_if_idle(each)

    def _is_idle(self, unit: FlatUnit) -> bool:
        index = unit.index
        busy = self._pins[index] > 0 or self._forwards[index] > 0 or index in self._in_backward
        return not busy and not any(unit in call.units for call in self._not_understood)

    def _release_if_idle(self, unit: FlatUnit) -> None:
        # What is on its way was sent for by the plan, which will use it or pass it over.
        if unit.stage == 3 and unit.residency is Residency.GATHERED and self._is_idle(unit):
            self.turns.free(unit)

    # -- for others -------------------------------------------------------------------------------------------

    def _meet(self, kind: Kind, units: list[FlatUnit]) -> None:
        # While units are held another order is right than otherwise, and no first unit sets it apart.
        self.turns.meet(kind, units[0] if units and not self._pins.total() else None)

    def assemble(self) -> None:
        """Return when every rank has come to a call that all of them make, and none needs this one's shards before."""
        self.turns.meet(Kind.REST)

    @contextmanager
    def hold(self, units: list[FlatUnit]) -> Iterator[None]:
        """Have these units whole inside the block, with exact values; every rank must enter it."""
        if not self._pins.total():
            self.assemble()
        for unit in units:
            if unit.approximate and not self._pins[unit.index]:
                self._give_up(unit)  # whatever it was gathered for, these were not the shards' values
            self._pins[unit.index] += 1
        try:
            for unit in units:
                self.turns.launch(unit, exact=unit.approximate)
            for unit in units:
                self.turns.arrive(unit)
            yield
        finally:
            for unit in units:
                self._pins[unit.index] -= 1
                self._release_if_idle(unit)

    def refresh(self, unit: FlatUnit) -> None:
        """The shard has new values: free what was gathered of the old ones, or gather again what is held."""
        if unit.stage < 3:
            return
        unit.version += 1
        self._give_up(unit)
        if self._pins[unit.index] > 0:
            self.turns.launch(unit, exact=unit.approximate)
            self.turns.arrive(unit)

    def _give_up(self, unit: FlatUnit) -> None:
        """Let a unit rest as shards, whoever uses it."""
        if unit.stage == 3 and unit.residency is not Residency.SHARDED:
            self.turns.arrive(unit)
            self.turns.free(unit)

    def close(self) -> None:
        """Remove the hooks."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep `torch.compile` from tracing into a hook: it changes storages and talks to other ranks."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook, recursive=True)
    return disabled


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
