"""The step of an optimizer whose states rest in a store: block by block through a window of host memory.

In: zero-core's `UnitStep`s. Out: the same units, each when its master is final. The arithmetic is that of the kernels
which step on the device, element by element the same; only where the numbers rest between steps differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from zero_core import ShardSlot, UnitStep
from zero_core.flat_unit import FlatUnit
from zero_core.hooks import Lane
from zero_core.steppers import (
    RULES,
    FusedRule,
    FusedStepper,
    asked_for,
    check_options,
    has_kernel,
    merge,
    rule_of,
)

from .blocks import block_elements, cut_blocks
from .errors import OffloadConfigError
from .nvme_store import NvmeStore
from .window import InStore, OnDevice, Operand, Window


@dataclass(frozen=True)
class FlatStep:
    """One pass over the flat tensors of one unit.

    Attributes:
        operands: master, gradient, states, and (where there is one) the low-precision shard.
        segments: runs of elements that move.
        scale: of gradients.
    """

    numel: int
    operands: list[Operand]
    segments: list[Any]
    scale: float
    has_low: bool

    @property
    def goes_elsewhere(self) -> bool:
        """Whether results go to other places than operands come from; what does not move goes there too."""
        return any(operand.to is not None for operand in self.operands)


def _always() -> bool:
    return True


def run(
    rule: FusedRule,
    window: Window,
    steps: Sequence[FlatStep],
    is_wanted: Callable[[], bool] = _always,
    meanwhile: Callable[[], bool] | None = None,
    *,
    leave_writes: bool = False,
) -> Iterator[int]:
    """Step units block by block; yields the position of each that moved, when it is final and given to its store.

    Ends between two blocks when it is no longer wanted. `meanwhile`, `leave_writes`: see `Window.through`.
    """
    final = None
    runs = [(each.numel, merge(each.segments) if each.segments else []) for each in steps]
    whole = {position for position, each in enumerate(steps) if each.goes_elsewhere}
    blocks = cut_blocks(runs, window.block_elements, whole=whole)
    through = window.through(blocks, [each.operands for each in steps], meanwhile, leave_writes=leave_writes)
    for block, tensors in through:
        if not is_wanted():
            return
        step = steps[block.unit]
        if final is not None:
            yield final
        master, grad, *rest = tensors
        low = rest.pop() if step.has_low else None
        if block.segments:
            rule.run(master, grad, rest, block.segments, step.scale, low)
        final = block.unit if block.last else None
    if final is not None:
        yield final


class StoreStepper:
    """A `zero_core.ShardOptimizer` over stores.

    Args:
        inner: torch's AdamW, Adam, Adagrad or SGD, or one of this package's, with options that the fused kernels know.
        window_bytes: of host memory for blocks being read, stepped and written; states in host memory are stepped where
            they lie.

    Raises:
        OffloadConfigError: another optimizer, or other options.
    """

    casts = True

    def __init__(self, inner: Optimizer, *, window_bytes: int = 192 << 20) -> None:
        rule = rule_of(inner)
        if rule is None or not has_kernel(inner):
            known = ", ".join([*(each.__name__ for each in RULES), "CPULion"])
            raise OffloadConfigError(
                f"{type(inner).__name__}: expected one of {known}, without amsgrad, maximize, differentiable, "
                "capturable and step hooks of its own: no kernel steps anything else block by block"
            )
        self.inner = inner
        self.window_bytes = window_bytes
        self.rule = rule
        self._options = asked_for(inner)
        self._resident = FusedStepper(inner)
        self._fresh: set[str] = set()  # zero, and not yet handed out
        self._window: Window | None = None

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`.

        Raises:
            OSError: a store cannot read or write; names file, offset and bytes. Parameters and states that the step had
                come to are updated, the others are not: go on from a checkpoint.
        """
        self.check()
        stored = [item for item in work if is_stored(item.unit)]
        factor = float(scale)
        for item in stored:
            self.reserve(item.unit)  # a full drive is met before a step is counted
        steps = []
        for item in stored:
            segments = [self.rule.advance(self.inner, slot) for slot in item.slots]
            operands = self.operands(item.unit, item.slots, self.grad(item.unit, item.grad))
            steps.append(
                FlatStep(item.grad.numel(), operands, segments, factor, item.unit.has_separate_master)
            )
        left, near = deque(work), deque(item for item in work if not is_stored(item.unit))

        def step_near() -> bool:
            """Step the next unit that is in no store, be it ahead of its turn; False: no other is left."""
            if near:
                deque(self._resident.step([near.popleft()], scale), maxlen=0)
            return bool(near)

        def up_to(last: UnitStep | None) -> Iterator[UnitStep]:
            """Units in the order of all ranks."""
            while left:
                item = left.popleft()
                if near and item is near[0]:
                    step_near()
                yield item
                if item is last:
                    return

        if stored:
            window = self.window_for(stored[0].unit)
            for position in run(self.rule, window, steps, meanwhile=step_near):
                yield from up_to(stored[position])
        yield from up_to(None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the states."""
        return self.rule.states(self.inner.param_groups[0])

    def check(self) -> None:
        """Before a step: the groups ask for what they asked for before."""
        check_options(self.inner, self._options)
        self.inner._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of a missing step

    def window_for(self, unit: FlatUnit) -> Window:
        """The one window, made for the most operands that a unit may have."""
        if self._window is None:
            most = 3 + len(self.names)
            elements = block_elements(self.window_bytes, most)
            store = unit.stores.optimizer
            engine = store.engine if isinstance(store, NvmeStore) else None
            self._window = Window(elements, pin=unit.device.type != "cpu", engine=engine)
        return self._window

    def hand_over_window(self, unit: FlatUnit) -> Window:
        """The window, for a thread; steps that need one here have another from now on."""
        window, self._window = self.window_for(unit), None
        return window

    def operands(self, unit: FlatUnit, slots: Sequence[ShardSlot], grad: Operand) -> list[Operand]:
        """Master, gradient, states and (where there is one) the low-precision shard."""
        found = [self.master(unit), grad, *self.states(unit, slots)]
        if unit.has_separate_master:
            assert unit.shard is not None
            if unit.resting is not None:
                found.append(in_store(unit.resting.store, unit.resting.name, unit.shard, read=False))
            else:
                found.append(Operand(_near(unit.shard), unit.shard.dtype, read=False))
        return found

    def master(self, unit: FlatUnit) -> Operand:
        """What a step of the unit updates."""
        assert unit.master is not None
        if unit.has_separate_master and unit.stores.optimizer is not None:
            return in_store(unit.stores.optimizer, unit.key("master"), unit.master)
        if unit.resting is not None and not unit.has_separate_master:
            return in_store(unit.resting.store, unit.resting.name, unit.master)
        return Operand(_near(unit.master), unit.master.dtype)

    def states(self, unit: FlatUnit, slots: Sequence[ShardSlot]) -> list[Operand]:
        """The states of a unit where they rest."""
        if unit.stores.optimizer is None:
            return [Operand(_near(state), state.dtype) for state in self._resident.flat_state(unit, slots)]
        placed = self.placed(unit, slots)
        return [in_store(unit.stores.optimizer, unit.key(name), state) for name, state in placed]

    def grad(self, unit: FlatUnit, grad: torch.Tensor) -> Operand:
        """The gradient of a unit where it rests."""
        grads = unit.stores.grads
        if grads is not None:
            return in_store(grads, unit.key("grad"), grad, written=False)
        return Operand(_near(grad), grad.dtype, written=False)

    def reduced_grad(self, lane: Lane) -> Operand:
        """The same, of a gradient that may be on its way to where it rests; nobody waits for that."""
        unit = lane.unit
        grads: Any = unit.stores.grads
        if grads is not None:
            at = grads.at(unit.key("grad")) if grads.in_memory else InStore(grads, unit.key("grad"))
            return Operand(at, lane.shard.dtype, written=False)
        assert lane.shard.value is not None
        return self.grad(unit, lane.shard.value)

    def placed(self, unit: FlatUnit, slots: Sequence[ShardSlot]) -> list[tuple[str, torch.Tensor]]:
        """The unit's states in the store: name and view; what lies elsewhere in `inner.state` is moved in."""
        found = self.kept(unit)
        for name, flat in found:
            key = unit.key(name)
            for slot in slots:
                self._move_in(slot, name, flat, fresh=key in self._fresh)
            self._fresh.discard(key)
        return found

    def kept(self, unit: FlatUnit) -> list[tuple[str, torch.Tensor]]:
        """The unit's states in the store as they are: name and view."""
        self.reserve(unit)
        return [(name, unit.stored_states[name]) for name in self.names]

    def reserve(self, unit: FlatUnit) -> None:
        """Have room in the store for the unit's states."""
        store: Any = unit.stores.optimizer
        assert unit.master is not None
        for name in self.names if store is not None else ():
            if name not in unit.stored_states:
                key = unit.key(name)
                unit.stored_states[name] = reserve_view(store, key, unit.master.numel(), torch.float32)
                self._fresh.add(key)

    def is_placed(self, unit: FlatUnit) -> bool:
        """Whether the unit's states are in the store, and each has been handed out."""
        return all(name in unit.stored_states and unit.key(name) not in self._fresh for name in self.names)

    def room_for(self, unit: FlatUnit, slot: ShardSlot, key: str) -> torch.Tensor | None:
        """Where a state of one slot rests in the store; None: the unit's states rest in none, or this is no state."""
        if unit.stores.optimizer is None or key not in self.names:
            return None
        for name, flat in self.placed(unit, [slot]):
            if name == key:
                return flat[slot.place.start : slot.place.stop]
        raise AssertionError(key)

    def adopt(self, unit: FlatUnit, slots: Sequence[ShardSlot], name: str, flat: torch.Tensor) -> None:
        """Have a state of these slots lie in `flat` from now on, which the store keeps under the state's name."""
        unit.stored_states[name] = flat
        for slot in slots:
            state = self.inner.state.get(slot.master, {})
            if name in state:
                state[name] = flat[slot.place.start : slot.place.stop]

    def _move_in(self, slot: ShardSlot, name: str, flat: torch.Tensor, *, fresh: bool) -> None:
        state = self.inner.state[slot.master]
        view, held = flat[slot.place.start : slot.place.stop], state.get(name)
        if held is not None and held.data_ptr() == view.data_ptr():
            return
        initial = self.rule.initial(slot.group)
        if held is None and not state:
            # Begun here: an optimizer that counts no steps would be taken to have made one.
            state["step"] = torch.tensor(0.0)
        if held is not None:
            view.copy_(held)
        elif initial or not fresh:  # a fresh one is zero, and need not be touched
            view.fill_(initial)
        state[name] = view


def reserve_view(store: Any, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Have room in a store under a name, all zeros; a view of it. Where that fails nothing is kept."""
    store.reserve(name, numel, dtype)
    try:
        return store.view(name)  # type: ignore[no-any-return]
    except BaseException:
        store.release(name)
        raise


def is_stored(unit: FlatUnit) -> bool:
    """Whether something that a step of the unit updates rests in a store."""
    return unit.stores.optimizer is not None or unit.resting is not None


def _near(tensor: torch.Tensor) -> torch.Tensor | OnDevice:
    return tensor if tensor.is_cpu else OnDevice(tensor)


def in_store(
    store: Any, name: str, view: torch.Tensor, *, read: bool = True, written: bool = True
) -> Operand:
    """An operand in a store: in place where that is memory, which a device may still be copying from or to."""
    at = store.view(name) if store.in_memory else InStore(store, name)
    return Operand(at, view.dtype, read, written)
