"""Before full values of one parameter, or an optimizer's state, are read or changed: all ranks want the same.

In: what this rank was asked for, or given. Out: a `Request` that is every rank's, or the same error on every rank,
before anything has changed. Next: `full_access` carries it out, or `optimizer` loads.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .api import Sharded, sharded
from .collectives import Wire
from .errors import ZeroConfigError
from .flat_unit import FlatUnit
from .hooks import Lane
from .layout import LocalSlot, Slot
from .materialize import local_names
from .optimizer import ShardedOptimizer
from .saved_layout import Layout, find_misfit
from .state import StateHolder, state_holders


@dataclass(frozen=True)
class Request:
    """What all ranks were asked for, and where it lies.

    Attributes:
        call: the public function, for messages.
        given_shape: of the tensor that the first rank passed.
    """

    call: str
    name: str
    what: str
    state: Sharded
    unit: FlatUnit
    index: int
    optimizer: ShardedOptimizer | None
    given_shape: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"{self.call}(..., '{self.name}', what='{self.what}')"

    @property
    def slot(self) -> Slot:
        """The parameter's place in its unit."""
        return self.unit.layout.slots[self.index]

    @property
    def part(self) -> LocalSlot | None:
        """This rank's part of the parameter."""
        return next((part for part in self.unit.local_slots if part.index == self.index), None)

    @property
    def lane(self) -> Lane:
        """The way of its gradient."""
        return next(lane for lane in self.state.reducer.lanes if lane.unit is self.unit)

    @property
    def holder(self) -> StateHolder | None:
        """What the torch optimizer holds of the parameter on this rank."""
        return next((h for h in state_holders(self.optimizer) if h.name == self.slot.name), None)


def agree(
    call: str,
    model: nn.Module,
    name: str,
    what: str,
    optimizer: ShardedOptimizer | None,
    given: torch.Tensor | None,
) -> Request:
    """Find the parameter, and make sure that every rank was asked for the same and found it; collective.

    Raises:
        ZeroConfigError: some rank has no such parameter, or lacks the optimizer; or ranks ask for different things.
    """
    state, problem, shape = sharded(model), "", None if given is None else list(given.shape)
    model = state.part(model)
    unit, index = state.units[0], 0
    try:
        unit, index = _find(state, model, name)
        _check(unit, index, name, what, optimizer)
    except ZeroConfigError as error:
        problem = str(error)
    state.reducer.assemble()
    told = state.everyone.gather_json(f"requests of {call}", [[name, what], problem, shape])
    for rank, (wanted, found, _) in enumerate(told):
        if found:
            raise ZeroConfigError(f"{call}: {found} (rank {rank} of {len(told)})")
        if wanted != told[0][0]:
            raise ZeroConfigError(
                f"{call}: ranks ask for different things: the first for {told[0][0]}, rank {rank} for {wanted}"
            )
    if optimizer is not None and what not in ("param", "grad"):
        optimizer.settle()
    shape = told[0][2]
    return Request(call, name, what, state, unit, index, optimizer, None if shape is None else tuple(shape))


def _find(state: Sharded, model: nn.Module, name: str) -> tuple[FlatUnit, int]:
    where = {
        known: (unit, index)
        for unit in state.units_of(model)
        for index, slot in enumerate(unit.layout.slots)
        for known in local_names(state, model, slot.names)
    }
    if name not in where:
        raise ZeroConfigError(f"there is no parameter '{name}'; {nearest(name, where)}")
    return where[name]


def _check(unit: FlatUnit, index: int, name: str, what: str, optimizer: ShardedOptimizer | None) -> None:
    if what == "param":
        return
    if not unit.trainable:
        raise ZeroConfigError(f"'{name}' is frozen: it has no '{what}'")
    if what == "grad":
        return
    if optimizer is None:
        raise ZeroConfigError(
            f"'{what}' of '{name}' is the optimizer's: pass optimizer= (without it there are 'param' and 'grad')"
        )
    if not optimizer.steps(unit, index):
        raise ZeroConfigError(f"the optimizer does not step '{name}'; pass the one that does")


def nearest(word: str, known: Collection[str]) -> str:
    """The known words that look like `word`, or else some of all, for the end of a message."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"nearest: {', '.join(near)}"
    return f"there is {', '.join(sorted(known)[:6])}{' ...' if len(known) > 6 else ''}"


def agree_to_load(wire: Wire, given: Any, own: Layout) -> None:
    """Make sure that every rank was given a state dict that fits its optimizer, all of one save; collective.

    Args:
        wire: all ranks.
        given: the state dict.
        own: the layout of this rank's optimizer.

    Raises:
        ZeroConfigError: some rank was not; on every rank.
    """
    problem = find_misfit(given, own)
    save = None if problem else [given["num_steps"], given["layout"]["frozen"], given["layout"]["owners"]]
    told = wire.gather_json("verdicts on optimizer states", [problem, save])
    for rank, (found, _) in enumerate(told):
        if found:
            raise ZeroConfigError(f"load_state_dict: {found} (rank {rank} of {len(told)})")
    for rank, (_, other) in enumerate(told):
        if other != told[0][1]:
            raise ZeroConfigError(
                f"load_state_dict: ranks have states of different saves: the first of step {told[0][1][0]}, rank "
                f"{rank} of step {other[0]}; load on every rank what all have saved at once"
            )
