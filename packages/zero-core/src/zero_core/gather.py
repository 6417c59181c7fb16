"""Stage 3: parameters are whole around their use, and only there.

In: module hooks (a unit's module is entered or left, its backward begins) and the reducer's word that a unit's
gradients are complete. Out: collectives that fill `FlatUnit.full`, and releases. `gather_plan` says what to fetch
ahead. A unit may be freed when nothing needs it: `_forwards` counts forwards under way, `_in_backward` holds those
whose backward has begun, `_pins` counts the `hold` blocks around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .collectives import Pending, Wire
from .config import Overlap
from .flat_unit import FlatUnit
from .gather_plan import GatherPlan
from .hooks import Reducer
from .params import ReleasedParameter, Residency


class Gatherer:
    """Gathers units before use and releases them after.

    Args:
        model: the sharded model; a pass runs from one of its forwards to the next.
        units: all its units.
        wire: the collectives for parameters (not those of the gradients: the two need no common order).
        overlap: the byte budget for gathers ahead of use.
        released: the class that parameters take while released.
        reducer: tells when a unit's gradients are complete, and when a backward pass ends.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[FlatUnit],
        wire: Wire,
        overlap: Overlap,
        released: type[ReleasedParameter],
        reducer: Reducer,
    ) -> None:
        self.units = units
        self.wire = wire
        self.released = released
        self.reducer = reducer
        sizes = [unit.full_bytes for unit in units]
        largest = max(sizes, default=0)
        budget = largest if overlap.prefetch_bytes is None else overlap.prefetch_bytes
        self._plans = {grad: GatherPlan(sizes, budget if overlap.enabled else 0) for grad in (True, False)}
        self._plan = self._plans[True]
        self._pins: Counter[int] = Counter()
        self._forwards: Counter[int] = Counter()
        self._in_backward: set[int] = set()
        self._keep_until_end: set[int] = set()
        self._calls: Counter[int] = Counter()
        self._depth = 0
        self._model = model
        self._input_hooks: list[RemovableHandle] = []
        self._on_the_way: dict[int, Pending] = {}
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

    # -- forward ----------------------------------------------------------------------------------------------

    def _before_forward(self, units: list[FlatUnit], module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._model and not _inside_backward():
            self._depth = 0  # whatever interrupted an earlier forward
        self._depth += 1
        if self._depth == 1 and not _inside_backward():
            self._begin_pass()
        for unit in units:
            self._use(unit)
            self._forwards[unit.index] += 1
        frozen = [unit for unit in units if not unit.trainable]
        if frozen and torch.is_grad_enabled() and not _inside_backward():
            self._watch_inputs(frozen, units, tree_leaves((args, kwargs)))

    def _after_forward(
        self, units: list[FlatUnit], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        self._depth = max(0, self._depth - 1)  # an earlier hook may have kept ours from seeing the entry
        needs_backward, understood = _tensors_needing_grad(output)
        if torch.is_grad_enabled() and module is not self._model:
            needs_backward += _kept_on(module)
        for unit in units:
            self._forwards[unit.index] -= 1
            if torch.is_grad_enabled() and not understood:
                self._keep_until_end.add(
                    unit.index
                )  # no tensor to hook: hold it, rather than fail in backward
            if needs_backward and _inside_backward():
                self._in_backward.add(unit.index)  # recomputed: its backward follows at once
        if needs_backward:
            for tensor in needs_backward:
                tensor.register_hook(partial(self._before_backward, units))
        for unit in units:
            if not self._plan.next_is(unit.index):
                self._release_if_idle(unit)

    def _begin_pass(self) -> None:
        """An outermost forward starts: whatever an exception or a dropped graph left behind is cleaned up."""
        self.reducer.abandon()
        self._forwards.clear()
        self._in_backward.clear()
        self._forget_inputs()
        self._plan = self._plans[torch.is_grad_enabled()]
        self._plan.begin()
        for unit in self.units:
            self._release_if_idle(unit)

    # -- backward ---------------------------------------------------------------------------------------------

    def _before_backward(self, units: list[FlatUnit], grad: torch.Tensor) -> None:
        self.reducer.open_pass()
        for unit in units:
            if unit.index not in self._in_backward:
                self._use(unit)
                self._in_backward.add(unit.index)

    def _after_backward(self, unit: FlatUnit | None) -> None:
        if unit is not None:  # every trainable weight has its gradient, so every use of the unit is behind us
            self._in_backward.discard(unit.index)
            self._release_if_idle(unit)
            return
        self._in_backward.clear()
        self._keep_until_end.clear()
        self._forget_inputs()
        for each in self.units:
            self._release_if_idle(each)

    def _watch_inputs(self, frozen: list[FlatUnit], units: list[FlatUnit], leaves: Iterable[Any]) -> None:
        """A frozen unit has no gradients to tell its end: it is done when those of its inputs are there.

        Only where the module's units are all frozen; beside trainable weights the end of the pass decides, since a
        frozen weight may be needed for an adapter's gradient after the inputs' are done.
        """
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if len(frozen) < len(units) or not inputs:
            return
        for unit in frozen:
            self._calls[unit.index] += 1
        left = Counter({id(tensor): 1 for tensor in inputs})

        def done(key: int, grad: torch.Tensor) -> None:
            left.pop(key, None)
            if not left:
                for unit in frozen:
                    self._calls[unit.index] -= 1
                    if self._calls[unit.index] <= 0:
                        self._in_backward.discard(unit.index)
                        self._release_if_idle(unit)

        self._input_hooks += [tensor.register_hook(partial(done, id(tensor))) for tensor in inputs]

    def _forget_inputs(self) -> None:
        """Stop watching: an input may be a leaf that outlives the pass."""
        for handle in self._input_hooks:
            handle.remove()
        self._input_hooks.clear()
        self._calls.clear()

    # -- the unit ---------------------------------------------------------------------------------------------

    def _use(self, unit: FlatUnit) -> None:
        """Have `unit` whole, and send for those that come next."""
        ahead = self._plan.use(unit.index)
        self.launch(unit)
        for index in ahead:
            self.launch(self.units[index])
        self.arrive(unit)

    def launch(self, unit: FlatUnit) -> None:
        """Start the gather of a unit that rests as shards."""
        if unit.residency is Residency.SHARDED:
            unit.enter(Residency.GATHERING, self.released)
            with self._back_to_shards_on_failure(unit):
                self._on_the_way[unit.index] = self.wire.gather(unit.label, unit.to_gather(), unit.full)

    def arrive(self, unit: FlatUnit) -> None:
        """Wait until the unit is whole."""
        if unit.residency is Residency.GATHERING:
            with self._back_to_shards_on_failure(unit):
                self._on_the_way.pop(unit.index).wait()
            unit.enter(Residency.GATHERED, self.released)

    @contextmanager
    def _back_to_shards_on_failure(self, unit: FlatUnit) -> Iterator[None]:
        try:
            yield
        except BaseException:
            unit.enter(Residency.SHARDED, self.released)
            raise

    def _release_if_idle(self, unit: FlatUnit) -> None:
        index = unit.index
        busy = self._pins[index] > 0 or self._forwards[index] > 0
        if (
            busy
            or index in self._in_backward
            or index in self._keep_until_end
            or unit.residency is Residency.SHARDED
        ):
            return
        self.arrive(unit)
        unit.enter(Residency.SHARDED, self.released)

    @contextmanager
    def hold(self, units: list[FlatUnit]) -> Iterator[None]:
        """Have these units whole inside the block; every rank must enter it."""
        for unit in units:
            self._pins[unit.index] += 1
        try:
            for unit in units:
                self.launch(unit)
            for unit in units:
                self.arrive(unit)
            yield
        finally:
            for unit in units:
                self._pins[unit.index] -= 1
                self._release_if_idle(unit)

    def refresh(self, unit: FlatUnit) -> None:
        """The shard has new values: free what was gathered of the old ones, or gather again what is held."""
        if unit.residency is not Residency.SHARDED:
            self.arrive(unit)
            unit.enter(Residency.SHARDED, self.released)
            if self._pins[unit.index] > 0:
                self.launch(unit)
                self.arrive(unit)

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


def _tensors_needing_grad(output: Any) -> tuple[list[torch.Tensor], bool]:
    """The tensors in a module's output through which a backward can come, and whether we saw all of it."""
    found, understood, seen = [], True, set()
    pending = tree_leaves(output)
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, torch.Tensor):
            if leaf.requires_grad and leaf.grad_fn is not None:
                found.append(leaf)
        elif not isinstance(
            leaf, (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device)
        ):
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


def _kept_on(module: nn.Module) -> list[torch.Tensor]:
    """Tensors with a graph that a module or its submodules keep as attributes, such as an auxiliary loss."""
    values = (value for part in module.modules() for value in part.__dict__.values())
    return [value for value in values if isinstance(value, torch.Tensor) and value.grad_fn is not None]
