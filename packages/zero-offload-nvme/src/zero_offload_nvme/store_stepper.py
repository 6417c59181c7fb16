"""The step of an optimizer whose states rest in a store: block by block through a window of host memory.

In: zero-core's `UnitStep`s. Out: the same units, each when its master is final. The arithmetic is that of the kernels
which step on the device, element by element the same; only where the numbers rest between steps differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer
from zero_core import ShardSlot, UnitStep
from zero_core.steppers import RULES, FusedStepper, asked_for, check_options, has_kernel, merge

from .blocks import block_elements, cut_blocks
from .errors import OffloadConfigError
from .window import InStore, OnDevice, Operand, Window


class StoreStepper:
    """A `zero_core.ShardOptimizer` over stores.

    Args:
        inner: torch's AdamW, Adam, Adagrad or SGD, with options that the fused kernels know.
        window_bytes: of host memory for blocks being read, stepped and written; states in host memory are stepped where
            they lie.

    Raises:
        OffloadConfigError: another optimizer, or other options.
    """

    casts = True

    def __init__(self, inner: Optimizer, *, window_bytes: int = 192 << 20) -> None:
        if not has_kernel(inner):
            known = ", ".join(each.__name__ for each in RULES)
            raise OffloadConfigError(
                f"{type(inner).__name__}: expected one of {known}, without amsgrad, maximize, differentiable, "
                "capturable and step hooks of its own: no kernel steps anything else block by block"
            )
        self.inner = inner
        self.window_bytes = window_bytes
        self._rule = RULES[type(inner)]
        self._options = asked_for(inner)
        self._resident = FusedStepper(inner)
        self._states: dict[str, torch.Tensor] = {}
        self._fresh: set[str] = set()  # zero, and not yet handed out
        self._window: Window | None = None

    def step(self, work: Sequence[UnitStep], scale: torch.Tensor | float) -> Iterator[UnitStep]:
        """See `zero_core.ShardOptimizer.step`.

        Raises:
            OSError: a store cannot read or write; names file, offset and bytes. Parameters and states that the step had
                come to are updated, the others are not: go on from a checkpoint.
        """
        check_options(self.inner, self._options)
        self.inner._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of a missing step
        stored = [item for item in work if _is_stored(item)]
        factor = float(scale)
        for item in stored:
            self._reserve(item)  # a full drive is met before a step is counted
        segments = [[self._rule.advance(self.inner, slot) for slot in item.slots] for item in stored]
        operands = [self._operands(item) for item in stored]
        runs = [
            (item.grad.numel(), merge(each) if each else [])
            for item, each in zip(stored, segments, strict=True)
        ]
        left = deque(work)
        if stored:
            window = self._made_window(max(map(len, operands)), stored[0].unit.device)
            for block, tensors in window.through(cut_blocks(runs, window.block_elements), operands):
                master, grad, *rest = tensors
                low = rest.pop() if stored[block.unit].unit.has_separate_master else None
                self._rule.run(master, grad, rest, block.segments, factor, low)
                if block.last:
                    yield from self._up_to(stored[block.unit], left, scale)
        yield from self._up_to(None, left, scale)

    def _up_to(
        self, last: UnitStep | None, left: deque[UnitStep], scale: torch.Tensor | float
    ) -> Iterator[UnitStep]:
        """Units in the order of all ranks: those before `last` that are not in the store are stepped here."""
        while left:
            item = left.popleft()
            if not _is_stored(item):
                yield from self._resident.step([item], scale)
            else:
                yield item
            if item is last:
                return

    def _made_window(self, num_operands: int, device: torch.device) -> Window:
        if self._window is None:
            elements = block_elements(self.window_bytes, num_operands)
            self._window = Window(elements, pin=device.type != "cpu")
        return self._window

    def _operands(self, item: UnitStep) -> list[Operand]:
        """Master, gradient, states and (where there is one) the low-precision shard."""
        unit = item.unit
        store = unit.stores.optimizer
        assert unit.master is not None
        if unit.has_separate_master and store is not None:
            master = _in(store, unit.key("master"), unit.master)
        elif unit.resting is not None and not unit.has_separate_master:
            master = _in(unit.resting.store, unit.resting.name, unit.master)
        else:
            master = Operand(_near(unit.master), unit.master.dtype)
        grads = unit.stores.grads
        if grads is not None:
            grad = _in(grads, unit.key("grad"), item.grad, written=False)
        else:
            grad = Operand(_near(item.grad), item.grad.dtype, written=False)
        if store is None:
            states = [Operand(_near(state), state.dtype) for state in self._resident.flat_state(item)]
        else:
            states = [_in(store, unit.key(name), state) for name, state in self._placed(item)]
        found = [master, grad, *states]
        if unit.has_separate_master:
            if unit.resting is not None:
                assert unit.shard is not None
                found.append(_in(unit.resting.store, unit.resting.name, unit.shard, read=False))
            else:
                assert unit.shard is not None
                found.append(Operand(_near(unit.shard), unit.shard.dtype, read=False))
        return found

    def _placed(self, item: UnitStep) -> list[tuple[str, torch.Tensor]]:
        """The unit's states in the store: name and view; what lies elsewhere in `inner.state` is moved in."""
        found = []
        for name in self._rule.states(self.inner.param_groups[0]):
            key = item.unit.key(name)
            for slot in item.slots:
                self._move_in(slot, name, self._states[key], fresh=key in self._fresh)
            self._fresh.discard(key)
            found.append((name, self._states[key]))
        return found

    def _reserve(self, item: UnitStep) -> None:
        """Have room in the store for the unit's states."""
        unit, store = item.unit, cast(Any, item.unit.stores.optimizer)
        assert unit.master is not None
        for name in self._rule.states(self.inner.param_groups[0]):
            key = unit.key(name)
            if key not in self._states:
                store.reserve(key, unit.master.numel(), torch.float32)
                self._states[key] = store.view(key)
                self._fresh.add(key)

    def _move_in(self, slot: ShardSlot, name: str, flat: torch.Tensor, *, fresh: bool) -> None:
        state = self.inner.state[slot.master]
        view, held = flat[slot.place.start : slot.place.stop], state.get(name)
        if held is not None and held.data_ptr() == view.data_ptr():
            return
        initial = self._rule.initial(slot.group)
        if held is not None:
            view.copy_(held)
        elif initial or not fresh:  # a fresh one is zero, and need not be touched
            view.fill_(initial)
        state[name] = view


def _is_stored(item: UnitStep) -> bool:
    return item.unit.stores.optimizer is not None or item.unit.resting is not None


def _near(tensor: torch.Tensor) -> torch.Tensor | OnDevice:
    return tensor if tensor.is_cpu else OnDevice(tensor)


def _in(store: Any, name: str, view: torch.Tensor, *, read: bool = True, written: bool = True) -> Operand:
    """An operand in a store: in place where that is memory."""
    at = view if store.in_memory else InStore(store, name)
    return Operand(at, view.dtype, read, written)
