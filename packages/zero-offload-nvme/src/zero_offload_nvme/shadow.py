"""A second place for what a step of one unit writes, until the step counts.

In: a unit, and which of its tensors a step must not touch yet. Out: the operands of a step that writes there instead,
and `commit`, which makes what was written there the unit's own. Next: `early` begins such steps and commits them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from zero_core import ShardSlot
from zero_core.flat_unit import FlatUnit

from .maps import host_zeros
from .store_stepper import StoreStepper, in_store, reserve_view
from .window import Operand, Place

# Note [Two places]
# What rests in a store has a twin there, and commits by changing names with it: no byte moves, and the place of the
# old values is the next step's twin. A shard on the device (below stage 3 a view into the buffer that the model
# computes with) cannot change places: its new values wait in host memory and are copied.


@dataclass
class Twin:
    """A tensor in a store, and another of its size beside it, which is given back when nobody holds this.

    Attributes:
        view, other: of the two; see `zero_core.ShardStore.view`.
        other_name: no other twin's, of another optimizer of this model neither.
    """

    store: Any
    name: str
    view: torch.Tensor
    other: torch.Tensor
    other_name: str

    def __post_init__(self) -> None:
        self.release = weakref.finalize(self, self.store.release, self.other_name)
        self.release.atexit = False

    @staticmethod
    def of(store: Any, name: str, view: torch.Tensor) -> Twin:
        """Reserve the other one."""
        other_name = f"{name}.next{next(_NUMBERS)}"
        other = reserve_view(store, other_name, view.numel(), view.dtype)
        return Twin(store, name, view, other, other_name)

    @property
    def target(self) -> torch.Tensor | Place:
        """The other one, for `Operand.to`."""
        return _unversioned(in_store(self.store, self.other_name, self.other).at)

    def swap(self) -> None:
        """Each has the other's name from now on."""
        self.store.swap(self.name, self.other_name)
        self.view, self.other = self.other, self.view


_NUMBERS = itertools.count()


def _unversioned(at: torch.Tensor | Place) -> torch.Tensor | Place:
    """The same memory; what the thread writes is no edit, and must not look like one."""
    return at.data if isinstance(at, torch.Tensor) else at


class Shadow:
    """Where results of one unit wait.

    Args:
        stepper: whose states they are.
        unit: with optimizer state in a store.
        with_state: states and a separate master wait too, and not just what the model computes with.

    Raises:
        OSError: a store has no room; nothing is kept then.
        OffloadMemoryError: likewise.
    """

    def __init__(self, stepper: StoreStepper, unit: FlatUnit, *, with_state: bool) -> None:
        self.unit = unit
        self._stepper = stepper
        self._with_state = with_state
        self._twins: dict[str, Twin] = {}
        self._values: torch.Tensor | None = None
        assert unit.shard is not None
        try:
            if with_state:
                for name, view in stepper.kept(unit):
                    self._add(name, unit.stores.optimizer, unit.key(name), view)
                if unit.has_separate_master:
                    assert unit.master is not None
                    self._add("master", unit.stores.optimizer, unit.key("master"), unit.master)
            if unit.resting is not None:
                self._add("shard", unit.resting.store, unit.resting.name, unit.shard)
            else:
                pin = unit.device.type != "cpu"
                self._values = host_zeros(unit.shard.numel(), unit.dtype, pin=pin)
        except BaseException:
            self.release()
            raise

    @staticmethod
    def bytes_for(stepper: StoreStepper, unit: FlatUnit, *, with_state: bool) -> int:
        """What one takes, in stores and in host memory."""
        assert unit.master is not None
        per_element = unit.dtype.itemsize
        if with_state:
            num_states = len(stepper.names)
            per_element += 4 * (num_states + unit.has_separate_master)
        return unit.master.numel() * per_element

    def operands(self, slots: Sequence[ShardSlot], grad: Operand) -> list[Operand]:
        """As `StoreStepper.operands`, with results that go here."""
        found = self._stepper.operands(self.unit, slots, grad)
        names = ["master", "grad", *self._stepper.names]
        names.append("shard")  # the last operand where there is a separate master
        if not self.unit.has_separate_master:
            names[0] = "shard"
        return [
            replace(operand, at=_unversioned(operand.at), to=self._target(name))
            for name, operand in zip(names, found, strict=False)
        ]

    def commit(self, slots: Sequence[ShardSlot]) -> None:
        """What the step wrote is the unit's from now on.

        Args:
            slots: all that this rank has of the unit; the optimizer's parameters and states follow.
        """
        unit = self.unit
        for twin in self._twins.values():
            twin.swap()
        if "master" in self._twins:
            unit.master = self._twins["master"].view
        assert unit.shard is not None
        if self._values is not None:
            unit.shard.copy_(self._values)
        else:
            unit.shard = self._twins["shard"].view
            if not unit.has_separate_master:
                unit.master = unit.shard
        assert unit.master is not None
        for slot in slots:
            slot.master.data = unit.master[slot.place.start : slot.place.stop]
        for name in self._twins.keys() - {"master", "shard"}:
            self._stepper.adopt(unit, slots, name, self._twins[name].view)

    def release(self) -> None:
        """Give the room back."""
        while self._twins:
            self._twins.popitem()[1].release()

    def _add(self, name: str, store: Any, key: str, view: torch.Tensor) -> None:
        self._twins[name] = Twin.of(store, key, view)

    def _target(self, name: str) -> torch.Tensor | Place | None:
        if name in self._twins:
            return self._twins[name].target
        return self._values if name == "shard" else None
